"""Matrices, stacked and cut."""

from __future__ import annotations

import pytest
import torch

from reelpool.models.linear import Linear, stack

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))


def matrix(rows, seed, bias=True):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 8, generator=draw)
    return Linear(weight, torch.randn(rows, generator=draw) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_it_multiplies_and_adds(bias):
    linear = matrix(5, 2, bias)
    expected = X @ linear.weight.T + (linear.bias if bias else 0)
    torch.testing.assert_close(linear(X), expected, rtol=0, atol=1e-5)  # measured equal bits


@pytest.mark.parametrize("bias", [True, False])
def test_stacked_matrices_give_the_results_of_each(bias):
    parts = [matrix(16, seed, bias) for seed in (2, 3, 4)]
    together = stack(parts)(X)
    assert together.shape == (40, 48)
    for part, result in zip(parts, together.chunk(3, -1), strict=True):
        torch.testing.assert_close(result, part(X), rtol=0, atol=1e-5)  # measured equal bits


@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_a_view_of_the_matrix(bias):
    whole = stack([matrix(16, seed, bias) for seed in (2, 3)])
    part = whole.rows(16, 32)
    assert part.weight.data_ptr() == whole.weight[16:].data_ptr()
    assert (part.bias is None) != bias
    torch.testing.assert_close(part(X), whole(X)[:, 16:], rtol=0, atol=1e-5)  # measured equal bits
