"""Matrices, stacked and cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reelpool.models.linear import Linear, Side, stack

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


def with_sides(linear, seed=9, rank=3):
    """Low-rank and whole terms beside a matrix."""
    draw = torch.Generator().manual_seed(seed)
    rows = sum(matrix.shape[0] for matrix in linear.matrices)
    up, down, whole = (
        torch.randn(shape, generator=draw) for shape in ((rows, rank), (rank, 8), (rows, 8))
    )
    sides = (Side(up, down, 0.5), Side(whole, None, -2.0), Side(up[2:4], down, 1.5, 2))
    dense = linear.weight + 0.5 * up @ down - 2 * whole
    dense[2:4] += 1.5 * up[2:4] @ down
    return replace(linear, sides=sides), replace(linear, weight=dense)


@pytest.mark.parametrize("bias", [True, False])
def test_sides_equal_the_matrix_they_add_up_to(bias):
    linear, dense = with_sides(matrix(5, 2, bias))
    torch.testing.assert_close(linear(X), dense(X), rtol=0, atol=1e-5)  # measured 3.8e-6


def test_sides_of_stacked_matrices_land_on_their_rows():
    pairs = [with_sides(matrix(16, seed), seed) for seed in (2, 3, 4)]
    whole = stack([linear for linear, _ in pairs])
    assert [side.start for side in whole.sides] == [0, 0, 2, 16, 16, 18, 32, 32, 34]
    for (_, dense), result in zip(pairs, whole(X).chunk(3, -1), strict=True):
        torch.testing.assert_close(result, dense(X), rtol=0, atol=2e-5)  # measured 7.6e-6


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 32), (0, 16), (16, 32), (3, 19), (18, 20), (19, 32)]
)
def test_rows_keep_what_their_sides_add(start, stop):
    whole = stack([with_sides(matrix(16, seed), seed)[0] for seed in (2, 3)])
    part = whole.rows(start, stop)
    torch.testing.assert_close(part(X), whole(X)[:, start:stop], rtol=0, atol=2e-5)
    assert all(0 <= side.start < side.stop <= stop - start for side in part.sides)


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 4, 1536), (60, 1, 256), (1280, 64, 256)])
def test_sides_give_the_same_bits_on_any_number_of_threads(shape, dtype, num_threads):
    """Few columns take other kernels too. Ranks of 1 to 128 were tried with up to 8 threads."""
    rows, rank, columns = shape
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(rows, columns, generator=draw).to(dtype)
    down = torch.randn(rank, columns, generator=draw).to(dtype)
    up = torch.randn(columns, rank, generator=draw).to(dtype)
    results = []
    for count in (1, num_threads):
        torch.set_num_threads(count)
        y = torch.zeros(rows, columns, dtype=dtype)
        Side(up, down, 0.3).add_to(y, x)
        results.append(y)
    assert torch.equal(*results)


def test_a_scale_is_not_rounded_to_the_type_of_the_products():
    x, whole = torch.eye(32).bfloat16(), torch.randn(16, 32, generator=draw_of(5)).bfloat16()
    y = torch.zeros(32, 16, dtype=torch.bfloat16)
    Side(whole, None, 1 / 3).add_to(y, x)
    assert torch.equal(y, (whole.float().T / 3).bfloat16())


def draw_of(seed):
    return torch.Generator().manual_seed(seed)
