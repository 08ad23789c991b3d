"""Original VAE names against diffusers' own converter, and an original file decoded by both."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from reelpool.models.open_weights import open_weights
from reelpool.models.presets import WAN21_VAE
from reelpool.models.vae_layouts import from_original, open_vae
from reelpool.models.wan_vae import expected_tensors, load_vae
from tests.vae_files import to_original


def test_names_equal_those_of_diffusers_converter():
    names = to_original({name: name for name in expected_tensors(WAN21_VAE)}, WAN21_VAE)
    theirs = convert_wan_vae_to_diffusers({name: name for name in names})
    assert {ours: name for name, ours in from_original(names).items()} == theirs
    assert len(theirs) == len(expected_tensors(WAN21_VAE))


def test_an_original_file_decodes_as_diffusers_does(tmp_path):
    torch.manual_seed(3)
    oracle = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=list(WAN21_VAE.latents_mean), latents_std=list(WAN21_VAE.latents_std),
    ).eval()  # fmt: skip
    weights = oracle.state_dict()
    for tensor in weights.values():
        tensor += 0.05 * torch.randn_like(tensor)
    folder = tmp_path / "vae"
    oracle.save_pretrained(folder)
    spec, _ = open_vae(open_weights(folder))
    torch.save(to_original(weights, spec), tmp_path / "Wan2.1_VAE.pth")
    original = load_vae(*open_vae(open_weights(tmp_path / "Wan2.1_VAE.pth")), torch.float32, "cpu")
    latents = torch.randn(1, 16, 2, 2, 2)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (spec.latents_mean, spec.latents_std)
    )
    with torch.inference_mode():
        frames, _ = original.decode(latents)
        expected = oracle.decode(latents * std + mean).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)  # measured 3e-7
