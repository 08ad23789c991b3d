"""Decides what a quantised transformer's file will hold, and whether it can be written.

Everything that can be refused is refused here, before hours of work: names, disk space, a source of
fewer bits. Nothing is read but headers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from reelpool.errors import ConfigError, WeightError

from .assembly import path_words
from .detect import HEAD_DIM, ModelTraits, variant_of
from .experts import WORDS, expert_of, is_half
from .jsonfile import read_json
from .keys import transformer_tensors
from .layouts import open_transformer
from .quantise_files import Stored
from .quantise_rules import Target, bits_of, check_out, kind_of
from .spec import TransformerSpec
from .weights import WeightSource

FP8 = "F8_E4M3"
FP8_MARK = "scaled_fp8"
CONFIG = "config.json"


@dataclass(frozen=True)
class Work:
    """A file to be written, and what it is made from.

    tensors: of the new file, in the order in which they are made.
    notices: sentences that the user should read before it begins.
    """

    spec: TransformerSpec
    traits: ModelTraits
    source: WeightSource
    target: Target
    out: Path
    tensors: tuple[Stored, ...]
    notices: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the new file's tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def plan_quantised(path: Path, out: Path, target: Target) -> Work:
    """Open a transformer and decide the type of each tensor. Nothing is written.

    Args:
        path: a file or folder, as `open_transformer` takes it.
        out: the file to write; it may exist.
        target: what to write.

    Raises:
        ConfigError: if `out` cannot be written, is what is read, or does not fit on its disk.
        WeightError: if the source is no transformer of Wan's, or has fewer bits than the target.
    """
    check_out(target, out)
    spec, traits, source = open_transformer(path)
    _check_bits(source, traits, target)
    _check_not_read(source, out)
    _check_config(spec, out)
    tensors = tuple(_tensors(spec, source, target))
    notices = tuple(_notices(path, spec, traits, source, out))
    work = Work(spec, traits, source, target, out, tensors, notices)
    free = shutil.disk_usage(out.parent).free
    if work.num_bytes > free:
        problem = f"{mib(work.num_bytes)} are needed, {mib(free)} are free"
        raise ConfigError(str(out), problem, "make room, or write to another disk")
    return work


def partial_of(out: Path) -> Path:
    """Where the file is until it is whole."""
    return out.with_name(f"{out.stem}.partial{out.suffix}")


def _tensors(spec: TransformerSpec, source: WeightSource, target: Target) -> Iterator[Stored]:
    """All tensors of the new file; the scale of an fp8 matrix follows it."""
    if not target.is_gguf:
        # Two elements instead of none tell ComfyUI not to multiply in fp8: nobody has measured how
        # large the inputs of these layers get, and without a scale it cuts them off at 448.
        yield Stored(FP8_MARK, FP8, (2,))
    for name, shape in transformer_tensors(spec).items():
        kind = kind_of(target, name, shape, source.info(name).dtype == torch.bfloat16)
        yield Stored(name, kind, shape)
        if kind == FP8:
            yield Stored(scale_name(name), "F32", ())


def scale_name(name: str) -> str:
    """Name of an fp8 matrix's scale."""
    return f"{name.removesuffix('.weight')}.scale_weight"


def _check_bits(source: WeightSource, traits: ModelTraits, target: Target) -> None:
    """Refuse to make a file of more bits than its source has: it would only be larger."""
    if bits_of(traits.quant) < bits_of(target.kind):
        raise WeightError(
            source.where,
            f"matrices already quantised to {traits.quant}",
            f"{bits_of(target.kind)} bits or more for {target.name}",
            "begin with a 16-bit file of the model: more bits bring nothing back",
        )


def _check_not_read(source: WeightSource, out: Path) -> None:
    """Refuse to write over a file that is being read."""
    read = {os.path.realpath(source.info(name).file) for name in source.names()}
    for path in (out, partial_of(out)):
        if os.path.realpath(path) in read:
            raise ConfigError(str(path), "is the file that is read", "give another name")


def is_usual(spec: TransformerSpec) -> bool:
    """Whether heads and eps are what a reader takes for granted; tensors do not tell them."""
    return (spec.head_dim, spec.eps) == (HEAD_DIM, TransformerSpec.eps)


def heads_of(spec: TransformerSpec) -> dict[str, object]:
    """A config.json that says what tensors do not."""
    return {
        "_class_name": "WanModel",
        "dim": spec.dim,
        "num_attention_heads": spec.num_heads,
        "attention_head_dim": spec.head_dim,
        "eps": spec.eps,
    }


def _check_config(spec: TransformerSpec, out: Path) -> None:
    """Refuse a folder whose config.json would give the new file other heads than it has."""
    config = out.with_name(CONFIG)
    if is_usual(spec) or not config.exists():
        return
    content = read_json(config)
    wanted = (spec.num_heads, spec.head_dim, spec.eps)
    if tuple(content.get(key) for key in list(heads_of(spec))[2:]) != wanted:
        problem = f"must say {spec.num_heads} heads of {spec.head_dim} for the new file beside it"
        raise ConfigError(str(config), problem, "write to a folder without a config.json")


def _notices(
    path: Path, spec: TransformerSpec, traits: ModelTraits, source: WeightSource, out: Path
) -> Iterator[str]:
    """What the user should know, in sentences."""
    if any(source.info(name).quant for name in source.names()):
        yield (
            f"{source.where} is quantised already ({traits.quant}): it is decoded first, and "
            "what it has lost stays lost; a 16-bit file of the model gives a better result"
        )
    if not is_usual(spec):
        yield (
            f"config.json beside the new file says that it has {spec.num_heads} heads of "
            f"{spec.head_dim}; keep the two together"
        )
    variant, _ = variant_of(str(out), spec, path_words(out.absolute()))
    if variant != traits.variant:
        yield (
            f"only its name tells that this is a model of kind {traits.variant}, and "
            f"{out.name} would be taken for {variant}"
        )
    expert = expert_of(path)
    if expert is not None and is_half(path) and expert_of(out) != expert:
        yield (
            f"only its name tells that this is the {WORDS[expert]}-noise expert: put "
            f"{WORDS[expert]} into {out.name}"
        )


def mib(num_bytes: int) -> str:
    """Bytes in words.

    Examples:
        >>> mib(3 * 2**20)
        '3 MiB'
    """
    return f"{num_bytes / 2**20:.0f} MiB"
