"""Our solvers against diffusers', bit for bit in float32 on the CPU."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from reelpool.runtime.schedule import SOLVERS, distilled_sigmas, make_schedule
from reelpool.runtime.solver import advance, start, timesteps

# DPMSolverMultistepScheduler.set_timesteps under NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = (1, 2, 4, 7, 20, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0, 12.0)
MULTISTEP = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def make_oracle(solver, shift):
    if solver == "unipc":
        return UniPCMultistepScheduler(flow_shift=shift, **MULTISTEP)
    if solver == "dpmpp":
        return DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++", flow_shift=shift, **MULTISTEP
        )
    return {"euler": FlowMatchEulerDiscreteScheduler, "lcm": FlowMatchLCMScheduler}[solver](
        shift=shift
    )


def model(latents, timestep):
    """A velocity that depends on both arguments and is not linear."""
    return torch.sin(3 * latents + timestep / 300) + 0.3 * latents.flip(-1)


def assert_same_run(schedule, oracle, first_step=0):
    """Run both to the end; every latent on the way must have the same bits."""
    generator = torch.Generator().manual_seed(schedule.num_steps)
    latents = torch.randn(1, 3, 4, 5, 6, generator=generator)
    state, theirs = start(schedule, latents, first_step), latents
    oracle.set_begin_index(first_step)
    for i, t in list(enumerate(oracle.timesteps))[first_step:]:
        told = timesteps(schedule, state)
        assert told.tolist() == [float(t)] * 4
        assert state.step == (i,) * 4
        extra = {}
        noise = None
        if schedule.solver == "lcm":
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(i))
            extra["generator"] = torch.Generator().manual_seed(i)
        theirs = oracle.step(model(theirs, t), t, theirs, return_dict=False, **extra)[0]
        state = advance(schedule, state, model(state.latents, told[0]), noise=noise)
        assert torch.equal(state.latents, theirs), f"step {i}"
    assert state.is_finished


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_run_equals_diffusers(solver, num_steps, shift):
    oracle, schedule = make_oracle(solver, shift), make_schedule(solver, num_steps, shift)
    oracle.set_timesteps(num_steps)
    assert list(schedule.sigmas) == oracle.sigmas.tolist()
    assert list(schedule.timesteps) == oracle.timesteps.to(torch.float32).tolist()
    assert_same_run(schedule, oracle)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("solver", ["unipc", "euler", "lcm"])
def test_run_with_distilled_levels_equals_diffusers(solver, shift):
    levels = distilled_sigmas()
    oracle, schedule = make_oracle(solver, shift), make_schedule(solver, 4, shift, levels)
    oracle.set_timesteps(sigmas=np.array(levels) if solver == "unipc" else list(levels))
    assert list(schedule.sigmas) == oracle.sigmas.tolist()
    assert_same_run(schedule, oracle)


@pytest.mark.parametrize("solver", SOLVERS)
def test_run_from_the_middle_equals_diffusers(solver):
    oracle, schedule = make_oracle(solver, 5.0), make_schedule(solver, 12, 5.0)
    oracle.set_timesteps(12)
    assert_same_run(schedule, oracle, first_step=5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_step_count_has_diffusers_levels(solver):
    oracle = make_oracle(solver, 5.0)
    for num_steps in range(1, 101):
        oracle.set_timesteps(num_steps)
        schedule = make_schedule(solver, num_steps, 5.0)
        assert list(schedule.sigmas) == oracle.sigmas.tolist()
        assert list(schedule.timesteps) == oracle.timesteps.to(torch.float32).tolist()


def test_distilled_lcm_has_the_trained_timesteps():
    schedule = make_schedule("lcm", 4, 5.0, distilled_sigmas())
    assert schedule.timesteps == pytest.approx((1000, 937.5, 833.3333, 625), abs=1e-3)
