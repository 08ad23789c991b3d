"""Every GGUF type against gguf-py, bit for bit in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from reelpool.models import quant
from reelpool.models.quant import Quantised
from tests.gguf_files import KINDS, compose

COLUMNS = 512


def matrix(kind, rows=7, seed=0):
    return Quantised(torch.from_numpy(compose(kind, rows, COLUMNS, seed)), kind, (rows, COLUMNS))


def reference(matrix):
    values = dequantize(matrix.data.numpy(), GGMLQuantizationType[matrix.kind])
    return torch.from_numpy(values.reshape(matrix.shape))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def test_every_type_that_gguf_py_decodes_is_decoded():
    assert set(KINDS) <= set(quant.KINDS)  # an older gguf-py knows fewer


@pytest.mark.parametrize("kind", KINDS)
def test_float32_equals_gguf_py_bit_for_bit(kind):
    stored = matrix(kind, rows=37)
    expected = reference(stored)
    assert expected.isfinite().all()
    assert len(expected.unique()) > 50
    assert torch.equal(bits(stored.dequantise(torch.float32)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_types_are_the_float32_values_rounded_once(kind, dtype):
    stored = matrix(kind)
    assert torch.equal(bits(stored.dequantise(dtype)), bits(reference(stored).to(dtype)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_decoded_as_gguf_py_does(kind):
    """NaN and infinite scales among them; a NaN's own bits may differ."""
    data = np.random.default_rng(1).integers(0, 256, matrix(kind).data.shape, dtype=np.uint8)
    stored = Quantised(torch.from_numpy(data), kind, (7, COLUMNS))
    with np.errstate(all="ignore"):
        expected = reference(stored)
    found = stored.dequantise(torch.float32)
    zeroed = [bits(values.nan_to_num(0, torch.inf, -torch.inf)) for values in (found, expected)]
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(*zeroed)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_views_and_decode_alone(kind):
    stored = matrix(kind, rows=5)
    whole = stored.dequantise(torch.float32)
    for start, stop in ((0, 5), (1, 2), (3, 5), (2, 2)):
        part = stored.rows(start, stop)
        assert part.shape == (stop - start, COLUMNS)
        assert part.data.data_ptr() == stored.data[start:].data_ptr() or start == stop
        assert torch.equal(bits(part.dequantise(torch.float32)), bits(whole[start:stop]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_block_at_an_odd_place_of_a_buffer_is_decoded(kind):
    size = max(quant.KINDS[kind].size, 32)
    raw = torch.from_numpy(compose(kind, 1, size))
    for offset in (1, 2, 13):
        buffer = torch.zeros(offset + raw.numel(), dtype=torch.uint8)
        buffer[offset:] = raw[0]
        stored = Quantised(buffer[offset:].view(1, -1), kind, (1, size))
        assert torch.equal(bits(stored.dequantise()), bits(reference(stored)))


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "IQ3_S"])
def test_chunks_change_nothing(kind, monkeypatch):
    stored = matrix(kind, rows=9)
    whole = {dtype: stored.dequantise(dtype) for dtype in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(quant, "CHUNK", 1280)
    for dtype, values in whole.items():
        assert torch.equal(bits(stored.dequantise(dtype)), bits(values))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "TQ1_0", "MXFP4"])
def test_what_gguf_py_quantises_comes_back_near(kind):
    values = np.random.default_rng(2).standard_normal((4, COLUMNS), np.float32)
    data = torch.from_numpy(quantize(values, GGMLQuantizationType[kind]))
    stored = Quantised(data, kind, (4, COLUMNS))
    assert torch.equal(bits(stored.dequantise()), bits(reference(stored)))
    # a step is the largest value over 7 to 127 levels, ternary digits over one
    assert (stored.dequantise() - torch.from_numpy(values)).abs().max() < 2.5


def test_decoding_leaves_the_stored_bytes_alone():
    for kind in KINDS:
        stored = matrix(kind, rows=1)
        before = stored.data.clone()
        stored.dequantise(torch.bfloat16)
        assert torch.equal(stored.data, before), kind


def test_other_shapes_and_no_rows():
    stored = Quantised(torch.from_numpy(compose("Q8_0", 6, 64)), "Q8_0", (1, 6, 64))
    assert stored.num_bytes == 6 * 68
    assert torch.equal(stored.dequantise(), reference(stored))
    none = Quantised(torch.empty(0, 34, dtype=torch.uint8), "Q8_0", (0, 32))
    assert none.dequantise(torch.bfloat16).shape == (0, 32)
