"""What an image gives the network; diffusers' pipelines are the reference in tests/oracle."""

import numpy as np
import pytest
import torch
from PIL import Image

from reelpool.models.spec import VaeSpec
from reelpool.models.wan_vae import WanVae
from reelpool.runtime.conditioning import first_latent, fit_image, image_condition, unit_image

SPEC = VaeSpec(
    base_dim=4,
    decoder_base_dim=4,
    z_dim=3,
    dim_mult=(1, 1, 1, 1),
    num_res_blocks=1,
    latents_mean=(0.1, -0.2, 0.3),
    latents_std=(1.5, 0.7, 2.0),
)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVae(SPEC).requires_grad_(False)


def random_image(height: int, width: int, seed: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), generator=made, dtype=torch.uint8)


def pixels(height=16, width=24, seed=1):
    return fit_image(random_image(height, width, seed), width, height)


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = random_image(16, 24)
    fitted = fit_image(image, 24, 16)
    assert fitted.shape == (1, 3, 16, 24)
    assert torch.equal(fitted[0], 2.0 * (image.float() / 255.0).permute(2, 0, 1) - 1.0)
    assert torch.equal(unit_image(image) * 2 - 1, fitted)


@pytest.mark.parametrize(("height", "width"), [(40, 24), (16, 60), (7, 5), (32, 52)])
def test_an_image_covers_the_video_and_is_cut_evenly(height, width):
    rows = torch.linspace(0, 255, height)[:, None, None].expand(height, width, 3)
    columns = torch.linspace(0, 255, width)[None, :, None].expand(height, width, 3)
    for ramp in (rows, columns):
        fitted = fit_image(ramp.to(torch.uint8), 24, 16)
        assert fitted.shape == (1, 3, 16, 24)
        assert fitted.abs().max() <= 1
        # cut evenly: what remains of a symmetric picture is symmetric (uint8 steps are 0.008)
        assert (fitted + fitted.flip(2, 3)).abs().max() < 0.03


def test_the_aspect_is_kept():
    """A disc stays a disc: as wide as it is high."""
    y, x = torch.meshgrid(torch.arange(200), torch.arange(320), indexing="ij")
    disc = (((x - 160) ** 2 + (y - 100) ** 2) < 60**2).to(torch.uint8)[..., None] * 255
    fitted = fit_image(disc.expand(200, 320, 3), 64, 64)[0, 0] > 0
    assert fitted.any(0).sum() == fitted.any(1).sum() == 38  # 120 of 200 rows, 64 of them


def test_shrinking_is_antialiased_as_in_pillow():
    image = random_image(96, 144)
    fitted = fit_image(image, 24, 16)
    small = Image.fromarray(image.numpy()).resize((24, 16), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 127.5 - 1
    assert (fitted[0] - expected).abs().max() < 0.01  # Pillow rounds to whole values


def test_the_video_of_a_first_image_is_the_image_and_gray(vae):
    first = pixels()
    condition = image_condition(vae, first, None, 13)
    assert condition.shape == (1, 4 + 3, 4, 2, 3)
    assert condition[:, :4, 0].eq(1).all()
    assert condition[:, :4, 1:].eq(0).all()
    video = torch.cat([first.unsqueeze(2), torch.zeros(1, 3, 12, 16, 24)], dim=2)
    assert torch.equal(condition[:, 4:], vae.encode(video)[0])


def test_a_last_image_is_the_last_pixel_frame(vae):
    first, last = pixels(), pixels(seed=2)
    condition = image_condition(vae, first, last, 9)
    mask = torch.zeros(4, 3)
    mask[:, 0] = mask[3, 2] = 1
    assert torch.equal(condition[0, :4, :, 1, 1], mask)
    zeros = torch.zeros(1, 3, 7, 16, 24)
    video = torch.cat([first.unsqueeze(2), zeros, last.unsqueeze(2)], dim=2)
    assert torch.equal(condition[:, 4:], vae.encode(video)[0])


def test_a_video_of_one_frame_is_the_image(vae):
    condition = image_condition(vae, pixels(), None, 1)
    assert condition[:, :4].eq(1).all()
    assert torch.equal(condition[:, 4:], first_latent(vae, pixels()))


def test_never_more_than_one_latent_frame_of_pixels_is_held(vae, monkeypatch):
    seen = []
    encode = WanVae.encode_group

    def watched(self, frames, caches):
        seen.append(frames.shape[2])
        return encode(self, frames, caches)

    monkeypatch.setattr(WanVae, "encode_group", watched)
    image_condition(vae, pixels(), pixels(seed=2), 17)
    assert seen == [1, 4, 4, 4, 4]


def test_tiles_give_nearly_the_latents_of_whole_frames(vae):
    first = pixels(64, 80)
    whole = image_condition(vae, first, None, 9)
    tiled = image_condition(vae, first, None, 9, tile=48)
    assert torch.equal(tiled[:, :4], whole[:, :4])
    difference = (tiled - whole)[:, 4:].abs()
    assert (
        0 < difference.mean() < 0.4 * whole[:, 4:].std()
    )  # measured 0.25: few latents are far from a border
    assert torch.equal(first_latent(vae, first, 48), tiled[:, 4:, :1])
