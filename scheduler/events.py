"""What happens during a run, as small records that a person or a program follows.

Free of Ray and torch. The executor emits them in order; the command line renders them as progress,
plain lines or JSON (one object a line), and the run directory keeps them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Event:
    """Base of all events; `kind` is the JSON field `event`."""

    kind: ClassVar[str] = "event"

    def as_json(self) -> dict[str, object]:
        """The event as a JSON object."""
        return {"event": self.kind, **dataclasses.asdict(self)}


Emit = Callable[[Event], None]


@dataclass(frozen=True)
class PoolStarting(Event):
    """Workers are being started; this takes seconds and must not be silent."""

    kind: ClassVar[str] = "pool_starting"
    pool: str
    num_workers: int


@dataclass(frozen=True)
class WorkerReady(Event):
    """A worker answers."""

    kind: ClassVar[str] = "worker_ready"
    worker: str
    device: str
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class PlanReady(Event):
    """The plan, in words for a person and as data for a program."""

    kind: ClassVar[str] = "plan"
    strategy: str
    text: str
    plan: dict[str, object]


@dataclass(frozen=True)
class JobStarted(Event):
    """A job begins; `settings` are its complete settings, defaults and seed included."""

    kind: ClassVar[str] = "job_started"
    job: str
    run_dir: str
    settings: dict[str, object]


@dataclass(frozen=True)
class LoraReady(Event):
    """A LoRA was matched to the model: what of it applies, and what does not, with reasons.

    num_layers: layers of the model that it changes. share: of its entries that apply, 0 to 1.
    unmatched: key in the file and why it does not apply. text: the same for a person.
    """

    kind: ClassVar[str] = "lora"
    job: str
    path: str
    strength: float
    strength_low: float
    num_layers: int
    share: float
    unmatched: tuple[tuple[str, str], ...]
    text: str


@dataclass(frozen=True)
class StageStarted(Event):
    """A stage begins on a worker: load, encode_text, encode_image, denoise, decode."""

    kind: ClassVar[str] = "stage_started"
    job: str
    stage: str
    workers: tuple[str, ...]


@dataclass(frozen=True)
class StageFinished(Event):
    """A stage ended, with its measured time."""

    kind: ClassVar[str] = "stage_finished"
    job: str
    stage: str
    workers: tuple[str, ...]
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class StepFinished(Event):
    """A denoising step ended."""

    kind: ClassVar[str] = "step"
    job: str
    step: int  # steps done so far, 1 to num_steps
    num_steps: int
    seconds: float


@dataclass(frozen=True)
class FramesWritten(Event):
    """Decoded frames reached the video file."""

    kind: ClassVar[str] = "frames"
    job: str
    num_frames: int  # frames written so far
    total_frames: int


@dataclass(frozen=True)
class Notice(Event):
    """Something the user should know that is not an error."""

    kind: ClassVar[str] = "notice"
    message: str


@dataclass(frozen=True)
class JobFinished(Event):
    """A job ended well."""

    kind: ClassVar[str] = "job_finished"
    job: str
    video: str
    run_dir: str
    seed: int
    num_frames: int
    width: int
    height: int
    fps: float
    seconds: float
    stage_seconds: dict[str, float]
    latents: str = ""


@dataclass(frozen=True)
class JobFailed(Event):
    """A job ended with an error; `advice` is the next command to try."""

    kind: ClassVar[str] = "job_failed"
    job: str
    error: str
    message: str
    advice: str = ""
