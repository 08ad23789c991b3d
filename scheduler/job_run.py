"""One job as a generator: submits calls, yields the references it needs next, ends with a result.

The executor resumes it with the values of those references. All state of the job (latents, solver
history, step, frames written) lives here and in the run directory; workers hold none that matters.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..models.files import ModelFiles, open_model
from ..models.lora import open_lora
from ..models.spec import LatentShape
from ..runtime.denoise import StepRequest, denoise
from ..runtime.guidance import needs_uncond
from ..runtime.noise import initial_noise
from ..runtime.results import RunDir
from ..runtime.schedule import Schedule
from ..runtime.solver import StepState, start
from ..runtime.still import read_still
from ..runtime.types import BlockCall, Branch, DecodeCall, ForwardKey, ImageCall, ModelRef
from ..runtime.video import VideoWriter
from ..runtime.wire import Packet, pack, unpack
from .events import (
    Emit,
    Event,
    FramesWritten,
    JobFinished,
    JobStarted,
    LoraReady,
    StageFinished,
    StageStarted,
    StepFinished,
)
from .job import Settings
from .plan import JobPlan, PlannedCall
from .planner import job_schedule
from .pool import Ref, WorkerPool

JobRun = Generator[list[Ref], list[object], JobFinished]
Steps = Generator[list[Ref], list[object], Tensor]

DECODE_LATENTS = 4  # latent frames of a decode call: small enough that frames arrive steadily
DECODE_AHEAD = 2  # decode calls in flight, so that the card works while frames are written


@dataclass(frozen=True)
class JobContext:
    """A job with its model opened, and its LoRAs matched to it."""

    settings: Settings
    files: ModelFiles
    loras: tuple[LoraReady, ...] = ()

    @classmethod
    def open(cls, settings: Settings) -> JobContext:
        """Open and check the job's model and LoRAs.

        Raises:
            WeightError: if a file cannot be used, or a LoRA is for another model.
        """
        files = open_model(settings.model, settings.parts)
        return cls(settings, files, tuple(_match_loras(settings, files)))

    @property
    def shape(self) -> LatentShape:
        """Size of the job's latents."""
        settings = self.settings
        return self.files.spec.latent_shape(settings.width, settings.height, settings.frames)

    @property
    def schedule(self) -> Schedule:
        """The job's noise levels."""
        return job_schedule(self.settings)

    def image_packet(self) -> Packet:
        """The job's images as decoded, for `encode_image`.

        Raises:
            ConfigError: if one cannot be read.
        """
        paths = {"first": self.settings.image, "last": self.settings.last_image}
        images = {k: torch.from_numpy(read_still(path)) for k, path in paths.items() if path}
        digest = hashlib.blake2b(digest_size=16)
        for name, image in images.items():
            digest.update(f"{name}:{tuple(image.shape)};".encode())
            digest.update(image.numpy().data)
        return pack(images, {"digest": digest.hexdigest()})


@dataclass(frozen=True)
class _Conditions:
    """What the forwards of a job are conditioned on.

    prompts: for each branch the packet of its prompt. image: the packet of the job's image, if any.
    first: the finished first latent frame, (1, C, 1, h, w), of models that take an image so.
    """

    prompts: Mapping[Branch, Ref]
    image: Ref | None
    first: Tensor | None


