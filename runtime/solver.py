"""Solvers of the flow-matching ODE, with a state that is plain tensors, one entry per latent frame.

A latent at noise level sigma is (1 - sigma) * x0 + sigma * noise, the model predicts the velocity
noise - x0; timestep = 1000 * sigma. Every latent frame has its own step and history, so frames may
be at different levels (diffusion forcing); those that share both are updated as one tensor, which
changes no bit, as all arithmetic is elementwise. Velocity and fresh noise come from outside.
Source: UniPC (arXiv 2302.04867), DPM-Solver++ (2211.01095), LCM (2310.04378) and flow matching
(2210.02747); the order of the arithmetic is that of diffusers 0.42.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from reelpool.errors import StateError

from .schedule import Schedule

_DEPTH: Final = {"unipc": 2, "euler": 0, "dpmpp": 1, "lcm": 0}  # x0 predictions kept


@dataclass(frozen=True, eq=False)
class StepState:
    """Everything a run needs to go on; a value, never changed in place.

    latents: (1, C, F, h, w) float32.
    step: for each latent frame the index of its next step; num_steps means finished.
    order: for each latent frame how many history entries count; fewer while it warms up.
    history: x0 predictions, newest last, each like `latents`; entries that do not count are 0.
    last_sample: like `latents`, where the last step of UniPC began; None for other solvers.
    sigmas: noise levels of the schedule this state belongs to.
    """

    latents: Tensor
    step: tuple[int, ...]
    order: tuple[int, ...]
    history: tuple[Tensor, ...]
    last_sample: Tensor | None
    sigmas: tuple[float, ...]

    @property
    def is_finished(self) -> bool:
        """Whether every latent frame is at noise level 0."""
        return min(self.step) >= len(self.sigmas) - 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Latents, history and last sample, those there are; all of one shape."""
        last = () if self.last_sample is None else (self.last_sample,)
        return (self.latents, *self.history, *last)

    def map(self, function: Callable[[Tensor], Tensor]) -> StepState:
        """Apply a function to each of `tensors`."""
        latents, *history = map(function, (self.latents, *self.history))
        last = None if self.last_sample is None else function(self.last_sample)
        return replace(self, latents=latents, history=tuple(history), last_sample=last)

    def to_tensors(self) -> dict[str, Tensor]:
        """Pack into contiguous tensors that share no memory, as safetensors wants them."""
        history = [f"history.{i}" for i in range(len(self.history))]
        names = ("latents", *history, "last_sample")  # the last goes unused without last_sample
        tensors = {n: x.contiguous() for n, x in zip(names, self.tensors, strict=False)}
        return tensors | {
            "step": torch.tensor(self.step, dtype=torch.int64),
            "order": torch.tensor(self.order, dtype=torch.int64),
            "sigmas": torch.tensor(self.sigmas, dtype=torch.float32),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> StepState:
        """Unpack what `to_tensors` packed.

        Raises:
            StateError: if a tensor is missing.
        """
        history = [f"history.{i}" for i in range(sum("history." in name for name in tensors))]
        missing = {"latents", "step", "order", "sigmas", *history} - tensors.keys()
        if missing:
            raise StateError("solver state", f"no {', '.join(sorted(missing))}", "a whole state")
        return cls(
            latents=tensors["latents"],
            step=tuple(tensors["step"].tolist()),
            order=tuple(tensors["order"].tolist()),
            history=tuple(tensors[name] for name in history),
            last_sample=tensors.get("last_sample"),
            sigmas=tuple(tensors["sigmas"].tolist()),
        )


def start(
    schedule: Schedule, latents: Tensor, first_step: int = 0, finished: Tensor | None = None
) -> StepState:
    """State before the first step.

    Args:
        schedule: the run's schedule.
        latents: (1, C, F, h, w) float32, at noise level `schedule.sigmas[first_step]`.
        first_step: index of the first step of all frames; above 0 when starting from a video.
        finished: (1, C, n, h, w) float32, given latent frames that replace the first n: the model
            is told timestep 0 for them, and they stay as they are.
    """
    assert latents.dtype == torch.float32, latents.dtype
    assert 0 <= first_step <= schedule.num_steps, first_step
    _, _, num_frames, _, _ = latents.shape
    num_given = 0 if finished is None else finished.shape[2]
    if finished is not None:
        latents = torch.cat([finished, latents[:, :, num_given:]], dim=2)
    return StepState(
        latents=latents,
        step=(schedule.num_steps,) * num_given + (first_step,) * (num_frames - num_given),
        order=(0,) * num_frames,
        history=tuple(torch.zeros_like(latents) for _ in range(_DEPTH[schedule.solver])),
        last_sample=torch.zeros_like(latents) if schedule.solver == "unipc" else None,
        sigmas=schedule.sigmas,
    )


def check_state(schedule: Schedule, state: StepState) -> None:
    """Make sure that a state, perhaps read from disk, can go on under a schedule.

    Raises:
        StateError: if its step count, noise levels, solver or shapes do not fit.
    """
    depth, num_steps = _DEPTH[schedule.solver], schedule.num_steps
    dims, frames = state.latents.shape, state.latents.shape[2]
    checks: tuple[tuple[str, object, object], ...] = (
        ("steps", len(state.sigmas) - 1, num_steps),
        ("noise levels", state.sigmas, schedule.sigmas),
        ("history entries", len(state.history), depth),
        ("last sample", state.last_sample is not None, schedule.solver == "unipc"),
        ("shapes", {tuple(x.shape) for x in state.tensors}, {tuple(dims)}),
        ("frames", (len(state.step), len(state.order)), (frames, frames)),
        ("steps out of range", [s for s in state.step if not 0 <= s <= num_steps], []),
        ("orders out of range", [n for n in state.order if not 0 <= n <= depth], []),
    )
    for what, found, expected in checks:
        if found != expected:
            raise StateError(f"solver state, {what}", str(found), str(expected))


def timesteps(schedule: Schedule, state: StepState) -> Tensor:
    """What the model is told about each latent frame.

    Returns:
        (F,) float32; 0 for finished frames.
    """
    values = (*schedule.timesteps, 0.0)
    return torch.tensor([values[step] for step in state.step], dtype=torch.float32)


def advance(
    schedule: Schedule,
    state: StepState,
    velocity: Tensor,
    active: tuple[bool, ...] | None = None,
    noise: Tensor | None = None,
) -> StepState:
    """Move latent frames one step on.

    Args:
        schedule: the run's schedule.
        state: where the run is; left as it is.
        velocity: (1, C, F, h, w) float32, the model's guided prediction at `timesteps`.
        active: which latent frames move, none of them finished; by default all unfinished. The
            others keep their bits.
        noise: (1, C, F, h, w) float32, fresh noise, for the "lcm" solver only; may be None when
            all frames take their last step.
    """
    assert velocity.shape == state.latents.shape, velocity.shape
    assert velocity.dtype == torch.float32, velocity.dtype
    unfinished = tuple(step < schedule.num_steps for step in state.step)
    active = unfinished if active is None else active
    assert all(u or not a for a, u in zip(active, unfinished, strict=True)), "frame is finished"
    sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    new = state.map(Tensor.clone)
    for (step, order), frames in _groups(state, active).items():
        part = replace(_take(state, frames), step=(step,), order=(order,))
        fresh = None if noise is None else noise[:, :, frames]
        moved = _UPDATES[schedule.solver](sigmas, part, velocity[:, :, frames], fresh)
        for whole, piece in zip(new.tensors, moved.tensors, strict=True):
            whole[:, :, frames] = piece
    depth = _DEPTH[schedule.solver]
    return replace(
        new,
        step=tuple(s + a for s, a in zip(state.step, active, strict=True)),
        order=tuple(min(n + a, depth) for n, a in zip(state.order, active, strict=True)),
    )


def _groups(state: StepState, active: tuple[bool, ...]) -> dict[tuple[int, int], list[int]]:
    """Active frames by (step, order): each group can be updated as one tensor."""
    groups: dict[tuple[int, int], list[int]] = {}
    for frame, is_active in enumerate(active):
        if is_active:
            groups.setdefault((state.step[frame], state.order[frame]), []).append(frame)
    return groups


def _take(state: StepState, frames: list[int]) -> StepState:
    return state.map(lambda x: x[:, :, frames])


def _log_snr(sigma: Tensor) -> Tensor:
    """Half the logarithm of the signal-to-noise ratio; infinite at sigma 0."""
    return torch.log(1 - sigma) - torch.log(sigma)


def _euler(sigmas: Tensor, part: StepState, velocity: Tensor, _: Tensor | None) -> StepState:
    """Straight line along the velocity."""
    i = part.step[0]
    return replace(part, latents=part.latents + (sigmas[i + 1] - sigmas[i]) * velocity)


def _lcm(sigmas: Tensor, part: StepState, velocity: Tensor, noise: Tensor | None) -> StepState:
    """Predict x0 and noise it afresh to the next level."""
    i = part.step[0]
    x0 = part.latents - sigmas[i] * velocity
    if sigmas[i + 1] == 0:
        return replace(part, latents=x0)
    assert noise is not None, "the lcm solver needs fresh noise"
    return replace(part, latents=(1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * noise)


def _dpmpp(sigmas: Tensor, part: StepState, velocity: Tensor, _: Tensor | None) -> StepState:
    """DPM-Solver++ 2M, midpoint; first order at a frame's first step and at the last level.

    Source: arXiv 2211.01095, multistep of order 2 in the data prediction form.
    """
    i = part.step[0]
    x0 = part.latents - sigmas[i] * velocity
    h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
    gain = (1 - sigmas[i + 1]) * (torch.exp(-h) - 1.0)
    latents = (sigmas[i + 1] / sigmas[i]) * part.latents - gain * x0
    if part.order[0] > 0 and sigmas[i + 1] > 0:
        ratio = (_log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])) / h
        latents = latents - 0.5 * gain * ((1.0 / ratio) * (x0 - part.history[-1]))
    return replace(part, latents=latents, history=(x0,))


