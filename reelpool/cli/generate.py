"""The commands that make videos: demo, generate, run; and plan, which only says how."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from reelpool.cli.output import Output
from reelpool.errors import ConfigError

if TYPE_CHECKING:
    from reelpool.scheduler.job import Job, Settings


def _set_verbose(wanted: bool) -> bool:
    if wanted:
        os.environ["REELPOOL_LOG"] = "info"  # workers inherit it
    return wanted


Model = Annotated[
    str,
    typer.Option(help="'demo', a model's folder, file or name, or (plan only) a geometry's name."),
]
OutputFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The video file (*.mp4).", show_default="from the prompt"),
]
Negative = Annotated[str | None, typer.Option(help="What the video should not show.")]
Size = Annotated[
    str | None, typer.Option(metavar="WxH", help="Width x height in pixels, such as 832x480.")
]
Frames = Annotated[int | None, typer.Option(help="Number of frames, 4n+1: 17, 33, 81.")]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the file.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; fewer is faster.")]
Guidance = Annotated[
    str | None,
    typer.Option(
        metavar="G[,LOW]",
        help="How strictly the prompt is followed; 1 turns it off. LOW: on the low-noise expert.",
    ),
]
Image = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Image the video begins with: PNG, JPEG or WebP."),
]
LastImage = Annotated[Path | None, typer.Option(metavar="FILE", help="Image the video ends with.")]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE[:STRENGTH[,LOW]]",
        help="A LoRA and its strength (1); give it again for more. LOW: on the low-noise expert.",
    ),
]
Vae = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The model's VAE, if it is not found.")
]
TextEncoder = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The model's text encoder, if not found.")
]
ImageEncoder = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The model's CLIP vision file, if not found.")
]
HighNoise = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Transformer for high noise, if not found.")
]
LowNoise = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Transformer for low noise, if not found.")
]
Shift = Annotated[float | None, typer.Option(help="Moves the steps towards high noise.")]
Seed = Annotated[
    int | None,
    typer.Option(help="The same seed gives the same video.", show_default="drawn, and printed"),
]
Solver = Annotated[
    str | None, typer.Option(metavar="NAME", help="Step rule: unipc, euler, dpmpp or lcm.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Compute type: float32, bfloat16 or float16.",
        show_default="what suits the cards",
    ),
]
Attention = Annotated[
    str, typer.Option(metavar="NAME", help="Attention back end: sdpa, flash, sage or xformers.")
]
MemoryStateName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How cards use their memory: disabled, none, low, normal, high or shared.",
        show_default="what the cards' memory says",
    ),
]
Reserve = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Memory of every card left to other programs, such as 512MiB."
    ),
]
SaveLatents = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Also write the latents (*.safetensors).")
]
RunDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for the run's record.", show_default="under runs/"),
]
Pool = Annotated[
    str,
    typer.Option(
        metavar="SPEC",
        help="Who does the work: auto (this machine's cards) or local:N[,MEMORY] (N workers on the "
        "CPU, each with that much memory).",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per event and nothing else.")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", callback=_set_verbose, help="Also show the log, on stderr."),
]


Command = TypeVar("Command", bound=Callable[..., None])


def _job_options(
    model: Model = "demo",
    output: OutputFile = None,
    negative: Negative = None,
    image: Image = None,
    last_image: LastImage = None,
    size: Size = None,
    frames: Frames = None,
    fps: Fps = None,
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    seed: Seed = None,
    solver: Solver = None,
    lora: Lora = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    image_encoder: ImageEncoder = None,
    high_noise: HighNoise = None,
    low_noise: LowNoise = None,
    dtype: Dtype = None,
    attention: Attention = "sdpa",
    memory_state: MemoryStateName = None,
    reserve: Reserve = None,
    save_latents: SaveLatents = None,
    run_dir: RunDir = None,
) -> None:
    """The options that describe a job, written once for the commands that take them."""


def _with_job_options(command: Command) -> Command:
    """Give a command the options above; they arrive in its `**values`."""
    own = inspect.signature(command, eval_str=True)
    options = list(inspect.signature(_job_options, eval_str=True).parameters.values())
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    required = [p for p in named if p.default is p.empty]
    rest = [p for p in named if p.default is not p.empty]
    parameters = [*required, *options, *rest]
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@_with_job_options
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the video shows.")],
    pool: Pool = "auto",
    json: Json = False,
    verbose: Verbose = False,
    **values: object,
) -> None:
    """Make a video of what a sentence says, and of an image for models that take one.

    What you leave out comes from the model. Example:

    reelpool generate "a red ring bounces over a gray background" -o ring.mp4
    """
    _execute(context.obj, [_job_of({**values, "prompt": prompt})], pool)


def run(
    context: typer.Context,
    files: Annotated[
        list[Path], typer.Argument(metavar="JOB.yaml...", help="Job files; see docs/job.md.")
    ],
    pool: Pool = "auto",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make the videos that job files describe; several jobs share the workers."""
    _execute(context.obj, _jobs_of(files), pool)