def _match_loras(settings: Settings, files: ModelFiles) -> Iterator[LoraReady]:
    for ref in settings.loras:
        report = open_lora(Path(ref.path)).match(files.spec.transformer)
        yield LoraReady(
            job=settings.id,
            path=ref.path,
            strength=ref.strength,
            strength_low=ref.strength_low,
            num_layers=len(report.layers),
            share=report.share,
            unmatched=tuple((entry.key, entry.reason) for entry in report.unmatched),
            text="\n".join(report.describe()),
        )


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
        settings, digest = context.settings, context.files.digest
        self._model = ModelRef(settings.model, digest, plan.numerics, settings.parts)
        self._scales = (settings.guidance, settings.guidance_low)
        self._run_dir = RunDir(context.settings.run_dir)
        self._emit_all = emit
        self._seconds: dict[str, float] = {}

    def run(self) -> JobRun:
        began = time.perf_counter()
        settings = self._settings
        self._run_dir.write_json("job.json", settings.as_json())
        self._emit(JobStarted(self._id, str(settings.run_dir), settings.as_json()))
        for lora in self._context.loras:
            self._emit(lora)
        conditions = yield from self._load_and_encode()
        latents = yield from self._denoise(conditions)
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

    def _load_and_encode(self) -> Generator[list[Ref], list[object], _Conditions]:
        """Load block ranges and encode prompts and images, on all workers at once."""
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
        image = self._begin_image() if self._settings.image else None
        loads = self._begin_load(self._plan.expert_of(0))
        yield list(prompts.values())
        self._finish("encode_text", (worker,), began)
        first = None
        if image is not None:
            (made,) = yield [image]
            self._finish("encode_image", (self._plan.stage_worker("encode_image"),), began)
            first = unpack(cast(Packet, made))[0].get("latent")
        yield from self._await_load(loads, began)
        return _Conditions(prompts, image, first)

    def _begin_image(self) -> Ref:
        worker, job = self._plan.stage_worker("encode_image"), self._settings
        self._emit(StageStarted(self._id, "encode_image", (worker,)))
        images = self._pool.put(self._context.image_packet())
        tile = self._plan.vae_tile
        call = ImageCall(self._model, job.width, job.height, job.frames, tile)
        return self._submit(worker, "encode_image", call, images)

    def _begin_load(self, expert: int) -> list[Ref]:
        """Have every worker load its block ranges of an expert, if it runs any with it."""
        self._emit(StageStarted(self._id, "load", self._plan.workers))
        has_uncond = needs_uncond(self._scales[expert])
        calls = [call for call in self._plan.calls if has_uncond or "cond" in call.branches]
        ranges = dict.fromkeys((call.worker, call.blocks) for call in calls)
        return [
            self._submit(
                name, "load_blocks", self._model, blocks, expert, self._plan.residency(name)
            )
            for name, blocks in ranges
        ]

    def _await_load(self, loads: list[Ref], began: float) -> Generator[list[Ref], list[object]]:
        reports = yield loads
        held = sum(cast(dict[str, float], report)["bytes"] for report in reports)
        self._finish("load", self._plan.workers, began, f"{held / 2**20:.0f} MiB on the cards")

    def _denoise(self, conditions: _Conditions) -> Steps:
        began = time.perf_counter()
        settings, schedule = self._settings, self._context.schedule
        noise = initial_noise(settings.seed, self._context.shape)
        state = start(schedule, noise, finished=conditions.first)
        guidance = [self._scales[self._plan.expert_of(step)] for step in range(schedule.num_steps)]
        steps = denoise(self._id, schedule, state, guidance, settings.seed)
        self._emit(StageStarted(self._id, "denoise", self._plan.workers))
        request, expert = next(steps), self._plan.expert_of(0)
        while True:
            step_began = time.perf_counter()
            if self._plan.expert_of(request.step_index) != expert:
                expert = self._plan.expert_of(request.step_index)
                yield from self._await_load(self._begin_load(expert), step_began)
                began += time.perf_counter() - step_began  # that time is the load's
                step_began = time.perf_counter()
            answers = self._submit_step(request, conditions)
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
        self, request: StepRequest, conditions: _Conditions
    ) -> dict[Ref, tuple[Branch, ...]]:
        """Walk the routes of a step: the references of its velocities, with their branches."""
        inputs = self._pool.put(pack({"latents": request.latents, "timesteps": request.timesteps}))
        wanted = {key.branch for key in request.keys}  # an expert may do without guidance
        latest: dict[tuple[Branch, ...], Ref] = {}
        answers: dict[Ref, tuple[Branch, ...]] = {}
        for planned in self._plan.calls:
            branches = tuple(branch for branch in planned.branches if branch in wanted)
            if not branches:
                continue
            call = self._block_call(request.step_index, planned, branches)
            packets = [conditions.prompts[branch] for branch in branches]
            if call.has_image:
                assert conditions.image is not None
                packets.append(conditions.image)
            before = latest.get(branches, inputs)
            ref = self._submit(planned.worker, "run_blocks", call, before, *packets)
            latest[branches] = ref
            if planned.blocks.is_last:
                answers[ref] = branches
        return answers

    def _block_call(
        self, step: int, planned: PlannedCall, branches: tuple[Branch, ...]
    ) -> BlockCall:
        """The call of one range: the first takes the image's channels, all its features."""
        spec = self._context.files.spec
        takes_image = planned.blocks.is_first or spec.image_encoder is not None
        return BlockCall(
            self._model,
            self._id,
            step,
            branches,
            planned.blocks,
            self._context.shape,
            expert=self._plan.expert_of(step),
            loras=self._settings.loras,
            has_image=spec.image == "concat" and takes_image,
            fps=self._settings.fps if spec.transformer.fps_embedding else None,
            residency=self._plan.residency(planned.worker),
        )

    def _decode(self, latents: Tensor) -> Generator[list[Ref], list[object], None]:
        """Decode in calls of a few latent frames, writing frames as they come."""
        began = time.perf_counter()
        worker = self._plan.stage_worker("decode")
        settings, total = self._settings, latents.shape[2]
        self._emit(StageStarted(self._id, "decode", (worker,)))
        whole = self._pool.put(pack({"latents": latents}))
        stream = f"{settings.run_dir.name}/{self._id}"
        starts = range(0, total, DECODE_LATENTS)
        tile = self._plan.vae_tile
        calls = [
            DecodeCall(self._model, stream, first, min(first + DECODE_LATENTS, total), tile)
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
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        self._emit(StageFinished(self._id, stage, workers, seconds, note))

    def _emit(self, event: Event) -> None:
        self._run_dir.append_event({"time": time.time(), **event.as_json()})
        self._emit_all(event)
