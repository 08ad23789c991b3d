"""Chooses routes for jobs on a pool. Pure, free of Ray and torch.

Strategies so far: one card, and CFG split (cond and uncond on two cards), the one that gains most
per byte where guidance needs two forwards: 8.4 MB a step for 832x480x81, 1.995x on two equal cards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reelpool.errors import InfeasiblePlan, PlanError

from ..models.spec import ModelSpec, NumericsProfile
from ..runtime.schedule import Schedule, expert_steps, make_schedule
from ..runtime.types import BlockRange, Branch
from .cards import PoolCard
from .job import Settings
from .plan import Alternative, Hop, JobPlan, Plan, Route, group_calls
from .plan_memory import with_memory


def make_plan(
    jobs: Sequence[Settings], specs: Sequence[ModelSpec], cards: Sequence[PoolCard]
) -> Plan:
    """Plan jobs over cards.

    Args:
        jobs: the jobs, complete.
        specs: for each job its model's geometry.
        cards: the pool's workers, the best first.
    Raises:
        PlanError: if there is no card, or one cannot compute in the wanted type.
        InfeasiblePlan: if a job's memory does not fit.
    """
    if not cards:
        raise PlanError("the pool has no card; start it with --pool local:1 or add a machine")
    plans, others, notes = [], [], []
    for index, (job, spec) in enumerate(zip(jobs, specs, strict=True)):
        # several jobs: begin on different cards, so that single-card stages spread
        turned = [*cards[index % len(cards) :], *cards[: index % len(cards)]]
        plan, alternatives = _fitting_plan(job, spec, turned)
        plans.append(plan)
        others += alternatives
        unused = len(cards) - len(plan.workers)
        if unused and len(jobs) == 1:
            notes.append(f"{unused} of {len(cards)} cards do not take part in the denoise")
    return Plan(tuple(plans), tuple(dict.fromkeys(others)), tuple(notes))


def job_schedule(job: Settings) -> Schedule:
    """A job's noise levels.

    LCM gets the evenly spaced grid that few-step models were distilled on (1, .75, .5, .25 for 4
    steps, before the shift); its own default grid ends too early for them.
    """
    sigmas = None
    if job.solver == "lcm":
        sigmas = [1 - index / job.steps for index in range(job.steps)]
    return make_schedule(job.solver, job.steps, job.shift, sigmas)


def _fitting_plan(
    job: Settings, spec: ModelSpec, cards: Sequence[PoolCard]
) -> tuple[JobPlan, list[Alternative]]:
    """The plan of a job with its memory; where a smaller card fails, the largest does it alone."""
    plan, others = _plan_job(job, spec, cards)
    try:
        return with_memory(plan, job, spec, cards), others
    except InfeasiblePlan as error:
        largest = max(cards, key=lambda card: card.memory_bytes)
        if all(card.memory_bytes == largest.memory_bytes for card in cards):
            raise
        strategy, reason = plan.strategy, str(error)
    alone, others = _plan_job(job, spec, [largest])
    # numerics as for the whole pool, so that the result does not depend on who fell out
    alone = replace(alone, numerics=plan.numerics)
    return with_memory(alone, job, spec, [largest]), [Alternative(strategy, reason), *others]


def _plan_job(
    job: Settings, spec: ModelSpec, cards: Sequence[PoolCard]
) -> tuple[JobPlan, list[Alternative]]:
    blocks = BlockRange(0, spec.transformer.num_layers, spec.transformer.num_layers)
    first, last = cards[0], cards[min(1, len(cards) - 1)]
    whole: tuple[Hop, ...] = (Hop(first.worker, blocks),)
    routes: tuple[tuple[Branch, Route], ...]
    if not job.needs_uncond:
        routes = (("cond", whole),)
        strategy = "single"
        others = [Alternative("cfg-split", "guidance 1 needs only one forward a step")]
    elif len(cards) == 1:
        routes = (("cond", whole), ("uncond", whole))
        strategy = "single"
        others = [Alternative("cfg-split", "there is only one card")]
    else:
        routes = (("cond", whole), ("uncond", (Hop(last.worker, blocks),)))
        strategy = "cfg-split"
        others = [Alternative("single", "one card would run both forwards of every step in turn")]
    plan = JobPlan(
        job=job.id,
        strategy=strategy,
        numerics=_numerics(job, cards),
        routes=routes,
        calls=group_calls(routes),
        stages=_stages(job, spec, first.worker, last.worker),
        expert_steps=expert_steps(job_schedule(job), spec.num_experts, spec.boundary),
    )
    return plan, others


def _stages(job: Settings, spec: ModelSpec, first: str, last: str) -> tuple[tuple[str, str], ...]:
    """Text on one card and images on the other, beside it; decode where the VAE is loaded then."""
    has_image = job.image is not None or spec.image == "concat"
    images = (("encode_image", last),) if has_image else ()
    return (("encode_text", first), *images, ("decode", last))


def _numerics(job: Settings, cards: Sequence[PoolCard]) -> NumericsProfile:
    """The job's profile: as asked, else what every card of the pool computes in."""
    dtype = job.dtype
    if dtype == "auto":
        preferred = {card.default_dtype for card in cards}
        dtype = preferred.pop() if len(preferred) == 1 else "float32"
    lacking = [card.worker for card in cards if dtype not in card.dtypes]
    if lacking:
        raise PlanError(f"{', '.join(lacking)} cannot compute in {dtype}; use --dtype float32")
    return NumericsProfile(dtype=dtype, attention=job.attention)
