"""The commands that measure: what a forward takes besides its weights."""

from __future__ import annotations

import json as json_text
import subprocess
import sys
from importlib.util import find_spec as find_package
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelpool.cli.generate import Json, Model, Verbose
from reelpool.errors import ReelpoolError

if TYPE_CHECKING:
    from reelpool.runtime.activations import Activations

# Of the checkout; an installed reelpool has none, and then diffusers is not measured.
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "activations.py"
TIMEOUT_S = 600
SHOWN_PIECES = 6

bench_app = typer.Typer()


@bench_app.callback()
def about() -> None:
    """Measure what reelpool takes."""


@bench_app.command()
def activations(
    context: typer.Context,
    model: Model = "wan2.1-t2v-14b",
    size: Annotated[
        str | None, typer.Option(metavar="WxH", help="Width x height.", show_default="the model's")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Number of frames.", show_default="the model's")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="Compute type.")] = "bfloat16",
    head_groups: Annotated[
        int, typer.Option(min=1, max=1000, help="Groups of heads of the lean forward.")
    ] = 8,
    per_frame: Annotated[
        bool, typer.Option("--per-frame", help="Every latent frame has a timestep of its own.")
    ] = False,
    diffusers: Annotated[
        bool, typer.Option(help="Measure diffusers too, if it is installed beside a checkout.")
    ] = True,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say how much memory one forward takes besides the weights; needs neither card nor weights.

    Everything kept between forwards is counted, and a prompt that fills all rows. Lean: with the
    heads of attention computed in groups.
    """
    from reelpool.runtime import log

    log.setup()
    from reelpool.models.registry import find_spec
    from reelpool.scheduler.job import make_job, resolve

    given = {"size": size, "frames": frames, "dtype": dtype}
    job = make_job({"prompt": "-", "model": model} | {k: v for k, v in given.items() if v})
    spec = find_spec(model)
    settings = resolve(job, spec, need_image=False)

    from reelpool.models.spec import NumericsProfile
    from reelpool.runtime.activations import measure_forward

    shape = spec.latent_shape(settings.width, settings.height, settings.frames)
    whole, lean = (
        measure_forward(
            spec.transformer,
            shape,
            NumericsProfile(dtype=settings.dtype, head_groups=groups),
            per_frame=per_frame,
        )
        for groups in (1, head_groups)
    )
    theirs = None
    if diffusers:
        words = [f"{settings.width}x{settings.height}", str(settings.frames)]
        words += ["--dtype", settings.dtype, *(["--per-frame"] if per_frame else [])]
        theirs = _diffusers_peak([settings.model, *words])
    content: dict[str, object] = {
        "model": spec.name,
        "width": settings.width,
        "height": settings.height,
        "frames": settings.frames,
        "dtype": settings.dtype,
        "per_frame": per_frame,
        "tokens": spec.transformer.num_tokens(shape),
        "head_groups": head_groups,
        "peak_bytes": whole.peak_bytes,
        "peak_bytes_lean": lean.peak_bytes,
        "kept_bytes": whole.kept_bytes,
        "diffusers_peak_bytes": theirs,
        "pieces": _pieces(whole),
        "pieces_lean": _pieces(lean),
    }
    title = (
        f"{spec.name}, {settings.width}x{settings.height}, {settings.frames} frames, "
        f"{settings.dtype}: {content['tokens']} tokens"
    )
    context.obj.result(content, "\n".join([title, *_lines(whole, lean, head_groups, theirs)]))


def _diffusers_peak(arguments: list[str]) -> int | None:
    """Peak bytes of diffusers' own class; None without a checkout or without diffusers.

    In a process of its own: the product never imports diffusers.
    """
    if not SCRIPT.is_file() or find_package("diffusers") is None:
        return None
    command = [sys.executable, str(SCRIPT), "--diffusers", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ReelpoolError(f"{SCRIPT}: no answer in {TIMEOUT_S} s; try --no-diffusers") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ReelpoolError(f"{SCRIPT}: {reason}; --no-diffusers measures ours alone")
    return int(json_text.loads(done.stdout))


def _pieces(measured: Activations) -> list[dict[str, object]]:
    """What lived at the peak, as data."""
    return [
        {
            "bytes": piece.num_bytes,
            "operator": piece.operator,
            "shape": list(piece.shape),
            "dtype": str(piece.dtype).removeprefix("torch."),
        }
        for piece in measured.pieces
    ]


def _lines(
    whole: Activations, lean: Activations, head_groups: int, theirs: int | None
) -> list[str]:
    """The peaks in words, and where their bytes go."""
    from reelpool.runtime.log import format_bytes

    lines = []
    for name, measured in (("all heads at once", whole), (f"{head_groups} head groups", lean)):
        lines.append(f"  {name:<18} {format_bytes(measured.peak_bytes)} at the peak:")
        for piece in measured.pieces[:SHOWN_PIECES]:
            shape = " x ".join(map(str, piece.shape))
            kind = str(piece.dtype).removeprefix("torch.")
            lines.append(f"    {format_bytes(piece.num_bytes):>10}  {shape} {kind}")
        rest = sum(piece.num_bytes for piece in measured.pieces[SHOWN_PIECES:])
        lines.append(f"    {format_bytes(rest):>10}  the rest")
    lines.append(f"  {'kept for the next':<18} {format_bytes(whole.kept_bytes)}, counted above")
    found = "not measured" if theirs is None else format_bytes(theirs)
    return [*lines, f"  {'diffusers':<18} {found}"]
