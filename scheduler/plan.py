"""What a plan is: who evaluates which forward, in which order, and why.

Pure records, free of Ray and torch. A strategy is nothing but its routes (ARCHITECTURE.md, "One
idea"): there is no code for any of them in the executor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..models.spec import NumericsProfile
from ..runtime.memory import MemoryPlan
from ..runtime.residency import Residency
from ..runtime.types import BlockRange, Branch


@dataclass(frozen=True)
class Hop:
    """One worker's part of a route."""

    worker: str
    blocks: BlockRange


Route = tuple[Hop, ...]


@dataclass(frozen=True)
class PlannedCall:
    """Forwards of one step that one worker runs together over one block range.

    `hop` is the position in the route: calls with hop > 0 take the result of hop - 1.
    """

    worker: str
    blocks: BlockRange
    branches: tuple[Branch, ...]
    hop: int


@dataclass(frozen=True)
class JobPlan:
    """How one job runs.

    routes: for each branch that is needed, its route.
    calls: the calls of every step, in the order in which they are submitted.
    stages: stage name -> worker, for encode_text, encode_image (where the job has an image) and
        decode.
    expert_steps: steps that each of the model's transformers takes, the high-noise one first.
    memory: worker -> what its card keeps, streams and cuts.
    """

    job: str
    strategy: str
    numerics: NumericsProfile
    routes: tuple[tuple[Branch, Route], ...]
    calls: tuple[PlannedCall, ...]
    stages: tuple[tuple[str, str], ...]
    expert_steps: tuple[int, ...]
    memory: tuple[tuple[str, MemoryPlan], ...] = ()

    def stage_worker(self, stage: str) -> str:
        """The worker of a stage."""
        return dict(self.stages)[stage]

    def residency(self, worker: str) -> Residency | None:
        """The blocks that stay on a worker's card; None where all do."""
        memory = dict(self.memory).get(worker)
        if memory is None or not memory.ring_slots:
            return None
        return Residency(frozenset(memory.resident_blocks), memory.ring_slots)

    @property
    def vae_tile(self) -> int:
        """Pixels of a tile of the VAE; 0 for whole frames.

        The leanest card's, whichever of them decodes: tiles change pixels, placement must not.
        """
        return min((made.vae_tile for _, made in self.memory if made.vae_tile), default=0)

    def expert_of(self, step: int) -> int:
        """Which expert takes a step: 0 the high-noise (or only) one, 1 the low-noise one."""
        return int(step >= self.expert_steps[0])

    @property
    def workers(self) -> tuple[str, ...]:
        """Workers that take part in the denoise, in order of first call."""
        return tuple(dict.fromkeys(call.worker for call in self.calls))


@dataclass(frozen=True)
class Alternative:
    """A strategy that was not chosen, and why."""

    strategy: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Plans of all jobs of a run."""

    jobs: tuple[JobPlan, ...]
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...] = ()

    @property
    def strategy(self) -> str:
        """The strategies in use, joined by +."""
        return "+".join(dict.fromkeys(job.strategy for job in self.jobs))

    def job(self, job: str) -> JobPlan:
        """The plan of one job."""
        return next(plan for plan in self.jobs if plan.job == job)

    def as_json(self) -> dict[str, object]:
        """The plan as JSON."""
        return {"strategy": self.strategy, **dataclasses.asdict(self)}

    def explain(self) -> str:
        """What was chosen and why each alternative lost, for a person."""
        lines = []
        for job in self.jobs:
            lines.append(f"plan for {job.job}: {job.strategy}")
            for branch, route in job.routes:
                hops = ", then ".join(f"{hop.worker} blocks {hop.blocks}" for hop in route)
                lines.append(f"  {branch:<12} {hops}")
            lines += [f"  {stage:<12} {worker}" for stage, worker in job.stages]
            if len(job.expert_steps) > 1:
                high, low = job.expert_steps
                lines.append(f"  experts      {high} steps high noise, then {low} low noise")
            numerics = job.numerics
            lines.append(
                f"  numerics     {numerics.dtype}, attention {numerics.attention}, "
                f"VAE {numerics.vae_dtype}"
            )
            for worker, memory in job.memory:
                lines += memory.explain(worker)
        lines += [f"  not {other.strategy}: {other.reason}" for other in self.alternatives]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def group_calls(routes: tuple[tuple[Branch, Route], ...]) -> tuple[PlannedCall, ...]:
    """The calls that walk the routes: branches with the same route share their calls.

    Calls are ordered by hop, then as the branches come: a worker that both finishes one branch and
    begins another gets the beginning first, so that nobody waits behind a late argument.
    """
    groups: dict[Route, list[Branch]] = {}
    for branch, route in routes:
        groups.setdefault(route, []).append(branch)
    calls = [
        PlannedCall(hop.worker, hop.blocks, tuple(branches), index)
        for route, branches in groups.items()
        for index, hop in enumerate(route)
    ]
    return tuple(sorted(calls, key=lambda call: call.hop))
