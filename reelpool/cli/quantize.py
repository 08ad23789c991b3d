"""The command that makes a smaller file of a model's transformer."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reelpool.cli.generate import Json, Verbose
from reelpool.errors import ConfigError

if TYPE_CHECKING:
    from reelpool.models.quantise import Report

WHERE = "IN"


def quantize(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar=WHERE, help="A transformer's file or folder, or a model's name."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The new file: .gguf, or for fp8 .safetensors."
        ),
    ],
    kind: Annotated[
        str,
        typer.Option("--type", metavar="TYPE", help="q8_0, q5_1, q5_0, q4_1, q4_0 or fp8."),
    ],
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Quantise a model's transformer: a smaller file, with almost the same videos.

    q8_0 can hardly be told from the original, q5 is close, q4 is half the size of q8_0. Text
    encoder and VAE are not part of the file.
    """
    from reelpool.models.quantise_rules import check_out, find_target
    from reelpool.runtime import log

    log.setup()
    target = find_target(kind)
    check_out(target, output)
    path = _transformer(model)
    from reelpool.models.quantise import write_quantised
    from reelpool.models.quantise_plan import plan_quantised
    from reelpool.scheduler.events import Notice

    work = plan_quantised(path, output, target)
    for notice in work.notices:
        context.obj.emit(Notice(notice))
    report = write_quantised(work, partial(context.obj.progress, "block"))
    content = {**dataclasses.asdict(report), "out": str(report.out), "notices": list(work.notices)}
    context.obj.result(content, "\n".join(_lines(report)))


def _transformer(name: str) -> Path:
    """The transformer's file or folder that a user means.

    Raises:
        ConfigError: if there is no such model, or it has two of them.
    """
    from reelpool.models.catalogue import ORIGINAL_EXPERTS
    from reelpool.models.finder import model_path

    try:
        path = model_path(name)
    except ConfigError as error:
        raise ConfigError(WHERE, error.problem, error.advice) from None
    parts = [path / part for part in ("transformer", "transformer_2", *ORIGINAL_EXPERTS)]
    found = [part for part in parts if part.is_dir()]
    if len(found) > 1:
        problem = f"{path} has two transformers, {found[0].name} and {found[1].name}"
        raise ConfigError(WHERE, problem, "give the folder of one, and then that of the other")
    return found[0] if found else path


def _lines(report: Report) -> list[str]:
    """What was written, in words."""
    from reelpool.runtime.log import format_bytes, format_seconds

    before, after = format_bytes(report.bytes_before), format_bytes(report.bytes_after)
    share = report.bytes_after / report.bytes_before
    lines = [
        f"{report.out}: {before} {report.before} became {after} {report.after} ({share:.0%}) "
        f"in {format_seconds(report.seconds)}"
    ]
    for kind, num_bytes in report.bytes_by_type.items():
        noun = "tensor" if report.tensors_by_type[kind] == 1 else "tensors"
        count = report.tensors_by_type[kind]
        lines.append(f"  {kind:<8} {format_bytes(num_bytes):>9} in {count} {noun}")
    return lines
