"""What a user types. Thin: it checks arguments, hands jobs to the executor and shows its events.

Nothing heavy is imported before the arguments are known to be good: each command imports what it
needs, inside. Exit codes: 0 done, 1 failed, 2 bad arguments, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Annotated, NoReturn

import typer

from reelpool import __version__
from reelpool.cli.bench import bench_app
from reelpool.cli.devices import devices
from reelpool.cli.generate import demo, generate, plan, run
from reelpool.cli.models import models
from reelpool.cli.output import JsonOutput, Output, json_stdout, open_output
from reelpool.cli.quantize import quantize
from reelpool.errors import Cancelled, ReelpoolError

INTERRUPTED = 130

app = typer.Typer(
    name="reelpool",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command()(generate)
app.command()(run)
app.command()(plan)
app.command()(devices)
app.add_typer(bench_app, name="bench")
app.command()(models)
app.command()(quantize)

# typer ships its own copy of click in newer versions, so the class is found through typer.
_UsageError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"reelpool {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Make videos from text with several small cards working as one.

    New here? `reelpool demo` makes a small video in under a minute, without any card.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: what the user typed after `reelpool`; the process's own by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    options = words[: words.index("--")] if "--" in words else words
    try:
        with ExitStack() as stack:
            if "--json" in options:
                output: Output = JsonOutput(stack.enter_context(json_stdout()))
            else:
                output = open_output()
            code = _run(words, output)
    except BrokenPipeError:  # the reader of our lines left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    sys.exit(code)


def _run(words: list[str], output: Output) -> int:
    """Run one command; every way it can end becomes an exit code and a line."""
    try:
        with output:
            code = app(args=words, prog_name="reelpool", standalone_mode=False, obj=output)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort, Cancelled):
        output.error("Interrupted", "interrupted", INTERRUPTED)
        return INTERRUPTED
    except ReelpoolError as error:
        output.error(type(error).__name__, str(error), error.exit_code)
        return error.exit_code
    except _UsageError as error:
        output.error("UsageError", _usage(error), 2)
        return 2
    except BrokenPipeError:
        raise
    except Exception as error:  # the outermost frame: a bug of ours is one line, too
        if os.environ.get("REELPOOL_LOG"):
            traceback.print_exc()
        problem = f"unexpected {type(error).__name__}: {error}"
        advice = "this is a bug in reelpool; --verbose shows where"
        output.error(type(error).__name__, f"{problem}; {advice}", 1)
        return 1
    return code if isinstance(code, int) else 0


def _usage(error: Exception) -> str:
    """What typer found wrong with the arguments, and where to read on."""
    message = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "reelpool"
    return f"{message.rstrip('.').replace('. Did', '; did')}; see {command} --help"
