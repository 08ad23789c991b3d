"""The noise levels that a run passes through, and which expert serves which step. Free of torch.

Timestep = 1000 * sigma. Source: diffusers 0.42.1, `set_timesteps` of its flow-matching schedulers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from reelpool.errors import ConfigError

SOLVERS: Final = ("unipc", "euler", "dpmpp", "lcm")
NUM_TRAIN_STEPS: Final = 1000  # timestep = 1000 * sigma


@dataclass(frozen=True)
class Schedule:
    """The noise levels a run passes through; every number is an exact float32.

    solver: one of SOLVERS.
    shift: how strongly the levels are moved towards noise; 1 leaves them.
    sigmas: num_steps + 1 falling levels, the last 0.
    timesteps: num_steps values, what the model is told at each step.
    """

    solver: str
    shift: float
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    @property
    def needs_noise(self) -> bool:
        """Whether `advance` must be given fresh noise."""
        return self.solver == "lcm"


def distilled_sigmas() -> tuple[float, ...]:
    """Levels before the shift that 4-step distilled models (lightx2v) were trained on."""
    return (1.0, 0.75, 0.5, 0.25)


def make_schedule(
    solver: str, num_steps: int, shift: float, sigmas: Sequence[float] | None = None
) -> Schedule:
    """Lay out the noise levels of a run.

    Args:
        solver: one of SOLVERS.
        num_steps: at least 1.
        shift: above 0; sigma becomes shift * sigma / (1 + (shift - 1) * sigma).
        sigmas: the levels before the shift, num_steps of them, falling within (0, 1]; by default
            the solver's own grid.
    Raises:
        ConfigError: if an argument is outside of its range.
    """
    if solver not in SOLVERS:
        raise ConfigError("solver", f"unknown solver {solver!r}", f"use one of {list(SOLVERS)}")
    if num_steps < 1:
        raise ConfigError("steps", f"{num_steps} steps", "use at least 1")
    if not 0 < shift < float("inf"):
        raise ConfigError("shift", f"shift {shift}", "use a number above 0, e.g. 5")
    if sigmas is not None:
        _check_sigmas(sigmas, num_steps)
    if solver in ("unipc", "dpmpp"):
        levels, times = _multistep_grid(solver, num_steps, shift, sigmas)
    else:
        levels, times = _flow_match_grid(num_steps, shift, sigmas)
    return Schedule(solver, shift, (*levels, 0.0), times)


def _check_sigmas(sigmas: Sequence[float], num_steps: int) -> None:
    falling = all(a > b for a, b in pairwise((1.0 + 1e-9, *sigmas, 0.0)))
    if len(sigmas) != num_steps or not falling:
        raise ConfigError("sigmas", f"{list(sigmas)}", f"give {num_steps} falling, in (0, 1]")


def _multistep_grid(
    solver: str, num_steps: int, shift: float, sigmas: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Levels and whole-number timesteps of the solvers that work in log-SNR.

    Source: diffusers 0.42.1, `set_timesteps` of UniPCMultistepScheduler and
    DPMSolverMultistepScheduler with use_flow_sigmas. The latter takes no levels; given levels are
    treated as the former does.
    """
    if sigmas is None:
        base = np.linspace(1, 1 / NUM_TRAIN_STEPS, num_steps + 1)
        base = (1.0 - base)[:0:-1] if solver == "dpmpp" else base[:-1]
    else:
        base = np.array(sigmas, dtype=np.float64)
    levels = base * shift / (1 + (shift - 1) * base)
    if abs(levels[0] - 1) < 1e-6:
        levels[0] -= 1e-6  # pure noise has no finite log-SNR
    times = (levels * NUM_TRAIN_STEPS).astype(np.int64)
    return tuple(levels.astype(np.float32).tolist()), tuple(float(t) for t in times)


def _flow_match_grid(
    num_steps: int, shift: float, sigmas: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Levels and timesteps of Euler and LCM; their own grid applies the shift twice at its end.

    Source: diffusers 0.42.1, FlowMatchEulerDiscreteScheduler and FlowMatchLCMScheduler.
    """
    if sigmas is None:
        ends = np.array([1.0, 1 / NUM_TRAIN_STEPS], dtype=np.float32)
        first, last = (ends * shift / (1 + (shift - 1) * ends)).tolist()
        base = np.linspace(first * NUM_TRAIN_STEPS, last * NUM_TRAIN_STEPS, num_steps)
        base = base / NUM_TRAIN_STEPS
    else:
        base = np.array(sigmas, dtype=np.float32)
    levels = (base * shift / (1 + (shift - 1) * base)).astype(np.float32)
    return tuple(levels.tolist()), tuple((levels * NUM_TRAIN_STEPS).tolist())


def expert_steps(schedule: Schedule, num_experts: int, boundary: float) -> tuple[int, ...]:
    """How many steps each expert takes, the high-noise one first; one expert takes all.

    The high-noise expert serves timesteps of at least `boundary` * 1000, the other those below.
    Timesteps fall, so each expert's steps are consecutive.
    Source: Wan2.2 wan/text2video.py; diffusers 0.42.1, `WanPipeline.__call__`.
    """
    if num_experts == 1:
        return (schedule.num_steps,)
    high = sum(time >= boundary * NUM_TRAIN_STEPS for time in schedule.timesteps)
    return high, schedule.num_steps - high
