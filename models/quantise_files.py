"""GGUF and safetensors files written tensor by tensor: the header first, then bytes as they come.

Sizes are known before values, so that no more than one tensor need be in memory. It does not know
how the bytes are made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

from .quant import KINDS

Bytes = npt.NDArray[np.uint8]
Parts = Iterable[tuple[str, Bytes]]
"""Names and bytes, each tensor of the file once."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its name, its type (F32 or one of `quant.KINDS`), shape of the values."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """The shape with bytes for values along the last axis."""
        size, num_bytes = _block(self.kind)
        if not self.shape:
            return (num_bytes,)
        return (*self.shape[:-1], self.shape[-1] // size * num_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.byte_shape)


def _block(kind: str) -> tuple[int, int]:
    """Values and bytes of one block."""
    if kind == "F32":
        return 1, 4
    return KINDS[kind].size, KINDS[kind].num_bytes


def write_gguf(path: Path, kind: str, tensors: Sequence[Stored], parts: Parts) -> None:
    """Write a GGUF file of Wan's.

    Args:
        path: the file; replaced if it is there.
        kind: the type that the file goes by.
        tensors: all of them, in order.
        parts: their bytes in the same order, of `byte_shape`.
    """
    writer = GGUFWriter(path, "wan")
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.byte_shape,
            np.dtype(np.uint8),
            tensor.num_bytes,
            GGMLQuantizationType[tensor.kind],
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, data in parts:
            writer.write_tensor_data(data)
    finally:
        writer.close()


def write_safetensors(path: Path, tensors: Sequence[Stored], parts: Parts) -> None:
    """Write a safetensors file.

    Tensors lie by the width of their type, wide ones first: all are aligned then, and without gaps,
    which the format does not allow.

    Args:
        path: the file; replaced if it is there.
        tensors: all of them.
        parts: their bytes, in any order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: -_block(tensor.kind)[1]):
        offsets[tensor.name] = end
        end += tensor.num_bytes
        place = [offsets[tensor.name], end]
        header[tensor.name] = {
            "dtype": tensor.kind, "shape": list(tensor.shape), "data_offsets": place,
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, data in parts:
            file.seek(8 + len(text) + offsets[name])
            file.write(data.data)
