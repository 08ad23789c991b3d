"""Events as a person or a program reads them: live progress, plain lines, or JSON.

One `Output` lives as long as the command. People's lines go to stdout, errors to stderr. As JSON,
stdout holds our objects only: whatever else writes to file descriptor 1 (Ray's processes inherit
it) is sent to stderr.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from reelpool.runtime.log import format_bytes, format_seconds
from reelpool.scheduler.events import (
    Event,
    FramesWritten,
    JobFailed,
    JobFinished,
    JobStarted,
    LoraReady,
    Notice,
    PlanReady,
    PoolStarting,
    StageFinished,
    StageStarted,
    StepFinished,
    WorkerReady,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

# what moves a terminal's cursor or turns its text, and bytes of names that are no text
_UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
QUIET_S = 10.0  # a plain line about a slow stage at least this often
STEP_LINES = 10  # and about this many lines for all steps


@contextmanager
def json_stdout() -> Iterator[TextIO]:
    """Yield a stream to the real stdout, and send all else that is written there to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)
        try:
            yield stream
        finally:
            sys.stdout.flush()
            os.dup2(stream.fileno(), 1)


def open_output() -> Output:
    """The output for people: live progress on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return LiveOutput()
    return PlainOutput(sys.stdout)


class Output(ABC):
    """Where a command's events, its result and its error go; a context manager."""

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    @abstractmethod
    def emit(self, event: Event) -> None:
        """Show one event."""

    @abstractmethod
    def result(self, content: Mapping[str, object], text: str) -> None:
        """Show what a command found that is not a run: as data, and in words."""

    @abstractmethod
    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far a command has come that is not a run; `what` is what is counted."""

    @abstractmethod
    def finish(self, jobs: Sequence[JobFinished]) -> None:
        """Show the end of a run that went well."""

    @abstractmethod
    def error(self, name: str, message: str, exit_code: int) -> None:
        """Show why the command failed."""


class JsonOutput(Output):
    """One JSON object a line; the last one is the result or the error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._advice = ""

    def emit(self, event: Event) -> None:
        """Write the event."""
        if isinstance(event, JobFailed):
            self._advice = event.advice
        self._write(event.as_json())

    def result(self, content: Mapping[str, object], text: str) -> None:
        """Write the data as the result."""
        self._write({**content, "event": "result"})

    def progress(self, what: str, done: int, total: int) -> None:
        """Write the counts."""
        self._write({"event": "progress", "what": what, "done": done, "total": total})

    def finish(self, jobs: Sequence[JobFinished]) -> None:
        """Write a result: the job's own keys, or `jobs` where there are several."""
        each = [job.as_json() for job in jobs]
        self._write({**(each[0] if len(each) == 1 else {"jobs": each}), "event": "result"})

    def error(self, name: str, message: str, exit_code: int) -> None:
        """Write the error, and the same line as ever to stderr."""
        content = {"error": name, "message": message, "exit_code": exit_code}
        self._write({"event": "error", **content, "advice": self._advice})
        _print_error(message, self._advice)

    def _write(self, content: Mapping[str, object]) -> None:
        # `event` first, for the eye
        ordered = {"event": content["event"], **content}
        text = printable(json.dumps(ordered, ensure_ascii=False))
        print(text, file=self._stream, flush=True)


