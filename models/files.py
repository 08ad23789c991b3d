"""The files of one model, opened and checked against each other before anything is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from reelpool.errors import WeightError

from .assembly import assemble
from .catalogue import is_diffusers
from .detect import ModelTraits
from .finder import find_model
from .fp8 import with_scales
from .image_encoder import open_image_encoder
from .jsonfile import read_json
from .layouts import open_transformer
from .model_index import INDEX, OWN, SCHEDULER, ModelIndex, read_index
from .open_weights import open_weights
from .parts import ModelParts, Parts
from .spec import ImageEncoderSpec, ModelDefaults, ModelSpec, TextSpec, TransformerSpec, VaeSpec
from .text_layouts import open_text_encoder
from .tokenizer import TokenizerSource, find_tokenizer
from .vae_layouts import open_vae
from .weights import WeightSource

SAMPLE_BYTES = 64 * 1024
NUM_SAMPLES = 16
VAE_STEM, ENCODER_STEM = "diffusion_pytorch_model", "model"
_TEXT_KEYS = {  # of a config.json: of `TextSpec`
    "d_model": "dim",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "d_kv": "head_dim",
    "d_ff": "ffn_dim",
    "vocab_size": "vocab_size",
}
_VAE_FILES = {  # by latent channels
    16: "wan_2.1_vae.safetensors or Wan2.1_VAE.pth",
    48: "wan2.2_vae.safetensors or Wan2.2_VAE.pth",
}


@dataclass(frozen=True)
class ModelFiles:
    """An opened model: nothing is read but headers until tensors are asked for.

    digest: tells models apart; equal on every host that holds the same files.
    transformers: canonical (original Wan) names; of two the high-noise one first.
    text_encoder, image_encoder: transformers names. vae: diffusers names.
    folder: that all of it lies in; None for single files.
    """

    spec: ModelSpec
    digest: str
    transformers: tuple[WeightSource, ...]
    text_encoder: WeightSource
    tokenizer: TokenizerSource
    vae: WeightSource
    image_encoder: WeightSource | None = None
    folder: Path | None = None

    @property
    def transformer(self) -> WeightSource:
        """The only transformer, or the high-noise one."""
        return self.transformers[0]


def open_model(name: str, parts: Parts = ()) -> ModelFiles:
    """Open a model and check that every tensor is there, and that its parts fit together.

    Args:
        name: `demo`, a file or folder, or a name that is looked up (see `finder`).
        parts: files that the user named for parts of it.

    Raises:
        ConfigError: if there is no such model, or a part of it is nowhere.
        WeightError: if a file is missing, damaged or belongs to another model.
    """
    found = find_model(name, parts)
    in_diffusers = found.folder is not None and is_diffusers(found.folder)
    index = read_index(found.folder) if found.folder and in_diffusers else ModelIndex()
    transformer, traits, experts = _open_experts(found, index)
    stored_text = open_weights(found.text_encoder, ENCODER_STEM)
    text_config = _config(found.text_encoder, in_diffusers)
    text, text_encoder = open_text_encoder(with_scales(stored_text), text_config)
    _check_text(found.text_encoder, text, text_config or {}, transformer)
    vae_config = _config(found.vae, in_diffusers)
    vae, vae_source = open_vae(open_weights(found.vae, VAE_STEM), vae_config)
    _check_vae(vae_source, vae, transformer)
    tokenizer = find_tokenizer(stored_text, found.tokenizer)
    image_encoder, image_source = _open_image_encoder(found, transformer)
    spec = assemble(found, index, transformer, traits, vae, text, image_encoder)
    sources = (*experts, text_encoder, vae_source, *([image_source] if image_source else []))
    files = _files(found, sources, tokenizer)
    geometry = replace(spec, name="", defaults=ModelDefaults())  # the names of folders shape those
    return ModelFiles(
        spec=spec,
        digest=files_digest(files, repr(geometry)),
        transformers=experts,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        vae=vae_source,
        image_encoder=image_source,
        folder=found.folder,
    )


def _open_experts(
    found: ModelParts, index: ModelIndex
) -> tuple[TransformerSpec, ModelTraits, tuple[WeightSource, ...]]:
    """One transformer, or two of one geometry."""
    opened = [open_transformer(path) for path in found.transformers]
    spec, traits, first = opened[0]
    for other, other_traits, source in opened[1:]:
        if (other, other_traits.variant) != (spec, traits.variant):
            raise WeightError(
                source.where,
                f"{_words(other, other_traits)} beside {_words(spec, traits)} in {first.where}",
                "two experts of one geometry",
                "give the high-noise and the low-noise file of the same model",
            )
    if index.boundary and len(opened) == 1:
        raise WeightError(
            str(found.transformers[0].with_name("transformer_2")),
            "no such folder",
            f"the low-noise expert, as {INDEX} has a boundary_ratio",
            "copy the folder again, or name its file under --low-noise",
        )
    return spec, traits, tuple(source for _, _, source in opened)


def _words(spec: TransformerSpec, traits: ModelTraits) -> str:
    return (
        f"a transformer of kind {traits.variant}, {spec.num_layers} blocks, width {spec.dim}, "
        f"{spec.in_channels} channels"
    )


def _config(part: Path, needed: bool) -> Mapping[str, object] | None:
    """The config.json of a part that is a folder; None if it has none and needs none."""
    file = part / "config.json"
    return read_json(file) if part.is_dir() and (needed or file.exists()) else None


def _check_text(
    path: Path, text: TextSpec, config: Mapping[str, object], transformer: TransformerSpec
) -> None:
    """Its width is the transformer's, and its config.json agrees: a cut file has fewer layers."""
    for key, field in _TEXT_KEYS.items():
        if config.get(key, getattr(text, field)) != getattr(text, field):
            raise WeightError(
                str(path / "config.json"),
                f"{key} {config[key]!r}",
                f"{getattr(text, field)}, as its weights have it",
                "the folder is incomplete or mixed: copy it again",
            )
    if text.dim != transformer.text_dim:
        raise WeightError(
            str(path),
            f"a text encoder of d_model {text.dim}",
            f"{transformer.text_dim}, the transformer's text_dim",
            "Wan models take umt5_xxl",
        )


