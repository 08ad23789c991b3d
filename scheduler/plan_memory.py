"""What each card of a job's plan keeps and streams, and the numerics that all of them share.

Pure, free of Ray and torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from reelpool.errors import InfeasiblePlan

from ..models.spec import ModelSpec
from ..runtime.log import format_bytes
from ..runtime.memory import LADDER, Demand, MemoryPlan, memory_plan
from ..runtime.types import BlockRange
from .cards import PoolCard
from .job import Settings
from .plan import JobPlan

# Left free on a GPU where no --reserve is given: its context, and scratch memory of kernels.
GPU_RESERVE = 512 * 2**20


def with_memory(
    plan: JobPlan, job: Settings, spec: ModelSpec, cards: Sequence[PoolCard]
) -> JobPlan:
    """The same plan with a memory plan for each card, and numerics that fit them all.

    Raises:
        InfeasiblePlan: if a card cannot do its part, naming it.
    """
    by_name = {card.worker: card for card in cards}
    names = dict.fromkeys([*plan.workers, *(worker for _, worker in plan.stages)])
    numerics, plans = plan.numerics, dict[str, MemoryPlan]()
    for _ in range(2):  # the leanest card decides how finely all of them cut the work
        plans = {
            name: _card_plan(replace(plan, numerics=numerics), job, spec, by_name[name])
            for name in names
        }
        rungs = [LADDER.index((made.token_chunk, made.head_groups)) for made in plans.values()]
        chunk, groups = LADDER[max(rungs)]
        numerics = replace(numerics, token_chunk=chunk, head_groups=groups)
    return replace(plan, numerics=numerics, memory=tuple(plans.items()))


def _card_plan(plan: JobPlan, job: Settings, spec: ModelSpec, card: PoolCard) -> MemoryPlan:
    calls = [call for call in plan.calls if call.worker == card.worker]
    stages = [stage for stage, worker in plan.stages if worker == card.worker]
    total = spec.transformer.num_layers
    ranges = [call.blocks for call in calls] or [BlockRange(0, total, total)]
    demand = Demand(
        spec=spec,
        shape=spec.latent_shape(job.width, job.height, job.frames),
        blocks=BlockRange(
            min(blocks.start for blocks in ranges), max(blocks.stop for blocks in ranges), total
        ),
        numerics=plan.numerics,
        quant=spec.quant,
        num_forwards=max((len(call.branches) for call in calls), default=1),
        stages=tuple(
            stage
            for stage in ("encode_text", "encode_image", "denoise", "decode")
            if stage in stages or (stage == "denoise" and calls)
        ),
        lora_bytes=sum(Path(lora.path).stat().st_size for lora in job.loras),
        is_cpu=card.is_cpu,
    )
    reserve = job.reserve
    if reserve is None:
        reserve = 0 if card.is_cpu else min(GPU_RESERVE, card.memory_bytes // 8)
    try:
        made = memory_plan(demand, card.memory_bytes, job.memory_state, reserve)
    except InfeasiblePlan as error:
        raise InfeasiblePlan(f"{card.worker}: {error.problem}", error.advice) from None
    return _with_host_note(made, card)


def _with_host_note(made: MemoryPlan, card: PoolCard) -> MemoryPlan:
    """Say so where files are larger than what the host's memory can keep of them."""
    wanted = made.host_bytes + made.mapped_bytes
    if not card.host_ram_bytes or wanted <= card.host_ram_bytes:
        return made
    note = (
        f"{format_bytes(wanted)} of host memory would keep all files in it, there are "
        f"{format_bytes(card.host_ram_bytes)}: some are read from the disk again in every step"
    )
    return replace(made, notes=(*made.notes, note))
