import pytest
import torch

from reelpool.runtime.guidance import combine, needs_uncond

COND = torch.tensor([1.0, 2.0, -3.0]).reshape(1, 1, 1, 1, 3)
UNCOND = torch.tensor([0.5, 2.0, 1.0]).reshape(1, 1, 1, 1, 3)


@pytest.mark.parametrize(("guidance", "expected"), [(0.0, False), (1.0, False), (1.5, True)])
def test_needs_uncond_above_one(guidance, expected):
    assert needs_uncond(guidance) is expected


def test_combine_extrapolates_from_uncond():
    guided = combine({"cond": COND, "uncond": UNCOND}, 5.0)
    assert torch.equal(guided, UNCOND + 5.0 * (COND - UNCOND))


def test_combine_without_guidance_is_cond():
    assert torch.equal(combine({"cond": COND}, 1.0), COND)


def test_combine_works_in_float32():
    half = {"cond": COND.bfloat16() / 3, "uncond": UNCOND.bfloat16() / 7}
    guided = combine(half, 5.0)
    assert guided.dtype == torch.float32
    assert torch.equal(guided, combine({k: v.float() for k, v in half.items()}, 5.0))
