"""Model files and folders that lie in the search folders, by name and place only; none is opened.

Walks are bounded in depth and number, follow links, and never enter a folder twice. Free of torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from .search_folders import Kind, SearchFolder

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
INDEX_SUFFIX = ".safetensors.index.json"
_SHARD = re.compile(r"(.+)-(\d{5})-of-\d{5}\.\w+")
MAX_DEPTH = 8
MAX_ENTRIES = 200_000  # files and folders looked at in one search folder
DIFFUSERS_INDEX = "model_index.json"
ORIGINAL_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
ORIGINAL_EXPERTS = ("high_noise_model", "low_noise_model")


@dataclass(frozen=True)
class Found:
    """A file of weights, or a folder that is a whole model.

    kind: what the folder it lies in is for; "" for any.
    label: of the search folder.
    root: the search folder.
    """

    path: Path
    kind: Kind
    label: str
    root: Path

    @property
    def name(self) -> str:
        """What a user calls it: `org/name` of the cache for its own folder, else path's last."""
        return self.label if self.path == self.root else self.path.name


def scan(folders: Iterable[SearchFolder], files_of_models: bool = False) -> Iterator[Found]:
    """Everything in the folders, by folder and name.

    Args:
        folders: where to look.
        files_of_models: also the files that lie inside folders which are whole models.
    """
    for folder in folders:
        for path in walk(folder.path, files_of_models):
            yield Found(path, folder.kind, folder.label, folder.path)


def walk(root: Path, files_of_models: bool = False) -> Iterator[Path]:
    """Files of weights and folders of whole models under `root`, which may be one itself.

    Of a sharded model the index is given instead of its shards.
    """
    seen: set[tuple[int, int]] = set()
    num_entries = 0
    stack = [(root, 0)]
    while stack:
        folder, depth = stack.pop()
        names, folders = _listed(folder, seen)
        num_entries += len(names) + len(folders)
        if num_entries > MAX_ENTRIES:
            return
        is_model = _is_model(names, folders)
        if is_model:
            yield folder
        if is_model and not files_of_models:
            continue
        for name in _weight_names(names):
            yield folder / name
        if depth < MAX_DEPTH:
            stack += [(folder / name, depth + 1) for name in reversed(folders)]


def _listed(folder: Path, seen: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """Names of files and folders in a folder; nothing of one seen before or not readable."""
    names: list[str] = []
    folders: list[str] = []
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return names, folders
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number > MAX_ENTRIES:
                    break
                if not entry.name.startswith(".") and not _is_special(entry):
                    (folders if entry.is_dir() else names).append(entry.name)
    except OSError:  # it has gone, or is not ours to read
        return names, folders
    return sorted(names), sorted(folders)


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is a pipe, socket or device: reading one may wait for ever.

    A link to nothing is none: whoever opens it says what it lacks.
    """
    return not entry.is_file() and not entry.is_dir() and os.path.exists(entry.path)


def _is_model(names: list[str], folders: list[str]) -> bool:
    """Whether a folder with these entries is a diffusers or an original Wan folder."""
    if DIFFUSERS_INDEX in names or set(ORIGINAL_EXPERTS) & set(folders):
        return True
    return ORIGINAL_TEXT_ENCODER in names and bool(_top_weights(names))


def _top_weights(names: Iterable[str]) -> list[str]:
    """Of an original Wan folder, the transformer's files."""
    return [name for name in names if name.startswith(("diffusion_pytorch_model", "model.safet"))]


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is, or was, a diffusers model folder."""
    return (folder / DIFFUSERS_INDEX).exists() or (folder / "transformer").is_dir()


def is_original(folder: Path) -> bool:
    """Whether a folder has the layout of the original Wan repositories."""
    return _is_model(*_listed(folder, set())) and not is_diffusers(folder)


def _weight_names(names: list[str]) -> list[str]:
    """Files of weights: single ones, and for shards their index, else the first of them."""
    indexed = {name.removesuffix(INDEX_SUFFIX) for name in names if name.endswith(INDEX_SUFFIX)}
    kept = []
    for name in names:
        shard = _SHARD.fullmatch(name)
        if shard and (shard[1] in indexed or shard[2] != "00001"):
            continue
        if name.endswith(INDEX_SUFFIX) or is_weights(name):
            kept.append(name)
    return kept


def is_weights(name: str) -> bool:
    """Whether a file of this name may hold weights."""
    return name.lower().endswith(WEIGHT_SUFFIXES)


def without_suffix(name: str) -> str:
    """A file's name without the ending that says it is weights."""
    for suffix in (INDEX_SUFFIX, *WEIGHT_SUFFIXES):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def named(name: str, found: Iterable[Found]) -> list[Found]:
    """Those that a name means: whole names before bare ones, each real file once.

    A name is a file's or folder's, the end of its path, with or without the ending of a file of
    weights, or `org/name` of the Hugging Face cache. The case of letters does not matter.
    """
    wanted = name.strip("/").replace("\\", "/").lower()
    everything = list(found)
    for bare in (False, True):
        hits = [item for item in everything if _means(wanted, item, bare)]
        if hits:
            first = {os.path.realpath(item.path): item for item in reversed(hits)}
            return list(first.values())[::-1]
    return []


def _means(wanted: str, item: Found, bare: bool) -> bool:
    tail = item.path.relative_to(item.root).as_posix()
    full = item.label if tail == "." else f"{item.label}/{tail}"
    full = (without_suffix(full) if bare else full).lower()
    return full == wanted or full.endswith(f"/{wanted}")


def nearest(name: str, found: Iterable[Found], more: Iterable[str] = ()) -> list[str]:
    """Up to three names like `name`, of what was found and of `more`."""
    names = {known.lower(): known for known in more}
    for item in found:
        names.setdefault(item.name.lower(), item.name)
        names.setdefault(without_suffix(item.name).lower(), item.name)
    near = get_close_matches(name.lower(), names, 5, 0.5)
    return list(dict.fromkeys(names[close] for close in near))[:3]
