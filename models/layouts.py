"""Transformers in any form people have, under canonical names and shapes.

Original, ComfyUI's (any prefix) and diffusers names; axes of 1 that converters drop or join; types
per tensor. What is opened is checked whole: every tensor there, with its shape, and none too many.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path

import torch

from reelpool.errors import MissingTensor, ShapeMismatch, WeightError

from . import fp8
from .assembly import path_words
from .detect import ModelTraits, detect, refuse_other, refuse_unsupported
from .jsonfile import read_json
from .keys import to_diffusers, transformer_names_from_diffusers, transformer_tensors
from .open_weights import STEMS, open_weights
from .quant import Matrix, plain
from .spec import TransformerSpec
from .weights import TensorInfo, WeightSource

STEM = STEMS[0]
# by these a transformer is found among a file's names, whatever stands before them
_ANCHORS = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.0.weight",
    "time_projection.1.weight",
    "head.head.weight",
)
# first words of the other parts in files that hold a whole model
_OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "clip_vision.")
# in some diffusers files; nothing has ever used it
_UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")
_CLASSES = ("WanModel", "WanTransformer3DModel", "SkyReelsV2Transformer3DModel")
_SHAPELESS = ("num_attention_heads", "attention_head_dim", "num_heads", "eps")
_USUAL_NAME = re.compile(rf"(?:{'|'.join(STEMS)})(?:-\d{{5}}-of-\d{{5}})?\.")
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def open_transformer(path: Path) -> tuple[TransformerSpec, ModelTraits, WeightSource]:
    """Open a transformer and recognise it. Nothing is read but headers.

    Args:
        path: a file, an index of shards, or a folder with one of them.
    Returns:
        Its geometry, what kind of model it is for, and its weights: canonical names and shapes,
        matrices in `matrix` as they are stored, all else plain in `get`.
    Raises:
        MissingTensor, ShapeMismatch: if a tensor is not there or does not fit.
        WeightError: if a file is missing, damaged, or no transformer that can be run.
    """
    raw = open_weights(path, STEM)
    source = fp8.with_scales(raw)
    refuse_unsupported(raw.where, source.names())
    prefix, is_diffusers = _recognise(source)
    stored = _canonical_names(source, prefix, is_diffusers)
    shapes = {name: source.info(theirs).shape for name, theirs in stored.items()}
    width = (*shapes.get("text_embedding.0.weight", ()), 0)[0]
    config_file, config = _config(path, is_diffusers, width)
    try:
        spec, variant, image = detect(raw.where, shapes, config, config_file, path_words(path))
    except MissingTensor as error:  # told by the name that the file would have
        name = prefix + (to_diffusers(error.tensor) if is_diffusers else error.tensor)
        raise MissingTensor(error.file, name, error.expected, error.advice) from None
    expected = transformer_tensors(spec)
    _check(source, expected, stored, prefix, is_diffusers)
    canonical = CanonicalSource(source, stored, expected)
    return spec, ModelTraits(variant, image, _quant(canonical, raw)), canonical


class CanonicalSource:
    """A transformer's tensors under canonical names, in canonical shapes.

    Matrices of linear layers come as they are stored. All else is small and comes plain: a type of
    blocks is decoded to float32.
    """

    def __init__(
        self,
        source: WeightSource,
        stored: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """See a checked source.

        Args:
            source: the file.
            stored: canonical names to those in the file.
            shapes: canonical names and shapes.
        """
        self._source = source
        self._stored = {name: stored[name] for name in shapes}
        self._shapes = dict(shapes)

    @property
    def where(self) -> str:
        """The underlying file."""
        return self._source.where

    def names(self) -> Iterator[str]:
        """The canonical names."""
        return iter(self._stored)

    def info(self, name: str) -> TensorInfo:
        """Place of one tensor, in its canonical shape; raises MissingTensor."""
        info, shape = self._source.info(self._name(name)), self._shapes[name]
        if info.quant and not _is_matrix(name, shape):
            return replace(info, shape=shape, dtype=torch.float32, quant="")
        return info if info.shape == shape else replace(info, shape=shape)

    def get(self, name: str) -> torch.Tensor:
        """One plain tensor, normally a view of the file.

        Raises:
            MissingTensor: if there is none of that name.
            WeightError: if it is a quantised matrix.
        """
        stored, shape = self._name(name), self._shapes[name]
        if _is_matrix(name, shape):
            return self._source.get(stored)
        return plain(self._source.matrix(stored), torch.float32).reshape(shape)

    def matrix(self, name: str) -> Matrix:
        """The same, or a quantised matrix as it is stored; raises MissingTensor."""
        stored, shape = self._name(name), self._shapes[name]
        return self._source.matrix(stored) if _is_matrix(name, shape) else self.get(name)

    def _name(self, name: str) -> str:
        try:
            return self._stored[name]
        except KeyError:
            raise MissingTensor(self.where, name, "it among the model's tensors") from None


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the matrix of a linear layer, which may stay quantised."""
    return len(shape) == 2 and name.endswith(".weight") and name != "fps_embedding.weight"