def _check_vae(source: WeightSource, vae: VaeSpec, transformer: TransformerSpec) -> None:
    needed = transformer.out_channels
    if vae.z_dim != needed:
        usual = _VAE_FILES.get(needed)
        raise WeightError(
            source.where,
            f"a VAE of z_dim {vae.z_dim}",
            f"{needed}, the transformer's out_channels",
            f"give {usual} under --vae" if usual else "",
        )


def _open_image_encoder(
    found: ModelParts, transformer: TransformerSpec
) -> tuple[ImageEncoderSpec | None, WeightSource | None]:
    """The image encoder, if the transformer attends to image features."""
    if not transformer.image_dim:
        return None, None
    if found.image_encoder is None:
        raise WeightError(
            str((found.folder or found.transformers[0].parent) / "image_encoder"),
            "no image encoder",
            f"one whose features have width {transformer.image_dim}",
            "give clip_vision_h.safetensors under --image-encoder",
        )
    stored = with_scales(open_weights(found.image_encoder, ENCODER_STEM))
    spec, source = open_image_encoder(stored, _config(found.image_encoder, False))
    positions = transformer.image_positions
    if spec.dim != transformer.image_dim or positions % spec.num_tokens:
        raise WeightError(
            source.where,
            f"an image encoder that gives {spec.num_tokens} rows of {spec.dim}",
            f"rows of {transformer.image_dim}"
            + (f", {positions} of two images" if positions else ""),
            "give clip_vision_h.safetensors under --image-encoder",
        )
    return spec, source


def _files(
    found: ModelParts, sources: tuple[WeightSource, ...], tokenizer: TokenizerSource
) -> dict[str, Path]:
    """All files that make the model, under names that do not tell where it lies."""
    paths = [*found.transformers, found.text_encoder, found.vae, found.image_encoder]
    files: dict[str, Path] = {}
    for number, (source, path) in enumerate(zip(sources, filter(None, paths), strict=False)):
        for file in sorted({Path(source.info(name).file) for name in source.names()}):
            files[f"{number}/{file.name}"] = file
        if path.is_dir():
            files[f"{number}/config.json"] = path / "config.json"
    if tokenizer.path:
        files[f"tokenizer/{tokenizer.path.name}"] = tokenizer.path
    for name in (INDEX, SCHEDULER, OWN) if found.folder else ():
        files[name] = Path(found.folder or ".") / name
    return {name: path for name, path in files.items() if path.is_file()}


def files_digest(files: Mapping[str, Path], more: str = "") -> str:
    """Digest of names, sizes, headers and sampled pages: cheap on a 9 GB file.

    The first 64 KiB (a header, or the whole of a small file) and 15 more pages spread evenly are
    read of every file.

    Args:
        files: by the name that counts.
        more: that makes a difference too.
    """
    digest = hashlib.blake2b(more.encode(), digest_size=16)
    for name, path in sorted(files.items()):
        digest.update(f"{name}:{path.stat().st_size};".encode())
        for sample in _samples(path):
            digest.update(sample)
    return digest.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(NUM_SAMPLES):
            offset = max(0, size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1)
            file.seek(offset, os.SEEK_SET)
            yield file.read(SAMPLE_BYTES)
