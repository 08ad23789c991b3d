"""Where a latent frame is cut so that the VAE takes it in pieces: arithmetic, no tensors.

A tiling depends on the size and the tile alone, never on memory or on the card, so that the same
job gives the same bits everywhere. Tiles have one size, lie evenly and overlap by at least a
quarter of the tile asked for; they are as small as their number allows: 104 latents at a tile of
32 take 4 tiles of 32, 60 take 3 of 26, where a fixed stride would take 32, 32 and 12.
"""

from __future__ import annotations

from dataclasses import dataclass

from reelpool.errors import ConfigError

from .spec import VaeSpec

MIN_TILE = 4  # latents: with fewer, three tiles would overlap at one place
OVERLAP = 4  # a tile overlaps its neighbours by this part of the tile asked for


@dataclass(frozen=True)
class Axis:
    """One axis cut into spans of one length; in latents.

    starts: of the spans, rising, the first 0; the last span ends at the end of the axis.
    """

    length: int
    starts: tuple[int, ...]

    @property
    def size(self) -> int:
        """Latents of the whole axis."""
        return self.starts[-1] + self.length

    def overlap(self, index: int) -> int:
        """Latents that span `index` shares with the one before; 0 for the first."""
        return self.starts[index - 1] + self.length - self.starts[index] if index else 0


@dataclass(frozen=True)
class Tiling:
    """A latent frame cut into tiles, numbered row by row."""

    rows: Axis
    columns: Axis

    @property
    def num_tiles(self) -> int:
        """How many tiles there are; 1 means that nothing is cut."""
        return len(self.rows.starts) * len(self.columns.starts)

    def place(self, tile: int) -> tuple[int, int]:
        """Row and column of tiles where a tile stands."""
        return divmod(tile, len(self.columns.starts))

    def corner(self, tile: int) -> tuple[int, int]:
        """First row and first column of latents of a tile."""
        row, column = self.place(tile)
        return self.rows.starts[row], self.columns.starts[column]


def cut_frame(spec: VaeSpec, height: int, width: int, tile: int) -> Tiling:
    """Cut a latent frame.

    Args:
        spec: the VAE's shape.
        height: of the frame, in latents.
        width: likewise.
        tile: the most pixels that a tile may be wide or high; 0 leaves the frame whole.

    Raises:
        ConfigError: if the tile is less than 4 latents.
    """
    if not tile:
        return Tiling(Axis(height, (0,)), Axis(width, (0,)))
    latents = tile // spec.spatial_factor
    if latents < MIN_TILE:
        least = MIN_TILE * spec.spatial_factor
        raise ConfigError("VAE tile", f"{tile} pixels", f"give {least} or more, or 0 for none")
    return Tiling(cut_axis(height, latents), cut_axis(width, latents))


def cut_axis(size: int, tile: int) -> Axis:
    """Cut an axis into as few spans as a tile of at most so many latents allows.

    >>> cut_axis(104, 32), cut_axis(60, 32)
    (Axis(length=32, starts=(0, 24, 48, 72)), Axis(length=26, starts=(0, 17, 34)))
    """
    if size <= tile:
        return Axis(size, (0,))
    overlap = tile // OVERLAP
    count = -(-(size - overlap) // (tile - overlap))
    length = -(-(size + (count - 1) * overlap) // count)
    return Axis(length, tuple(i * (size - length) // (count - 1) for i in range(count)))
