"""Which tensor is stored in which type, and what a user may call the types."""

from __future__ import annotations

import pytest

from reelpool.errors import ConfigError
from reelpool.models.keys import transformer_tensors
from reelpool.models.presets import PRESETS
from reelpool.models.quant_mix import transformer_bytes
from reelpool.models.quantise_files import Stored
from reelpool.models.quantise_rules import TARGETS, bits_of, find_target, kind_of

GGUF = [name for name, target in TARGETS.items() if target.is_gguf]


@pytest.mark.parametrize(
    ("name", "shape", "is_bf16", "expected"),
    [
        ("blocks.0.ffn.0.weight", (13824, 5120), True, "Q4_0"),
        ("blocks.0.ffn.2.weight", (5120, 13824), True, "Q4_1"),
        ("blocks.0.cross_attn.k_img.weight", (5120, 5120), True, "Q4_0"),
        ("blocks.0.self_attn.q.weight", (96, 48), True, "F16"),  # rows of 1.5 blocks
        ("blocks.0.self_attn.q.weight", (32, 32), True, "F32"),  # 1024 values
        ("blocks.0.self_attn.q.bias", (5120,), True, "F32"),
        ("blocks.0.modulation", (1, 6, 5120), False, "F32"),
        ("patch_embedding.weight", (5120, 16, 1, 2, 2), True, "F32"),
        ("text_embedding.0.weight", (5120, 4096), True, "BF16"),
        ("text_embedding.0.weight", (5120, 4096), False, "F16"),
        ("time_projection.1.weight", (30720, 5120), True, "BF16"),
        ("img_emb.proj.1.weight", (1280, 1280), False, "F16"),
        ("fps_projection.2.weight", (9216, 1536), False, "F16"),
        ("head.head.weight", (64, 5120), False, "F16"),
        ("head.modulation", (1, 2, 5120), True, "F32"),
    ],
)
def test_rules_for_what_stays_unquantised(name, shape, is_bf16, expected):
    assert kind_of(TARGETS["q4_0"], name, shape, is_bf16) == expected
    as_fp8 = "F8_E4M3" if name.startswith("blocks.") and expected[:2] in ("Q4", "F1") else expected
    assert kind_of(TARGETS["fp8"], name, shape, is_bf16) == as_fp8


@pytest.mark.parametrize("preset", ["wan2.1-t2v-1.3b", "wan2.1-flf2v-14b-720p", "wan2.2-ti2v-5b"])
@pytest.mark.parametrize("kind", GGUF)
def test_bytes_are_those_that_plans_count_with(preset, kind):
    spec = PRESETS[preset].transformer
    shapes = transformer_tensors(spec)
    stored = [Stored(n, kind_of(TARGETS[kind], n, s, True), s) for n, s in shapes.items()]
    assert sum(tensor.num_bytes for tensor in stored) == transformer_bytes(spec, kind)


def test_bits_by_the_names_of_types():
    names = {"fp32": 32, "bf16": 16, "fp8_e5m2": 8, "Q6_K": 6, "iq2_xxs": 2, "MXFP4": 4, "tq1_0": 1}
    assert {name: bits_of(name) for name in names} == names


def test_an_unknown_type_names_the_nearest():
    assert find_target(" Q4_0 ").kind == "Q4_0"
    for name, near in (("q8", "q8_0"), ("q4_k_m", "q4_"), ("fp-8", "fp8")):
        with pytest.raises(ConfigError, match=f"did you mean {near}.*q5_1"):
            find_target(name)
    with pytest.raises(ConfigError, match="use one of q8_0"):
        find_target("zzz")
