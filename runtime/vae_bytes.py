"""Bytes of the VAE on a card, by tile. Free of torch.

What decoding takes is proportional to the pixels and to the width of the decoder's last stage: the
peak lies there, at full resolution. The rates are what `vae_memory.measure_vae` counts of the real
code for the VAEs of Wan 2.1 and 2.2; tests/runtime/test_memory.py holds them against it. Encoding
takes three quarters of it, or less.
"""

from __future__ import annotations

from ..models.spec import VaeSpec
from ..models.vae_tiles import cut_frame
from .card_bytes import SIZES

TILES = (1024, 768, 512, 384, 256, 192, 128)  # pixels
# (is_residual, bytes of a value) -> bytes for each pixel and channel of decoder_base_dim
_DECODE = {(False, 4): 162.6, (False, 2): 89.5, (True, 4): 59.95, (True, 2): 30.0}
_CACHES = {(False, 4): 98.6, (False, 2): 49.3, (True, 4): 27.9, (True, 2): 14.0}
_FRAMES = 64  # bytes for each pixel: four frames of float32 as bytes and as floats on their way
_FLOAT32 = 0.003  # part of the weights that stay float32 in a half type, rounded up


def vae_params(spec: VaeSpec) -> int:
    """Parameters, in proportion to those of Wan's VAEs (126.9 M and 704.7 M)."""
    encoder, decoder = (5848, 8470) if spec.is_residual else (5830, 7945)
    return encoder * spec.base_dim**2 + decoder * spec.decoder_base_dim**2


def vae_card_bytes(spec: VaeSpec, frame: tuple[int, int], tile: int, dtype: str) -> int:
    """The most bytes of a decode: weights and one tile, or the frame whole.

    Args:
        spec: the VAE.
        frame: height and width in pixels.
        tile: the most pixels that a tile is high or wide; 0 for the whole frame.
        dtype: of the VAE.
    """
    size, (_, pixels) = SIZES[dtype], _tiling(spec, frame, tile)
    rate = _DECODE[spec.is_residual, size] * spec.decoder_base_dim + _FRAMES
    return int(size * vae_params(spec) * (1 + _FLOAT32) + rate * pixels)


def vae_parked_bytes(spec: VaeSpec, frame: tuple[int, int], tile: int, dtype: str) -> int:
    """Caches of all tiles of a frame, which wait on the host; 0 where there is but one."""
    num_tiles, pixels = _tiling(spec, frame, tile)
    rate = _CACHES[spec.is_residual, SIZES[dtype]] * spec.decoder_base_dim
    return int(rate * num_tiles * pixels) if num_tiles > 1 else 0


def pick_tile(
    spec: VaeSpec, frame: tuple[int, int], usable: int, dtype: str, *, smallest: bool = False
) -> tuple[int, int] | None:
    """The largest tile (0: none is needed) that fits, and its peak; None if none does."""
    tiles = (0, *(tile for tile in TILES if tile < max(frame)))
    for tile in tiles[-1:] if smallest else tiles:
        peak = vae_card_bytes(spec, frame, tile, dtype)
        if peak <= usable:
            return tile, peak
    return None


def _tiling(spec: VaeSpec, frame: tuple[int, int], tile: int) -> tuple[int, int]:
    """Number of tiles, and pixels of each."""
    factor = spec.spatial_factor
    tiling = cut_frame(spec, frame[0] // factor, frame[1] // factor, tile)
    return tiling.num_tiles, tiling.rows.length * tiling.columns.length * factor**2
