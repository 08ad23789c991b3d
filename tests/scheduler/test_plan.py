import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelpool.errors import PlanError
from reelpool.models.registry import find_spec
from reelpool.runtime.types import BlockRange
from reelpool.scheduler.cards import PoolCard
from reelpool.scheduler.plan import Hop, group_calls
from reelpool.scheduler.planner import make_plan
from tests.settings import demo_settings


def cards(count, **changes):
    values = {"host": "here", "memory_bytes": 2**33, "dtypes": ("float32",)}
    values |= {"default_dtype": "float32", **changes}
    return [PoolCard(worker=f"worker-{index}", **values) for index in range(count)]


def plan(tmp_path, count, **changes):
    job = demo_settings(tmp_path, **changes)
    return make_plan([job], [find_spec("demo")], cards(count))


def test_one_card_runs_both_branches_in_one_call(tmp_path):
    made = plan(tmp_path, 1)
    assert made.strategy == "single"
    (call,) = made.jobs[0].calls
    assert call.branches == ("cond", "uncond")
    assert call.blocks == BlockRange(0, 6, 6)


def test_two_cards_with_guidance_split_the_branches(tmp_path):
    made = plan(tmp_path, 2)
    assert made.strategy == "cfg-split"
    assert [(c.worker, c.branches) for c in made.jobs[0].calls] == [
        ("worker-0", ("cond",)),
        ("worker-1", ("uncond",)),
    ]
    assert [other.strategy for other in made.alternatives] == ["single"]


def test_guidance_one_needs_one_forward_and_says_so(tmp_path):
    made = plan(tmp_path, 2, guidance=1.0)
    assert made.strategy == "single"
    assert [c.branches for c in made.jobs[0].calls] == [("cond",)]
    assert "guidance 1" in made.alternatives[0].reason


def test_explain_names_workers_blocks_and_what_lost(tmp_path):
    text = plan(tmp_path, 2).explain()
    for part in ("cfg-split", "worker-0 blocks 0:6", "worker-1 blocks 0:6", "not single"):
        assert part in text


def test_plan_is_json(tmp_path):
    made = plan(tmp_path, 2)
    again = json.loads(json.dumps(made.as_json()))
    assert again["strategy"] == "cfg-split"
    assert again["jobs"][0]["calls"][1]["worker"] == "worker-1"


def test_cards_beyond_two_are_said_to_be_idle(tmp_path):
    assert any("1 of 3 cards" in note for note in plan(tmp_path, 3).notes)


def test_several_jobs_begin_on_different_cards(tmp_path):
    jobs = [demo_settings(tmp_path, f"job-{i}", guidance=1.0) for i in (1, 2)]
    made = make_plan(jobs, [find_spec("demo")] * 2, cards(2))
    assert [job.workers for job in made.jobs] == [("worker-0",), ("worker-1",)]


def preset_plan(tmp_path, model, count=2, **changes):
    spec = find_spec(model)
    own = spec.defaults
    values = {"steps": own.steps, "shift": own.shift, "guidance": own.guidance, **changes}
    return make_plan([demo_settings(tmp_path, model=model, **values)], [spec], cards(count))


@pytest.mark.parametrize(
    ("model", "steps"),
    [("wan2.2-t2v-a14b", (26, 14)), ("wan2.2-i2v-a14b", (15, 25)), ("wan2.1-t2v-14b", (50,))],
)
def test_the_steps_of_each_expert_are_planned_and_said(tmp_path, model, steps):
    made = preset_plan(tmp_path, model)
    (job,) = made.jobs
    assert job.expert_steps == steps
    assert [job.expert_of(step) for step in (0, steps[0] - 1)] == [0, 0]
    assert ("low noise" in made.explain()) == (len(steps) == 2)
    if len(steps) == 2:
        assert job.expert_of(steps[0]) == job.expert_of(sum(steps) - 1) == 1
        assert f"{steps[0]} steps high noise, then {steps[1]} low noise" in made.explain()


def test_uncond_is_planned_if_any_expert_needs_it(tmp_path):
    changes = {"guidance": 1.0, "guidance_low": 3.0}
    made = preset_plan(tmp_path, "wan2.2-t2v-a14b", **changes)
    assert made.strategy == "cfg-split"


def test_images_are_encoded_beside_the_text_and_where_the_vae_is(tmp_path):
    made = preset_plan(tmp_path, "wan2.2-i2v-a14b")
    assert made.jobs[0].stages == (
        ("encode_text", "worker-0"),
        ("encode_image", "worker-1"),
        ("decode", "worker-1"),
    )
    text_only = preset_plan(tmp_path, "wan2.2-ti2v-5b").jobs[0]
    assert [stage for stage, _ in text_only.stages] == ["encode_text", "decode"]
    with_image = preset_plan(tmp_path, "wan2.2-ti2v-5b", image=tmp_path / "a.png").jobs[0]
    assert [stage for stage, _ in with_image.stages] == ["encode_text", "encode_image", "decode"]


def test_no_card_is_refused(tmp_path):
    with pytest.raises(PlanError, match="no card"):
        plan(tmp_path, 0)


def test_a_type_the_card_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(PlanError, match=r"worker-0, worker-1 cannot compute in float16"):
        plan(tmp_path, 2, dtype="float16")


def test_mixed_cards_fall_back_to_float32(tmp_path):
    mixed = [
        *cards(1, dtypes=("float32", "float16"), default_dtype="float16"),
        PoolCard("other", "there", 2**33, ("float32", "bfloat16"), "bfloat16"),
    ]
    made = make_plan([demo_settings(tmp_path)], [find_spec("demo")], mixed)
    assert made.jobs[0].numerics.dtype == "float32"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=2), st.booleans())
def test_calls_cover_every_route_once_and_in_order(cuts, same_route):
    """Whatever the routes: each hop of each branch is in exactly one call, after the hop before."""

    def route(workers, cut):
        return (Hop(workers[0], BlockRange(0, cut, 10)), Hop(workers[1], BlockRange(cut, 10, 10)))

    cond = route("ab", cuts[0])
    uncond = cond if same_route else route("ba", cuts[-1])
    calls = group_calls((("cond", cond), ("uncond", uncond)))
    for branch, wanted in (("cond", cond), ("uncond", uncond)):
        mine = [call for call in calls if branch in call.branches]
        assert tuple(Hop(call.worker, call.blocks) for call in mine) == wanted
        assert [call.hop for call in mine] == [0, 1]
