"""Files with fp8 matrices, seen as quantised ones: the scale of each is found and goes with it.

Four forms: without any scale; ComfyUI's `scaled_fp8` (a scale of each layer under `scale_weight`);
the same with `weight_scale`; and its later `comfy_quant`, where a small JSON for each layer, or one
in the file's header, says what the layer is. w = fp8 as float32 · scale, rounded once.

Scales of inputs are left: they only serve products in fp8, which nobody makes here.
Source: ComfyUI (comfy/ops.py, pull requests 10498 and 11000), kijai's ComfyUI-WanVideoWrapper.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from reelpool.errors import WeightError

from .quant import CHUNK, Matrix, Quantised
from .weights import SafetensorsSource, TensorInfo, WeightSource

KINDS = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
HEADER_KEY = "_quantization_metadata"
MAX_JSON_BYTES = 4096  # of one layer's; those met have 30 to 60
ADVICE = "use an fp8, GGUF or 16-bit file of the model"

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALES = (".scale_weight", ".weight_scale")
_MARKS = (".comfy_quant", ".scale_input", ".input_scale")  # read or not needed: never weights
_FILE_MARK = "scaled_fp8"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block or a layer, in a tensor's name


def with_scales(source: WeightSource) -> WeightSource:
    """See the fp8 matrices of a file as `Quantised`, and its scales and marks not at all.

    Tensors that are fp8 without being matrices (biases, norms) stay plain. A source that has
    neither fp8 matrices nor marks comes back itself. Nothing is read but headers and the JSON of
    `comfy_quant`.

    Raises:
        WeightError: if a layer is quantised in a way that is not fp8, a scale does not fit, or one
            matrix has two scales, or none while others of its kind have one.
    """
    names = set(source.names())
    formats = _formats(source, names)
    for layer, kind in formats.items():
        if kind not in FORMATS:
            found = f"tensor {layer}.weight quantised as {kind}"
            raise WeightError(source.where, found, " or ".join(FORMATS), ADVICE)
    for name in sorted(names):
        if name.endswith(".weight_scale_2"):
            found = f"tensor {name}, a second scale as nvfp4 has"
            raise WeightError(source.where, found, "fp8 with one scale", ADVICE)
    scales = _scale_names(source, names)
    hidden = {
        name
        for name in names
        if name.endswith((*_SCALES, *_MARKS)) or name.rpartition(".")[2] == _FILE_MARK
    }
    if not hidden and not any(_is_fp8_matrix(source.info(name)) for name in names):
        return source
    for weight, scale in scales.items():
        _check_scale(source, weight, scale)
    for layer, kind in formats.items():
        info = source.info(f"{layer}.weight")
        if info.dtype != FORMATS[kind]:
            found = f"tensor {info.name} of {_word(info.dtype)}, said to be {kind}"
            raise WeightError(info.file, found, f"values of {kind}", ADVICE)
    _check_all_scaled(source, names, scales)
    return Fp8Source(source, scales, hidden)


class Fp8Source:
    """A source whose fp8 matrices are `Quantised`, with their scales."""

    def __init__(self, source: WeightSource, scales: Mapping[str, str], hidden: set[str]) -> None:
        """See `with_scales`.

        Args:
            source: the file.
            scales: name of each weight that has one to the name of its scale.
            hidden: names that are not weights.
        """
        self._source = source
        self._scales = dict(scales)
        self._hidden = hidden
        self._seen: set[str] = set()  # matrices whose bytes have been looked at

    @property
    def where(self) -> str:
        """The file."""
        return self._source.where

    def names(self) -> Iterator[str]:
        """Names of weights, not of scales and marks."""
        return (name for name in self._source.names() if name not in self._hidden)

    def info(self, name: str) -> TensorInfo:
        """Place of one tensor; raises MissingTensor."""
        info = self._source.info(name)
        if not self._is_quantised(info):
            return info
        return replace(info, dtype=torch.uint8, quant=KINDS[info.dtype])

    def get(self, name: str) -> torch.Tensor:
        """A view of one plain tensor; raises MissingTensor, or WeightError for a quantised one."""
        info = self.info(name)
        if info.quant:
            raise WeightError(info.file, f"tensor {name} as {info.quant}", "a plain tensor")
        return self._source.get(name)

    def matrix(self, name: str) -> Matrix:
        """A view of one tensor, an fp8 matrix with its scale; its bytes are looked at once.

        Raises:
            MissingTensor: if there is none of that name.
            WeightError: if there is a NaN in an fp8 matrix.
        """
        info = self._source.info(name)
        if not self._is_quantised(info):
            return self._source.matrix(name)
        rows = math.prod(info.shape[:-1])
        data = self._source.get(name).view(torch.uint8).reshape(rows, info.shape[-1])
        if name not in self._seen:
            _check_numbers(info, data)
            self._seen.add(name)
        return Quantised(data, KINDS[info.dtype], info.shape, self._scale(info, rows))

    def _is_quantised(self, info: TensorInfo) -> bool:
        return _is_fp8_matrix(info) or (info.dtype in KINDS and info.name in self._scales)

    def _scale(self, info: TensorInfo, rows: int) -> torch.Tensor | None:
        """(rows,) float32; None without. Convolutions have several rows for each output."""
        stored = self._scales.get(info.name)
        if stored is None:
            return None
        scale = self._source.get(stored).float().reshape(-1)
        if len(scale) == 1:
            return scale.expand(rows).contiguous()
        return scale.repeat_interleave(rows // len(scale))


def _is_fp8_matrix(info: TensorInfo) -> bool:
    return info.dtype in KINDS and len(info.shape) == 2


def _check_numbers(info: TensorInfo, data: torch.Tensor) -> None:
    """Refuse NaN, which a cast of large values to float8_e4m3fn makes, and infinity."""
    least = 0x7F if info.dtype == torch.float8_e4m3fn else 0x7C
    for part in data.flatten().split(CHUNK):
        if part.numel() and int((part & 0x7F).max()) >= least:
            raise WeightError(
                info.file,
                f"tensor {info.name} with NaN or infinity in it",
                "finite numbers",
                "the file is damaged or was badly made: download it again, or take another one",
            )


def _scale_names(source: WeightSource, names: set[str]) -> dict[str, str]:
    """Each weight's name to that of its scale."""
    scales: dict[str, str] = {}
    for name in sorted(names):
        for end in _SCALES:
            if name.endswith(end):
                weight = f"{name.removesuffix(end)}.weight"
                if weight in scales:
                    found = f"tensors {scales[weight]} and {name}, two scales of one matrix"
                    raise WeightError(source.where, found, "one of them", ADVICE)
                scales[weight] = name
    return scales


