"""From what a user calls a model to the files and folders of its parts. Free of torch on import.

A name is `demo`, a path, or one that is looked up in the search folders. What a single file lacks
(VAE, encoders, the other expert) is found by its usual name, or asked for by it. A header is read
only where the transformer itself must say which VAE it needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reelpool.errors import ConfigError, WeightError

from .catalogue import (
    DIFFUSERS_INDEX,
    ORIGINAL_EXPERTS,
    is_diffusers,
    is_original,
    named,
    nearest,
    scan,
    walk,
)
from .companions import (
    Usual,
    companion,
    find_tokenizer,
    is_companion,
    usual_folder,
    usual_parts,
)
from .experts import HIGH, LOW, WORDS, expert_of, is_half, partner, partner_name, same_file
from .parts import ModelParts, Parts
from .presets import PRESETS, find_preset
from .search_folders import search_folders
from .spec import TransformerSpec

DEMO_FOLDER = Path(__file__).resolve().parent / "demo"
WHERE = "--model"
MAX_NAMED = 5  # candidates that a message lists


@dataclass(frozen=True)
class Search:
    """How a model's parts are looked for; each walk, look-up and header is done once.

    paths: gives the files and folders of models in the search folders.
    companion: the file of a part of a model that lies in a folder.
    read_spec: geometry of a transformer by its header.
    """

    paths: Callable[[], Sequence[Path]]
    companion: Callable[[Usual, Path], Path | None]
    read_spec: Callable[[Path], TransformerSpec]


@dataclass(frozen=True)
class Lack:
    """A part that is nowhere: what it is, the file and folder it usually is, the option for it."""

    option: str
    what: str
    name: str
    folder: Path

    def error(self, model: str) -> ConfigError:
        """Ask for it."""
        advice = f"put {self.name} into {self.folder}, or give {self.option} FILE"
        return ConfigError(self.option, f"found no {self.what} for {model}", advice)


def find_model(name: str, parts: Parts = ()) -> ModelParts:
    """Find a model and its parts on this host's disks.

    Args:
        name: `demo`, a file, a folder, or a name found in the search folders.
        parts: files that the user named for parts of it.

    Raises:
        ConfigError: if there is no such model, several are meant, or a part is nowhere.
        WeightError: if a folder holds no model, or a file is no transformer of Wan's.
    """
    given = {part: given_file(part, value) for part, value in parts}
    path = model_path(name)
    found, lacks = parts_of(name, path, given, make_search())
    if lacks:
        raise lacks[0].error(str(path))
    return found


def make_search(
    paths: Callable[[], Sequence[Path]] | None = None,
    read_spec: Callable[[Path], TransformerSpec] | None = None,
) -> Search:
    """A search that remembers what it has found.

    Args:
        paths: gives the files and folders of models in the search folders, if they are known.
        read_spec: reads a transformer's geometry; by `layouts.open_transformer` unless given.
    """

    def scanned() -> Sequence[Path]:
        return [found.path for found in scan(search_folders(), files_of_models=True)]

    def read(path: Path) -> TransformerSpec:
        from .layouts import open_transformer

        return open_transformer(path)[0]

    known = functools.cache(paths or scanned)
    found = functools.cache(lambda usual, folder: companion(usual, folder, known))
    return Search(known, found, functools.cache(read_spec or read))


def model_path(name: str, where: str = WHERE) -> Path:
    """The file or folder that a model's name stands for.

    Args:
        name: as `find_model` takes it.
        where: what stands before the message of an error.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    if name == "demo":
        return DEMO_FOLDER
    if path := existing(name):
        return path
    if find_preset(name, where):
        problem = f"{name} is a geometry without weights"
        raise ConfigError(where, problem, "give the path of a model's file or folder")
    return _looked_up(name, where)


def parts_of(
    name: str, path: Path, given: Mapping[str, Path], search: Search
) -> tuple[ModelParts, list[Lack]]:
    """The parts of the model at a path, and those that are nowhere (then their path is empty).

    Args:
        name: what the user called it.
        path: a file or folder.
        given: files that the user named, by `PART_NAMES`.
        search: how parts are looked for.

    Raises:
        ConfigError: if a folder holds several models.
        WeightError: if a folder holds no model, or a file is no transformer of Wan's.
    """
    if path.is_dir() and is_diffusers(path):
        return _diffusers(name, path, given), []
    experts, lacks, beside = _transformers(path, given, search.paths)
    files: dict[str, Path] = {}
    spec = search.read_spec(experts[HIGH])
    for usual in usual_parts(spec, "image_encoder" in given):
        there = given.get(usual.part) or search.companion(usual, beside)
        files[usual.part] = there or Path()
        if there is None:
            folder = usual_folder(usual, beside)
            lacks.append(Lack(usual.option, usual.what, usual.name, folder))
    text_encoder = files["text_encoder"]
    found = ModelParts(
        name,
        experts,
        text_encoder,
        files["vae"],
        tokenizer=find_tokenizer(text_encoder) if text_encoder != Path() else None,
        image_encoder=files.get("image_encoder"),
        folder=path if path.is_dir() and is_original(path) else None,
    )
    return found, lacks


