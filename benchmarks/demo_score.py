"""Scores the demo model: does a video show what its caption says?

Generates held-out captions (combinations of colour, shape and motion never trained on), lets the
automatic judge (`reelpool.models.demo.judge`) tell what each video shows, and counts. Beside it
stand the judge's verdicts on the drawn clips of the same captions and on their reconstructions by
the VAE: what could be reached at best. Writes benchmarks/results/demo_score.json and, with the
model's default settings, the contact sheet models/demo/sheet.png.

    python benchmarks/demo_score.py                     through reelpool, the model's defaults
    python benchmarks/demo_score.py --with diffusers    through WanPipeline (needs accelerate)
    python benchmarks/demo_score.py --guidance 4 --clips 48 --dry-run
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import machine, table

from reelpool.models.demo import clips
from reelpool.models.demo.clips import ClipParams
from reelpool.models.demo.judge import Scores, score
from reelpool.models.files import open_model
from reelpool.models.registry import model_folder
from reelpool.models.spec import ModelDefaults, NumericsProfile
from reelpool.models.text import TextEncoder
from reelpool.models.wan_vae import load_vae
from reelpool.runtime.block_runner import BlockRunner, ForwardInput
from reelpool.runtime.denoise import denoise
from reelpool.runtime.noise import initial_noise
from reelpool.runtime.schedule import make_schedule
from reelpool.runtime.solver import start
from reelpool.runtime.types import BlockRange, ForwardKey

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "demo_score.json"
SHEET = ROOT / "models" / "demo" / "sheet.png"
FIRST_SEED = 9000
SHEET_ROWS, SHEET_STEP, SHEET_LABEL = 12, 2, 12
SHEET_LEVEL = 12  # colours are rounded to multiples of this: a third of the bytes
TARGETS = {"colour": 0.95, "background": 0.95, "motion": 0.95, "shape": 0.78}

Generate = Callable[[list[str], list[int]], list[Tensor]]
"""Captions and their seeds to videos, (T, H, W, 3) in 0..1 each."""


@dataclass(frozen=True)
class Row:
    """One line of the result: what was judged, and how."""

    what: str
    scores: Scores
    strict_shape: float
    seconds: float


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    settings = settings_of(args)
    params = [
        clips.sample_clip(random.Random(FIRST_SEED + i), held_out=True) for i in range(args.clips)
    ]
    drawn = [to_video(clips.render(clip, settings.frames)) for clip in params]
    rows = [judge_row("drawn clips", lambda: drawn, params)]
    rows.append(
        judge_row("their VAE reconstructions", lambda: reconstruct(args.model, drawn), params)
    )
    generate = GENERATORS[args.generator](args.model, settings)
    captions = [clips.caption(clip) for clip in params]
    seeds = [args.seed + i for i in range(len(captions))]
    videos: list[Tensor] = []
    rows.append(
        judge_row("generated", lambda: videos.extend(generate(captions, seeds)) or videos, params)
    )
    report(rows, settings)
    if args.dry_run:
        return
    write_results(rows, settings, args)
    if settings == open_model(args.model).spec.defaults:
        write_sheet(videos, captions, args.sheet)
        print(f"wrote {args.sheet}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--with", dest="generator", choices=sorted(GENERATORS), default="reelpool")
    parser.add_argument("--model", default="demo", help="model folder")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    for name in ("guidance", "shift"):
        parser.add_argument(f"--{name}", type=float, help="instead of the model's default")
    for name in ("steps", "frames"):
        parser.add_argument(f"--{name}", type=int, help="instead of the model's default")
    parser.add_argument("--solver", help="instead of the model's default")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sheet", type=Path, default=SHEET)
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> ModelDefaults:
    """The model's defaults with what the command line says instead."""
    names = ("guidance", "shift", "steps", "frames", "solver")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(open_model(args.model).spec.defaults, **changes)


def with_reelpool(model: str, settings: ModelDefaults) -> Generate:
    """Through the product's own text encoder, denoising loop, blocks, solver and VAE."""
    files, cpu = open_model(model), torch.device("cpu")
    spec, numerics = files.spec, NumericsProfile()
    text = TextEncoder(spec.text, files.text_encoder, files.tokenizer, torch.float32, cpu)
    runner = BlockRunner(spec.transformer, files.transformer, numerics, cpu)
    vae = load_vae(spec.vae, files.vae, torch.float32, cpu)
    blocks = BlockRange(0, spec.transformer.num_layers, spec.transformer.num_layers)
    shape = spec.latent_shape(settings.width, settings.height, settings.frames)
    schedule = make_schedule(settings.solver, settings.steps, settings.shift)

    def generate_one(caption: str, seed: int) -> Tensor:
        prompts = {"cond": caption, "uncond": settings.negative}
        embeds = {branch: text.encode(prompt) for branch, prompt in prompts.items()}
        state = start(schedule, initial_noise(seed, shape))
        loop = denoise("score", schedule, state, (settings.guidance,) * settings.steps, seed)
        answers: dict[ForwardKey, Tensor] | None = None
        while True:
            try:
                request = loop.send(answers) if answers is not None else next(loop)
            except StopIteration as stop:
                return to_video(vae.decode(stop.value.latents)[0][0])
            forwards = [
                ForwardInput(
                    prompts[key.branch],
                    embeds[key.branch],
                    shape,
                    request.latents,
                    request.timesteps,
                )
                for key in request.keys
            ]
            answers = dict(zip(request.keys, runner.run(blocks, forwards), strict=True))

    def generate(captions: list[str], seeds: list[int]) -> list[Tensor]:
        with torch.inference_mode():
            return [generate_one(*pair) for pair in zip(captions, seeds, strict=True)]

    return generate


