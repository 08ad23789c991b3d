"""The files of one model, opened and checked against its geometry before anything is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from reelpool.errors import WeightError

from .jsonfile import read_json
from .keys import (
    text_tensors,
    to_diffusers,
    transformer_names_from_diffusers,
    transformer_tensors,
)
from .registry import model_folder, spec_from_folder
from .spec import ModelSpec
from .wan_vae import expected_tensors as vae_tensors
from .weights import RenamedSource, WeightSource, check_tensors, open_folder

SAMPLE_BYTES = 64 * 1024
NUM_SAMPLES = 16


@dataclass(frozen=True)
class ModelFiles:
    """An opened model: nothing is read but headers until tensors are asked for.

    digest: tells models apart; equal on every host that holds the same files.
    transformer: canonical (original Wan) names. text_encoder: transformers names. vae: diffusers
    names.
    """

    folder: Path
    spec: ModelSpec
    digest: str
    transformer: WeightSource
    text_encoder: WeightSource
    vae: WeightSource


def open_model(name: str) -> ModelFiles:
    """Open a model folder (or `demo`) and check that every tensor is there with its shape.

    Raises:
        ConfigError: if there is no such model.
        WeightError: if a file is missing, damaged or belongs to another model.
    """
    folder = model_folder(name)
    spec = spec_from_folder(folder)
    stored = open_folder(folder / "transformer", "diffusion_pytorch_model")
    text_encoder = open_folder(folder / "text_encoder", "model")
    vae = open_folder(folder / "vae", "diffusion_pytorch_model")
    _check_transformer(stored, spec)
    check_tensors(text_encoder, text_tensors(spec.text))
    check_tensors(vae, vae_tensors(spec.vae))
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    if not isinstance(read_json(tokenizer).get("model"), dict):
        raise WeightError(str(tokenizer), "no model in it", "a tokenizer's vocabulary")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".json") and path.is_file()
    )
    transformer = RenamedSource(stored, transformer_names_from_diffusers(stored.names()))
    return ModelFiles(folder, spec, files_digest(files, folder), transformer, text_encoder, vae)


def _check_transformer(stored: WeightSource, spec: ModelSpec) -> None:
    """Check names and shapes; a tensor too many changes the result as much as one too few."""
    expected = {
        to_diffusers(name): shape for name, shape in transformer_tensors(spec.transformer).items()
    }
    check_tensors(stored, expected)
    for name in stored.names():
        if name not in expected:
            raise WeightError(
                stored.where,
                f"tensor {name}",
                f"none but those of the {spec.transformer.num_layers} blocks that config.json says",
                "the file belongs to another model, or to one this version cannot run",
            )


def files_digest(files: Iterable[Path], root: Path) -> str:
    """Digest of names, sizes, headers and sampled pages: cheap on a 9 GB file.

    The first 64 KiB (a header, or the whole of a small file) and 15 more pages spread evenly are
    read of every file.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()}:{size};".encode())
        with path.open("rb") as file:
            for index in range(NUM_SAMPLES):
                offset = max(0, size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1)
                file.seek(offset, os.SEEK_SET)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