def _unipc(sigmas: Tensor, part: StepState, velocity: Tensor, _: Tensor | None) -> StepState:
    """UniPC of order 2 with B(h) = exp(h) - 1: correct the last step, then predict the next.

    Source: arXiv 2302.04867, UniC and UniP in the data prediction form.
    """
    i, order, sample = part.step[0], part.order[0], part.latents
    x0 = sample - sigmas[i] * velocity
    if order > 0:
        assert part.last_sample is not None
        sample = _unipc_move(sigmas, i, order, part.last_sample, part.history, x0)
    next_order = min(2, len(sigmas) - 1 - i, order + 1)
    history = (part.history[-1], x0)
    latents = _unipc_move(sigmas, i + 1, next_order, sample, history, None)
    return replace(part, latents=latents, history=history, last_sample=sample)


def _unipc_move(
    sigmas: Tensor, i: int, order: int, sample: Tensor, x0s: tuple[Tensor, ...], x0: Tensor | None
) -> Tensor:
    """Move from level i - 1 to level i.

    `sample` is at level i - 1, `x0s` are the predictions up to there, newest last; `x0`, where it
    is known already, is the one at level i and makes this the corrector. Order is 1 or 2.
    """
    alpha, last = 1 - sigmas[i], _log_snr(sigmas[i - 1])
    h = _log_snr(sigmas[i]) - last
    phi = torch.expm1(-h)
    base = sigmas[i] / sigmas[i - 1] * sample - alpha * phi * x0s[-1]
    ratio, slope = torch.ones(()), torch.zeros(())
    if order == 2:
        ratio = (_log_snr(sigmas[i - 2]) - last) / h
        slope = (x0s[-2] - x0s[-1]) / ratio
    if x0 is None:
        return base - alpha * phi * (0.5 * slope)
    weights = _corrector_weights(-h, phi, ratio) if order == 2 else torch.full((2,), 0.5)
    return base - alpha * phi * (weights[0] * slope + weights[1] * (x0 - x0s[-1]))


def _corrector_weights(h: Tensor, phi: Tensor, ratio: Tensor) -> Tensor:
    """Weights of the older and the newest difference of x0 in the corrector of order 2.

    Solves the order conditions; h is minus the step in log-SNR, phi = exp(h) - 1, ratio is minus
    the step before in units of this one. All () float32, the result (2,).
    """
    first = phi / h - 1
    conditions = torch.stack([torch.ones(2), torch.stack([ratio, torch.ones(())])])
    wanted = torch.stack([first / phi, (first / h - 0.5) * 2 / phi])
    weights: Tensor = torch.linalg.solve(conditions, wanted)
    return weights


# Each takes the levels, a part of a state whose frames share step and order, its velocity and its
# noise, and gives the part's new latents, history and last sample.
_UPDATES: Final = {"unipc": _unipc, "euler": _euler, "dpmpp": _dpmpp, "lcm": _lcm}
