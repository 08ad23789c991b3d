"""What a user may write in a job, on the command line or in a YAML file; one sentence when wrong.

The only place where the fields of a job are described: docs/job.md is generated from here. Nothing
here knows a model, so what depends on one (size, frames) is checked by `job.resolve`. Free of Ray
and torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    WithJsonSchema,
)

from reelpool.errors import ConfigError

from ..runtime.memory import MemoryState
from .job_values import (
    listed,
    read_bytes,
    say_something,
    split_guidance,
    split_lora,
    split_size,
    without_nul,
)

# Equal to runtime.solver.SOLVERS and models.attention.PACKAGES, which import torch (a test checks).
SolverName = Literal["unipc", "euler", "dpmpp", "lcm"]
AttentionName = Literal["sdpa", "flash", "sage", "xformers"]
DtypeName = Literal["float32", "bfloat16", "float16"]

COMMAND_LINE = "--"  # `where` of a job typed as arguments; of a file it is "job.yaml: "
MAX_TEXT = 10_000  # characters; the text encoder reads 512 tokens of them
MAX_SIDE = 8192
MAX_SEED = 2**32 - 1  # torch's CPU generator uses 32 bits of a seed
_OTHER_NAMES = {
    "width": "size",
    "height": "size",
    "resolution": "size",
    "num_inference_steps": "steps",
    "length": "frames",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "sampler": "solver",
    "scheduler": "solver",
    "out": "output",
    "loras": "lora",
    "start_image": "image",
    "end_image": "last_image",
    "t5": "text_encoder",
    "clip_vision": "image_encoder",
}
_OTHER_VALUES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}


Text = Annotated[str, Field(max_length=MAX_TEXT)]
Whole = Annotated[int, Strict()]  # else `true` would count as 1
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
File = Annotated[Path, AfterValidator(without_nul)]
Side = Annotated[int, Strict(), Field(ge=1, le=MAX_SIDE)]
Size = Annotated[
    tuple[Side, Side],
    BeforeValidator(split_size),
    WithJsonSchema({"type": "string", "format": "size"}),
]
Scale = Annotated[float, Strict(), Field(ge=0, le=100, allow_inf_nan=False)]
Guidance = Annotated[
    Scale | tuple[Scale, Scale],
    BeforeValidator(split_guidance),
    WithJsonSchema({"type": "number", "format": "guidance", "minimum": 0, "maximum": 100}),
]
Bytes = Annotated[
    int,
    BeforeValidator(read_bytes),
    Strict(),
    Field(ge=0, le=2**50),
    WithJsonSchema({"type": "string", "format": "bytes"}),
]
Strength = Annotated[float, Strict(), Field(ge=-100, le=100, allow_inf_nan=False)]


class LoraEntry(BaseModel):
    """A LoRA of a job: `low` is its strength on the low-noise expert, `strength` without it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: File
    strength: Strength = 1.0
    low: Strength | None = None


Loras = Annotated[
    tuple[Annotated[LoraEntry, BeforeValidator(split_lora)], ...],
    BeforeValidator(listed),
    WithJsonSchema({"type": "array", "format": "loras"}),
]


def _field(
    about: str,
    example: object,
    default: object = None,
    absent: str = "the model's own",
    **limits: Any,
) -> Any:
    """A field with what the docs say of it: meaning, an example, what happens without it."""
    extra: dict[str, Any] = {"absent": absent}
    return Field(default, description=about, examples=[example], json_schema_extra=extra, **limits)