def _check_all_scaled(source: WeightSource, names: set[str], scales: Mapping[str, str]) -> None:
    """Refuse an fp8 matrix that lost its scale, which would be wrong by a factor of about 1000.

    Only where the same layer of another block has one: embeddings are stored without, and a file
    of a whole model may have a scaled text encoder beside a plain transformer.
    """
    kinds = {_NUMBER.sub("#", weight) for weight in scales}
    for name in sorted(names - scales.keys()):
        if _NUMBER.sub("#", name) in kinds and _is_fp8_matrix(source.info(name)):
            scale = name.removesuffix(".weight") + _SCALES[0]
            found = f"tensor {name} in fp8 without a scale, which others of its kind have"
            raise WeightError(source.info(name).file, found, scale, ADVICE)


def _check_scale(source: WeightSource, weight: str, name: str) -> None:
    """A scale is one number, or one for each output, and belongs to an fp8 tensor."""
    of, scale = source.info(weight), source.info(name)
    if of.dtype not in KINDS:
        found = f"tensor {name}, a scale for {_word(of.dtype)} values"
        raise WeightError(scale.file, found, "fp8 values where there is a scale", ADVICE)
    outputs = of.shape[0] if len(of.shape) > 1 else 1
    if scale.dtype not in _FLOATS or math.prod(scale.shape) not in (1, outputs):
        raise WeightError(
            scale.file,
            f"tensor {name} of {_word(scale.dtype)} and shape {list(scale.shape)}",
            f"one number, or one for each of {outputs} outputs",
            ADVICE,
        )


def _formats(source: WeightSource, names: set[str]) -> dict[str, str]:
    """Layer to its format, as the header and the layers' own marks say."""
    formats: dict[str, str] = {}
    if isinstance(source, SafetensorsSource) and HEADER_KEY in source.metadata:
        content = _json(source, f"metadata {HEADER_KEY}", str(source.metadata[HEADER_KEY]))
        layers = content.get("layers", content)
        if not isinstance(layers, dict):
            raise WeightError(source.where, f"metadata {HEADER_KEY} without layers", "a map")
        formats = {
            layer: _format(source, layer, entry)
            for layer, entry in layers.items()
            if f"{layer}.weight" in names  # of the marks of other parts, none is here
        }
    for name in sorted(names):
        if name.endswith(".comfy_quant"):
            info = source.info(name)
            if info.num_bytes > MAX_JSON_BYTES:
                found = f"tensor {name} of {info.num_bytes} bytes"
                raise WeightError(info.file, found, f"a JSON of at most {MAX_JSON_BYTES}")
            text = bytes(source.get(name).contiguous().view(torch.uint8).flatten().tolist())
            layer = name.removesuffix(".comfy_quant")
            entry = _json(source, f"tensor {name}", text.decode("utf-8", "replace"))
            formats[layer] = _format(source, layer, entry)
    return formats


def _json(source: WeightSource, what: str, text: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise WeightError(source.where, f"{what} with {text[:40]!r}", "a JSON object")
    return content


def _format(source: WeightSource, layer: str, entry: object) -> str:
    kind = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(kind, str):
        raise WeightError(source.where, f"layer {layer} quantised without a format", "a format")
    return kind


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