def _recognise(source: WeightSource) -> tuple[str, bool]:
    """What stands before all names, and whether they are diffusers'."""
    names = list(source.names())
    votes: Counter[tuple[str, bool]] = Counter()
    for anchor in _ANCHORS:
        ends = ((anchor, False), (to_diffusers(anchor), True))
        for end, is_diffusers in ends:
            for name in names:
                prefix = name.removesuffix(end)
                if prefix != name and (not prefix or prefix.endswith(".")):
                    votes[prefix, is_diffusers] += 1
    # patch_embedding is called the same in both: it alone tells nothing
    most = votes.most_common(2)
    if not most or most[0][1] < 2:
        raise refuse_other(source.where, names)
    if len(most) == 2 and most[0][1] == most[1][1]:
        raise WeightError(source.where, "two transformers", "one", "use a file for each")
    return most[0][0]


def _canonical_names(source: WeightSource, prefix: str, is_diffusers: bool) -> dict[str, str]:
    """Canonical names to those in the file.

    Raises:
        WeightError: if there is a tensor that no Wan transformer has.
    """
    inner = [name[len(prefix) :] for name in source.names() if name.startswith(prefix)]
    for name in source.names():
        if not name.startswith((prefix, *_OTHER_PARTS)):
            raise _too_many(source, name)
    if not is_diffusers:
        return {name: prefix + name for name in inner}
    names = transformer_names_from_diffusers(inner)
    known = set(names.values())
    for name in inner:
        if name not in known and not _UNUSED.fullmatch(name):
            raise _too_many(source, prefix + name)
    return {name: prefix + theirs for name, theirs in names.items()}


def _check(
    source: WeightSource,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    prefix: str,
    is_diffusers: bool,
) -> None:
    """Check names, shapes and types; a tensor too many changes the result like one too few."""
    for name, theirs in stored.items():
        if name not in expected:
            raise _too_many(source, theirs)
    for name, shape in expected.items():
        if name not in stored:
            theirs = prefix + (to_diffusers(name) if is_diffusers else name)
            raise MissingTensor(source.where, theirs, "it among the file's tensors")
        info = source.info(stored[name])
        fits = info.shape == shape if _is_matrix(name, shape) else _same_order(info.shape, shape)
        if not fits:
            raise ShapeMismatch(info.file, info.name, info.shape, shape)
        if not info.quant and not info.dtype.is_floating_point:
            found = f"tensor {info.name} of {str(info.dtype).removeprefix('torch.')}"
            raise WeightError(info.file, found, "floating point, fp8 or a type of GGUF")


def _too_many(source: WeightSource, name: str) -> WeightError:
    return WeightError(
        source.info(name).file,
        f"tensor {name}",
        "none but those of a Wan transformer, as many blocks as its config.json says",
        "the file belongs to another model, or to one this version cannot run",
    )


def _same_order(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether axes were only joined, or ones dropped or added: the same values in the same order.

    >>> _same_order((6, 8), (1, 6, 8)), _same_order((8, 6), (1, 6, 8))
    (True, False)
    """
    steps, wanted = (list(accumulate((1, *axes), mul)) for axes in (stored, shape))
    return steps[-1] == wanted[-1] and set(steps) <= set(wanted)


def _config(path: Path, is_diffusers: bool, width: int) -> tuple[str, Mapping[str, object]]:
    """The transformer's config.json, if it is one: (file, content).

    A folder with diffusers names must have one. Beside a file of an unusual name it may be that of
    another file: then only its heads and eps count, and only if they make up the width.
    """
    is_folder = path.is_dir()
    file = (path if is_folder else path.parent) / "config.json"
    if is_folder and (is_diffusers or file.exists()):
        return str(file), read_json(file)
    if is_folder or not file.is_file():
        return str(path), {}
    is_own = _USUAL_NAME.match(path.name) is not None
    try:
        config = read_json(file)
    except WeightError:
        if is_own:
            raise
        return str(path), {}
    if config.get("_class_name") not in _CLASSES:
        return str(path), {}
    if is_own:
        return str(file), config
    heads, head_dim = config.get("num_attention_heads"), config.get("attention_head_dim")
    fits = heads * head_dim == width if type(heads) is type(head_dim) is int else False
    if not fits and config.get("dim") != width:
        return str(path), {}
    return str(file), {key: config[key] for key in _SHAPELESS if key in config}


def _quant(source: CanonicalSource, raw: WeightSource) -> str:
    """The type of most matrices of the blocks."""
    matrices: Iterable[TensorInfo] = (
        source.info(name)
        for name in source.names()
        if name.startswith("blocks.") and name.endswith(".weight")
    )
    kinds: Counter[str] = Counter()
    for info in matrices:
        if len(info.shape) == 2:
            kinds[info.quant.lower() or _TYPES.get(info.dtype, str(info.dtype)[6:])] += 1
    kind = kinds.most_common(1)[0][0]
    if kind.startswith("f8_"):
        scaled = any(name.endswith((".scale_weight", ".weight_scale")) for name in raw.names())
        return f"fp8_{kind.removeprefix('f8_')}" + (" scaled" if scaled else "")
    return kind
