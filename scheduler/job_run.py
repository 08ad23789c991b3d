"""One job as a generator: submits calls, yields the references it needs next, ends with a result.

The executor resumes it with the values of those references. All state of the job (latents, solver
history, step, frames written) lives here and in the run directory; workers hold none that matters.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.files import ModelFiles, open_model
from ..models.spec import LatentShape
from ..runtime.denoise import StepRequest, denoise
from ..runtime.noise import initial_noise
from ..runtime.results import RunDir
from ..runtime.solver import Schedule, StepState, make_schedule, start
from ..runtime.types import BlockCall, Branch, DecodeCall, ForwardKey, ModelRef
from ..runtime.video import VideoWriter
from ..runtime.wire import Packet, pack, unpack
from .events import (
    Emit,
    Event,
    FramesWritten,
    JobFinished,
    JobStarted,
    StageFinished,
    StageStarted,
    StepFinished,
)
from .job import Settings
from .plan import JobPlan
from .pool import Ref, WorkerPool

JobRun = Generator[list[Ref], list[object], JobFinished]
Steps = Generator[list[Ref], list[object], Tensor]

DECODE_LATENTS = 4  # latent frames of a decode call: small enough that frames arrive steadily
DECODE_AHEAD = 2  # decode calls in flight, so that the card works while frames are written


@dataclass(frozen=True)
class JobContext:
    """A job with its model opened."""

    settings: Settings
    files: ModelFiles

    @classmethod
    def open(cls, settings: Settings) -> JobContext:
        """Open and check the job's model; raises WeightError."""
        return cls(settings, open_model(settings.model))

    @property
    def shape(self) -> LatentShape:
        """Size of the job's latents."""
        settings = self.settings
        return self.files.spec.latent_shape(settings.width, settings.height, settings.frames)

    @property
    def schedule(self) -> Schedule:
        """The job's noise levels.

        LCM gets the evenly spaced grid that few-step models were distilled on (1, .75, .5, .25 for
        4 steps, before the shift); its own default grid ends too early for them.
        """
        job = self.settings
        sigmas = None
        if job.solver == "lcm":
            sigmas = [1 - index / job.steps for index in range(job.steps)]
        return make_schedule(job.solver, job.steps, job.shift, sigmas)


def run_job(context: JobContext, plan: JobPlan, pool: WorkerPool, emit: Emit) -> JobRun:
    """Run a job from prompt to video.

    Yields:
        References; send their values back in the same order.
    Returns:
        What the job made.
    Raises:
        ReelpoolError: whatever ends the job early; the run directory keeps its last steps.
    """
    return (yield from _Job(context, plan, pool, emit).run())


