"""Memory in the plan of a job: one numerics for all cards, and what happens to a card too small."""

from __future__ import annotations

import json

import pytest

from reelpool.errors import InfeasiblePlan
from reelpool.models.registry import find_spec
from reelpool.models.spec import NumericsProfile
from reelpool.runtime.memory import LADDER
from reelpool.runtime.types import LoraRef
from reelpool.scheduler.cards import PoolCard
from reelpool.scheduler.plan_memory import GPU_RESERVE
from reelpool.scheduler.planner import make_plan
from tests.settings import demo_settings

GIB = 2**30
A14B = {"model": "wan2.2-t2v-a14b@q5_k_m", "width": 832, "height": 480, "frames": 81}


def planned(tmp_path, sizes, **changes):
    """The plan of a job on CPU cards of so many GiB."""
    dtypes = ("float32", "bfloat16")
    cards = [
        PoolCard(f"worker-{index}", "here", int(size * GIB), dtypes, "bfloat16")
        for index, size in enumerate(sizes)
    ]
    job = demo_settings(tmp_path, **changes)
    return make_plan([job], [find_spec(job.model)], cards)


def test_the_demo_s_numerics_are_those_without_a_memory_plan(tmp_path):
    (job,) = planned(tmp_path, [1, 1], dtype="float32").jobs
    assert job.numerics == NumericsProfile()
    assert [worker for worker, _ in job.memory] == ["worker-0", "worker-1"]
    assert all(memory.state == "high" for _, memory in job.memory)


def test_every_card_has_the_stages_it_runs(tmp_path):
    (job,) = planned(tmp_path, [8, 8], **A14B).jobs
    stages = {worker: [stage for stage, _ in made.peak_bytes] for worker, made in job.memory}
    assert stages == {"worker-0": ["encode_text", "denoise"], "worker-1": ["denoise", "decode"]}


def test_the_mission_is_planned_and_said(tmp_path):
    made = planned(tmp_path, [8], **A14B)
    text = made.explain()
    for part in (
        "8 GiB, state low",
        "blocks",
        "2 slots",
        "head groups",
        "VAE frames whole",
        "host",
    ):
        assert part in text
    memory = json.loads(json.dumps(made.as_json()))["jobs"][0]["memory"][0][1]
    assert memory["ring_slots"] == 2
    assert dict(memory["peak_bytes"])["denoise"] <= 8 * GIB
    for key in ("resident_blocks", "token_chunk", "head_groups", "vae_tile", "host_bytes", "notes"):
        assert key in memory


def test_the_leanest_card_decides_how_finely_all_cut(tmp_path):
    (lean,) = planned(tmp_path, [2.2], **A14B).jobs
    assert lean.numerics.head_groups > 1
    (job,) = planned(tmp_path, [24, 2.2], **A14B).jobs
    rungs = {(made.token_chunk, made.head_groups) for _, made in job.memory}
    assert len(rungs) == 1
    assert rungs == {(job.numerics.token_chunk, job.numerics.head_groups)}
    assert rungs & set(LADDER[1:])


def test_a_job_leaves_out_a_card_that_cannot_take_part(tmp_path):
    made = planned(tmp_path, [8, 0.5], **A14B)
    assert made.jobs[0].workers == ("worker-0",)
    assert made.alternatives[0].strategy == "cfg-split"
    assert made.alternatives[0].reason.startswith("worker-1: the job does not fit: ")


def test_what_fits_no_card_names_the_card(tmp_path):
    with pytest.raises(InfeasiblePlan, match=r"^worker-0: the job does not fit: .*; give the card"):
        planned(tmp_path, [0.5, 0.5], **A14B)


def test_state_and_reserve_are_the_job_s(tmp_path):
    (job,) = planned(tmp_path, [12], **A14B, memory_state="none", reserve=4 * GIB).jobs
    ((_, made),) = job.memory
    assert (made.state, made.budget_bytes, made.resident_blocks) == ("none", 8 * GIB, ())
    assert (job.numerics.token_chunk, job.numerics.head_groups) == LADDER[-1]


def test_a_gpu_keeps_a_reserve_of_its_own_accord(tmp_path):
    card = PoolCard("here", "here", 8 * GIB, ("bfloat16",), "bfloat16", is_cpu=False)
    made = make_plan([demo_settings(tmp_path)], [find_spec("demo")], [card])
    assert made.jobs[0].memory[0][1].budget_bytes == 8 * GIB - GPU_RESERVE


def test_loras_take_room(tmp_path):
    path = tmp_path / "style.safetensors"
    path.write_bytes(bytes(3 * 2**20))
    without, with_lora = (
        dict(planned(tmp_path, [8], **A14B, loras=loras).jobs[0].memory[0][1].peak_bytes)
        for loras in ((), (LoraRef(str(path), 1.0, 1.0),))
    )
    assert with_lora["denoise"] - without["denoise"] == 3 * 2**20


def test_a_host_too_small_for_the_files_is_told(tmp_path):
    small = PoolCard("here", "here", 8 * GIB, ("bfloat16",), "bfloat16", host_ram_bytes=10 * GIB)
    job = demo_settings(tmp_path, **A14B)
    made = make_plan([job], [find_spec(job.model)], [small])
    assert "read from the disk again" in made.explain()
    assert "read from the disk again" not in planned(tmp_path, [8], **A14B).explain()
