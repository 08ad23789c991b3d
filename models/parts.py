"""Where the parts of one model lie on this host's disk. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# parts of a model that a user may name a file for, by option and by key of a job file
PART_NAMES = ("high_noise", "low_noise", "vae", "text_encoder", "image_encoder")
Parts = tuple[tuple[str, str], ...]  # pairs of a name of `PART_NAMES` and a path


@dataclass(frozen=True)
class ModelParts:
    """Files or folders of a model's parts.

    name: what the user called it.
    transformers: one, or for a two-expert model the high-noise one and the low-noise one.
    tokenizer: a `tokenizer.json`, a SentencePiece model, or a folder with one of them; None when
        the text encoder's own file holds it.
    folder: the diffusers or original folder that they come from; None for single files.
    """

    name: str
    transformers: tuple[Path, ...]
    text_encoder: Path
    vae: Path
    tokenizer: Path | None = None
    image_encoder: Path | None = None
    folder: Path | None = None
