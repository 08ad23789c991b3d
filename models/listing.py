"""What lies in the search folders: models and what each lacks, parts, and what is neither.

Reads headers only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from reelpool.errors import ConfigError, WeightError

from .assembly import path_words
from .catalogue import Found, is_diffusers, is_weights, scan, without_suffix
from .companions import USUALS, is_companion
from .defaults import defaults_for
from .detect import ModelTraits
from .experts import HIGH
from .finder import Lack, Search, make_search, parts_of
from .layouts import open_transformer
from .parts import ModelParts
from .presets import WAN21_VAE, WAN22_VAE, usual_boundary
from .registry import find_spec
from .search_folders import SearchFolder
from .spec import ImageEncoderSpec, ModelSpec, TextSpec, TransformerSpec

Opened = tuple[TransformerSpec, ModelTraits]


@dataclass(frozen=True)
class ListedModel:
    """A model that can be opened, or could if its missing parts were there.

    num_bytes: of the transformers' files. label: of the search folder.
    """

    name: str
    label: str
    num_bytes: int
    transformer: TransformerSpec
    traits: ModelTraits
    parts: ModelParts
    lacks: tuple[Lack, ...]


@dataclass(frozen=True)
class ListedPart:
    """A VAE, an encoder or a LoRA."""

    what: str
    path: Path
    num_bytes: int
    label: str


@dataclass(frozen=True)
class Refused:
    """A file that may have been meant to be a model, and why it is none."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Listing:
    """Everything found."""

    models: tuple[ListedModel, ...]
    parts: tuple[ListedPart, ...]
    refused: tuple[Refused, ...]


def list_models(folders: Iterable[SearchFolder]) -> Listing:
    """List what the search folders hold.

    A pair of experts is one model, and a file that is reached by several paths is one file.
    """
    everything = list(scan(folders, files_of_models=True))
    inside = _inside_of_models(everything)
    models: dict[tuple[str, ...], ListedModel] = {}
    parts: dict[str, ListedPart] = {}
    refused: dict[str, Refused] = {}
    opened = _opener()
    search = make_search(lambda: [found.path for found in everything], lambda path: opened(path)[0])
    for found in everything:
        key = os.path.realpath(found.path)
        if part := _part(found):
            parts.setdefault(key, part)
        elif found.path not in inside and key not in refused:
            try:
                model = _listed(found.name, found.path, found.label, search, opened)
            except (ConfigError, WeightError) as error:
                refused[key] = Refused(found.path, str(error))
                continue
            models.setdefault(tuple(map(os.path.realpath, model.parts.transformers)), model)
    return Listing(tuple(models.values()), tuple(parts.values()), tuple(refused.values()))


def inspect_model(name: str, path: Path) -> ListedModel:
    """Look into one model's headers.

    Args:
        name: what it is called.
        path: a file or folder.

    Raises:
        ConfigError: if a folder holds several models.
        WeightError: if it is no Wan transformer, or is damaged.
    """
    opened = _opener()
    return _listed(name, path, "", make_search(read_spec=lambda file: opened(file)[0]), opened)


def _opener() -> Callable[[Path], Opened]:
    """Opens each transformer once, and keeps what it is: its tensors' places take 1 MB."""

    @functools.cache
    def opened(path: Path) -> Opened:
        spec, traits, _ = open_transformer(path)
        return spec, traits

    return opened


def _listed(
    name: str, path: Path, label: str, search: Search, opened: Callable[[Path], Opened]
) -> ListedModel:
    parts, lacks = parts_of(name, path, {}, search)
    spec, traits = opened(parts.transformers[HIGH])
    if parts.folder and is_diffusers(parts.folder):
        lacks = _lacks_of_diffusers(parts)
    num_bytes = sum(map(weights_bytes, parts.transformers))
    return ListedModel(name, label, num_bytes, spec, traits, parts, tuple(lacks))


def spec_of(model: ListedModel) -> ModelSpec:
    """Geometry and defaults; of an incomplete model with the usual VAE and encoders."""
    if not model.lacks:
        return find_spec(model.parts.name)
    t, num_experts = model.transformer, len(model.parts.transformers)
    vae = WAN22_VAE if t.out_channels == WAN22_VAE.z_dim else WAN21_VAE
    words = path_words(model.parts.transformers[HIGH])
    made = ModelSpec(
        model.name,
        t,
        vae,
        TextSpec(dim=t.text_dim),
        defaults_for(model.traits.variant, t, num_experts, words),
        variant=model.traits.variant,
        image=model.traits.image,
        image_encoder=ImageEncoderSpec(dim=t.image_dim) if t.image_dim else None,
        quant=model.traits.quant,
    )
    if num_experts == 1:
        return made
    return replace(made, num_experts=2, boundary=usual_boundary(t))


def weights_bytes(path: Path) -> int:
    """Bytes of a file of weights, or of those that lie in a folder, links followed."""
    files = [path] if path.is_file() else [p for p in path.iterdir() if is_weights(p.name)]
    if path.name.endswith(".index.json"):
        stem = f"{without_suffix(path.name)}-"
        files = [p for p in path.parent.iterdir() if p.name.startswith(stem)]
    return sum(file.stat().st_size for file in files)


def _inside_of_models(everything: Iterable[Found]) -> set[Path]:
    """Files that belong to a folder which is a whole model."""
    found = list(everything)
    roots = {item.path for item in found if item.path.is_dir()}
    return {item.path for item in found if roots & set(item.path.parents)}


def _part(found: Found) -> ListedPart | None:
    """A part by the folder it lies in and by its name; the parts of diffusers folders have none."""
    if found.path.is_dir():
        return None
    usual = next((usual for usual in USUALS if usual.is_name(found.path.name)), None)
    kinds = {"vae": "VAE", "text_encoder": "text encoder", "image_encoder": "image encoder"}
    what = usual.what if usual else kinds.get(found.kind, "")
    if found.kind == "lora" or (not what and "lora" in found.path.name.lower()):
        what = "LoRA"
    if not what and is_companion(found.path.name):
        what = "VAE"
    return ListedPart(what, found.path, weights_bytes(found.path), found.label) if what else None


def _lacks_of_diffusers(parts: ModelParts) -> list[Lack]:
    """Folders of a diffusers model in which no weights are."""
    lacks = []
    for path in (parts.text_encoder, parts.vae, parts.image_encoder):
        if path and not (path.is_file() or (path.is_dir() and weights_bytes(path))):
            option = f"--{path.name.replace('_', '-')}"
            what = path.name.replace("_", " ")
            lacks.append(Lack(option, what, f"the folder {path.name}", path.parent))
    return lacks
