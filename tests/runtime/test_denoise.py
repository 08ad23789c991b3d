import pytest
import torch

from reelpool.errors import NumericError, StateError
from reelpool.models.spec import LatentShape
from reelpool.runtime.denoise import denoise
from reelpool.runtime.noise import frame_noise, initial_noise
from reelpool.runtime.schedule import SOLVERS, make_schedule
from reelpool.runtime.solver import advance, start
from reelpool.runtime.types import ForwardKey

SHAPE = LatentShape(3, 4, 5, 6)
FIVES = (5.0,) * 4  # guidance of each step
SIGN = {"cond": 1.0, "uncond": -0.5}


def answer(request):
    told = request.timesteps[:, None, None] / 300
    return {k: torch.sin(SIGN[k.branch] * request.latents + told) for k in request.keys}


def drive(loop):
    """Answer every request; give the requests and the final state."""
    requests, velocities = [], None
    try:
        while True:
            requests.append(loop.send(velocities))
            velocities = answer(requests[-1])
    except StopIteration as stop:
        return requests, stop.value


def begin(solver="unipc", num_steps=4, guidance=5.0, first_frame=0):
    schedule = make_schedule(solver, num_steps, 5.0)
    state = start(schedule, initial_noise(1, SHAPE))
    return schedule, denoise(
        "job", schedule, state, (guidance,) * num_steps, 1, first_frame=first_frame
    )


def test_requests_name_the_forwards_of_each_step():
    schedule, loop = begin()
    requests, final = drive(loop)
    assert [r.step_index for r in requests] == [0, 1, 2, 3]
    for i, request in enumerate(requests):
        assert request.keys == (ForwardKey("job", i, "cond"), ForwardKey("job", i, "uncond"))
        assert request.timesteps.tolist() == [schedule.timesteps[i]] * 4
        assert request.latents is request.state.latents
    assert final.step == (4, 4, 4, 4)
    assert torch.isfinite(final.latents).all()


def test_without_guidance_only_cond_is_asked_for():
    requests, _ = drive(begin(guidance=1.0)[1])
    assert {key.branch for r in requests for key in r.keys} == {"cond"}


def test_guidance_may_differ_by_step():
    schedule, loop = begin()
    scales = (5.0, 5.0, 1.0, 2.0)
    mixed, _ = drive(denoise("job", schedule, next(loop).state, scales, 1))
    assert [len(request.keys) for request in mixed] == [2, 2, 1, 2]
    same, _ = drive(denoise("job", schedule, mixed[0].state, FIVES, 1))
    assert torch.equal(mixed[2].latents, same[2].latents)
    assert not torch.equal(mixed[3].latents, same[3].latents)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_given_first_frame_is_told_timestep_0_and_stays(solver):
    schedule = make_schedule(solver, 4, 5.0)
    noise, given = initial_noise(1, SHAPE), initial_noise(2, SHAPE)[:, :, :1]
    state = start(schedule, noise, finished=given)
    requests, final = drive(denoise("job", schedule, state, FIVES, 1))
    assert [request.timesteps.tolist() for request in requests] == [
        [0.0, *[time] * 3] for time in schedule.timesteps
    ]
    for latents in (*(request.latents for request in requests), final.latents):
        assert torch.equal(latents[:, :, :1], given)
    assert torch.equal(requests[0].latents[:, :, 1:], noise[:, :, 1:])
    assert not torch.equal(final.latents[:, :, 1:], noise[:, :, 1:])


@pytest.mark.parametrize("solver", SOLVERS)
def test_resume_from_any_step_gives_the_same_bits(solver):
    schedule, loop = begin(solver)
    requests, final = drive(loop)
    for request in requests:
        rest, again = drive(denoise("job", schedule, request.state, FIVES, 1))
        assert [r.step_index for r in rest] == list(range(request.step_index, 4))
        assert torch.equal(again.latents, final.latents)


def test_finished_state_asks_for_nothing():
    schedule, loop = begin()
    _, final = drive(loop)
    requests, again = drive(denoise("job", schedule, final, FIVES, 1))
    assert requests == []
    assert again is final


def test_lcm_renoises_by_absolute_latent_frame():
    schedule, loop = begin("lcm", num_steps=2, guidance=1.0, first_frame=10)
    requests, _ = drive(loop)
    velocity = answer(requests[0])[requests[0].keys[0]]
    noise = frame_noise(1, "renoise", 0, 10, SHAPE)
    expected = advance(schedule, requests[0].state, velocity, noise=noise)
    assert torch.equal(requests[1].latents, expected.latents)


@pytest.mark.parametrize("solver", SOLVERS)
def test_staggered_frames_run_to_the_end(solver):
    schedule, loop = begin(solver)
    whole, final = drive(loop)
    state = whole[0].state
    for mask in [(True, True, False, False), (True, False, False, False)]:
        velocity = whole[0].latents
        noise = frame_noise(1, "renoise", 0, 0, SHAPE)
        state = advance(schedule, state, velocity, mask, noise)
    requests, staggered = drive(denoise("job", schedule, state, FIVES, 1))
    assert [r.step_index for r in requests] == [0, 1, 2, 3]
    assert requests[2].timesteps.tolist() == [0.0, *(schedule.timesteps[i] for i in (3, 2, 2))]
    assert staggered.is_finished
    # the two frames that were not moved ahead end as in the run in step
    assert torch.equal(staggered.latents[:, :, 2:], final.latents[:, :, 2:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_velocity_that_is_not_finite_is_named(bad):
    _, loop = begin()
    request = loop.send(answer(next(loop)))
    velocities = answer(request)
    velocities[request.keys[1]][0, 0, 2, 1, 1] = bad
    with pytest.raises(NumericError, match="step 1, branch uncond") as caught:
        loop.send(velocities)
    assert caught.value.stage == "denoise"


def test_state_of_another_schedule_is_refused():
    state = next(begin(num_steps=4)[1]).state
    with pytest.raises(StateError, match="found 4, expected 6"):
        next(denoise("job", make_schedule("unipc", 6, 5.0), state, (5.0,) * 6, 1))
