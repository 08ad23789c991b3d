"""Rotary position embedding over (frame, row, column).

The head's channels are split over the three axes (height and width 2*(head_dim//6) each, time the
rest); channel pairs (2j, 2j+1) of an axis of size a turn by position * 10000^(-2j/a). Angles are
computed in float64 and stored as float32 complex numbers.

Source: Wan2.1 repository, wan/modules/model.py (rope_params, rope_apply).
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def rope_table(head_dim: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Unit complex numbers that turn the channel pairs of every token.

    Args:
        head_dim: channels of a head.
        grid: tokens along (frames, height, width); positions start at 0 on every axis.
        device: where the table shall lie.
    Returns:
        (tokens, head_dim / 2) complex64; tokens in frame, row, column order.

    >>> rope_table(12, (1, 2, 2), torch.device("cpu")).shape
    torch.Size([4, 6])
    """
    spatial = 2 * (head_dim // 6)
    parts = []
    for axis, size in enumerate((head_dim - 2 * spatial, spatial, spatial)):
        frequencies = THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.outer(torch.arange(grid[axis], dtype=torch.float64), frequencies)
        shape = [1, 1, 1, size // 2]
        shape[axis] = grid[axis]
        parts.append(torch.polar(torch.ones_like(angles), angles).view(shape).expand(*grid, -1))
    return torch.cat(parts, dim=-1).flatten(0, 2).to(torch.complex64).to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the channel pairs of every head; float32 is turned in place.

    Args:
        x: (tokens, heads, head_dim), contiguous.
        table: (tokens, head_dim / 2) complex64.
    Returns:
        (tokens, heads, head_dim) in the dtype of `x`.
    """
    wide = x.float()
    torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(table.unsqueeze(1))
    return wide.to(x.dtype)
