"""The memory plan: what it chooses, what it refuses, the constants it shares with other code."""

from __future__ import annotations

import pytest
import torch

from reelpool.errors import InfeasiblePlan
from reelpool.models import linear, quant
from reelpool.models.registry import find_spec
from reelpool.models.spec import NumericsProfile
from reelpool.models.wan_vae import WanVae, stays_float32
from reelpool.runtime import block_runner, card_bytes, memory, swap, vae_bytes
from reelpool.runtime.memory import LADDER, MEMORY_STATES, Demand, memory_plan
from reelpool.runtime.meter import meter
from reelpool.runtime.types import BlockRange
from reelpool.runtime.vae_memory import measure_vae

META, GIB = torch.device("meta"), 2**30
ALL = ("encode_text", "encode_image", "denoise", "decode")


def demand(model, size, frames, dtype="bfloat16", stages=ALL, **changes):
    spec = find_spec(model)
    layers = spec.transformer.num_layers
    shape = spec.latent_shape(*size, frames)
    blocks = BlockRange(0, layers, layers)
    return Demand(spec, shape, blocks, NumericsProfile(dtype), spec.quant, stages=stages, **changes)


A14B = demand("wan2.2-t2v-a14b@q5_k_m", (832, 480), 81)
I2V = demand("wan2.1-i2v-14b@q4_k_m", (512, 512), 25)
DEMO = demand("demo", (64, 64), 17, "float32")


def test_constants_equal_those_of_the_code_that_they_describe():
    assert (card_bytes.CPU_PIECE, card_bytes.DEVICE_PIECE) == (linear.PIECE, linear.DEVICE_PIECE)
    assert (card_bytes.CPU_CHUNK, card_bytes.DEVICE_CHUNK) == (quant.CHUNK, quant.DEVICE_CHUNK)
    assert card_bytes.TEXT_KV_MIN_SHARE == block_runner.TEXT_KV_MIN_SHARE
    assert memory.STAGING_BUFFERS == swap.NUM_STAGING
    default = NumericsProfile()
    assert LADDER[0] == (default.token_chunk, default.head_groups)


@pytest.mark.parametrize("name", sorted(card_bytes._DECODE))
def test_what_decoding_takes_is_what_the_meter_counts(name):
    kind = "F8_E4M3" if name == "fp8" else name.upper()
    size, num_bytes = quant.KINDS[kind].size, quant.KINDS[kind].num_bytes
    rows = quant.DEVICE_CHUNK // size
    blocks = torch.empty((rows, num_bytes), dtype=torch.uint8, device=META)
    with torch.inference_mode(), meter(META) as count:
        quant.Quantised(blocks, kind, (rows, size)).dequantise(torch.float32)
    each = count.peak_bytes / (rows * size) - 4
    assert each <= card_bytes._DECODE[name] <= each + 0.04


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", ["wan2.1-t2v-14b", "wan2.2-ti2v-5b"])
def test_decoding_takes_what_is_planned(model, dtype):
    spec, frame, tile = find_spec(model).vae, (480, 832), 256
    with META:
        parameters = dict(WanVae(spec).named_parameters())
    weights = sum(
        p.numel() * (4 if dtype == "float32" or stays_float32(name) else 2)
        for name, p in parameters.items()
    )
    for asked in (0, tile):
        sides = [side // spec.spatial_factor for side in frame]
        counted = measure_vae(spec, *sides, asked, getattr(torch, dtype))
        planned = vae_bytes.vae_card_bytes(spec, frame, asked, dtype)
        assert weights + counted.card_bytes <= planned <= 1.05 * (weights + counted.card_bytes)
        parked = vae_bytes.vae_parked_bytes(spec, frame, asked, dtype)
        assert counted.host_bytes <= parked <= 1.05 * counted.host_bytes
    encoding = measure_vae(spec, *sides, tile, getattr(torch, dtype), encodes=True)
    assert weights + encoding.card_bytes <= planned


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("job", "budget"), [(A14B, 8 * GIB), (I2V, int(5.2 * GIB))])
def test_the_mission_fits_in_numbers(job, budget, dtype):
    job = memory.replace(job, numerics=NumericsProfile(dtype))
    made = memory_plan(job, budget)
    assert made.highest_bytes <= budget
    assert made.ring_slots == 2
    assert len(made.resident_blocks) >= 8
    assert made.host_bytes + made.mapped_bytes <= 32 * GIB
    assert made.text_encoder == "streamed"


def test_the_mission_fits_even_the_least_memory():
    made = memory_plan(I2V, 3 * GIB, "none")
    assert (made.resident_blocks, made.ring_slots) == ((), 2)
    assert (made.token_chunk, made.head_groups) == LADDER[-1]
    assert made.highest_bytes <= 3 * GIB


def test_the_demo_keeps_everything_and_its_numerics():
    made = memory_plan(DEMO, GIB)
    assert made.state == "high"
    assert made.resident_blocks == tuple(range(6))
    assert (made.ring_slots, made.vae_tile, made.text_encoder) == (0, 0, "resident")
    assert (made.token_chunk, made.head_groups) == LADDER[0]
    assert made.stays_loaded
    assert made.notes == ()


