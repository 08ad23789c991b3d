"""Real runs: in this process, and on one Ray cluster for the whole file."""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reelpool.errors import Cancelled, WeightError, WorkerLost
from reelpool.models.registry import DEMO_FOLDER, find_spec
from reelpool.runtime.device import cpu_card
from reelpool.runtime.results import RunDir
from reelpool.runtime.solver import StepState
from reelpool.runtime.types import BlockRange, LoraRef
from reelpool.runtime.video import read_frames, read_metadata
from reelpool.scheduler.executor import Executor, run_jobs
from reelpool.scheduler.job_run import JobContext
from reelpool.scheduler.open_pool import pool_card
from reelpool.scheduler.plan import Hop, JobPlan, Plan, group_calls
from reelpool.scheduler.planner import make_plan
from reelpool.scheduler.pool import InProcessPool
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
    base = make_plan([settings], [find_spec(settings.model)], POOL_CARDS).jobs[0]
    stages = (("encode_text", "worker-1"), ("encode_image", "worker-1"), ("decode", "worker-0"))
    calls, steps = group_calls(routes), base.expert_steps
    job = JobPlan(base.job, strategy, base.numerics, routes, calls, stages, steps)
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


def test_a_card_that_holds_a_part_of_the_blocks_gives_the_same_bits(here, tmp_path):
    """As planned for less memory than the model's weights: four of six blocks come by in turns."""
    settings = demo_settings(tmp_path)
    card = cpu_card(0, 33 * 2**20)
    pool = InProcessPool(card, torch.get_num_threads(), Events())
    try:
        cards = [pool_card(info.name, info.host, info.card) for info in pool.workers]
        plan = make_plan([settings], [find_spec("demo")], cards)
        ((_, memory),) = plan.jobs[0].memory
        assert memory.ring_slots == 2
        assert len(memory.resident_blocks) < 4
        assert memory.vae_tile == 0
        (result,) = Executor(pool, Events()).run([JobContext.open(settings)], plan)
        held = pool._worker._stages.held_bytes()["transformer"]
        whole = find_spec("demo").transformer.num_params * 4
        assert held < 0.95 * whole
        assert held <= dict(memory.peak_bytes)["denoise"]
    finally:
        pool.close()
    assert torch.equal(load_file(result.latents)["latents"], here[1])
    assert (read_frames(settings.output) == read_frames(here[0].output)).all()


@pytest.mark.ray
@pytest.mark.parametrize("strategy", ROUTES)
def test_every_route_on_ray_gives_the_bits_of_this_process(strategy, here, ray_pool, tmp_path):
    settings = demo_settings(tmp_path)
    plan = routed(settings, strategy, tuple(ROUTES[strategy].items()))
    (result,) = Executor(ray_pool, Events()).run([JobContext.open(settings)], plan)
    assert torch.equal(load_file(result.latents)["latents"], here[1])
    assert (read_frames(settings.output) == read_frames(here[0].output)).all()


@pytest.fixture(scope="module")
def image_models(tmp_path_factory):
    """Kind -> folder of a tiny model that takes images; beside them an image."""
    from tests.tiny_image_models import write_image_model

    root = tmp_path_factory.mktemp("image-models")
    pixels = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    return {kind: write_image_model(root / kind, kind) for kind in ("i2v-2.1", "i2v-2.2")}


def image_settings(folder, model, **changes):
    folder.mkdir(exist_ok=True)
    size = {"width": 48, "height": 32, "frames": 9, "image": model.parent / "image.png"}
    return demo_settings(folder, model=str(model), shift=5.0, **{**size, **changes})


@pytest.mark.ray
@pytest.mark.parametrize("kind", ["i2v-2.1", "i2v-2.2"])
def test_image_jobs_cut_and_split_on_ray_give_the_bits_of_this_process(
    kind, image_models, ray_pool, tmp_path
):
    """Features go to every range; the low-noise expert of 2.2 runs without guidance."""
    model = image_models[kind]
    experts = {"guidance_low": 1.0} if kind == "i2v-2.2" else {}
    settings = image_settings(tmp_path / "here", model, **experts)
    (expected,) = run_jobs([settings], "auto", Events())
    settings = image_settings(tmp_path / "ray", model, **experts)
    head, tail, whole = BlockRange(0, 1, 2), BlockRange(1, 2, 2), BlockRange(0, 2, 2)
    routes = (("cond", (Hop(A, head), Hop(B, tail))), ("uncond", (Hop(B, whole),)))
    events = Events()
    plan = routed(settings, "cut and split", routes)
    (result,) = Executor(ray_pool, events).run([JobContext.open(settings)], plan)
    latents = [load_file(each.latents)["latents"] for each in (expected, result)]
    assert torch.equal(*latents)
    assert latents[0].std() > 0.1
    stages = [event.stage for event in events if event.kind == "stage_finished"]
    loads = ["load"] * (1 + (kind == "i2v-2.2"))  # the low-noise expert, when its steps come
    assert stages == ["encode_text", "encode_image", *loads, "denoise", "decode"]


