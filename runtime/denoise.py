"""The denoising loop of one job, turned inside out.

`denoise` yields the forwards it needs and receives their velocities; who computes them, where and
in which order is the executor's business. All state of the run is the `StepState` in each request,
so a run can be taken up from any of them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reelpool.errors import NumericError

from ..models.spec import LatentShape
from .guidance import combine, needs_uncond
from .noise import frame_noise
from .schedule import Schedule
from .solver import StepState, advance, check_state, timesteps
from .types import Branch, ForwardKey


@dataclass(frozen=True, eq=False)
class StepRequest:
    """The forwards of one step, to be answered by their velocities.

    step_index: step of the frames that are furthest behind; with one schedule for all frames, the
        step.
    latents: (1, C, F, h, w) float32, what the transformer takes.
    timesteps: (F,) float32, 0 for finished frames.
    keys: the forwards wanted, cond first.
    state: the run before this step, to snapshot.
    """

    step_index: int
    latents: Tensor
    timesteps: Tensor
    keys: tuple[ForwardKey, ...]
    state: StepState


def denoise(
    job_id: str,
    schedule: Schedule,
    state: StepState,
    guidance: Sequence[float],
    seed: int,
    *,
    first_frame: int = 0,
) -> Generator[StepRequest, Mapping[ForwardKey, Tensor], StepState]:
    """Run a job from a state, new or saved, to its last step.

    Args:
        job_id: the job's name in the keys of its forwards.
        schedule: noise levels and solver.
        state: from `solver.start`, or from the snapshot of any step.
        guidance: guidance scale of every step (two experts may have two); up to 1 only the cond
            branch is asked for.
        seed: the job's seed, for solvers that add fresh noise.
        first_frame: absolute latent frame of the state's first frame, for the same.
    Yields:
        The forwards of the next step. Send it their velocities, each (1, C, F, h, w).
    Returns:
        The state in which all frames are finished.
    Raises:
        StateError: if the state does not fit the schedule.
        NumericError: if a velocity is not finite.
    """
    assert len(guidance) == schedule.num_steps, guidance
    check_state(schedule, state)
    while not state.is_finished:
        scale = guidance[min(state.step)]
        request = _request(job_id, schedule, state, scale)
        velocities = yield request
        velocity = combine(_by_branch(request, velocities), scale)
        noise = _fresh_noise(state, seed, first_frame) if schedule.needs_noise else None
        state = advance(schedule, state, velocity, noise=noise)
    return state


def _request(job_id: str, schedule: Schedule, state: StepState, guidance: float) -> StepRequest:
    step = min(state.step)
    branches: tuple[Branch, ...] = ("cond", "uncond") if needs_uncond(guidance) else ("cond",)
    return StepRequest(
        step_index=step,
        latents=state.latents,
        timesteps=timesteps(schedule, state),
        keys=tuple(ForwardKey(job_id, step, branch) for branch in branches),
        state=state,
    )


def _by_branch(
    request: StepRequest, velocities: Mapping[ForwardKey, Tensor]
) -> dict[Branch, Tensor]:
    """Pick the velocities of a request, each checked to be finite."""
    picked: dict[Branch, Tensor] = {}
    for key in request.keys:
        velocity = velocities[key]
        if not torch.isfinite(velocity).all():
            raise NumericError(
                "denoise",
                f"the velocity of step {key.step}, branch {key.branch}",
                "use bfloat16 or float32 if the job computes in float16",
            )
        picked[key.branch] = velocity
    return picked


def _fresh_noise(state: StepState, seed: int, first_frame: int) -> Tensor:
    """Noise for every latent frame at its own step."""
    _, channels, num_frames, height, width = state.latents.shape
    shape = LatentShape(channels, num_frames, height, width)
    if len(set(state.step)) == 1:
        return frame_noise(seed, "renoise", state.step[0], first_frame, shape)
    one = replace(shape, frames=1)
    frames = [
        frame_noise(seed, "renoise", step, first_frame + i, one)
        for i, step in enumerate(state.step)
    ]
    return torch.cat(frames, dim=2)
