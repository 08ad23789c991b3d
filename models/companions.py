"""The other parts of a model whose transformer is a single file: VAE, encoders, tokenizer.

They are known by the names that they are published under, and looked for beside the transformer,
in the sibling folders of a ComfyUI tree, then in all search folders. Free of torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reelpool.errors import WeightError

from .catalogue import is_weights
from .jsonfile import read_json
from .search_folders import COMFYUI_KINDS, Kind
from .spec import TransformerSpec


@dataclass(frozen=True)
class Usual:
    """How a part is usually called and where it lies.

    part: as in `parts.PART_NAMES`; the option is `--part`.
    name: the file to ask for.
    pattern: of the names it is published under, in lower case.
    folder: ComfyUI's for it; `name` of its folder inside a diffusers model: `inner`.
    """

    part: str
    what: str
    kind: Kind
    name: str
    pattern: str
    folder: str
    inner: str

    @property
    def option(self) -> str:
        """What names it on the command line."""
        return f"--{self.part.replace('_', '-')}"

    def is_name(self, name: str) -> bool:
        """Whether a file of this name is such a part."""
        lower = name.lower()
        return is_weights(lower) and re.search(self.pattern, lower) is not None


_WAN = r"(?<![a-z])wan[ _.\-]?"
VAE21 = Usual(
    "vae", "Wan 2.1 VAE", "vae", "wan_2.1_vae.safetensors",
    rf"{_WAN}(2[._\-]?1)?[ ._\-]?(video[ ._\-]?)?vae", "vae", "vae",
)  # fmt: skip
VAE22 = Usual(
    "vae", "Wan 2.2 VAE", "vae", "wan2.2_vae.safetensors", rf"{_WAN}2[._\-]?2[ ._\-]?vae", "vae",
    "vae",
)  # fmt: skip
TEXT_ENCODER = Usual(
    "text_encoder", "UMT5-XXL text encoder", "text_encoder",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors", r"(?<![a-z])umt5[ ._\-]?xxl", "text_encoders",
    "text_encoder",
)  # fmt: skip
IMAGE_ENCODER = Usual(
    "image_encoder", "CLIP vision encoder", "image_encoder", "clip_vision_h.safetensors",
    r"clip[ ._\-]?vision[ ._\-]?h(?![a-z])|xlm[ ._\-]?roberta[ ._\-]?large[ ._\-]?vit[ ._\-]?huge",
    "clip_vision", "image_encoder",
)  # fmt: skip
USUALS = (VAE21, VAE22, TEXT_ENCODER, IMAGE_ENCODER)

_SOME_VAE = re.compile(r"(?<![a-z])(vae|tae[a-z]*\d)", re.IGNORECASE)  # TAEHV's are called taew2_1
_Z_DIM_22 = 48
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
_TOKENIZER_FOLDERS = ("", "tokenizer", "google/umt5-xxl", "umt5-xxl")


def is_companion(name: str) -> bool:
    """Whether a file of this name is a VAE or an encoder: no transformer."""
    return any(usual.is_name(name) for usual in USUALS) or _SOME_VAE.search(name) is not None


def usual_parts(transformer: TransformerSpec, with_image: bool = False) -> list[Usual]:
    """The parts that a transformer needs beside itself.

    Args:
        transformer: its geometry.
        with_image: whether an image encoder is wanted even if the geometry does not say so.
    """
    vae = VAE22 if transformer.out_channels == _Z_DIM_22 else VAE21
    has_image = with_image or transformer.image_dim > 0
    return [vae, TEXT_ENCODER, *([IMAGE_ENCODER] if has_image else [])]


def companion(usual: Usual, beside: Path, searched: Callable[[], Sequence[Path]]) -> Path | None:
    """The file (or diffusers folder) of a part: beside the transformer, else in search folders.

    Of several in one folder the largest is taken: it is the most exact.

    Args:
        usual: which part.
        beside: the folder that the transformer lies in.
        searched: gives files and folders of models in the search folders; called if need be.
    """
    for folder in _places(usual, beside):
        if found := _best(usual, _files(folder)) or _diffusers_part(usual, folder):
            return found
    if found := _best(usual, searched()):
        return found
    inner = (_diffusers_part(usual, path) for path in searched() if path.is_dir())
    return next(filter(None, inner), None)


def _diffusers_part(usual: Usual, model: Path) -> Path | None:
    """The part's folder inside a diffusers model folder, if it is the right kind of VAE."""
    folder = model / usual.inner
    if not (folder / "config.json").is_file() or not any(map(is_weights, _names(folder))):
        return None
    if usual.part == "vae":
        try:
            z_dim = read_json(folder / "config.json").get("z_dim", 0)
        except WeightError:  # damaged: it is not what we look for
            return None
        if (z_dim == _Z_DIM_22) != (usual is VAE22):
            return None
    return folder


def comfyui_models(folder: Path) -> Path | None:
    """The folder `models` of the ComfyUI tree that a folder lies in, by its name or its folders."""
    for inner in (folder, *list(folder.parents)[:5]):
        models = inner.parent
        others = (models / name for name in COMFYUI_KINDS if name != inner.name)
        if inner.name in COMFYUI_KINDS and (
            models.name == "models" or any(other.is_dir() for other in others)
        ):
            return models
    return None


def usual_folder(usual: Usual, beside: Path) -> Path:
    """Where a user would put the missing part of a model that lies in the folder `beside`."""
    models = comfyui_models(beside)
    return models / usual.folder if models else beside


def find_tokenizer(text_encoder: Path) -> Path | None:
    """A tokenizer in a text encoder's folder or beside it; None if there is none.

    ComfyUI's and GGUF files hold their tokenizer themselves.
    """
    for folder in (text_encoder, text_encoder.parent, text_encoder.parent.parent):
        for inner in _TOKENIZER_FOLDERS:
            for name in TOKENIZER_FILES:
                if (folder / inner / name).is_file():
                    return folder / inner / name
    return None


def _places(usual: Usual, beside: Path) -> Iterator[Path]:
    yield beside
    if models := comfyui_models(beside):
        for name, kind in COMFYUI_KINDS.items():
            if kind == usual.kind:
                yield models / name
                yield from (models / name / inner for inner in _names(models / name))
    for folder in (beside, beside.parent):
        yield folder / usual.inner
        yield folder / usual.folder
    yield beside.parent


def _names(folder: Path) -> list[str]:
    """What a folder holds; nothing where there is none, or it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _files(folder: Path) -> Iterator[Path]:
    return (folder / name for name in _names(folder) if is_weights(name))


def _best(usual: Usual, files: Iterable[Path]) -> Path | None:
    """The largest; of equal ones the first by name."""
    fitting = [path for path in files if usual.is_name(path.name) and path.is_file()]
    return min(fitting, key=lambda path: (-path.stat().st_size, str(path)), default=None)