@pytest.mark.parametrize("kind", ["i2v-2.1", "i2v-2.2"])
def test_another_image_gives_another_video(kind, image_models, tmp_path):
    model, latents = image_models[kind], []
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (48, 32), colour).save(tmp_path / name / "image.png")
        settings = image_settings(tmp_path / name, model, image=tmp_path / name / "image.png")
        (result,) = run_jobs([settings], "auto", Events())
        latents.append(load_file(result.latents)["latents"])
    assert not torch.allclose(*latents, atol=1e-3)


def test_parts_named_by_the_user_reach_the_worker(here, tmp_path):
    """The demo model with a text encoder from another folder, then with one that cannot be."""
    other = shutil.copytree(DEMO_FOLDER / "text_encoder", tmp_path / "encoder")
    file = other / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    save_file({**tensors, name: tensors[name] * 1.5}, file)
    settings = demo_settings(tmp_path, parts=(("text_encoder", str(other)),))
    (result,) = run_jobs([settings], "auto", Events())
    assert not torch.allclose(load_file(result.latents)["latents"], here[1], atol=1e-3)
    vae = DEMO_FOLDER / "vae" / "diffusion_pytorch_model.safetensors"
    events = Events()
    with pytest.raises(WeightError):
        run_jobs([replace(settings, parts=(("text_encoder", str(vae)),))], "auto", events)
    assert not events


def test_a_lora_is_reported_and_one_for_another_model_refused_before_a_worker_starts(
    here, tmp_path
):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    layer = "diffusion_model.blocks.0.self_attn.q"
    width = find_spec("demo").transformer.dim
    for path, size in ((good, width), (bad, width + 8)):
        made = torch.Generator().manual_seed(1)
        down, up = (torch.randn(*shape, generator=made) for shape in ((2, size), (size, 2)))
        tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        save_file({**tensors, "lora_te_x.lora_down.weight": torch.zeros(2, 2)}, path)
    latents = {}
    for strength in (0.0, 0.5):
        settings = demo_settings(
            tmp_path, f"job-{strength}", loras=(LoraRef(str(good), strength, strength),)
        )
        events = Events()
        (result,) = run_jobs([settings], "auto", events)
        latents[strength] = load_file(result.latents)["latents"]
        (report,) = [event for event in events if event.kind == "lora"]
        assert (report.num_layers, len(report.unmatched)) == (1, 1)
        assert report.text.startswith(str(good))
    assert torch.equal(latents[0.0], here[1])
    assert not torch.allclose(latents[0.5], here[1], atol=1e-3)
    events = Events()
    with pytest.raises(WeightError, match=r"bad\.safetensors"):
        run_jobs([demo_settings(tmp_path, loras=(LoraRef(str(bad), 1.0, 1.0),))], "auto", events)
    assert not events


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


def test_ctrl_c_never_strikes_inside_the_pool(tmp_path):
    settings = demo_settings(tmp_path)
    calls = []

    class Interrupting(InProcessPool):
        def wait(self, refs, timeout_s):
            calls.append("began")
            os.kill(os.getpid(), signal.SIGINT)
            done = super().wait(refs, timeout_s)
            calls.append("ended")
            return done

    pool = Interrupting(cpu_card(0), 1, Events())
    card = pool_card("here", "here", cpu_card(0))
    plan = make_plan([settings], [find_spec("demo")], [card])
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Cancelled):
            Executor(pool, Events()).run([JobContext.open(settings)], plan)
    finally:
        pool.close()
    assert calls == ["began", "ended"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_damaged_model_fails_before_a_worker_starts(tmp_path):
    (tmp_path / "model").mkdir()
    events = Events()
    with pytest.raises(WeightError, match=r"model_index\.json"):
        run_jobs([demo_settings(tmp_path, model=str(tmp_path / "model"))], "auto", events)
    assert not events
