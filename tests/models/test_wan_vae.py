"""Shapes, sizes and refusals of the Wan VAE; its numbers are tests/oracle's business."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from reelpool.errors import ConfigError, MissingTensor, ShapeMismatch, StateError, WeightError
from reelpool.models.presets import PRESETS
from reelpool.models.spec import VaeSpec
from reelpool.models.wan_vae import (
    VaeState,
    WanVae,
    expected_tensors,
    load_vae,
    vae_spec_from_config,
)
from reelpool.models.weights import SafetensorsSource

SPEC = VaeSpec(
    base_dim=4,
    decoder_base_dim=4,
    z_dim=4,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_down=(True, True),
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    latents_mean=(0.1, 0.2, 0.3, 0.4),
    latents_std=(1.0, 2.0, 0.5, 1.5),
)
CONFIG = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "base_dim": 4,
    "dim_mult": [1, 2, 2],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1, 2.0, 0.5, 1.5],
    "num_res_blocks": 1,
    "patch_size": 2,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "temperal_downsample": [True, True],
    "z_dim": 4,
}
WAN21_CONFIG = {  # what the published Wan2.1 folders say, statistics apart
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "num_res_blocks": 2,
    "patch_size": None,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}


@pytest.fixture(scope="module")
def vae() -> WanVae:
    torch.manual_seed(1)
    return WanVae(SPEC).requires_grad_(False)


def test_config_of_a_patchified_vae_gives_its_spec():
    assert vae_spec_from_config(CONFIG) == SPEC


def test_config_with_the_keys_of_wan21_gives_the_preset():
    assert vae_spec_from_config(WAN21_CONFIG) == PRESETS["wan2.1-t2v-1.3b"].vae


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"base_dim": "wide"}, "base_dim = 'wide'"),
        ({"z_dim": True}, "z_dim"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"is_residual": 1}, "is_residual"),
        ({"dim_mult": []}, "dim_mult"),
        ({"dim_mult": [1, 0, 2]}, "dim_mult"),
        ({"dim_mult": [1, 2, "2"]}, "dim_mult"),
        ({"temperal_downsample": [True]}, "temporal_down"),
        ({"temperal_downsample": [1, 1]}, "temperal_downsample"),
        ({"scale_factor_temporal": 8}, "temporal_factor"),
        ({"scale_factor_spatial": 16}, "spatial_factor"),
        ({"patch_size": None, "scale_factor_spatial": 4}, "in_channels"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"latents_mean": [0.0, 0.0, 0.0, float("nan")]}, "latents_mean"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_nonsense_in_a_config_is_refused_by_name(change, words):
    with pytest.raises(WeightError) as caught:
        vae_spec_from_config({**CONFIG, **change})
    assert words in str(caught.value)


def test_parts_of_a_spec_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="temporal_down"):
        WanVae(replace(SPEC, temporal_down=(True,)))
    with pytest.raises(ConfigError, match="dim_mult"):
        WanVae(replace(SPEC, dim_mult=(1, 3, 2)))


@pytest.mark.parametrize(
    ("spec", "millions"), [(PRESETS["wan2.1-t2v-1.3b"].vae, 126.9), (SPEC, None)]
)
def test_expected_tensors_count_the_parameters(spec, millions):
    shapes = expected_tensors(spec)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    expected = sum(p.numel() for p in WanVae(SPEC).parameters()) if millions is None else None
    assert expected is None or count == expected
    assert millions is None or round(count / 1e6, 1) == millions


def test_wan22_has_its_published_number_of_parameters():
    wan22 = VaeSpec(160, 256, 48, is_residual=True, in_channels=12, out_channels=12, patch_size=2)
    wan22 = replace(wan22, spatial_factor=16, latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48)
    count = sum(torch.Size(shape).numel() for shape in expected_tensors(wan22).values())
    assert round(count / 1e6, 1) == 704.7


def test_decode_gives_one_frame_then_four_for_each_latent_frame(vae):
    latents = torch.randn(1, 4, 3, 2, 3, generator=torch.Generator().manual_seed(2))
    first, state = vae.decode(latents[:, :, :1])
    rest, state = vae.decode(latents[:, :, 1:], state)
    none, last = vae.decode(latents[:, :, :0], state)
    assert first.shape == (1, 3, 1, 16, 24)
    assert rest.shape == (1, 3, 8, 16, 24)
    assert none.shape == (1, 3, 0, 16, 24)
    assert state.num_done == last.num_done == 3
    assert rest.abs().max() <= 1


def test_encode_keeps_frames_that_fill_no_group(vae):
    frames = torch.rand(1, 3, 7, 16, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    latents, state = vae.encode(frames)
    assert latents.shape == (1, 4, 2, 2, 3)
    assert state.pending is not None
    assert torch.equal(state.pending, frames[:, :, 5:])
    latents, state = vae.encode(frames[:, :, :2], state)
    assert latents.shape == (1, 4, 1, 2, 3)
    assert state.pending is None


def test_empty_first_calls_start_nothing(vae):
    frames, state = vae.decode(torch.zeros(1, 4, 0, 2, 3))
    latents, encoded = vae.encode(torch.zeros(1, 3, 0, 16, 24))
    assert frames.shape == (1, 3, 0, 16, 24)
    assert latents.shape == (1, 4, 0, 2, 3)
    assert (state.num_done, state.num_bytes, encoded.num_bytes) == (0, 0, 0)


def test_state_stays_the_same_size_however_long_the_stream(vae):
    sizes, state = [], None
    for _ in range(5):
        _, state = vae.decode(torch.zeros(1, 4, 1, 2, 2), state)
        sizes.append(state.num_bytes)
    assert sizes[2] == sizes[3] == sizes[4] == sum(c.nbytes for c in state.caches.values())
    assert all(c.shape[2] <= 2 for c in state.caches.values())


def test_inference_mode_and_graph_give_the_same_bits():
    torch.manual_seed(4)
    trained = WanVae(SPEC)
    latents = torch.randn(1, 4, 2, 2, 2)
    frames, _ = trained.decode(latents)
    assert frames.requires_grad
    with torch.inference_mode():
        assert torch.equal(trained.decode(latents)[0], frames)


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (1, 3, 1, 2, 2)])
def test_latents_of_another_shape_are_refused(vae, shape):
    with pytest.raises(ConfigError, match="latents"):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 1, 16, 16), (1, 3, 1, 16, 20), (3, 1, 16, 16)])
def test_frames_of_another_shape_are_refused(vae, shape):
    with pytest.raises(ConfigError, match="frames"):
        vae.encode(torch.zeros(shape))


def test_a_state_of_something_else_is_refused(vae):
    _, state = vae.decode(torch.zeros(1, 4, 2, 2, 2))
    _, encoded = vae.encode(torch.zeros(1, 3, 7, 16, 16))
    with pytest.raises(StateError, match="encoder state"):
        vae.encode(torch.zeros(1, 3, 4, 16, 16), state)
    with pytest.raises(StateError, match="decoder state"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2), VaeState(1, state.caches))
    with pytest.raises(StateError, match=r"kept frames of decoder\.conv_in"):
        vae.decode(torch.zeros(1, 4, 1, 2, 3), state)
    with pytest.raises(StateError, match="waiting frames"):
        vae.encode(torch.zeros(1, 3, 4, 16, 24), encoded)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"num_done": torch.tensor(-1)},
        {"num_done": torch.tensor(1.0)},
        {"num_done": torch.tensor([1, 2])},
        {"num_done": torch.tensor(1), "extra": torch.zeros(1)},
    ],
    ids=["missing", "negative", "fraction", "two", "unknown"],
)
def test_damaged_state_tensors_are_refused(tensors):
    with pytest.raises(StateError):
        VaeState.from_tensors(tensors)


def test_loading_gives_the_stored_weights(vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file(vae.state_dict(), path)
    latents = torch.zeros(1, 4, 2, 2, 2)
    loaded = load_vae(SPEC, SafetensorsSource(path), torch.float32, "cpu")
    half = load_vae(SPEC, SafetensorsSource(path), torch.bfloat16, torch.device("cpu"))
    assert torch.equal(loaded.decode(latents)[0], vae.decode(latents)[0])
    assert not any(p.requires_grad for p in loaded.parameters())
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    kept = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert kept == {name for name in kinds if "gamma" in name or "decoder.conv_out" in name}
    assert {kinds[name] for name in kinds.keys() - kept} == {torch.bfloat16}
    frames, state = half.decode(latents)
    assert frames.dtype == torch.float32
    assert half.decode(latents, state)[0].shape == (1, 3, 8, 16, 16)
    with pytest.raises(StateError, match="bfloat16"):
        half.decode(latents, vae.decode(latents)[1])


def test_loading_names_what_is_missing_or_misshapen(vae, tmp_path):
    weights = dict(vae.state_dict())
    gamma = weights.pop("decoder.norm_out.gamma")
    save_file(weights, tmp_path / "missing.safetensors")
    save_file(
        {**weights, "decoder.norm_out.gamma": gamma[:2].clone()}, tmp_path / "shape.safetensors"
    )
    with pytest.raises(MissingTensor, match=r"decoder\.norm_out\.gamma"):
        load_vae(SPEC, SafetensorsSource(tmp_path / "missing.safetensors"), torch.float32, "cpu")
    with pytest.raises(ShapeMismatch, match=r"decoder\.norm_out\.gamma"):
        load_vae(SPEC, SafetensorsSource(tmp_path / "shape.safetensors"), torch.float32, "cpu")
