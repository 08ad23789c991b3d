"""The solver's state: it can be stored anywhere, and each latent frame goes its own way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from reelpool.errors import ConfigError, StateError
from reelpool.runtime.schedule import SOLVERS, make_schedule
from reelpool.runtime.solver import StepState, advance, check_state, start, timesteps

FRAMES = 5
relaxed = settings(max_examples=25, deadline=None, derandomize=True, database=None)
solvers = st.sampled_from(SOLVERS)
masks = st.lists(st.booleans(), min_size=FRAMES, max_size=FRAMES).map(tuple)


def randn(seed, frames=FRAMES):
    return torch.randn(1, 2, frames, 3, 5, generator=torch.Generator().manual_seed(seed))


def model(state, told):
    """A velocity of each latent frame that depends on nothing but the frame."""
    return torch.sin(3 * state.latents + told[:, None, None] / 300)


def step(schedule, state, active=None, noise=None):
    velocity = model(state, timesteps(schedule, state))
    return advance(schedule, state, velocity, active, randn(99) if noise is None else noise)


def run(schedule, state):
    while not state.is_finished:
        state = step(schedule, state)
    return state


def assert_equal(a, b):
    assert (a.step, a.order, a.sigmas) == (b.step, b.order, b.sigmas)
    assert len(a.tensors) == len(b.tensors)
    assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


@relaxed
@given(solver=solvers, num_steps=st.integers(1, 9), stop=st.integers(0, 9))
def test_stored_state_continues_with_the_same_bits(solver, num_steps, stop):
    schedule = make_schedule(solver, num_steps, 5.0)
    state = start(schedule, randn(0))
    for _ in range(min(stop, num_steps)):
        state = step(schedule, state)
    restored = StepState.from_tensors(load(save(state.to_tensors())))
    check_state(schedule, restored)
    assert_equal(restored, state)
    assert_equal(run(schedule, restored), run(schedule, state))


@relaxed
@given(solver=solvers, num_steps=st.integers(1, 7))
def test_frames_one_by_one_equal_all_at_once(solver, num_steps):
    schedule = make_schedule(solver, num_steps, 8.0)
    together = alone = start(schedule, randn(1))
    for _ in range(num_steps):
        together = step(schedule, together)
        for frame in reversed(range(FRAMES)):
            alone = step(schedule, alone, tuple(i == frame for i in range(FRAMES)))
        assert_equal(alone, together)


@relaxed
@given(solver=solvers, rounds=st.lists(masks, min_size=1, max_size=14))
def test_staggered_frames_equal_one_solver_per_frame(solver, rounds):
    """As SkyReels-V2 does it: every latent frame has its own solver."""
    schedule = make_schedule(solver, 6, 8.0)
    latents = randn(2)
    state = start(schedule, latents)
    singles = [start(schedule, latents[:, :, [i]]) for i in range(FRAMES)]
    for index, mask in enumerate(rounds):
        noise = randn(100 + index)
        active = tuple(m and s < 6 for m, s in zip(mask, state.step, strict=True))
        before, state = state, step(schedule, state, active, noise)
        for i, is_active in enumerate(active):
            if is_active:
                singles[i] = step(schedule, singles[i], noise=noise[:, :, [i]])
            else:
                assert torch.equal(state.latents[:, :, i], before.latents[:, :, i])
    for i, single in enumerate(singles):
        assert (state.step[i], state.order[i]) == (single.step[0], single.order[0])
        for whole, piece in zip(state.tensors, single.tensors, strict=True):
            assert torch.equal(whole[:, :, [i]], piece)


@pytest.mark.parametrize("solver", SOLVERS)
def test_advance_leaves_its_arguments(solver):
    schedule = make_schedule(solver, 4, 5.0)
    state = step(schedule, start(schedule, randn(3)))
    kept = state.map(torch.clone)
    step(schedule, state)
    assert_equal(state, kept)


def test_finished_frames_are_told_zero_and_rest():
    schedule = make_schedule("unipc", 2, 5.0)
    state = start(schedule, randn(4))
    for _ in range(2):
        state = step(schedule, state, (True, False, False, False, True))
    assert timesteps(schedule, state).tolist() == [0.0, 999.0, 999.0, 999.0, 0.0]
    after = step(schedule, state)
    assert after.step == (2, 1, 1, 1, 2)
    assert torch.equal(after.latents[:, :, [0, 4]], state.latents[:, :, [0, 4]])


def other_shape(state):
    tensors = state.to_tensors()
    tensors["history.0"] = randn(0, frames=2)
    return StepState.from_tensors(tensors)


def other_frames(state):
    tensors = state.to_tensors()
    tensors["step"] = tensors["step"][:2]
    return StepState.from_tensors(tensors)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda s: start(make_schedule("unipc", 5, 5.0), s.latents), "steps: found 5, expected 4"),
        (lambda s: start(make_schedule("unipc", 4, 3.0), s.latents), "noise levels"),
        (lambda s: start(make_schedule("dpmpp", 4, 5.0), s.latents), "noise levels"),
        (other_shape, "shapes"),
        (other_frames, "frames"),
    ],
    ids=["steps", "shift", "solver", "shape", "frames"],
)
def test_state_of_another_run_is_refused(broken, message):
    schedule = make_schedule("unipc", 4, 5.0)
    state = start(schedule, randn(5))
    check_state(schedule, state)
    with pytest.raises(StateError, match=message):
        check_state(schedule, broken(state))


@pytest.mark.parametrize("name", ["latents", "step", "history.0", "sigmas"])
def test_incomplete_state_is_refused(name):
    tensors = start(make_schedule("unipc", 4, 5.0), randn(6)).to_tensors()
    del tensors[name]
    with pytest.raises(StateError, match=f"no {name}"):
        StepState.from_tensors(tensors)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("ddim", 4, 5.0), "solver"),
        (("unipc", 0, 5.0), "steps"),
        (("unipc", 4, 0.0), "shift"),
        (("lcm", 4, 5.0, (1.0, 0.5)), "sigmas"),
        (("lcm", 2, 5.0, (0.5, 1.0)), "sigmas"),
        (("lcm", 2, 5.0, (1.5, 1.0)), "sigmas"),
    ],
)
def test_bad_schedule_is_refused(arguments, where):
    with pytest.raises(ConfigError) as caught:
        make_schedule(*arguments)
    assert caught.value.where == where