class Job(BaseModel):
    """One video to make. Only the prompt is required: the model brings defaults for the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Annotated[Text, AfterValidator(say_something)] = _field(
        "What the video shows.",
        "a red ring bounces over a gray striped background",
        ...,
        "required",
        min_length=1,
    )
    model: str = _field(
        "`demo` (ships with reelpool), a model's folder or file, or, to plan without weights, the"
        " name of a geometry such as `wan2.1-t2v-14b`.",
        "demo",
        "demo",
        "`demo`",
        min_length=1,
        max_length=4096,
    )
    output: File | None = _field(
        "The video file, `*.mp4`; one that exists is replaced.",
        "ring.mp4",
        absent="`reelpool-<prompt>-<seed>.mp4` in the current folder",
    )
    negative: Text | None = _field(
        "What the video should not show. Empty (`''`) stays empty.", "blurry, distorted"
    )
    image: File | None = _field(
        "The image that the video begins with: PNG, JPEG or WebP.", "first.png", absent="none"
    )
    last_image: File | None = _field(
        "The image that the video ends with, for models that take one.", "last.png", absent="none"
    )
    size: Size | None = _field(
        "Width x height in pixels, multiples of 16 for Wan (32 for TI2V-5B).",
        "64x64",
        absent="the image's aspect at the model's own area, or the model's own",
    )
    frames: Whole | None = _field(
        "Number of frames, 4n+1 for Wan: 17, 33, 81.", 17, ge=1, le=1_000_000
    )
    fps: Number | None = _field("Frames per second of the file.", 8, gt=0, le=1000)
    steps: Whole | None = _field(
        "Denoising steps; more takes longer and looks better up to a point.", 20, ge=1, le=1000
    )
    guidance: Guidance | None = _field(
        "How strictly the prompt is followed (classifier-free guidance). 1 turns it off and halves"
        " the work. A model of two experts takes two: `[4.0, 3.0]`, high noise first.",
        3.0,
    )
    shift: Number | None = _field(
        "Moves the steps towards high noise; larger for larger videos.", 3.0, gt=0, le=1000
    )
    seed: Whole | None = _field(
        "The same seed and settings give the same video.",
        7,
        absent="drawn, and printed",
        ge=0,
        le=MAX_SEED,
    )
    solver: SolverName | None = _field("The rule that takes a denoising step.", "unipc")
    lora: Loras | None = _field(
        "LoRA files, each with its strength (0 turns it off) and, for two experts, that on the"
        " low-noise one: `FILE:0.8`, `FILE:1,0.6`, or `{file: FILE, strength: 1, low: 0.6}`.",
        ["style.safetensors:0.8"],
        absent="none",
    )
    vae: File | None = _field(
        "The model's VAE, where it is not found by itself.", "vae.safetensors"
    )
    text_encoder: File | None = _field(
        "The model's text encoder, file or folder.", "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    )
    image_encoder: File | None = _field(
        "The model's image encoder (CLIP vision).", "clip_vision_h.safetensors"
    )
    high_noise: File | None = _field(
        "The transformer for high noise of a two-expert model.", "high.gguf"
    )
    low_noise: File | None = _field("The transformer for low noise.", "low.gguf")
    dtype: DtypeName | None = _field(
        "Compute type of the transformer.", "float32", absent="what suits the cards"
    )
    attention: AttentionName = _field(
        "Attention back end; all but `sdpa` need their package installed.",
        "sdpa",
        "sdpa",
        "`sdpa`",
    )
    memory_state: MemoryState | None = _field(
        "How cards use their memory: `high` keeps everything on the card, `normal` as many blocks"
        " as fit, `low` at most half a card of them, `none` the least possible, `shared` leaves a"
        " quarter to the system, `disabled` checks nothing.",
        "normal",
        absent="what the cards' memory says",
    )
    reserve: Bytes | None = _field(
        "Memory of every card that is left to other programs.",
        "1GiB",
        absent="512 MiB of a GPU, nothing of a CPU card",
    )
    save_latents: File | None = _field(
        "Also writes the finished latents to this `*.safetensors` file: one tensor, `latents`,"
        " float32, (1, C, F, h, w).",
        "ring.safetensors",
        absent="not written",
    )
    run_dir: File | None = _field(
        "Folder for the run's record: settings, plan, events, results to resume from.",
        "runs/ring",
        absent="`runs/<date>-<time>-<prompt>`",
    )
    zoom: Whole | None = _field(
        "Each pixel becomes zoom x zoom equal ones in the file.", 4, absent="1", ge=1, le=16
    )


def make_job(values: Mapping[str, object], where: str = COMMAND_LINE) -> Job:
    """Check the values of a job.

    Args:
        values: field name to value, as typed or as YAML gives it.
        where: what stands before a field's name in a message: "--", "job.yaml: ".

    Raises:
        ConfigError: if a key is unknown or a value is of the wrong type or out of range.
    """
    try:
        return Job.model_validate(dict(values))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    # An unknown key first: a misspelt `prompt` is also a missing one.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    name = str(first["loc"][0])
    kind = first["type"] if len(first["loc"]) == 1 else "value"  # within a value: advice as a whole
    if kind == "extra_forbidden":
        raise ConfigError(label(where, name), "there is no such key", _nearest_key(name)) from None
    if kind == "missing":
        raise ConfigError(label(where, name), "is missing", f"give {expected(name)}") from None
    value = values[name]
    raise ConfigError(label(where, name), f"found {shown(value)}", _advice(name, value)) from None


def label(where: str, name: str) -> str:
    """Name a field as the user wrote it.

    >>> label("--", "save_latents"), label("--", "prompt"), label("job.yaml: ", "steps")
    ('--save-latents', 'PROMPT', 'job.yaml: steps')
    """
    if where != COMMAND_LINE:
        return f"{where}{name[:80]}"
    return "PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}"


def expected(name: str) -> str:
    """Say which values a field takes.

    >>> expected("shift"), expected("dtype")
    ('a number above 0, at most 1000', 'float32, bfloat16 or float16')
    """
    schema = field_schema(name)
    if schema.get("format") == "loras":
        return "files as FILE, FILE:STRENGTH or FILE:STRENGTH,LOW with strengths from -100 to 100"
    if schema.get("format") == "guidance":
        return "a number from 0 to 100, or two (high noise, low noise)"
    if "enum" in schema:
        return f"{', '.join(schema['enum'][:-1])} or {schema['enum'][-1]}"
    if schema["type"] in ("integer", "number"):
        noun = "a whole number" if schema["type"] == "integer" else "a number"
        if "exclusiveMinimum" in schema:
            return f"{noun} above {schema['exclusiveMinimum']}, at most {schema['maximum']}"
        return f"{noun} from {schema['minimum']} to {schema['maximum']}"
    if schema.get("format") == "bytes":
        return "a size such as 512MiB or 2GiB"
    if schema.get("format") == "size":
        return "WIDTHxHEIGHT in pixels, such as 832x480"
    if schema.get("format") == "path":
        return "a path"
    return f"text of {schema.get('minLength', 0)} to {schema['maxLength']} characters"


def field_schema(name: str) -> dict[str, Any]:
    """A field's JSON schema, with the type of its value (never null) at the top."""
    schema: dict[str, Any] = Job.model_json_schema()["properties"][name]
    value, *_ = schema.pop("anyOf", [{}])
    return {**value, **schema}


