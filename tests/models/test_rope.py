"""Rotary tables and turning, against diffusers and against what rotation means."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

from reelpool.models.rope import rope_table, rotate

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [12, 16, 64, 128])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 5), (21, 30, 1)], ids=str)
def test_table_equals_diffusers(head_dim, grid):
    frames, rows, columns = grid
    module = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
    cos, sin = module(torch.zeros(1, 4, frames, 2 * rows, 2 * columns))
    table = rope_table(head_dim, grid, CPU)
    assert table.shape == (frames * rows * columns, head_dim // 2)
    assert table.dtype == torch.complex64
    # theirs repeats every angle for the two channels of its pair
    assert torch.equal(table.real, cos[0, :, 0, ::2])
    assert torch.equal(table.imag, sin[0, :, 0, 1::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rotation_turns_pairs_and_keeps_their_length(dtype):
    table = rope_table(12, (2, 2, 3), CPU)
    x = torch.randn(12, 3, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * table[:, None]).flatten(-2).to(dtype)
    turned = rotate(x.clone(), table)
    assert turned.dtype == dtype
    assert torch.equal(turned, expected)
    assert torch.equal(turned[0], x[0])  # position 0 on every axis: not turned
    lengths = turned.float().unflatten(-1, (-1, 2)).norm(dim=-1)
    torch.testing.assert_close(lengths, pairs.abs(), rtol=0.01, atol=1e-6)  # bfloat16's rounding


def test_float32_is_turned_in_place():
    x = torch.ones(4, 1, 12)
    assert rotate(x, rope_table(12, (1, 2, 2), CPU)).data_ptr() == x.data_ptr()
