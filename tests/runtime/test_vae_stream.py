"""Streams of whole frames and of tiles; tests/oracle holds them against diffusers' tiled decode."""

from __future__ import annotations

import pytest
import torch

from reelpool.errors import ConfigError
from reelpool.models.spec import VaeSpec
from reelpool.models.vae_tiles import cut_frame
from reelpool.models.wan_vae import WanVae
from reelpool.runtime.meter import peak_of
from reelpool.runtime.vae_stream import CHUNK_LATENTS, VaeStream, blend, cut

SPEC = VaeSpec(
    base_dim=4,
    decoder_base_dim=4,
    z_dim=3,
    dim_mult=(1, 2, 2, 2),
    num_res_blocks=1,
    latents_mean=(0.1, -0.2, 0.3),
    latents_std=(1.5, 0.7, 2.0),
)
HEIGHT, WIDTH, TILE = 9, 12, 48  # 2 x 3 tiles of 5 x 5 latents
LATENTS = torch.randn(1, 3, 6, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def vae() -> WanVae:
    torch.manual_seed(0)
    return WanVae(SPEC).requires_grad_(False)


def decoded(vae, cuts=(6,), tile=TILE):
    """All frames, from calls of so many latent frames."""
    stream = VaeStream(vae, HEIGHT, WIDTH, tile)
    return torch.cat([f for part in LATENTS.split(cuts, 2) for f in stream.decode(part)], 2)


@pytest.fixture(scope="module")
def tiled(vae) -> torch.Tensor:
    return decoded(vae)


def test_a_whole_stream_has_the_bits_of_one_decode(vae):
    assert torch.equal(decoded(vae, tile=0), vae.decode(LATENTS)[0])
    assert torch.equal(decoded(vae, (2, 4), tile=0), vae.decode(LATENTS)[0])


@pytest.mark.parametrize("cuts", [(1, 1, 4), (5, 1), (3, 3)], ids=str)
def test_tiles_in_any_calls_give_the_same_bits(vae, tiled, cuts):
    assert torch.equal(decoded(vae, cuts), tiled)


def test_tiles_on_their_own_in_any_order_give_the_same_bits(vae, tiled):
    """Each tile with a VAE of its own, the last first, and blended when all are there."""
    tiling = cut_frame(SPEC, HEIGHT, WIDTH, TILE)
    assert tiling.num_tiles == 6
    pieces = {}
    for tile in reversed(range(6)):
        other = WanVae(SPEC).requires_grad_(False)
        other.load_state_dict(vae.state_dict())
        caches = {}
        part = cut(tiling, tile, LATENTS).split(1, 2)
        pieces[tile] = torch.cat([other.decode_frame(latent, caches) for latent in part], 2)
    joined = blend(tiling, (pieces[tile] for tile in range(6)), SPEC.spatial_factor)
    assert torch.equal(joined.clamp(-1, 1), tiled)


@pytest.mark.parametrize("size", [(9, 11), (4, 30), (16, 5)], ids=str)
def test_blending_the_tiles_of_a_picture_gives_the_picture(size):
    tiling = cut_frame(SPEC, *size, 48)
    picture = torch.rand(2, 3, size[0] * 8, size[1] * 8, generator=torch.Generator().manual_seed(1))
    pieces = (cut(tiling, tile, picture, 8).clone() for tile in range(tiling.num_tiles))
    torch.testing.assert_close(blend(tiling, pieces, 8), picture, rtol=0, atol=1e-6)


def test_overlaps_fade_linearly():
    tiling = cut_frame(SPEC, 4, 9, 48)  # 2 tiles of 5 columns: one latent is shared
    pieces = [torch.zeros(32, 40), torch.ones(32, 40)]
    row = blend(tiling, pieces, 8)[5]
    expected = torch.cat([torch.zeros(32), torch.arange(8) / 8, torch.ones(32)])
    assert torch.equal(row, expected)


def test_the_first_frames_come_after_the_first_chunk(vae):
    frames = VaeStream(vae, HEIGHT, WIDTH, TILE).decode(LATENTS)
    assert next(frames).shape[2] == 4 * CHUNK_LATENTS - 3
    assert next(frames).shape[2] == 8


def test_encoded_tiles_of_one_frame_are_those_of_its_parts(vae):
    frames = torch.rand(1, 3, 5, 32, 80, generator=torch.Generator().manual_seed(2)) * 2 - 1
    stream = VaeStream(vae, 4, 10, 48)  # 2 tiles of 6 columns: 2 latents are shared
    groups = frames.split((1, 4), 2)
    latents = torch.cat([stream.encode(group) for group in groups], 2)
    left, right = (vae.encode(frames[..., a:b])[0] for a, b in ((0, 48), (32, 80)))
    assert torch.equal(latents[..., :4], left[..., :4])
    assert torch.equal(latents[..., 6:], right[..., 2:])
    torch.testing.assert_close(latents[..., 4], left[..., 4])
    torch.testing.assert_close(latents[..., 5], (left[..., 5] + right[..., 1]) / 2)
    assert stream.num_bytes > 0


def test_memory_beside_the_others_caches_and_the_frames_is_that_of_one_tile(vae):
    """To the byte, without a card: what its host would hold is taken off."""

    def peak(height, width, num_latents):
        stream = VaeStream(vae, height, width, TILE)
        latents = torch.zeros(1, 3, num_latents, height, width)
        list(stream.decode(latents[:, :, :2]))  # caches have their full size from here on

        def run():
            for part in latents[:, :, 2:].split(1, 2):
                list(stream.decode(part))

        others = stream.num_bytes * (1 - 1 / stream.tiling.num_tiles)
        frames = 4 * 3 * 64 * height * width * 4 if stream.is_tiled else 0
        return peak_of(run).live_bytes - others - frames

    with torch.inference_mode():
        one = peak(5, 5, 4)
        assert peak(9, 12, 4) == pytest.approx(one, rel=0.1)  # and a tile's frames that wait
        assert peak(9, 12, 8) == peak(9, 12, 4)


def test_frames_of_another_size_are_refused(vae):
    stream = VaeStream(vae, HEIGHT, WIDTH, TILE)
    with pytest.raises(
        ConfigError, match=r"VAE stream: shape \[1, 3, 1, 9, 11\]; expected \(9, 12"
    ):
        list(stream.decode(torch.zeros(1, 3, 1, 9, 11)))
    with pytest.raises(ConfigError, match=r"expected \(72, 96\)"):
        stream.encode(torch.zeros(1, 3, 1, 72, 80))
