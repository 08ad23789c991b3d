"""A job as the user wrote it becomes `Settings`: every value concrete, checked before any work.

`load_jobs` reads YAML, `resolve` fills in what the model and chance decide. Nothing is created on
disk and nothing of the model is opened but its JSON. Free of Ray and torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import yaml

from reelpool.errors import ConfigError

from ..models.finder import model_path
from ..models.parts import PART_NAMES, Parts
from ..models.registry import find_spec
from ..models.spec import ModelSpec
from ..runtime.types import LoraRef
from .job_inputs import guidance_scales, lora_refs, part_files, video_size
from .job_schema import (
    ATTENTION_NAMES,
    COMMAND_LINE,
    MAX_SIDE,
    SOLVER_NAMES,
    Job,
    label,
    make_job,
)

__all__ = [
    "ATTENTION_NAMES",
    "COMMAND_LINE",
    "SOLVER_NAMES",
    "Job",
    "Settings",
    "load_job",
    "load_jobs",
    "make_job",
    "read_jobs",
    "resolve",
    "resolve_jobs",
]

MAX_FILE_BYTES = 2**20
MAX_JOBS = 1000
_PATHS = ("output", "save_latents", "run_dir", "image", "last_image")
_NAMES = ("model", *PART_NAMES)  # paths, or names that are looked up


@dataclass(frozen=True)
class Settings:
    """A job with nothing left open; what the plan, the workers and the video's metadata hold.

    guidance_low: of the low-noise expert; the same as `guidance` for a model of one.
    dtype: "float32", "bfloat16", "float16", or "auto" for what suits the cards. Paths are absolute.
    memory_state: "" for what the cards' memory says. reserve: bytes; None for the usual.
    """

    id: str
    prompt: str
    negative: str
    model: str
    output: Path
    width: int
    height: int
    frames: int
    fps: float
    steps: int
    guidance: float
    shift: float
    seed: int
    solver: str
    dtype: str
    attention: str
    save_latents: Path | None
    run_dir: Path
    zoom: int
    guidance_low: float
    image: Path | None = None
    last_image: Path | None = None
    parts: Parts = ()
    loras: tuple[LoraRef, ...] = ()
    memory_state: str = ""
    reserve: int | None = None

    def as_json(self) -> dict[str, object]:
        """The settings as a JSON object, paths as text."""
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    @property
    def needs_uncond(self) -> bool:
        """Whether any step needs a forward without the prompt."""
        return max(self.guidance, self.guidance_low) > 1

    @property
    def targets(self) -> tuple[Path, ...]:
        """What the job writes; no two jobs of a run may share one."""
        return tuple(path for path in (self.output, self.save_latents, self.run_dir) if path)


def load_job(path: Path | str) -> Job:
    """Read a YAML file that holds one job.

    Raises:
        ConfigError: if it cannot be read, holds several jobs, or a value in it is wrong.
    """
    jobs = load_jobs(path)
    if len(jobs) != 1:
        raise ConfigError(str(path), f"holds {len(jobs)} jobs", "expected one")
    return jobs[0]


def load_jobs(path: Path | str) -> list[Job]:
    """Read the jobs of a YAML file: one mapping, a list of them, or `jobs:` with a list.

    Raises:
        ConfigError: if it cannot be read or a value in it is wrong.
    """
    return [job for _, job in read_jobs(path)]


def read_jobs(path: Path | str) -> list[tuple[str, Job]]:
    """Read jobs as `load_jobs` does, each with the `where` that `resolve` wants.

    Relative paths in the file count from its folder.

    Raises:
        ConfigError: if it cannot be read or a value in it is wrong.
    """
    path = Path(path)
    content = _read_yaml(path)
    if isinstance(content, dict) and "jobs" in content:
        for name in content:
            if name != "jobs":
                raise ConfigError(
                    f"{path.name}: {str(name)[:80]}", "stands beside jobs", "put it into each job"
                )
        content = content["jobs"]
    elif not isinstance(content, list):
        return [(f"{path.name}: ", _job_of(path, content, f"{path.name}: "))]
    if not isinstance(content, list) or not 1 <= len(content) <= MAX_JOBS:
        raise ConfigError(f"{path.name}: jobs", "expected a list", f"give 1 to {MAX_JOBS} jobs")
    places = [f"{path.name}: jobs[{index}]." for index in range(len(content))]
    return [
        (where, _job_of(path, item, where)) for where, item in zip(places, content, strict=True)
    ]


def _read_yaml(path: Path) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(str(path), "is larger than 1 MiB", "give a job file")
        return yaml.safe_load(data.decode("utf-8-sig"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(str(path), f"cannot be read ({reason})", "give a job file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(str(path), f"is not YAML ({reason})", "see docs/job.md") from None


def _job_of(path: Path, content: object, where: str) -> Job:
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        place = where.removesuffix(": ").removesuffix(".")
        raise ConfigError(place, f"found {found}", "expected keys and values such as prompt: ...")
    job = make_job({str(key): value for key, value in content.items()}, where)
    folder = path.absolute().parent
    changes: dict[str, object] = {
        name: folder / value for name in _PATHS if (value := getattr(job, name)) is not None
    }
    for name in _NAMES:
        value = getattr(job, name)
        if value not in (None, "demo") and (folder / value).exists():
            changes[name] = type(value)(folder / value)
    if job.lora:
        changes["lora"] = tuple(
            entry.model_copy(update={"file": folder / entry.file})
            if (folder / entry.file).exists()
            else entry
            for entry in job.lora
        )
    return job.model_copy(update=changes)


def resolve_jobs(jobs: Sequence[tuple[str, Job]], *, need_weights: bool = True) -> list[Settings]:
    """Resolve the jobs of one run: ids `job-1`, `job-2`, ..., no two writing the same file.

    Args:
        jobs: each with its `where`, as `read_jobs` gives them.
        need_weights: whether a geometry without weights is refused.

    Raises:
        ConfigError: if a value is wrong or a model does not exist.
        WeightError: if a model's folder is incomplete.
    """
    done: list[Settings] = []
    taken: set[Path] = set()
    for index, (where, job) in enumerate(jobs, 1):
        try:
            spec = find_spec(job.model, part_files(job))
            if need_weights:
                model_path(job.model)
        except ConfigError as error:  # it says --model or --vae, whoever asked
            if not error.where.startswith(COMMAND_LINE):
                raise
            name = error.where.removeprefix(COMMAND_LINE).replace("-", "_")
            raise ConfigError(label(where, name), error.problem, error.advice) from None
        done.append(resolve(job, spec, f"job-{index}", where, taken, need_image=need_weights))
        taken.update(done[-1].targets)
    return done


def resolve(
    job: Job,
    spec: ModelSpec,
    job_id: str = "job-1",
    where: str = COMMAND_LINE,
    taken: Collection[Path] = (),
    *,
    need_image: bool = True,
) -> Settings:
    """Fill in the model's defaults, a seed and the file names, and check what the model decides.

    Args:
        job: as the user wrote it.
        spec: of the job's model.
        job_id: the name of the job within its run.
        where: what stands before a field's name in a message.
        taken: files and folders that other jobs of the run write.
        need_image: whether a model that cannot do without an image must get one.

    Raises:
        ConfigError: if a size, a number of frames, an image or a path cannot be used.
    """
    own = spec.defaults
    width, height = video_size(job, spec, where, need_image)
    _check_size(width, height, spec, label(where, "size"))
    frames = own.frames if job.frames is None else job.frames
    _check_frames(frames, spec, label(where, "frames"))
    guidance, guidance_low = guidance_scales(job, spec, where)
    seed = secrets.randbits(31) if job.seed is None else job.seed
    slug = _slug(job.prompt)
    if job.output is None:
        output = _unused(Path.cwd() / f"reelpool-{slug}-{seed}.mp4", taken)
    else:
        output = job.output.absolute()
    _check_file(output, ".mp4", label(where, "output"), taken)
    latents = job.save_latents.absolute() if job.save_latents else None
    if latents:
        _check_file(latents, ".safetensors", label(where, "save_latents"), taken)
    if job.run_dir is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run_dir = _unused(Path.cwd() / "runs" / f"{stamp}-{slug}", taken)
    else:
        run_dir = job.run_dir.absolute()
    _check_folder(run_dir, label(where, "run_dir"), taken)
    return Settings(
        id=job_id,
        prompt=job.prompt,
        negative=own.negative if job.negative is None else job.negative,
        model=_model_name(job.model),
        output=output,
        width=width,
        height=height,
        frames=frames,
        fps=float(own.fps if job.fps is None else job.fps),
        steps=own.steps if job.steps is None else job.steps,
        guidance=guidance,
        guidance_low=guidance_low,
        shift=float(own.shift if job.shift is None else job.shift),
        seed=seed,
        solver=job.solver or own.solver,
        dtype=job.dtype or "auto",
        attention=job.attention,
        save_latents=latents,
        run_dir=run_dir,
        zoom=job.zoom or 1,
        image=job.image.absolute() if job.image else None,
        last_image=job.last_image.absolute() if job.last_image else None,
        parts=part_files(job),
        loras=lora_refs(job, spec, where),
        memory_state=job.memory_state or "",
        reserve=job.reserve,
    )


def _model_name(model: str) -> str:
    """A folder or file by its absolute path: workers run elsewhere."""
    path = Path(model).expanduser()
    return str(path.absolute()) if model != "demo" and path.exists() else model


def _check_size(width: int, height: int, spec: ModelSpec, where: str) -> None:
    step = spec.size_multiple
    if width % step == 0 and height % step == 0:
        return
    near = [
        min(max(step, (side + step // 2) // step * step), MAX_SIDE // step * step)
        for side in (width, height)
    ]
    raise ConfigError(
        where,
        f"{width}x{height} is not made of multiples of {step}",
        f"the nearest size is {near[0]}x{near[1]}",
    )


def _check_frames(frames: int, spec: ModelSpec, where: str) -> None:
    factor = spec.vae.temporal_factor
    below = (frames - 1) // factor * factor + 1
    if frames != below:
        advice = f"the nearest are {below} and {below + factor}"
        raise ConfigError(where, f"{frames} is not {factor}n+1", advice)


def _slug(prompt: str) -> str:
    """A few words of the prompt, fit for a file name.

    >>> _slug("A red ring, bouncing!"), _slug("漢字")
    ('a-red-ring-bouncing', 'video')
    """
    slug = ""
    for word in re.findall(r"[a-z0-9]+", prompt.lower()):
        if len(slug) + len(word) > 40:
            break
        slug = f"{slug}-{word}" if slug else word
    return slug or "video"


def _unused(first: Path, taken: Collection[Path]) -> Path:
    """The path itself, or with -2, -3, ... before its suffix."""
    path = first
    for number in count(2):
        if path not in taken and not path.exists():
            break
        path = first.with_name(f"{first.stem}-{number}{first.suffix}")
    return path


def _check_file(path: Path, suffix: str, where: str, taken: Collection[Path]) -> None:
    _check_taken(path, where, taken)
    try:
        if path.is_dir():
            advice = f"give the name of a {suffix} file"
            raise ConfigError(where, f"{path} is a folder", advice)
        if path.suffix.lower() != suffix:
            found = f"{path.name!r} is no {suffix} file"
            raise ConfigError(where, found, f"use {path.stem}{suffix}")
        if not path.parent.is_dir():
            advice = f"create it first: mkdir -p {path.parent}"
            raise ConfigError(where, f"there is no folder {path.parent}", advice)
        _check_writable(path.parent, where)
    except OSError as error:
        raise ConfigError(where, f"{str(path)[:80]}: {error.strerror}", "use another") from None


def _check_folder(path: Path, where: str, taken: Collection[Path]) -> None:
    _check_taken(path, where, taken)
    try:
        there = next(part for part in (path, *path.parents) if part.exists())
        if not there.is_dir():
            raise ConfigError(where, f"{there} is a file", "give the name of a folder")
        _check_writable(there, where)
    except OSError as error:
        raise ConfigError(where, f"{str(path)[:80]}: {error.strerror}", "use another") from None


def _check_taken(path: Path, where: str, taken: Collection[Path]) -> None:
    if path in taken:
        raise ConfigError(where, f"another job of this run writes {path}", "use another name")


def _check_writable(folder: Path, where: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(where, f"the folder {folder} is not writable", "use another")