def shown(value: object) -> str:
    """Write a wrong value for a message, cut short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return f"{str(value).lower()} (YAML reads yes, no, on, off so; text needs quotes)"
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"{len(value)} characters, {value[:30]!r}..."
    if isinstance(value, int | float | Path):
        return str(value)[:40]
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def _nearest_key(name: str) -> str:
    known = list(Job.model_fields)
    simple = name.lower().strip("-").replace("-", "_")
    near = [_OTHER_NAMES[simple]] if simple in _OTHER_NAMES else get_close_matches(simple, known, 1)
    return f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"


def _advice(name: str, value: object) -> str:
    schema = field_schema(name)
    if schema.get("format") == "guidance":
        value = split_guidance(value)
    if isinstance(value, str) and "enum" in schema:
        simple = _OTHER_VALUES.get(value.lower(), value.lower())
        near = get_close_matches(simple, schema["enum"], 1)
        if near:
            return f"did you mean {near[0]}? ({expected(name)})"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and schema["type"] in ("integer", "number"):
        low, high = schema.get("minimum"), schema["maximum"]
        if low is not None and value < low:
            return f"the nearest is {low} ({expected(name)})"
        if value > high:
            return f"the nearest is {high} ({expected(name)})"
    if schema.get("format") == "size" and isinstance(value, tuple | list | str):
        return f"give {expected(name)}, sides from 1 to {MAX_SIDE}"
    return f"expected {expected(name)}"


SOLVER_NAMES: tuple[str, ...] = get_args(SolverName)
ATTENTION_NAMES: tuple[str, ...] = get_args(AttentionName)