def _transformers(
    path: Path, given: Mapping[str, Path], searched: Callable[[], Sequence[Path]]
) -> tuple[tuple[Path, ...], list[Lack], Path]:
    """The experts, which of them is nowhere, and the folder that other parts lie in or near."""
    if path.is_dir() and is_original(path):
        there = tuple(path / part for part in ORIGINAL_EXPERTS if (path / part).is_dir())
        lacks = []
        if len(there) == 1:
            absent = next(part for part in ORIGINAL_EXPERTS if part != there[0].name)
            option = f"--{absent.removesuffix('_model').replace('_', '-')}"
            lacks = [Lack(option, f"folder {absent}", absent, path)]
        return _override(there or (path,), given), lacks, path
    chosen = _chosen(path) if path.is_dir() else path
    return *_experts(chosen, given, searched), chosen.parent


def _diffusers(name: str, folder: Path, given: Mapping[str, Path]) -> ModelParts:
    second = folder / "transformer_2"  # the low-noise one
    image_encoder = folder / "image_encoder"
    experts = (folder / "transformer", *([second] if second.is_dir() else []))
    return ModelParts(
        name,
        _override(experts, given),
        given.get("text_encoder", folder / "text_encoder"),
        given.get("vae", folder / "vae"),
        tokenizer=folder / "tokenizer",
        image_encoder=given.get("image_encoder", image_encoder if image_encoder.is_dir() else None),
        folder=folder,
    )


def _override(experts: tuple[Path, ...], given: Mapping[str, Path]) -> tuple[Path, ...]:
    """A folder's experts, those that the user named in place of its own."""
    high = given.get("high_noise", experts[HIGH])
    low = given.get("low_noise", experts[LOW] if len(experts) > 1 else None)
    if low:
        _check_two(high, low, given)
    return (high, low) if low else (high,)


def _check_two(high: Path, low: Path, given: Mapping[str, Path]) -> None:
    """Refuse one file as both experts: the model would run, and give poor videos."""
    if same_file(high, low):
        option = next((f"--{word}-noise" for word in WORDS if f"{word}_noise" in given), WHERE)
        problem = f"{high} would be the high-noise and the low-noise expert"
        raise ConfigError(option, problem, "give two files, one of each expert")


def _experts(
    path: Path, given: Mapping[str, Path], searched: Callable[[], Sequence[Path]]
) -> tuple[tuple[Path, ...], list[Lack]]:
    """One transformer, or the high-noise and the low-noise one, and which of them is nowhere."""
    own = expert_of(path)
    files = [given.get("high_noise"), given.get("low_noise")]
    named_one = files[HIGH] or files[LOW]
    if named_one is None:
        other = partner(path, searched if is_half(path) else list) if own is not None else None
        if own is None or (other is None and not is_half(path)):
            return (path,), []
        files[own], files[1 - own] = path, other
    elif None in files:  # the model's own file is the other one, or has it beside
        absent = files.index(None)
        files[absent] = partner(path, searched) if own == 1 - absent else path
    lacks = []
    if None in files:
        word = WORDS[files.index(None)]
        lack = Lack(f"--{word}-noise", f"{word}-noise expert", partner_name(path), path.parent)
        lacks.append(lack)
    found = tuple(file for file in files if file)
    if not lacks:
        _check_two(found[HIGH], found[LOW], given)
    return found, lacks


def _chosen(folder: Path) -> Path:
    """The one transformer of a folder of files; of a pair of experts the high-noise one.

    Raises:
        ConfigError: if there are several.
        WeightError: if there is none.
    """
    files = [path for path in walk(folder) if path.is_file() and not is_companion(path.name)]
    first = [path for path in files if expert_of(path) != LOW or partner(path, list) not in files]
    if not files:
        advice = "give a diffusers folder, an original Wan folder, or a transformer's file"
        raise WeightError(str(folder / DIFFUSERS_INDEX), "no such file", "it or weights", advice)
    if len(first) > 1:
        raise _several(WHERE, str(folder), first)
    return first[0]


def _looked_up(name: str, where: str) -> Path:
    folders = search_folders()
    repositories = [f.path for f in folders if f.label.lower() == name.lower() and "/" in name]
    everything = [f for f in scan(folders) if f.kind in ("", "transformer")]
    hits = repositories or [found.path for found in named(name, everything)]
    if len(hits) > 1:
        raise _several(where, name, hits)
    if hits:
        return hits[0]
    advice = "give demo, a model's file or folder, or a name that `reelpool models` lists"
    if near := nearest(name, everything, ("demo", *PRESETS)):
        advice = f"did you mean {', '.join(near)}?"
    raise ConfigError(where, f"there is no model {name!r}", advice)


def given_file(part: str, value: str) -> Path:
    """The file or folder that a user named for a part or a LoRA: a path, or a name that is found.

    Raises:
        ConfigError: if there is none, or more than one.
    """
    option = f"--{part.replace('_', '-')}"
    path = existing(value)
    if path:
        return path
    everything = list(scan(search_folders(), files_of_models=True))
    hits = [found.path for found in named(value, everything)]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise _several(option, value, hits)
    near = nearest(value, everything)
    advice = f"did you mean {', '.join(near)}?" if near else "give the path of a file or folder"
    raise ConfigError(option, f"there is no file {value}", advice)


def existing(text: str) -> Path | None:
    """The path that a text is, if there is something."""
    try:
        path = Path(text).expanduser().absolute()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such home: no path
        return None


def _several(where: str, name: str, paths: Sequence[Path]) -> ConfigError:
    some = ", ".join(map(str, paths[:MAX_NAMED]))
    more = f" and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else ""
    return ConfigError(where, f"{name} may be {some}{more}", "give one of these paths")
