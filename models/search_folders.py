"""Where model files may lie on this host: configured folders, ComfyUI's, the Hugging Face cache.

Knows folders, not files. Free of torch.

* lists `model_folders` and `comfyui` of `reelpool/config.yaml` in XDG_CONFIG_HOME or ~/.config
* REELPOOL_MODELS, a list of folders as in PATH
* `models/<kind>` of every ComfyUI root, those of its `extra_model_paths.yaml`, and ~/ComfyUI
* the snapshots of HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from reelpool.errors import ConfigError

Kind = Literal["", "transformer", "text_encoder", "vae", "image_encoder", "lora"]

# ComfyUI's folder names and what lies in them
COMFYUI_KINDS: dict[str, Kind] = {
    "diffusion_models": "transformer",
    "unet": "transformer",
    "text_encoders": "text_encoder",
    "clip": "text_encoder",
    "vae": "vae",
    "clip_vision": "image_encoder",
    "loras": "lora",
}
MAX_YAML_BYTES = 2**20
MAX_REPOSITORIES = 5000  # of the Hugging Face cache


@dataclass(frozen=True)
class SearchFolder:
    """A folder to look in.

    kind: of the files in it; "" for any.
    label: how it is called in a list: `ComfyUI`, `org/name` of the Hugging Face cache, a path.
    """

    path: Path
    kind: Kind
    label: str


def config_path() -> Path:
    """The user's configuration file, whether it exists or not."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "reelpool" / "config.yaml"


def search_folders() -> list[SearchFolder]:
    """All folders that exist, in the order in which they are searched, each once.

    Raises:
        ConfigError: if the configuration file or an `extra_model_paths.yaml` is not what it should
            be, or a folder that the configuration names does not exist.
    """
    config = config_path()
    content = _read_yaml(config) if config.is_file() else {}
    for key in content:
        if key not in ("model_folders", "comfyui"):
            raise ConfigError(f"{config}: {key}", "no such key", "use model_folders or comfyui")
    folders = [
        SearchFolder(path, "", str(path)) for path in _configured(config, content, "model_folders")
    ]
    named = os.environ.get("REELPOOL_MODELS", "").split(os.pathsep)
    folders += [
        SearchFolder(path, "", str(path))
        for path in map(_path, filter(None, map(str.strip, named)))
    ]
    roots = _configured(config, content, "comfyui")
    usual = _path("~/ComfyUI")
    for root in [*roots, usual]:
        folders += comfyui_folders(root)
    folders += hugging_face_folders(hugging_face_cache())
    return list({_identity(f.path): f for f in reversed(folders) if f.path.is_dir()}.values())[::-1]


def comfyui_folders(root: Path) -> list[SearchFolder]:
    """The model folders of a ComfyUI root, or of an `extra_model_paths.yaml` by its path."""
    if root.is_file():
        return _extra_folders(root)
    extra = root / "extra_model_paths.yaml"
    folders = [
        SearchFolder(root / "models" / name, kind, "ComfyUI")
        for name, kind in COMFYUI_KINDS.items()
    ]
    if not extra.is_file():
        return folders
    own: list[SearchFolder] = []
    others: list[SearchFolder] = []
    for section in _sections(extra):
        (own if section.get("is_default") is True else others).extend(_of_section(extra, section))
    return [*own, *folders, *others]


def _extra_folders(path: Path) -> list[SearchFolder]:
    sections = sorted(_sections(path), key=lambda section: section.get("is_default") is not True)
    return [folder for section in sections for folder in _of_section(path, section)]


def _sections(path: Path) -> list[Mapping[str, object]]:
    return [section for section in _read_yaml(path).values() if isinstance(section, Mapping)]


def _of_section(file: Path, section: Mapping[str, object]) -> Iterator[SearchFolder]:
    """Folders of one section: relative to its base_path, several in one text, a line each."""
    base = section.get("base_path")
    start = file.parent / _path(base) if isinstance(base, str) and base else file.parent
    for name, kind in COMFYUI_KINDS.items():
        value = section.get(name)
        for line in value.splitlines() if isinstance(value, str) else ():
            if line.strip():
                yield SearchFolder(start / _path(line.strip()), kind, "ComfyUI")


def hugging_face_cache() -> Path:
    """The cache of huggingface_hub, whether it exists or not."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return _path(cache)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _path(os.environ.get("HF_HOME") or f"{base}/huggingface") / "hub"


def hugging_face_folders(cache: Path) -> list[SearchFolder]:
    """One snapshot of every model in a cache: the one of refs/main, else the newest."""
    folders = []
    for repository in _listed(cache)[:MAX_REPOSITORIES]:
        if not repository.name.startswith("models--"):
            continue
        snapshot = _snapshot(repository)
        if snapshot:
            label = repository.name.removeprefix("models--").replace("--", "/")
            folders.append(SearchFolder(snapshot, "", label))
    return folders


def _snapshot(repository: Path) -> Path | None:
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = ""
    main = repository / "snapshots" / commit
    if commit and "/" not in commit and main.is_dir():
        return main
    there = [path for path in _listed(repository / "snapshots") if path.is_dir()]
    return max(there, key=lambda path: path.stat().st_mtime_ns, default=None)


def _listed(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing of one that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _configured(config: Path, content: Mapping[str, object], key: str) -> list[Path]:
    value = content.get(key)
    if value is None:
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise ConfigError(f"{config}: {key}", f"found {value!r}", "expected a list of folders")
    paths = [config.parent / _path(item) for item in values]
    for path in paths:
        if not path.exists():
            advice = "correct it or take it out"
            raise ConfigError(f"{config}: {key}", f"there is no folder {path}", advice)
    return paths


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ConfigError(str(path), "is larger than 1 MiB", "expected a few lines")
        content = yaml.safe_load(data.decode("utf-8-sig"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(str(path), f"cannot be read ({reason})", "correct it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(str(path), f"is not YAML ({reason})", "correct it") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        found = f"found a {type(content).__name__}"
        raise ConfigError(str(path), found, "expected keys and values")
    return {str(key): value for key, value in content.items()}


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def _identity(path: Path) -> str:
    return os.path.realpath(path)
