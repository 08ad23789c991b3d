"""Where a latent frame is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelpool.errors import ConfigError
from reelpool.models.spec import VaeSpec
from reelpool.models.vae_tiles import MIN_TILE, cut_axis, cut_frame


@given(st.integers(1, 300), st.integers(MIN_TILE, 80))
def test_spans_cover_the_axis_and_overlap_only_their_neighbours(size, tile):
    axis = cut_axis(size, tile)
    assert axis.size == size
    assert axis.length <= tile
    assert axis.starts[0] == axis.overlap(0) == 0
    assert all(axis.overlap(i) >= tile // 4 for i in range(1, len(axis.starts)))
    pairs = zip(axis.starts, axis.starts[2:], strict=False)
    assert all(start + axis.length <= after for start, after in pairs)


@given(st.integers(2, 300), st.integers(MIN_TILE, 80))
def test_no_fewer_and_no_smaller_spans_would_do(size, tile):
    axis, overlap = cut_axis(size, tile), tile // 4
    count = len(axis.starts)
    if count > 1:
        assert count * (axis.length - 1) - (count - 1) * overlap < size
        assert (count - 1) * tile - (count - 2) * overlap < size


def test_tiles_are_numbered_row_by_row():
    tiling = cut_frame(VaeSpec(), 60, 104, 256)
    assert tiling.num_tiles == 12
    assert [tiling.corner(tile) for tile in (0, 1, 4, 11)] == [(0, 0), (0, 24), (17, 0), (34, 72)]
    assert tiling.place(5) == (1, 1)


def test_a_frame_that_fits_a_tile_stays_whole():
    for tile in (0, 256, 4096):
        tiling = cut_frame(VaeSpec(), 30, 32, tile)
        assert (tiling.num_tiles, tiling.rows.length, tiling.columns.length) == (1, 30, 32)


def test_a_tile_that_is_no_multiple_counts_as_the_next_lower():
    spec = VaeSpec(spatial_factor=16)
    assert cut_frame(spec, 44, 80, 271) == cut_frame(spec, 44, 80, 256)


def test_a_tile_of_next_to_nothing_is_refused():
    with pytest.raises(ConfigError, match="VAE tile: 24 pixels; give 32 or more, or 0 for none"):
        cut_frame(VaeSpec(), 60, 104, 24)