class PlainOutput(Output):
    """Lines that scroll: for a log, a pipe, a terminal without cursor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._advice = ""
        self._num_jobs = 0
        self._last_line_s = 0.0
        self._shown_share = -1
        self._step_seconds: dict[str, float] = {}  # of all steps of a job so far

    def emit(self, event: Event) -> None:
        """Print the event's lines, if it is worth some."""
        if isinstance(event, StageStarted):
            self._shown_share = -1
            self._line(f"{self._job(event.job)}{event.stage} on {', '.join(event.workers)} ...")
        elif isinstance(event, StepFinished):
            self._step_line(event)
        elif isinstance(event, FramesWritten):
            if self._is_due(event.num_frames, event.total_frames):
                self._line(f"{self._job(event.job)}frame {event.num_frames}/{event.total_frames}")
        else:
            self._emit_rare(event)

    def _step_line(self, event: StepFinished) -> None:
        spent = self._step_seconds.get(event.job, 0.0) + event.seconds
        self._step_seconds[event.job] = spent
        if not self._is_due(event.step, event.num_steps):
            return
        mean, missing = spent / event.step, event.num_steps - event.step
        left = f", about {format_seconds(missing * mean)} left" if missing else ""
        each = f"{format_seconds(mean)} each"
        self._line(f"{self._job(event.job)}step {event.step}/{event.num_steps}, {each}{left}")

    def _emit_rare(self, event: Event) -> None:
        """Events that both forms for people show as lines."""
        if isinstance(event, PoolStarting):
            noun = "worker" if event.num_workers == 1 else "workers"
            self._line(f"starting {event.num_workers} {noun} ({event.pool}) ...")
        elif isinstance(event, WorkerReady):
            memory, spent = format_bytes(event.memory_bytes), format_seconds(event.seconds)
            self._line(f"worker {event.worker} ready on {event.device}, {memory}, after {spent}")
        elif isinstance(event, PlanReady | LoraReady):
            for line in self._text_lines(event):
                self._line(line)
        elif isinstance(event, JobStarted):
            self._num_jobs += 1
            self._line(_job_line(event))
        elif isinstance(event, StageFinished):
            note = f" ({event.note})" if event.note else ""
            self._line(
                f"{self._job(event.job)}{event.stage} done on {', '.join(event.workers)} "
                f"in {format_seconds(event.seconds)}{note}"
            )
        elif isinstance(event, Notice):
            self._line(f"note: {event.message}")
        elif isinstance(event, JobFailed):
            self._advice = event.advice
            if self._num_jobs > 1:  # a single job's reason is the command's last line
                self._line(f"{event.job} failed: {event.message}")

    def _text_lines(self, event: PlanReady | LoraReady) -> list[str]:
        """Lines of an event that brings its own text."""
        if isinstance(event, LoraReady):
            return [f"{self._job(event.job)}lora {line}" for line in event.text.splitlines()]
        return [f"  {line}" for line in event.text.splitlines() or [event.strategy]]

    def result(self, content: Mapping[str, object], text: str) -> None:
        """Print the words."""
        self._line(text)

    def progress(self, what: str, done: int, total: int) -> None:
        """Print some of the counts."""
        if self._is_due(done, total):
            self._line(f"{what} {done}/{total}")

    def finish(self, jobs: Sequence[JobFinished]) -> None:
        """Print for each job where the time went and where the video is."""
        for job in jobs:
            for line in summary(job):
                self._line(line)

    def error(self, name: str, message: str, exit_code: int) -> None:
        """Print the reason to stderr."""
        _print_error(message, self._advice)

    def _line(self, text: str) -> None:
        self._print(printable(text))

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _job(self, job: str) -> str:
        """The job's name before a line, where there are several."""
        return f"{job}: " if self._num_jobs > 1 else ""

    def _is_due(self, done: int, total: int) -> bool:
        """Whether progress deserves a line: the first, the last, every tenth, or after silence."""
        share, now = done * STEP_LINES // max(total, 1), time.monotonic()
        if share <= self._shown_share and done < total and now - self._last_line_s < QUIET_S:
            return False
        self._shown_share, self._last_line_s = share, now
        return True


