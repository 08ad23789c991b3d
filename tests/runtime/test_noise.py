import pytest
import torch

from reelpool.models.spec import LatentShape
from reelpool.runtime.noise import frame_noise, frame_seed, initial_noise

SHAPE = LatentShape(4, 6, 5, 7)


def test_initial_noise_is_diffusers_draw():
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(initial_noise(7, SHAPE), torch.randn(SHAPE.dims, generator=generator))


def test_initial_noise_leaves_the_global_generator():
    before = torch.random.get_rng_state()
    initial_noise(7, SHAPE)
    frame_noise(7, "renoise", 0, 0, SHAPE)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("cut", range(1, 6))
def test_frame_noise_does_not_depend_on_the_split(cut):
    whole = frame_noise(7, "renoise", 3, 10, SHAPE)
    left = frame_noise(7, "renoise", 3, 10, LatentShape(4, cut, 5, 7))
    right = frame_noise(7, "renoise", 3, 10 + cut, LatentShape(4, 6 - cut, 5, 7))
    assert torch.equal(torch.cat([left, right], dim=2), whole)


def test_frame_noise_depends_on_every_argument():
    one = LatentShape(4, 1, 5, 7)
    arguments = [
        (7, "renoise", 3, 10),
        (8, "renoise", 3, 10),
        (7, "initial", 3, 10),
        (7, "renoise", 4, 10),
        (7, "renoise", 3, 11),
    ]
    draws = {tuple(frame_noise(*a, one).flatten().tolist()) for a in arguments}
    assert len(draws) == len(arguments)


def test_frame_noise_is_standard_normal():
    noise = frame_noise(0, "initial", 0, 0, LatentShape(16, 8, 30, 40))
    assert abs(noise.mean().item()) < 0.01  # measured 0.003
    assert abs(noise.std().item() - 1) < 0.01


def test_noise_is_the_same_forever():
    assert frame_seed(42, "renoise", 1, 7) == 3267521218
    shape = LatentShape(2, 1, 4, 4)
    drawn = frame_noise(42, "renoise", 1, 7, shape).flatten()[:4].tolist()
    assert drawn == pytest.approx([-0.01773061, 0.20617405, 0.15383674, 1.57375360], abs=1e-6)
    drawn = initial_noise(42, LatentShape(2, 2, 4, 4)).flatten()[:4].tolist()
    assert drawn == pytest.approx([1.92691529, 1.48728406, 0.90071720, -2.10552096], abs=1e-6)
