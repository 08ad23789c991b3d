"""Our Wan VAE against diffusers' AutoencoderKLWan: tiny seeded random weights, both layouts.

Beside each tolerance stands the largest difference measured (CPU, torch 2.13).
"""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan

from reelpool.models.wan_vae import VaeState, WanVae, expected_tensors, vae_spec_from_config
from reelpool.runtime.vae_stream import VaeStream

MEAN = [0.3, -0.2, 0.1, 0.5]
STD = [1.5, 0.7, 2.0, 1.1]
COMMON = {"attn_scales": [], "z_dim": 4, "latents_mean": MEAN, "latents_std": STD}
PATCHED = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
CONFIGS = {
    "wan21": {
        "base_dim": 8,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "scale_factor_spatial": 8,
    },
    "wan22": {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "scale_factor_spatial": 16,
        **PATCHED,
    },
    "demo": {
        "base_dim": 8,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "scale_factor_spatial": 8,
        **PATCHED,
    },
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[WanVae, AutoencoderKLWan]:
    """Both implementations with the same random weights; norms and biases away from 1 and 0."""
    config = {**COMMON, **CONFIGS[name]}
    torch.manual_seed(11)
    oracle = AutoencoderKLWan(**config).eval()
    for parameter in oracle.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    vae = WanVae(vae_spec_from_config(config))
    vae.load_state_dict(oracle.state_dict(), strict=True)
    return vae.to(dtype), oracle.to(dtype)


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(MEAN).view(1, -1, 1, 1, 1), torch.tensor(STD).view(1, -1, 1, 1, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_names_and_shapes_equal_diffusers(name):
    _, oracle = build(name)
    theirs = {key: tuple(value.shape) for key, value in oracle.state_dict().items()}
    assert expected_tensors(vae_spec_from_config({**COMMON, **CONFIGS[name]})) == theirs


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(1, 1, 1), (4, 2, 3)], ids=str)
def test_decode_equals_diffusers(name, size):
    vae, oracle = build(name)
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3))
    mean, std = statistics()
    with torch.inference_mode():
        frames, state = vae.decode(latents)
        expected = oracle.decode(latents * std + mean).sample
    assert frames.shape[2] == 4 * size[0] - 3
    assert state.num_done == size[0]
    assert expected.std() > 0.05
    assert (expected.abs() < 1).float().mean() > 0.5  # the clamp does not hide the comparison
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)  # measured 4.2e-6


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_frames", [1, 11])
def test_encode_equals_diffusers(name, num_frames):
    vae, oracle = build(name)
    video = torch.rand(1, 3, num_frames, 16, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1
    mean, std = statistics()
    with torch.inference_mode():
        latents, state = vae.encode(video)
        expected = (oracle.encode(video).latent_dist.mode() - mean) / std
    assert state.num_done == latents.shape[2] == (num_frames - 1) // 4 + 1
    assert expected.std() > 0.05
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)  # measured 8.3e-7


@pytest.mark.parametrize("name", CONFIGS)
def test_mid_block_attention_equals_diffusers(name):
    vae, oracle = build(name)
    ours, theirs = vae.decoder.mid_block.attentions[0], oracle.decoder.mid_block.attentions[0]
    width = ours.proj.weight.shape[0]
    x = torch.randn(2, width, 3, 5, 4, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = theirs(x)
        result = ours(x.clone())
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)  # measured 2.4e-7


