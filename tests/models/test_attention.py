"""Attention behind one function."""

from __future__ import annotations

import math

import pytest
import torch

from reelpool.errors import ConfigError
from reelpool.models.attention import PACKAGES, attention, available_backends

HERE = available_backends()


def qkv(num_queries=5, num_keys=7, heads=3, width=4):
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randn(count, heads, width, generator=draw)
        for count in (num_queries, num_keys, num_keys)
    ]


def test_it_is_softmax_attention_over_all_keys():
    query, key, value = qkv()
    scores = torch.einsum("qhc,khc->hqk", query, key) / 2
    expected = torch.einsum("hqk,khc->qhc", scores.softmax(-1), value)
    result = attention(query, key, value)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)  # measured 1.2e-7


@pytest.mark.parametrize("copies", [2, 13, 505])
def test_bias_of_log_copies_stands_for_that_many_copies_of_a_key(copies):
    query, key, value = qkv()
    bias = torch.zeros(7)
    bias[-1] = math.log(copies)
    many = [torch.cat([x, x[-1:].expand(copies - 1, -1, -1)]).double() for x in (key, value)]
    result = attention(query, key, value, bias=bias).double()
    expected = attention(query.double(), *many)  # float64: 505 float32 terms are 1.6e-5 off
    assert (result - attention(query, key, value)).abs().max() > 0.01
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)  # measured 2.9e-7


def test_views_of_a_wider_tensor_do():
    whole = torch.randn(6, 3, 3, 4, generator=torch.Generator().manual_seed(2))
    views = whole.unbind(1)
    assert torch.equal(attention(*views), attention(*(view.contiguous() for view in views)))


def test_sdpa_is_always_there():
    assert "sdpa" in HERE
    assert set(HERE) <= set(PACKAGES)


@pytest.mark.parametrize("backend", ["magic", "", *(set(PACKAGES) - set(HERE))])
@pytest.mark.parametrize("bias", [None, torch.zeros(7)], ids=["plain", "bias"])
def test_a_back_end_that_is_not_here_is_refused_by_name(backend, bias):
    with pytest.raises(ConfigError) as caught:
        attention(*qkv(), backend=backend, bias=bias)
    assert repr(backend) in str(caught.value)
    assert "sdpa" in str(caught.value)
