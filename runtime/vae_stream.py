"""Decoding and encoding as streams of any length, whole frames or tiles.

A stream owns the feature caches of its tiles. Of a tiled stream, the card holds one tile at a time:
its caches wait in host memory and travel with it. Tiles never see each other before they are
blended, so they may run in any order and on different cards with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from reelpool.errors import ConfigError

from ..models.vae_layers import Caches
from ..models.vae_tiles import Axis, Tiling, cut_frame
from ..models.wan_vae import WanVae

HOST = torch.device("cpu")
# Latent frames that a tile decodes before the next one's turn: its caches cross the bus once for
# all of them, and 16 frames of 1280x720 wait on the host as 177 MB of float32.
CHUNK_LATENTS = 4


class VaeStream:
    """What a stream keeps: caches of every tile. Not thread-safe.

    A call that raises leaves it unusable: begin anew.
    """

    def __init__(self, vae: WanVae, height: int, width: int, tile: int = 0) -> None:
        """Begin a stream.

        Args:
            vae: the model's, on the card that computes.
            height: of the frame, in latents.
            width: likewise.
            tile: the most pixels that a tile may be wide or high; 0 takes frames whole and keeps
                the caches on the card.

        Raises:
            ConfigError: if the tile is less than 4 latents.
        """
        self.tile = tile
        self.tiling = cut_frame(vae.spec, height, width, tile)
        self._vae = vae
        self._device = vae.post_quant_conv.weight.device
        self._caches: list[Caches] = [{} for _ in range(self.tiling.num_tiles)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all caches: on the card if the frame is whole, else on the host."""
        return sum(cache.nbytes for caches in self._caches for cache in caches.values())

    @property
    def card_bytes(self) -> int:
        """Bytes of the caches that wait on the card between calls."""
        return 0 if self.is_tiled else self.num_bytes

    @property
    def is_tiled(self) -> bool:
        """Whether the frame is cut."""
        return self.tiling.num_tiles > 1

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode the next latent frames, a piece at a time.

        Args:
            latents: (1, z, n, h, w), normalised, on any device.

        Yields:
            frames (1, 3, m, H, W) float32 in [-1, 1], in order: of a latent frame at a time, on
            the card; with tiles of 4, on the host.
        """
        self._check(latents, 1)
        step = CHUNK_LATENTS if self.is_tiled else 1
        for start in range(0, latents.shape[2], step):
            part = latents[:, :, start : start + step]
            pieces = (self._decode_tile(tile, part) for tile in range(self.tiling.num_tiles))
            scale = self._vae.spec.spatial_factor
            yield blend(self.tiling, pieces, scale).clamp_(-1.0, 1.0)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode the next group of frames: the first alone, then 4 at a time.

        Args:
            frames: (1, 3, 1 or 4, H, W) in [-1, 1], on any device.

        Returns:
            normalised latents (1, z, 1, h, w) float32, the mean of the posterior; on the host if
            there are tiles.
        """
        scale = self._vae.spec.spatial_factor
        self._check(frames, scale)
        pieces = (self._encode_tile(tile, frames) for tile in range(self.tiling.num_tiles))
        return blend(self.tiling, pieces, 1)

    def _decode_tile(self, tile: int, latents: Tensor) -> Tensor:
        latents = cut(self.tiling, tile, latents).to(self._device)
        caches = self._take(tile)
        frames = [self._vae.decode_frame(latent, caches) for latent in latents.split(1, dim=2)]
        return self._put(tile, caches, torch.cat(frames, dim=2) if len(frames) > 1 else frames[0])

    def _encode_tile(self, tile: int, frames: Tensor) -> Tensor:
        frames = cut(self.tiling, tile, frames, self._vae.spec.spatial_factor).to(self._device)
        caches = self._take(tile)
        return self._put(tile, caches, self._vae.encode_group(frames, caches))

    def _take(self, tile: int) -> Caches:
        """Bring a tile's caches to the card; nobody else holds them from here on."""
        caches = self._caches[tile]
        self._caches[tile] = {}
        return {name: caches.pop(name).to(self._device) for name in list(caches)}

    def _put(self, tile: int, caches: Caches, result: Tensor) -> Tensor:
        """Park a tile's caches; gives the result where the others wait."""
        if not self.is_tiled:
            self._caches[tile] = caches
            return result
        self._caches[tile] = {name: caches.pop(name).to(HOST) for name in list(caches)}
        return result.to(HOST)

    def _check(self, x: Tensor, scale: int) -> None:
        size = (self.tiling.rows.size * scale, self.tiling.columns.size * scale)
        if tuple(x.shape[3:]) != size:
            raise ConfigError("VAE stream", f"shape {list(x.shape)}", f"expected {size} at its end")


def cut(tiling: Tiling, tile: int, x: Tensor, scale: int = 1) -> Tensor:
    """A tile of (..., H, W), as a view; `scale` pixels of x make a latent."""
    top, left = (start * scale for start in tiling.corner(tile))
    height, width = tiling.rows.length * scale, tiling.columns.length * scale
    return x[..., top : top + height, left : left + width]


def blend(tiling: Tiling, pieces: Iterable[Tensor], scale: int) -> Tensor:
    """Join tiles: across an overlap, one fades out and the next in, linearly.

    Args:
        tiling: how the frame was cut.
        pieces: of every tile, in the order of their numbers, (..., h, w) float32; overwritten.
        scale: pixels of the pieces that a latent makes.

    Returns:
        (..., H, W) float32; that of a single tile is the tile itself.
    """
    joined: Tensor | None = None
    rows = _weights(tiling.rows, scale)
    columns = _weights(tiling.columns, scale)
    for tile, piece in enumerate(pieces):
        if tiling.num_tiles == 1:
            return piece
        if joined is None:
            size = (tiling.rows.size * scale, tiling.columns.size * scale)
            joined = piece.new_zeros(*piece.shape[:-2], *size)
        row, column = tiling.place(tile)
        weight = (rows[row].unsqueeze(1) * columns[column]).to(piece.device)
        # two steps: a fused one rounds differently where a thread's share of the tensor ends
        cut(tiling, tile, joined, scale).add_(piece.mul_(weight))
    assert joined is not None
    return joined


def _weights(axis: Axis, scale: int) -> list[Tensor]:
    """Share of each span in what is seen at each of its pixels; sums to 1 where spans overlap."""
    weights = [torch.ones(axis.length * scale) for _ in axis.starts]
    for index in range(1, len(weights)):
        width = axis.overlap(index) * scale
        rising = torch.arange(width) / width
        weights[index][:width] = rising
        weights[index - 1][-width:] = 1.0 - rising
    return weights
