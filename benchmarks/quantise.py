"""What quantising costs: videos of the demo model from quantised files against those from its own.

Held-out captions, each with its own seed, go through the product's text encoder, denoising loop and
VAE in float32, once with the demo's own weights (bfloat16) and once with each of the files that
`reelpool quantize` writes. SSIM loss is 1 - SSIM. A few clips rule the mean: rounding takes their
noise to another path or phase of the same motion (q5_0: stripes half a period off, 0.49 for one of
32 clips); hence the median beside it.

    python benchmarks/quantise.py [--clips N] [--only q8_0,fp8] [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from demo_score import FIRST_SEED, with_reelpool
from measure import machine, table

from reelpool.models.demo import clips
from reelpool.models.files import open_model
from reelpool.models.quantise import Report, write_quantised
from reelpool.models.quantise_plan import plan_quantised
from reelpool.models.quantise_rules import TARGETS, Target
from reelpool.models.registry import DEMO_FOLDER
from reelpool.runtime.quality import psnr, ssim

RESULTS = Path(__file__).resolve().parent / "results" / "quantise.json"
GOALS = {"q8_0": 0.002, "q5_1": 0.015, "q5_0": 0.015, "q4_1": 0.05, "q4_0": 0.05}
STEM = "diffusion_pytorch_model"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    captions = [
        clips.caption(clips.sample_clip(random.Random(FIRST_SEED + i), held_out=True))
        for i in range(args.clips)
    ]
    full = videos_of(DEMO_FOLDER, captions)
    rows = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            report = quantised_copy(Path(folder), TARGETS[name])
            rows.append(compare(report, full, videos_of(Path(folder), captions)))
        print(json.dumps(rows[-1]), flush=True)
    show(rows)
    if not args.dry_run:
        write_results(rows, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(TARGETS))
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    return parser.parse_args()


def quantised_copy(folder: Path, target: Target) -> Report:
    """A folder with the demo's parts, its transformer quantised."""
    for part in DEMO_FOLDER.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    (folder / "transformer").mkdir()
    config = (DEMO_FOLDER / "transformer" / "config.json").read_text()
    (folder / "transformer" / "config.json").write_text(config)
    out = folder / "transformer" / f"{STEM}{target.suffix}"
    return write_quantised(plan_quantised(DEMO_FOLDER / "transformer", out, target))


def videos_of(folder: Path, captions: list[str]) -> list[Tensor]:
    """Videos, (T, H, W, 3) in 0..1 each."""
    generate = with_reelpool(str(folder), open_model(str(folder)).spec.defaults)
    return [video.clamp(0, 1) for video in generate(captions, list(range(len(captions))))]


def compare(report: Report, full: list[Tensor], quantised: list[Tensor]) -> dict[str, Any]:
    pairs = list(zip(full, quantised, strict=True))
    losses = [1 - ssim(*pair) for pair in pairs]
    noises = [psnr(*pair) for pair in pairs]
    return {
        "type": report.after,
        "bytes": report.bytes_after,
        "share_of_bf16": round(report.bytes_after / report.bytes_before, 4),
        "ssim_loss_mean": round(statistics.fmean(losses), 6),
        "ssim_loss_median": round(statistics.median(losses), 6),
        "ssim_loss_worst": round(max(losses), 6),
        "psnr_mean": round(statistics.fmean(noises), 2),
        "psnr_worst": round(min(noises), 2),
        "goal": GOALS.get(report.after),
    }


def show(rows: list[dict[str, Any]]) -> None:
    header = list(rows[0])
    print(table([[row[name] for name in header] for row in rows], header))
    short = [row["type"] for row in rows if row["ssim_loss_mean"] > (row["goal"] or 1)]
    print("over the goal: " + ", ".join(short) if short else "all goals met")


def write_results(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    files = open_model("demo")
    content = {
        "what": "videos of the demo model from quantised files against those from bfloat16 ones, "
        "all computed in float32",
        "machine": {**machine(), "threads": args.threads},
        "command": " ".join(["python", "benchmarks/quantise.py", *sys.argv[1:]]),
        "model_digest": files.digest,
        "clips": args.clips,
        "settings": {
            name: getattr(files.spec.defaults, name)
            for name in ("width", "height", "frames", "steps", "guidance", "shift", "solver")
        },
        "results": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
