"""Names that stand for geometries: counts of shared/facts/wan.md 1.2, and `@quant`."""

from __future__ import annotations

import pytest

from reelpool.errors import ConfigError
from reelpool.models.keys import block_tensors, transformer_tensors
from reelpool.models.presets import PRESETS, find_preset
from reelpool.models.quant_mix import QUANTS
from reelpool.models.vae_config import check_spec

COUNTS = {  # total, per block
    "wan2.1-t2v-1.3b": (1_418_996_800, 46_440_704),
    "wan2.1-t2v-14b": (14_288_491_584, 351_394_304),
    "wan2.1-i2v-14b-480p": (16_394_878_784, 403_838_464),
    "wan2.1-i2v-14b-720p": (16_394_878_784, 403_838_464),
    "wan2.1-flf2v-14b-720p": (16_395_536_704, 403_838_464),
    "wan2.1-fun-inp-14b": (16_394_878_784, 403_838_464),
    "wan2.2-t2v-a14b": (14_288_491_584, 351_394_304),
    "wan2.2-i2v-a14b": (14_288_901_184, 351_394_304),
    "wan2.2-ti2v-5b": (4_999_787_712, 163_656_704),
    "skyreels-v2-df-14b-540p": (14_288_491_584, 351_394_304),
    "skyreels-v2-df-14b-720p": (14_288_491_584, 351_394_304),
    "skyreels-v2-t2v-14b-540p": (14_288_491_584, 351_394_304),
    "skyreels-v2-i2v-14b-540p": (16_394_878_784, 403_838_464),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_published_ones(name):
    spec = PRESETS[name].transformer
    assert (spec.num_params, spec.block_params) == COUNTS[name]


def test_there_are_enough_and_each_is_consistent():
    assert len(PRESETS) >= 12
    for name, spec in PRESETS.items():
        assert spec.name == name == name.lower()
        check_spec(spec.vae)
        assert spec.vae.z_dim == spec.transformer.out_channels
        assert (spec.image_encoder is not None) == (spec.transformer.image_dim > 0)
        assert (spec.image == "concat") == (spec.transformer.in_channels == 36)
        assert (spec.boundary > 0) == (spec.num_experts == 2)
        count = sum(map(_size, transformer_tensors(spec.transformer).values()))
        assert count == spec.transformer.num_params
        count = sum(map(_size, block_tensors(spec.transformer, 0).values()))
        assert count == spec.transformer.block_params


def _size(shape):
    product = 1
    for side in shape:
        product *= side
    return product


def test_variants_and_images():
    found = {name: (spec.variant, spec.image) for name, spec in PRESETS.items()}
    assert found["wan2.1-flf2v-14b-720p"] == ("flf2v", "concat")
    assert found["wan2.2-i2v-a14b"] == ("i2v", "concat")
    assert found["wan2.2-ti2v-5b"] == ("ti2v", "first-frame")
    assert found["skyreels-v2-df-1.3b-540p"] == ("df", "")
    assert PRESETS["wan2.2-ti2v-5b"].size_multiple == 32
    assert PRESETS["wan2.2-t2v-a14b"].boundary == 0.875
    assert PRESETS["wan2.2-i2v-a14b"].boundary == 0.9


def test_a_quantisation_follows_the_at():
    spec = find_preset("wan2.2-i2v-a14b@q4_k_m")
    assert (spec.quant, spec.name) == ("q4_k_m", "wan2.2-i2v-a14b@q4_k_m")
    assert spec.transformer == PRESETS["wan2.2-i2v-a14b"].transformer
    assert find_preset("wan2.2-i2v-a14b@Q4_K_M") == spec
    assert find_preset("Wan2.2-I2V-A14B") is None  # the name of a repository, maybe on the disk
    assert find_preset("wan2.2-i2v-a14b") is PRESETS["wan2.2-i2v-a14b"]
    assert find_preset("wan9@q4_k_m") is None
    for quant in QUANTS:
        assert find_preset(f"wan2.1-t2v-1.3b@{quant}").quant == quant


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wan2.1-t2v-14b@q4_km", "did you mean wan2.1-t2v-14b@q4_k_m?"),
        ("wan2.1-t2v-14b@", "use one of bf16"),
        ("wan2.1-t2v-14b@zzz", "use one of bf16"),
    ],
)
def test_an_unknown_quantisation_is_refused_with_the_nearest(name, words):
    with pytest.raises(ConfigError, match="no quantisation") as caught:
        find_preset(name)
    assert words in str(caught.value)
