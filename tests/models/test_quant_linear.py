"""Quantised matrices multiply, stack and are cut like plain ones."""

from __future__ import annotations

import pytest
import torch

from reelpool.models import linear as linear_module
from reelpool.models.linear import Linear, stack
from reelpool.models.quant import Quantised, plain
from tests.gguf_files import compose

IN = 256
X = torch.randn(2, 20, IN, generator=torch.Generator().manual_seed(1))
FLOATS = [torch.float32, torch.bfloat16]


def quantised(kind, rows, seed=0):
    data = torch.from_numpy(compose(kind, rows, IN, seed, extremes=False)).clone()
    return Quantised(data, kind, (rows, IN))


def linear(kind, rows, dtype=torch.float32, seed=0, bias=True):
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, generator=draw).to(dtype) if bias else None
    if kind == "plain":
        return Linear(torch.randn(rows, IN, generator=draw).to(dtype), values)
    return Linear(quantised(kind, rows, seed), values)


def expected(weight, bias, x):
    return torch.nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_quantised_matrix_multiplies_like_its_decoded_twin(kind, bias, dtype):
    matrix = linear(kind, 24, dtype, bias=bias)
    x = X.to(dtype)
    twin = Linear(matrix.weight.dequantise(dtype), matrix.bias)
    assert torch.equal(matrix(x), twin(x))  # the same product of the same bits
    assert matrix(x).shape == (2, 20, 24)
    assert matrix(x).dtype == dtype


def test_decoding_to_bfloat16_is_the_plain_matrix_within_rounding():
    matrix = linear("Q5_K", 24, bias=False)
    exact = X.double() @ matrix.weight.dequantise().double().T
    scale = X.double().abs() @ matrix.weight.dequantise().double().abs().T
    error = (matrix(X.bfloat16()).double() - exact).abs() / scale
    assert error.max() < 0.01  # measured 0.0035; weights, x and result are rounded by 2**-9 each


@pytest.mark.parametrize("kinds", [["Q4_K"], ["Q4_K", "plain", "Q6_K"]])
def test_large_matrices_are_decoded_in_pieces(kinds, monkeypatch):
    matrix = stack([linear(kind, 50, seed=i) for i, kind in enumerate(kinds)])
    whole, decoded = matrix(X), []
    decode = Quantised.dequantise
    record = lambda self, dtype: decoded.append(self.shape[0]) or decode(self, dtype)  # noqa: E731
    monkeypatch.setattr(Quantised, "dequantise", record)
    monkeypatch.setattr(linear_module, "PIECE", 16 * IN + 3)
    torch.testing.assert_close(matrix(X), whole, rtol=1e-5, atol=1e-3)
    assert decoded == [16, 16, 16, 2] * sum(kind != "plain" for kind in kinds)


@pytest.mark.parametrize("kind", ["Q4_0", "Q3_K", "IQ2_XS"])
def test_rows_are_a_view_and_give_those_outputs(kind):
    whole = linear(kind, 24)
    part = whole.rows(8, 20)
    assert part.weight.data.data_ptr() == whole.weight.data[8:].data_ptr()
    assert torch.equal(part.weight.dequantise(), whole.weight.dequantise()[8:20])
    torch.testing.assert_close(part(X), whole(X)[..., 8:20], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_one_kind_stacks_into_one_matrix(bias):
    parts = [linear("Q4_K", 8, seed=seed, bias=bias) for seed in range(3)]
    whole = stack(parts)
    assert isinstance(whole.weight, Quantised)
    assert whole.weight.shape == (24, IN)
    weights = [part.weight.dequantise() for part in parts]
    assert torch.equal(whole.weight.dequantise(), torch.cat(weights))


@pytest.mark.parametrize("bias", [True, False])
def test_several_kinds_stack_into_one_interface(bias):
    """As a Q4_K_M file has them: Q4_K for q and k, Q6_K for v."""
    kinds = [("Q4_K", 8), ("Q4_K", 16), ("Q6_K", 8), ("plain", 4), ("plain", 4), ("Q4_K", 8)]
    parts = [linear(kind, rows, seed=i, bias=bias) for i, (kind, rows) in enumerate(kinds)]
    whole = stack(parts)
    assert [m.shape[0] for m in whole.matrices] == [24, 8, 8, 8]
    dense = torch.cat([plain(part.weight, torch.float32) for part in parts])
    assert whole(X).shape == (2, 20, 48)
    found = torch.cat([part(X) for part in parts], -1)
    torch.testing.assert_close(whole(X), found, rtol=1e-5, atol=1e-3)
    for start, stop in ((0, 48), (0, 8), (20, 34), (24, 32), (32, 48), (47, 48)):
        part = whole.rows(start, stop)
        kept = torch.cat([plain(matrix, torch.float32) for matrix in part.matrices])
        assert torch.equal(kept, dense[start:stop])
        torch.testing.assert_close(part(X), whole(X)[..., start:stop], rtol=1e-5, atol=1e-3)
    assert len(whole.rows(0, 24).matrices) == 1


def test_stacks_of_stacks_join_again():
    first = stack([linear("Q4_K", 8), linear("Q6_K", 8)])
    second = stack([linear("Q6_K", 8, seed=1), linear("Q4_K", 8, seed=1)])
    whole = stack([first, second])
    assert [(m.kind, m.shape[0]) for m in whole.matrices] == [
        ("Q4_K", 8),
        ("Q6_K", 16),
        ("Q4_K", 8),
    ]


def test_the_type_to_compute_in():
    assert linear("plain", 4, torch.bfloat16).dtype == torch.bfloat16
    assert linear("Q8_0", 4, torch.bfloat16).dtype == torch.bfloat16
    assert linear("Q8_0", 4, bias=False).dtype == torch.float32
    mixed = stack([linear("Q8_0", 4, torch.bfloat16), linear("plain", 4, torch.bfloat16)])
    assert mixed.dtype == torch.bfloat16