class LiveOutput(PlainOutput):
    """Lines for what is done, and below them a moving bar for each stage that runs."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(sys.stdout)
        self._given = console
        self._progress: Progress | None = None
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the bars away, or an error would be printed among them."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def emit(self, event: Event) -> None:
        """Move the bars, and print what has ended."""
        if isinstance(event, PoolStarting):
            noun = "worker" if event.num_workers == 1 else "workers"
            self._begin(("", "pool"), f"starting {event.num_workers} {noun}", event.num_workers)
        elif isinstance(event, WorkerReady):
            self._advance(("", "pool"))
            self._emit_rare(event)
        elif isinstance(event, StageStarted):
            name = f"{self._job(event.job)}{event.stage} on {', '.join(event.workers)}"
            self._begin((event.job, event.stage), name)
        elif isinstance(event, StepFinished):
            self._move((event.job, "denoise"), event.step, event.num_steps)
        elif isinstance(event, FramesWritten):
            self._move((event.job, "decode"), event.num_frames, event.total_frames)
        else:
            if isinstance(event, StageFinished):
                self._end((event.job, event.stage))
            elif isinstance(event, PlanReady | JobStarted):
                self._end(("", "pool"))
            self._emit_rare(event)

    def progress(self, what: str, done: int, total: int) -> None:
        """Move a bar."""
        self._move(("", what), done, total)
        if done == total:
            self._end(("", what))

    def finish(self, jobs: Sequence[JobFinished]) -> None:
        """Take the bars away and print the summaries."""
        self.__exit__(None, None, None)
        super().finish(jobs)

    def _print(self, text: str) -> None:
        if self._progress:
            # no markup: a prompt may hold [brackets]
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._given:
            self._given.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            super()._print(text)

    def _bars(self) -> Progress:
        if self._progress is None:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                SpinnerColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._given,
                transient=True,
            )
            self._progress.start()
        return self._progress

    def _begin(self, key: tuple[str, str], name: str, total: int | None = None) -> None:
        self._end(key)
        self._tasks[key] = self._bars().add_task(name, total=total)

    def _advance(self, key: tuple[str, str]) -> None:
        if key in self._tasks:
            self._bars().advance(self._tasks[key])

    def _move(self, key: tuple[str, str], done: int, total: int) -> None:
        if key not in self._tasks:
            self._begin(key, f"{self._job(key[0])}{key[1]}", total)
        self._bars().update(self._tasks[key], completed=done, total=total)

    def _end(self, key: tuple[str, str]) -> None:
        if key in self._tasks:
            self._bars().remove_task(self._tasks.pop(key))


def printable(text: str) -> str:
    r"""A text with control characters and undecoded bytes of file names as JSON writes them.

    New lines stay. Inside of JSON the result means the same.

    Examples:
        >>> print(printable("wan\x1b[2J.gguf"))
        wan\u001b[2J.gguf
    """
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def summary(job: JobFinished) -> list[str]:
    """Where a job's time went, and where its video is."""
    spent = ", ".join(f"{name} {format_seconds(s)}" for name, s in job.stage_seconds.items())
    path = Path(job.video)
    size = f", {format_bytes(path.stat().st_size)}" if path.is_file() else ""
    lines = [f"time: {spent}"] if spent else []
    if job.latents:
        lines.append(f"latents: {job.latents}")
    lines.append(f"record: {job.run_dir}")
    lines.append(
        f"video: {job.video} ({job.width}x{job.height}, {job.num_frames} frames, "
        f"{job.num_frames / job.fps:.2f} s{size}), seed {job.seed}, "
        f"made in {format_seconds(job.seconds)}"
    )
    return lines


def _job_line(event: JobStarted) -> str:
    values = event.settings
    prompt = " ".join(str(values.get("prompt", "")).split())
    prompt = prompt if len(prompt) <= 80 else f"{prompt[:77]}..."
    return (
        f'{event.job}: "{prompt}", {values.get("width")}x{values.get("height")}, '
        f"{values.get('frames')} frames, {values.get('steps')} steps, seed {values.get('seed')}"
    )


def _print_error(message: str, advice: str) -> None:
    print(printable(f"error: {' '.join(message.split())}"), file=sys.stderr)
    if advice:
        print(printable(f"try: {advice}"), file=sys.stderr)
