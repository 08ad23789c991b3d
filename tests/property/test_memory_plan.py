"""What a memory plan predicts against what the meter counts of the real code, at real sizes.

The checker shares nothing with the planner's arithmetic: it loads the blocks (shapes on the meta
device, quantised as in files), counts their tensors, and runs the call under the plan's numerics.
Four blocks stand for all, so that a point takes a second.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from reelpool.errors import InfeasiblePlan
from reelpool.models.presets import PRESETS
from reelpool.models.spec import NumericsProfile
from reelpool.models.wan_weights import tensors_of
from reelpool.runtime.block_runner import BlockRunner
from reelpool.runtime.memory import Demand, memory_plan
from reelpool.runtime.meter import meter
from reelpool.runtime.types import BlockRange
from tests.meta_weights import META, QuantisedMeta, forward_inputs

LAYERS, MIB = 4, 2**20
SHAPES = (((832, 480), 81), ((512, 512), 25), ((640, 384), 49), ((1280, 704), 33))
MODELS = (
    "wan2.1-t2v-14b",
    "wan2.2-i2v-a14b",
    "wan2.1-i2v-14b-480p",
    "wan2.1-flf2v-14b-720p",
    "wan2.1-t2v-1.3b",
    "wan2.2-ti2v-5b",
    "skyreels-v2-df-1.3b-540p",
)
QUANTS = ("", "fp8", "q8_0", "q5_k_m", "q4_k_m", "q4_0")
BUDGETS = (0.4, 0.8, 1.2, 1.8, 2.6, 4.5)  # GiB
DTYPES = ("bfloat16", "float32")


def grid():
    """Some of all points, in an order that mixes everything."""
    points = [
        (model, shape, quant, budget, dtype)
        for model in MODELS
        for shape in SHAPES
        for quant in QUANTS
        for budget in BUDGETS
        for dtype in DTYPES
    ]
    return random.Random(3).sample(points, 300)


def planned(point):
    """The demand of a point and its plan; None if it does not fit."""
    model, (size, frames), quant, budget, dtype = point
    spec = PRESETS[model]
    spec = replace(spec, transformer=replace(spec.transformer, num_layers=LAYERS))
    demand = Demand(
        spec,
        spec.latent_shape(*size, frames),
        BlockRange(0, LAYERS, LAYERS),
        NumericsProfile(dtype),
        quant,
        stages=("denoise",),
    )
    try:
        return demand, memory_plan(demand, int(budget * 2**30))
    except InfeasiblePlan:
        return demand, None


def counted_bytes(demand, plan):
    """Weights on the card and the peak of a call, by the real code."""
    spec, blocks = demand.spec.transformer, demand.blocks
    numerics = replace(demand.numerics, token_chunk=plan.token_chunk, head_groups=plan.head_groups)
    runner = BlockRunner(spec, QuantisedMeta(spec, demand.quant), numerics, META)
    runner.load(blocks)
    block = sum(tensor.nbytes for tensor in tensors_of(runner._blocks[0]))
    outer = runner.weight_bytes - LAYERS * block
    with meter(META) as count:
        runner.run(blocks, forward_inputs(spec, demand.shape, demand.num_forwards))
    return outer + (len(plan.resident_blocks) + plan.ring_slots) * block, count.peak_bytes


def check(point):
    demand, plan = planned(point)
    assert plan is not None
    weights, activations = counted_bytes(demand, plan)
    predicted = dict(plan.peak_bytes)["denoise"]
    counted = weights + activations
    assert counted >= 64 * MIB
    assert counted <= predicted <= 1.05 * counted, (point, plan, counted / MIB, predicted / MIB)
    assert counted <= plan.budget_bytes
    # the activations alone, too: weights must not hide what is wrong with them
    call = demand.call_bytes(plan.token_chunk, plan.head_groups)
    assert activations <= call <= 1.05 * activations + MIB, (point, plan, activations / MIB)


FITTING = [point for point in grid() if planned(point)[1] is not None]
QUICK = [point for point in FITTING if point[1][1] == 25 and planned(point)[1].token_chunk >= 1024]


def test_the_grid_has_streams_and_rungs_of_all_kinds():
    plans = [planned(point)[1] for point in FITTING[:90]]
    assert len(plans) == 90
    assert {plan.ring_slots > 0 for plan in plans} == {True, False}
    assert len({(plan.token_chunk, plan.head_groups) for plan in plans}) >= 4
    assert {len(plan.resident_blocks) for plan in plans} == {0, 1, LAYERS}


@pytest.mark.parametrize("index", range(8))
def test_predicted_peaks_are_never_under_and_at_most_5_percent_over(index):
    check(QUICK[index])


@pytest.mark.soak
@pytest.mark.parametrize("index", range(90))
def test_predicted_peaks_of_the_whole_grid(index):
    check(FITTING[index])