class _Job:
    """The stages of one job. Owned by the driver thread."""

    def __init__(self, context: JobContext, plan: JobPlan, pool: WorkerPool, emit: Emit) -> None:
        self._context, self._plan, self._pool = context, plan, pool
        self._settings = context.settings
        self._id = context.settings.id
        self._model = ModelRef(context.settings.model, context.files.digest, plan.numerics)
        self._run_dir = RunDir(context.settings.run_dir)
        self._emit_all = emit
        self._seconds: dict[str, float] = {}

    def run(self) -> JobRun:
        began = time.perf_counter()
        settings = self._settings
        self._run_dir.write_json("job.json", settings.as_json())
        self._emit(JobStarted(self._id, str(settings.run_dir), settings.as_json()))
        prompts = yield from self._load_and_encode()
        latents = yield from self._denoise(prompts)
        path = self._save_latents(latents)
        yield from self._decode(latents)
        result = JobFinished(
            job=self._id,
            video=str(settings.output),
            run_dir=str(settings.run_dir),
            seed=settings.seed,
            num_frames=settings.frames,
            width=settings.width * settings.zoom,
            height=settings.height * settings.zoom,
            fps=settings.fps,
            seconds=time.perf_counter() - began,
            stage_seconds=dict(self._seconds),
            latents=path,
        )
        self._emit(result)
        return result

    def _load_and_encode(self) -> Generator[list[Ref], list[object], dict[Branch, Ref]]:
        """Load block ranges and encode prompts, on all workers at once."""
        began = time.perf_counter()
        worker = self._plan.stage_worker("encode_text")
        prompts: dict[Branch, Ref] = {}
        texts: dict[Branch, str] = {
            "cond": self._settings.prompt,
            "uncond": self._settings.negative,
        }
        self._emit(StageStarted(self._id, "encode_text", (worker,)))
        for branch, _ in self._plan.routes:
            prompts[branch] = self._submit(worker, "encode_text", self._model, texts[branch])
        self._emit(StageStarted(self._id, "load", self._plan.workers))
        ranges = dict.fromkeys((call.worker, call.blocks) for call in self._plan.calls)
        loads = [self._submit(name, "load_blocks", self._model, blocks) for name, blocks in ranges]
        yield list(prompts.values())
        self._finish("encode_text", (worker,), began)
        reports = yield loads
        held = sum(cast(dict[str, float], report)["bytes"] for report in reports)
        self._finish("load", self._plan.workers, began, f"{held / 2**20:.0f} MiB on the cards")
        return prompts

    def _denoise(self, prompts: Mapping[Branch, Ref]) -> Steps:
        began = time.perf_counter()
        settings, schedule = self._settings, self._context.schedule
        state = start(schedule, initial_noise(settings.seed, self._context.shape))
        steps = denoise(self._id, schedule, state, settings.guidance, settings.seed)
        self._emit(StageStarted(self._id, "denoise", self._plan.workers))
        request = next(steps)
        while True:
            step_began = time.perf_counter()
            answers = self._submit_step(request, prompts)
            values = yield list(answers)
            velocities: dict[ForwardKey, Tensor] = {}
            for branches, packet in zip(answers.values(), values, strict=True):
                tensors, _ = unpack(cast(Packet, packet))
                for branch in branches:
                    key = ForwardKey(self._id, request.step_index, branch)
                    velocities[key] = tensors[f"velocity.{branch}"]
            try:
                request = steps.send(velocities)
            except StopIteration as stop:
                final = cast(StepState, stop.value)
                self._step_done(schedule.num_steps, final, step_began)
                self._finish("denoise", self._plan.workers, began)
                return final.latents
            self._step_done(request.step_index, request.state, step_began)

    def _submit_step(
        self, request: StepRequest, prompts: Mapping[Branch, Ref]
    ) -> dict[Ref, tuple[Branch, ...]]:
        """Walk the routes of a step: the references of its velocities, with their branches."""
        inputs = self._pool.put(pack({"latents": request.latents, "timesteps": request.timesteps}))
        latest: dict[tuple[Branch, ...], Ref] = {}
        answers: dict[Ref, tuple[Branch, ...]] = {}
        for planned in self._plan.calls:
            call = BlockCall(
                self._model,
                self._id,
                request.step_index,
                planned.branches,
                planned.blocks,
                self._context.shape,
            )
            texts = [prompts[branch] for branch in planned.branches]
            before = latest.get(planned.branches, inputs)
            ref = self._submit(planned.worker, "run_blocks", call, before, *texts)
            latest[planned.branches] = ref
            if planned.blocks.is_last:
                answers[ref] = planned.branches
        return answers

    def _decode(self, latents: Tensor) -> Generator[list[Ref], list[object], None]:
        """Decode in calls of a few latent frames, writing frames as they come."""
        began = time.perf_counter()
        worker = self._plan.stage_worker("decode")
        settings, total = self._settings, latents.shape[2]
        self._emit(StageStarted(self._id, "decode", (worker,)))
        whole = self._pool.put(pack({"latents": latents}))
        stream = f"{settings.run_dir.name}/{self._id}"
        starts = range(0, total, DECODE_LATENTS)
        calls = [
            DecodeCall(self._model, stream, first, min(first + DECODE_LATENTS, total))
            for first in starts
        ]
        comment = {"reelpool": json.dumps(settings.as_json())}
        size = (settings.width, settings.height)
        with VideoWriter(settings.output, *size, settings.fps, comment, settings.zoom) as writer:
            flying: list[Ref] = []
            for index in range(len(calls)):
                while len(flying) < DECODE_AHEAD and index + len(flying) < len(calls):
                    call = calls[index + len(flying)]
                    flying.append(self._submit(worker, "decode", call, whole))
                values = yield [flying.pop(0)]
                writer.write(unpack(cast(Packet, values[0]))[0]["frames"])
                self._emit(FramesWritten(self._id, writer.num_frames, settings.frames))
        yield [self._submit(worker, "end_stream", stream)]
        self._finish("decode", (worker,), began)

    def _save_latents(self, latents: Tensor) -> str:
        """Keep the latents before anything can fail; returns the path asked for, or ours."""
        own = self._run_dir.root / "latents.safetensors"
        targets = (
            [own] if self._settings.save_latents is None else [own, self._settings.save_latents]
        )
        for path in targets:
            partial = path.with_suffix(".partial")
            save_file({"latents": latents.to(torch.float32).contiguous()}, partial)
            partial.replace(path)
        return str(targets[-1])

    def _step_done(self, step: int, state: StepState, began: float) -> None:
        self._run_dir.snapshot(step, state.to_tensors())
        seconds = time.perf_counter() - began
        self._emit(StepFinished(self._id, step, self._settings.steps, seconds))

    def _submit(self, worker: str, method: str, *args: object) -> Ref:
        return self._pool.submit(worker, method, *args)

    def _finish(self, stage: str, workers: tuple[str, ...], began: float, note: str = "") -> None:
        seconds = time.perf_counter() - began
        self._seconds[stage] = seconds
        self._emit(StageFinished(self._id, stage, workers, seconds, note))

    def _emit(self, event: Event) -> None:
        self._run_dir.append_event({"time": time.time(), **event.as_json()})
        self._emit_all(event)
