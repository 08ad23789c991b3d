"""What a diffusers folder says of the whole model. Free of torch.

Its model_index.json, the shift of its scheduler, and defaults in a demo.json of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from reelpool.errors import WeightError

from .jsonfile import read_json
from .spec import ModelDefaults

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
OWN = "demo.json"
PIPELINES = (
    "WanPipeline",
    "WanImageToVideoPipeline",
    "SkyReelsV2Pipeline",
    "SkyReelsV2ImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline",
)
MAX_NUMBER = 2**31 - 1


@dataclass(frozen=True)
class ModelIndex:
    """What a model_index.json tells that the weights do not.

    boundary: share of 1000 timesteps from which the high-noise expert serves; 0 if not told.
    is_first_frame: images come as a finished first latent frame. `expand_timesteps` alone only
        says that timesteps are per frame.
    is_forcing: a model with timesteps per frame.
    """

    boundary: float = 0.0
    is_first_frame: bool = False
    is_forcing: bool = False


def read_index(folder: Path) -> ModelIndex:
    """Read a folder's model_index.json.

    Raises:
        WeightError: if it is missing, or that of a pipeline that cannot be run.
    """
    path = folder / INDEX
    content = read_json(path)
    kind = content.get("_class_name")
    if kind not in PIPELINES:
        raise WeightError(str(path), f"a model of class {kind}", " or ".join(PIPELINES))
    boundary = content.get("boundary_ratio")
    if boundary is None:
        boundary = 0.0
    if isinstance(boundary, bool) or not isinstance(boundary, int | float) or not 0 <= boundary < 1:
        raise WeightError(str(path), f"boundary_ratio {boundary!r}", "a number from 0 to 1")
    is_first_frame = content.get("expand_timesteps") is True and "ImageToVideo" in str(kind)
    return ModelIndex(float(boundary), is_first_frame, "DiffusionForcing" in str(kind))


def folder_defaults(folder: Path, defaults: ModelDefaults) -> ModelDefaults:
    """The scheduler's shift over a model's defaults, and the folder's demo.json over both.

    Raises:
        WeightError: if a value has another type or range.
    """
    scheduler, own = folder / SCHEDULER, folder / OWN
    if scheduler.exists():
        shift = number(scheduler, read_json(scheduler), "flow_shift", defaults.shift)
        defaults = replace(defaults, shift=shift)
    if not own.exists():
        return defaults
    values = read_json(own)
    changes: dict[str, object] = {}
    for field in fields(ModelDefaults):
        if values.get(field.name) is not None:  # null: not said
            changes[field.name] = _checked(own, field.name, values, getattr(defaults, field.name))
    return replace(defaults, **changes)  # type: ignore[arg-type]  # checked against each default


def _checked(path: Path, key: str, values: Mapping[str, object], like: object) -> object:
    value = values[key]
    if isinstance(like, str):
        if not isinstance(value, str):
            raise WeightError(str(path), f"{key} {value!r}", "a text")
        return value
    if isinstance(like, int):
        if type(value) is not int or not 0 < value <= MAX_NUMBER:
            found = f"{key} {value!r}"
            raise WeightError(str(path), found, f"a whole number from 1 to {MAX_NUMBER}")
        return value
    return number(path, values, key, 0.0)


def number(path: Path, config: Mapping[str, object], key: str, default: float) -> float:
    """A number of at least 0 in a JSON file, or the default; raises WeightError."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise WeightError(str(path), f"{key} {value!r}", "a number of at least 0")
    return float(value)