@pytest.mark.parametrize("name", ["wan21", "demo"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_are_as_near_to_float32_as_diffusers(name, dtype):
    exact, _ = build(name)
    vae, oracle = build(name, dtype)
    # 12 samples together: for a single one the ratio lies anywhere from 0.6 to 1.3
    latents = torch.randn(12, 4, 2, 2, 2, generator=torch.Generator().manual_seed(6))
    mean, std = statistics()
    with torch.inference_mode():
        truth = exact.decode(latents)[0]
        frames, _ = vae.decode(latents)
        theirs = oracle.decode((latents * std + mean).to(dtype)).sample.float()
    ours_rms, theirs_rms = ((x - truth).square().mean().sqrt() for x in (frames, theirs))
    assert frames.dtype == torch.float32
    assert ours_rms < 1.05 * theirs_rms  # measured 0.87 to 0.99


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_diffusers(name):
    vae, oracle = build(name)
    latents = torch.randn(1, 4, 3, 1, 2, generator=torch.Generator().manual_seed(7))
    mean, std = statistics()
    first, state = vae.decode(latents[:, :, :2])
    frames = torch.cat([first, vae.decode(latents[:, :, 2:], state)[0]], 2)
    frames.square().mean().backward()
    oracle.decode(latents * std + mean).sample.square().mean().backward()
    video = frames.detach()
    vae.encode(video)[0].square().mean().backward()
    ((oracle.encode(video).latent_dist.mode() - mean) / std).square().mean().backward()
    theirs = dict(oracle.named_parameters())
    for path, parameter in vae.named_parameters():
        scale = theirs[path].grad.abs().max().clamp_min(1e-3)
        # both lie 4e-6 to 2e-5 from float64; narrower models are worse conditioned (5e-5)
        assert (parameter.grad - theirs[path].grad).abs().max() < 5e-5 * scale, path  # 5e-6


def test_state_of_a_float32_stream_has_the_size_of_the_diffusers_cache():
    vae, oracle = build("wan21")
    with torch.inference_mode():
        _, state = vae.decode(torch.zeros(1, 4, 3, 2, 2))
        oracle.clear_cache()
        x = oracle.post_quant_conv(torch.zeros(1, 4, 3, 2, 2))
        for i in range(3):
            oracle._conv_idx = [0]
            oracle.decoder(
                x[:, :, i : i + 1],
                feat_cache=oracle._feat_map,
                feat_idx=oracle._conv_idx,
                first_chunk=i == 0,
            )
    assert isinstance(state, VaeState)
    assert state.num_bytes == sum(c.nbytes for c in oracle._feat_map if c is not None)


def tiled_pair(name: str, tile: int) -> tuple[WanVae, AutoencoderKLWan]:
    """Both, with tiles of so many pixels and a stride of three quarters."""
    vae, oracle = build(name)
    size, stride = [tile] * 2, [tile * 3 // 4] * 2
    oracle.enable_tiling(*size, *stride)
    return vae, oracle


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(10, 4), (4, 10), (10, 10)], ids=str)
def test_tiled_decode_equals_diffusers(name, size):
    """Tiles of 4 latents, 3 apart, which both cut alike but for one more of diffusers' at the end.

    Where four tiles meet, diffusers fades into a neighbour that is faded already, so that its
    weights are no product of two ramps. And it blends patches, not pixels: with a patch of 2 its
    ramp has half our steps.
    """
    scale = CONFIGS[name]["scale_factor_spatial"]
    vae, oracle = tiled_pair(name, 4 * scale)
    latents = torch.randn(1, 4, 3, *size, generator=torch.Generator().manual_seed(8))
    mean, std = statistics()
    with torch.inference_mode():
        stream = VaeStream(vae, *size, 4 * scale)
        frames = torch.cat(list(stream.decode(latents)), 2)
        expected = oracle.decode(latents * std + mean).sample
    ends = [(n - 1) * scale for n in size]
    difference = (frames - expected)[..., : ends[0], : ends[1]].abs()
    rows, columns = (torch.tensor([i // scale in (3, 6) for i in range(end)]) for end in ends)
    corners, overlaps = rows[:, None] & columns, rows[:, None] | columns
    alike = ~corners if name == "wan21" else ~overlaps
    assert stream.tiling.num_tiles == (9 if size == (10, 10) else 3)
    assert difference[..., alike].max() < 1e-5  # measured 4.6e-6
    assert difference[..., ~corners].mean() < 0.03 * expected.std()  # measured 0.019


@pytest.mark.parametrize("size", [(10, 4), (4, 10)], ids=str)
def test_tiled_encode_equals_diffusers(size):
    vae, oracle = tiled_pair("wan21", 32)
    made = torch.Generator().manual_seed(9)
    video = torch.rand(1, 3, 5, 8 * size[0], 8 * size[1], generator=made) * 2 - 1
    mean, std = statistics()
    with torch.inference_mode():
        stream = VaeStream(vae, *size, 32)
        latents = torch.cat([stream.encode(group) for group in video.split((1, 4), 2)], 2)
        expected = (oracle.encode(video).latent_dist.mode() - mean) / std
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)  # measured 1.3e-6