def test_more_memory_never_keeps_less_nor_cuts_finer():
    before = (0, -len(LADDER))
    for budget in range(3, 24):
        made = memory_plan(A14B, budget * GIB)
        rung = LADDER.index((made.token_chunk, made.head_groups))
        now = (-rung, len(made.resident_blocks))
        assert now >= before or budget == 3
        assert made.highest_bytes <= budget * GIB
        before = now
    assert (made.ring_slots, len(made.resident_blocks)) == (0, 40)


def test_streaming_comes_before_finer_cuts():
    needs_whole = A14B.outer_bytes + A14B.call_bytes(*LADDER[0]) + 40 * A14B.block_bytes
    made = memory_plan(A14B, needs_whole - 1)
    assert (made.token_chunk, made.head_groups) == LADDER[0]
    assert (len(made.resident_blocks), made.ring_slots) == (37, 2)
    assert memory_plan(A14B, needs_whole).ring_slots == 0


def test_residents_are_spread_among_those_that_come_by():
    made = memory_plan(A14B, 8 * GIB)
    gaps = [b - a for a, b in zip(made.resident_blocks, made.resident_blocks[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("state", MEMORY_STATES)
def test_every_state_has_a_meaning_of_its_own(state):
    budget = 64 * GIB
    made = memory_plan(A14B, budget, state)
    free = memory_plan(A14B, budget)
    assert made.state == state
    assert free.state == "high"
    blocks, place = len(made.resident_blocks), made.text_encoder
    expected = {
        "disabled": (40, "resident", budget),
        "none": (0, "streamed", budget),
        "low": (37, "streamed", budget),
        "normal": (40, "resident", budget),
        "high": (40, "resident", budget),
        "shared": (40, "resident", budget * 3 // 4),
    }
    assert (blocks, place, made.budget_bytes) == expected[state]


def test_low_gives_at_most_half_of_the_card_to_blocks_that_stay():
    made = memory_plan(A14B, 12 * GIB, "low")
    assert 0 < len(made.resident_blocks) * A14B.block_bytes <= 6 * GIB
    assert len(memory_plan(A14B, 12 * GIB, "normal").resident_blocks) > len(made.resident_blocks)


def test_a_reserve_is_left_free():
    made = memory_plan(A14B, 10 * GIB, reserve_bytes=2 * GIB)
    assert made.budget_bytes == 8 * GIB
    assert made.resident_blocks == memory_plan(A14B, 8 * GIB).resident_blocks


def test_disabled_refuses_nothing():
    assert memory_plan(A14B, 1, "disabled").highest_bytes > 1


@pytest.mark.parametrize(
    ("budget", "state", "reserve", "said"),
    [
        (1 * GIB, "", 0, "the denoise takes at least 2.1 GiB, there are 1 GiB; give the card"),
        (8 * GIB, "high", 0, "there are 8 GiB; use --memory-state normal"),
        (8 * GIB, "", 7 * GIB, "there are 1 GiB; 7 GiB of the card are reserved: reserve less"),
        (1 * GIB, "", 2 * GIB, "there are 0 B; give the card as much"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(budget, state, reserve, said):
    with pytest.raises(InfeasiblePlan) as caught:
        memory_plan(A14B, budget, state, reserve)
    assert str(caught.value).startswith("the job does not fit: ")
    assert said in str(caught.value)


def test_high_refuses_where_the_experts_do_not_fit_together():
    whole = memory_plan(A14B, 64 * GIB)
    text, denoise = (dict(whole.peak_bytes)[stage] for stage in ("encode_text", "denoise"))
    with pytest.raises(InfeasiblePlan, match="all at once"):
        memory_plan(A14B, text + denoise, "high")
    assert memory_plan(A14B, text + denoise).state == "normal"


def test_a_decode_that_does_not_fit_is_told():
    alone = demand("wan2.1-t2v-14b", (832, 480), 81, stages=("decode",))
    with pytest.raises(InfeasiblePlan, match="the decode takes at least"):
        memory_plan(alone, 2**28)
    tiles = [memory_plan(alone, size * GIB).vae_tile for size in (1, 2, 3, 8)]
    assert tiles == [192, 384, 384, 0]


def test_one_block_has_to_stay():
    spec = find_spec("wan2.1-t2v-14b")
    one = memory.replace(A14B, spec=spec, blocks=BlockRange(3, 4, 40), stages=("denoise",))
    for state in ("", "none", "low"):
        made = memory_plan(one, 8 * GIB, state)
        assert (made.resident_blocks, made.ring_slots) == ((3,), 0)


def test_a_card_without_the_denoise_keeps_no_block():
    made = memory_plan(demand("wan2.1-t2v-14b", (832, 480), 81, stages=("decode",)), 8 * GIB)
    assert (made.resident_blocks, made.ring_slots, made.mapped_bytes) == ((), 0, 0)
    assert "blocks" not in "\n".join(made.explain("worker-1"))
    assert [stage for stage, _ in made.peak_bytes] == ["decode"]


def test_explained_for_a_person():
    text = "\n".join(memory_plan(A14B, 8 * GIB).explain("worker-0"))
    for part in ("worker-0: 8 GiB, state low", "denoise 7.9 GiB", "2 slots", "head groups 1",
                 "text encoder streamed", "not all 40 blocks can stay"):  # fmt: skip
        assert part in text
