"""Real runs: in this process, and on one Ray cluster for the whole file."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from reelpool.errors import Cancelled, WeightError, WorkerLost
from reelpool.models.registry import find_spec
from reelpool.runtime.device import cpu_card
from reelpool.runtime.results import RunDir
from reelpool.runtime.solver import StepState
from reelpool.runtime.types import BlockRange
from reelpool.runtime.video import read_frames, read_metadata
from reelpool.scheduler.executor import Executor, run_jobs
from reelpool.scheduler.job_run import JobContext
from reelpool.scheduler.open_pool import pool_card
from reelpool.scheduler.plan import Hop, JobPlan, Plan, group_calls
from reelpool.scheduler.planner import make_plan
from tests.settings import demo_settings


class Events(list):
    def __call__(self, event):
        self.append(event)

    def kinds(self):
        return [event.kind for event in self]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The reference: a demo job in this process. (settings, latents, events)."""
    settings = demo_settings(tmp_path_factory.mktemp("here"))
    events = Events()
    (result,) = run_jobs([settings], "auto", events)
    return settings, load_file(result.latents)["latents"], events


@pytest.fixture(scope="module")
def ray_pool():
    from reelpool.scheduler.ray_pool import RayPool

    pool = RayPool([cpu_card(index) for index in range(3)], 1, False, Events())
    yield pool
    pool.close()


def routed(settings, strategy, routes):
    """A plan with routes made by hand."""
    base = make_plan([settings], [find_spec("demo")], POOL_CARDS).jobs[0]
    stages = (("encode_text", "worker-1"), ("decode", "worker-0"))
    job = JobPlan(base.job, strategy, base.numerics, routes, group_calls(routes), stages)
    return Plan((job,), ())


*POOL_CARDS, SPARE = [pool_card(f"worker-{i}", "here", cpu_card(i)) for i in range(3)]
A, B = "worker-0", "worker-1"
WHOLE, HEAD, TAIL = BlockRange(0, 6, 6), BlockRange(0, 4, 6), BlockRange(4, 6, 6)
ROUTES = {
    "single": {"cond": (Hop(A, WHOLE),), "uncond": (Hop(A, WHOLE),)},
    "cfg-split": {"cond": (Hop(A, WHOLE),), "uncond": (Hop(B, WHOLE),)},
    "layer-cut": {"cond": (Hop(A, HEAD), Hop(B, TAIL)), "uncond": (Hop(A, HEAD), Hop(B, TAIL))},
    "asymmetric-cfg": {"uncond": (Hop(A, HEAD), Hop(B, TAIL)), "cond": (Hop(A, WHOLE),)},
}


def test_run_makes_the_video_and_tells_every_stage(here):
    settings, latents, events = here
    assert read_frames(settings.output).shape == (17, 64, 64, 3)
    assert latents.shape == (1, 16, 5, 8, 8)
    assert latents.dtype == torch.float32
    assert '"seed": 1' in read_metadata(settings.output)["reelpool"]
    assert events.kinds()[:3] == ["pool_starting", "worker_ready", "plan"]
    assert events.kinds().count("step") == settings.steps
    stages = [event.stage for event in events if event.kind == "stage_finished"]
    assert stages == ["encode_text", "load", "denoise", "decode"]
    assert events[-1].kind == "job_finished"


def test_run_dir_keeps_job_events_latents_and_the_last_two_steps(here):
    settings, latents, events = here
    run = RunDir(settings.run_dir)
    assert run.read_json("job.json")["prompt"] == settings.prompt
    assert len(list(run.events())) == len(events) - 3  # the pool's own three come before the job
    assert torch.equal(load_file(settings.run_dir / "latents.safetensors")["latents"], latents)
    step, tensors, _ = run.last_snapshot()
    assert step == settings.steps
    assert torch.equal(StepState.from_tensors(tensors).latents, latents)
    assert len(list((settings.run_dir / "snapshots").iterdir())) == 2


@pytest.mark.ray
@pytest.mark.parametrize("strategy", ROUTES)
def test_every_route_on_ray_gives_the_bits_of_this_process(strategy, here, ray_pool, tmp_path):
    settings = demo_settings(tmp_path)
    plan = routed(settings, strategy, tuple(ROUTES[strategy].items()))
    (result,) = Executor(ray_pool, Events()).run([JobContext.open(settings)], plan)
    assert torch.equal(load_file(result.latents)["latents"], here[1])
    assert (read_frames(settings.output) == read_frames(here[0].output)).all()


@pytest.mark.ray
def test_planned_jobs_share_two_workers_with_the_bits_of_a_lone_job(here, ray_pool, tmp_path):
    jobs = [demo_settings(tmp_path, "one"), demo_settings(tmp_path, "two", guidance=1.0, seed=5)]
    plan = make_plan(jobs, [find_spec("demo")] * 2, POOL_CARDS)
    results = Executor(ray_pool, Events()).run([JobContext.open(job) for job in jobs], plan)
    assert [result.job for result in results] == ["one", "two"]
    assert torch.equal(load_file(results[0].latents)["latents"], here[1])
    alone = demo_settings(tmp_path, "alone", guidance=1.0, seed=5)
    (result,) = run_jobs([alone], "auto", Events())
    assert torch.equal(
        load_file(results[1].latents)["latents"], load_file(result.latents)["latents"]
    )


@pytest.mark.ray
def test_a_killed_worker_is_named_and_the_steps_done_are_kept(ray_pool, tmp_path):
    settings = demo_settings(tmp_path, steps=30)
    plan = make_plan([settings], [find_spec("demo")], [SPARE])

    def kill_at_step_three(event):
        if event.kind == "step" and event.step == 3:
            os.kill(ray_pool.get(ray_pool.control(SPARE.worker, "ping")), signal.SIGKILL)

    with pytest.raises(WorkerLost, match=SPARE.worker):
        Executor(ray_pool, kill_at_step_three).run([JobContext.open(settings)], plan)
    assert RunDir(settings.run_dir).last_snapshot()[0] >= 3
    assert not settings.output.exists()


def test_interrupt_stops_before_the_next_block_and_leaves_no_partial_file(tmp_path):
    settings = demo_settings(tmp_path)

    def interrupt(event):
        if event.kind == "frames":
            raise KeyboardInterrupt

    with pytest.raises(Cancelled):
        run_jobs([settings], "auto", interrupt)
    assert not list(tmp_path.glob("*.mp4"))
    assert (settings.run_dir / "latents.safetensors").exists()


def test_a_damaged_model_fails_before_a_worker_starts(tmp_path):
    (tmp_path / "model").mkdir()
    events = Events()
    with pytest.raises(WeightError, match=r"model_index\.json"):
        run_jobs([demo_settings(tmp_path, model=str(tmp_path / "model"))], "auto", events)
    assert not events
