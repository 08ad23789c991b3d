"""Time and memory of our Wan transformer over diffusers', same weights, one process.

    python benchmarks/against_diffusers.py                 # everything: about 45 minutes on 2 cores
    python benchmarks/against_diffusers.py --only demo     # the cases whose name contains "demo"

A turn is what a step of a job costs: the cond and the uncond forward, ours in one call of
`BlockRunner` (a worker's own path), diffusers' in two calls. The prompts have 60 rows and 452 rows
of padding unless a case says otherwise. Results are merged by case into
results/against_diffusers.json; benchmarks/README.md says what they mean.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from measure import machine, paired, shares, table
from torch import Tensor

from reelpool.models import keys
from reelpool.models.files import open_model
from reelpool.models.presets import PRESETS
from reelpool.models.registry import DEMO_FOLDER
from reelpool.models.spec import LatentShape, NumericsProfile, TransformerSpec
from reelpool.models.weights import RenamedSource, TensorInfo
from reelpool.runtime.block_runner import BlockRunner, ForwardInput
from reelpool.runtime.denoise import denoise
from reelpool.runtime.device import cpu_card
from reelpool.runtime.meter import peak_of
from reelpool.runtime.noise import initial_noise
from reelpool.runtime.schedule import make_schedule
from reelpool.runtime.solver import start
from reelpool.runtime.stages import CardStages
from reelpool.runtime.types import BlockCall, BlockRange, DecodeCall, ModelRef
from reelpool.runtime.wire import pack, unpack

RESULTS = Path(__file__).parent / "results" / "against_diffusers.json"
SMALL = PRESETS["wan2.1-t2v-1.3b"].transformer
SHAPES = {1280: LatentShape(16, 5, 32, 32), 7168: LatentShape(16, 7, 64, 64)}
FP32_PARTS = ("time_embedder", "scale_shift_table", "norm2")  # what diffusers keeps in float32
TIMESTEP = 500.0
TARGETS = {"time at 1280": 0.9, "time at 7168": 1.0, "memory at 7168": 0.6}


@dataclass(frozen=True)
class Case:
    """One measurement of the random 1.3B geometry.

    layers: blocks that are run; a forward of the real model runs 30.
    rows: rows of the prompt that are not padding.
    """

    tokens: int
    dtype: str
    layers: int
    rounds: int
    rows: int = 60
    threads: int = 2
    profiled: bool = False

    @property
    def name(self) -> str:
        """Key in the results."""
        return f"1.3B {self.tokens} {self.dtype} {self.rows} rows {self.threads} threads"


def cases() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        yield Case(1280, dtype, layers=30, rounds=3, profiled=True)
        yield Case(1280, dtype, layers=8, rounds=3, threads=1)
        yield Case(1280, dtype, layers=8, rounds=3, rows=512)
        yield Case(7168, dtype, layers=2, rounds=3, profiled=True)
        yield Case(7168, dtype, layers=2, rounds=2, threads=1)
        yield Case(7168, dtype, layers=2, rounds=2, rows=512)


class StateDict:
    """A WeightSource over a diffusers model's own tensors: both sides share their storage."""

    where = "memory"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape."""
        tensor = self._tensors[name]
        return TensorInfo(name, self.where, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)

    def get(self, name: str) -> Tensor:
        """The tensor itself."""
        return self._tensors[name]

    matrix = get


class Step:
    """One step of a job, computed by both."""

    def __init__(
        self,
        spec: TransformerSpec,
        model: WanTransformer3DModel,
        shape: LatentShape,
        numerics: NumericsProfile,
        prompts: tuple[Tensor, Tensor],
    ) -> None:
        self._model, self._dtype = model, getattr(torch, numerics.dtype)
        self._blocks = BlockRange(0, spec.num_layers, spec.num_layers)
        names = keys.transformer_names_from_diffusers(model.state_dict())
        source = RenamedSource(StateDict(model.state_dict()), names)
        self.runner = BlockRunner(spec, source, numerics, torch.device("cpu"))
        self.runner.load(self._blocks)
        self._latents = initial_noise(1, shape)
        self._prompts = prompts
        timesteps = torch.full((shape.frames,), TIMESTEP)
        self._forwards = [
            ForwardInput(name, prompt, shape, self._latents, timesteps)
            for name, prompt in zip(("cond", "uncond"), prompts, strict=True)
        ]

    def ours(self) -> list[Tensor]:
        """Both velocities, in one call as a worker gets it."""
        return self.runner.run(self._blocks, self._forwards)

    @torch.inference_mode()
    def theirs(self) -> list[Tensor]:
        """Both velocities, in two calls as WanPipeline makes them."""
        latents, step = self._latents.to(self._dtype), torch.tensor([TIMESTEP])
        return [
            self._model(latents, step, prompt[None].to(self._dtype), return_dict=False)[0]
            for prompt in self._prompts
        ]

    def cache_bytes(self, total_layers: int) -> int:
        """Bytes our side keeps between steps, for a model of `total_layers` blocks."""
        layers = self._blocks.total
        self.runner.drop_caches()
        self.runner.run(BlockRange(0, 1, layers), self._forwards)
        one = self.runner.cache_bytes
        self.ours()
        return one + (self.runner.cache_bytes - one) // (layers - 1) * (total_layers - 1)


def random_model(spec: TransformerSpec, dtype: torch.dtype) -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=spec.num_heads,
        attention_head_dim=spec.head_dim,
        ffn_dim=spec.ffn_dim,
        num_layers=spec.num_layers,
    ).eval()
    for name, parameter in model.named_parameters():
        if not any(part in name for part in FP32_PARTS):
            parameter.data = parameter.data.to(dtype)
    return model


def random_prompts(spec: TransformerSpec, rows: int) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, 512, spec.text_dim).unbind()
    first[rows:] = second[rows:] = 0
    return first, second


def measure(case: Case) -> dict[str, Any]:
    """Memory, time and, if asked for, where the time goes."""
    spec = TransformerSpec(**{**asdict(SMALL), "num_layers": case.layers})
    prompts = random_prompts(spec, case.rows)
    model = random_model(spec, getattr(torch, case.dtype))
    step = Step(spec, model, SHAPES[case.tokens], NumericsProfile(dtype=case.dtype), prompts)
    record = {**asdict(case), **measure_step(step, SMALL.num_layers, case.threads, case.rounds)}
    if case.profiled:
        record["where"] = {"ours": shares(step.ours), "diffusers": shares(step.theirs)}
    return record


def measure_step(step: Step, layers: int, threads: int, rounds: int) -> dict[str, Any]:
    """Both sides' memory and answers, then their time.

    Memory is the peak of a step without weights. It does not depend on the number of blocks: each
    begins and ends with the residual stream alone. What we keep between steps is there before ours
    begins, where the meter does not see it; it is added, for all `layers` of the real model.
    """
    torch.set_num_threads(threads)
    caches = step.cache_bytes(layers)
    answers: list[Tensor] = []
    ours = peak_of(lambda: answers.append(step.ours()[0].float()))
    theirs = peak_of(lambda: answers.append(step.theirs()[0].float()))
    return {
        "largest_velocity": answers[1].abs().max().item(),
        "largest_difference": (answers[0] - answers[1]).abs().max().item(),
        "memory": {
            "ours": ours.live_bytes + caches,
            "of_that_caches": caches,
            "diffusers": theirs.live_bytes,
            "ratio": round((ours.live_bytes + caches) / theirs.live_bytes, 4),
            "process_growth_ours": ours.process_bytes,
            "process_growth_diffusers": theirs.process_bytes,
        },
        "time": paired(step.ours, step.theirs, rounds, threads).as_json(),
    }


def demo_pipeline() -> WanPipeline:
    # all is float32 here; with types to keep, loading a transformer would want accelerate
    WanTransformer3DModel._keep_in_fp32_modules = None
    pipeline = WanPipeline.from_pretrained(DEMO_FOLDER)
    pipeline.text_encoder.float()  # transformers loads the stored type
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_demo_step(threads: int, rounds: int) -> dict[str, Any]:
    """One step of the demo model: 80 tokens."""
    files = open_model("demo")
    defaults = files.spec.defaults
    shape = files.spec.latent_shape(defaults.width, defaults.height, defaults.frames)
    pipeline = demo_pipeline()
    prompts = pipeline.encode_prompt("a red ball bounces over a gray background", "")
    step = Step(
        files.spec.transformer,
        pipeline.transformer,
        shape,
        NumericsProfile(),
        tuple(prompt[0] for prompt in prompts),
    )
    return measure_step(step, files.spec.transformer.num_layers, threads, rounds)


def measure_demo_video(threads: int, rounds: int) -> dict[str, Any]:
    """Latents and frames of a whole job of the demo model, text encoding included."""
    pipeline, prompt = demo_pipeline(), "a red ball bounces over a gray background"
    defaults = open_model("demo").spec.defaults
    stages = CardStages(cpu_card(0))

    def ours() -> Tensor:
        return our_video(stages, prompt)

    def theirs() -> Tensor:
        return pipeline(
            prompt,
            "",
            height=defaults.height,
            width=defaults.width,
            num_frames=defaults.frames,
            num_inference_steps=defaults.steps,
            guidance_scale=defaults.guidance,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).frames[0]

    torch.set_num_threads(threads)
    difference = (ours().float() / 255 - torch.from_numpy(theirs())).abs().max().item()
    return {
        "largest_pixel_difference": difference,
        "time": paired(ours, theirs, rounds, threads).as_json(),
    }


def our_video(stages: CardStages, prompt: str) -> Tensor:
    """(T, H, W, 3) uint8 by the calls a worker gets."""
    files = open_model("demo")
    defaults = files.spec.defaults
    shape = files.spec.latent_shape(defaults.width, defaults.height, defaults.frames)
    model = ModelRef("demo", files.digest, NumericsProfile())
    layers = files.spec.transformer.num_layers
    call = BlockCall(model, "job", 0, ("cond", "uncond"), BlockRange(0, layers, layers), shape)
    prompts = (stages.encode_text(model, prompt), stages.encode_text(model, ""))
    schedule = make_schedule(defaults.solver, defaults.steps, defaults.shift)
    state = start(schedule, initial_noise(0, shape))
    steps = denoise("job", schedule, state, (defaults.guidance,) * defaults.steps, seed=0)
    request = next(steps)
    while True:
        inputs = pack({"latents": request.latents, "timesteps": request.timesteps})
        tensors, _ = unpack(stages.run_blocks(call, inputs, prompts))
        try:
            request = steps.send({key: tensors[f"velocity.{key.branch}"] for key in request.keys})
        except StopIteration as stop:
            latents = pack({"latents": stop.value.latents})
            break
    decode = DecodeCall(model, "job", 0, shape.frames)
    frames = unpack(stages.decode(decode, latents))[0]["frames"]
    stages.end_stream("job")
    return frames


def report(results: dict[str, Any]) -> str:
    """The results as a table."""
    rows = []
    for name, record in results.items():
        when, memory = record["time"], record.get("memory", {})
        rows.append(
            (
                name,
                record.get("layers", "all"),
                f"{when['ours']:.3f}",
                f"{when['theirs']:.3f}",
                f"{when['ratio']:.3f} ({when['low']:.3f}-{when['high']:.3f})",
                *(f"{memory[k] / 2**20:.1f}" if memory else "" for k in ("ours", "diffusers")),
                f"{memory['ratio']:.3f}" if memory else "",
                f"{when['load']:.1f}",
            )
        )
    header = ("case", "blocks", "ours s", "theirs s", "time ratio", "ours MiB", "theirs MiB")
    return table(rows, (*header, "memory ratio", "load"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    only = parser.parse_args().only
    warnings.filterwarnings("ignore", category=FutureWarning)
    measured = {
        "demo step 2 threads": lambda: measure_demo_step(2, 41),
        "demo step 1 thread": lambda: measure_demo_step(1, 41),
        "demo video 2 threads": lambda: measure_demo_video(2, 5),
        "demo video 1 thread": lambda: measure_demo_video(1, 5),
        **{case.name: lambda case=case: measure(case) for case in cases()},
    }
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"results": {}}
    for name in (name for name in measured if only in name):
        record = measured[name]()
        stored["results"][name] = {**record, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
        stored = {"machine": machine(), "targets": TARGETS, "results": stored["results"]}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
        print(report({name: stored["results"][name]}), flush=True)
    print(report({name: stored["results"][name] for name in measured if name in stored["results"]}))


if __name__ == "__main__":
    main()