def with_diffusers(model: str, settings: ModelDefaults) -> Generate:
    """Through diffusers' WanPipeline, in batches; the seed of a batch is that of its first clip."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    if settings.solver != "unipc":
        raise SystemExit("--with diffusers: only the folder's own solver, unipc, can be used")
    pipeline = WanPipeline.from_pretrained(model_folder(model))
    pipeline.text_encoder.float()  # transformers keeps the stored bfloat16, diffusers does not
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=settings.shift
    )

    def generate(captions: list[str], seeds: list[int]) -> list[Tensor]:
        videos: list[Tensor] = []
        for first in range(0, len(captions), 12):
            made = pipeline(
                captions[first : first + 12],
                height=settings.height,
                width=settings.width,
                num_frames=settings.frames,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                generator=torch.Generator().manual_seed(seeds[first]),
                output_type="pt",
            ).frames
            videos.extend(made.permute(0, 1, 3, 4, 2))
        return videos

    return generate


GENERATORS = {"reelpool": with_reelpool, "diffusers": with_diffusers}


def to_video(frames: Tensor) -> Tensor:
    """(3, T, H, W) in -1..1 to (T, H, W, 3) in 0..1."""
    return ((frames + 1) / 2).permute(1, 2, 3, 0)


@torch.inference_mode()
def reconstruct(model: str, videos: list[Tensor]) -> list[Tensor]:
    """What the VAE makes of videos."""
    files = open_model(model)
    vae = load_vae(files.spec.vae, files.vae, torch.float32, torch.device("cpu"))
    frames = torch.stack([video.permute(3, 0, 1, 2) * 2 - 1 for video in videos])
    return [to_video(vae.decode(vae.encode(part)[0])[0][0]) for part in frames.split(1)]


def judge_row(what: str, make: Callable[[], list[Tensor]], params: list[ClipParams]) -> Row:
    began = time.process_time()
    videos = make()
    seconds = time.process_time() - began
    strict = score(videos, params, is_strict=True).rates["shape"]
    return Row(what, score(videos, params), strict, seconds)


def report(rows: list[Row], settings: ModelDefaults) -> None:
    names = ["colour", "background", "motion", "shape", "all"]
    cells = [
        [row.what, *(f"{row.scores.rates[name]:.3f}" for name in names), f"{row.strict_shape:.3f}"]
        for row in rows
    ]
    print(settings)
    print(table(cells, ["", *names, "shape by sharp outlines"]))
    generated = rows[-1]
    short = [name for name, goal in TARGETS.items() if generated.scores.rates[name] < goal]
    print("all targets met" if not short else "below target: " + ", ".join(short))
    print(f"{generated.seconds / generated.scores.num_clips:.2f} cpu-s a video")
    for caption, wrong in generated.scores.misses:
        print("  ", caption, wrong)


def write_results(rows: list[Row], settings: ModelDefaults, args: argparse.Namespace) -> None:
    content = {
        "what": "shares of held-out captions whose video shows them, by the automatic judge",
        "machine": {**machine(), "threads": args.threads},
        "generator": args.generator,
        "model_digest": open_model(args.model).digest,
        "settings": {
            name: getattr(settings, name)
            for name in ("width", "height", "frames", "steps", "guidance", "shift", "solver")
        },
        "clips": rows[-1].scores.num_clips,
        "cpu_seconds_a_video": round(rows[-1].seconds / rows[-1].scores.num_clips, 3),
        "targets": TARGETS,
        "rates": {
            row.what: {
                **{name: round(rate, 4) for name, rate in row.scores.rates.items()},
                "shape by sharp outlines": round(row.strict_shape, 4),
            }
            for row in rows
        },
        "misses": [{"caption": text, "seen": seen} for text, seen in rows[-1].scores.misses],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


def write_sheet(videos: list[Tensor], captions: list[str], path: Path) -> None:
    """Every second frame of the first videos, each row under its caption."""
    shown = videos[:SHEET_ROWS]
    count = len(range(0, shown[0].shape[0], SHEET_STEP))
    height, width = shown[0].shape[1:3]
    row_height = height + SHEET_LABEL + 2
    sheet = Image.new("RGB", (count * (width + 2), row_height * len(shown)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (video, caption) in enumerate(zip(shown, captions, strict=False)):
        top = row * row_height
        draw.text((2, top), caption, fill="black")
        levels = (video[::SHEET_STEP].clamp(0, 1) * 255 / SHEET_LEVEL).round() * SHEET_LEVEL
        frames = levels.clamp(0, 255).byte().numpy()
        for column, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (column * (width + 2), top + SHEET_LABEL))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main()
