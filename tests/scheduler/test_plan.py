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