def demo(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="The video file (*.mp4).")] = Path(
        "demo.mp4"
    ),
    prompt: Annotated[
        str | None, typer.Option(help="What the video shows.", show_default="the model's own")
    ] = None,
    seed: Seed = None,
    run_dir: RunDir = None,
    pool: Pool = "local:2",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a small video with the model that ships with reelpool, on two local workers.

    Needs no card and no download. The prompt may name a colour, a shape (circle, square, triangle,
    star, ring), how it moves, and a background.
    """
    from reelpool.models.registry import find_spec

    own = find_spec("demo").defaults
    values = {"prompt": prompt or own.prompt, "output": output, "seed": seed, "run_dir": run_dir}
    # above 1, or there would be no second branch for the second worker
    values |= {"guidance": own.guidance if own.guidance > 1 else 3.0, "zoom": own.zoom}
    _execute(context.obj, [_job_of(values)], pool)


@_with_job_options
def plan(
    context: typer.Context,
    what: Annotated[
        list[str], typer.Argument(metavar="PROMPT|JOB.yaml...", help="A prompt, or job files.")
    ],
    pool: Pool = "auto",
    json: Json = False,
    verbose: Verbose = False,
    **values: object,
) -> None:
    """Say how a job would run, without weights and without running it.

    Takes the arguments of `generate`, or job files (and then only --pool and --json).
    """
    files = [Path(word) for word in what if word.lower().endswith((".yaml", ".yml"))]
    if files and len(files) < len(what):
        raise ConfigError("plan", "found a prompt beside job files", "give one or the other")
    if files:
        _refuse_given(context)
        jobs = _jobs_of(files)
    elif len(what) > 1:
        advice = "put quotes around the prompt, or give files that end in .yaml"
        raise ConfigError("PROMPT", f"found {len(what)} of them", advice)
    else:
        jobs = [_job_of({**values, "prompt": what[0]})]
    settings = _settings(jobs, pool, need_weights=False)
    from reelpool.scheduler.executor import plan_jobs

    made = plan_jobs(settings, pool)
    context.obj.result(made.as_json(), made.explain())


def _job_of(values: Mapping[str, object]) -> tuple[str, Job]:
    """The job that arguments describe: those of its fields that were given."""
    from reelpool.scheduler.job import COMMAND_LINE, Job, make_job

    given = {name: values[name] for name in Job.model_fields if values.get(name) not in (None, [])}
    return COMMAND_LINE, make_job(given)


def _jobs_of(files: Sequence[Path]) -> list[tuple[str, Job]]:
    from reelpool.scheduler.job import read_jobs

    return [job for file in files for job in read_jobs(file)]


def _settings(
    jobs: Sequence[tuple[str, Job]], pool: str, *, need_weights: bool = True
) -> list[Settings]:
    """All that can be checked before anything heavy is imported."""
    from reelpool.runtime import log
    from reelpool.scheduler.job import resolve_jobs
    from reelpool.scheduler.pool_spec import parse_pool

    log.setup()
    parse_pool(pool)
    return resolve_jobs(jobs, need_weights=need_weights)


def _execute(output: Output, jobs: Sequence[tuple[str, Job]], pool: str) -> None:
    settings = _settings(jobs, pool)
    from reelpool.scheduler.executor import run_jobs

    output.finish(run_jobs(settings, pool, output.emit))


def _refuse_given(context: typer.Context) -> None:
    """Refuse arguments that a job file holds."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name in ("what", "pool", "json", "verbose") or source is None:
            continue
        if source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(option, "stands beside job files", "write it into the job file")
