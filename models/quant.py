"""Quantised matrices as files store them: kept as they lie in the file, decoded per use.

`Quantised.dequantise` equals gguf-py's `dequantize` bit for bit in float32. Any other type is that
float32 result rounded once, to the nearest, ties to even. The codes are unpacked in chunks that
stay in the cache; on a card in chunks that keep the float32 scratch small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import quant_blocks, quant_iq, quant_k
from .quant_blocks import word_bytes

CHUNK = 2**20  # values decoded at a time: 4 MiB of float32, the best of 2**17 to 2**21 measured
DEVICE_CHUNK = 2**24  # the same on a card: 64 MiB, few launches


@dataclass(frozen=True)
class Kind:
    """A type of blocks: values and bytes of one, and how it is decoded.

    decode: takes (n, num_bytes) uint8, fills (n, size) float32.
    """

    size: int
    num_bytes: int
    decode: Callable[[Tensor, Tensor], None]


def _float(dtype: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    def decode(blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.view(dtype))

    return decode


KINDS: dict[str, Kind] = {
    "F16": Kind(1, 2, _float(torch.float16)),
    "BF16": Kind(1, 2, _float(torch.bfloat16)),
    "Q4_0": Kind(32, 18, quant_blocks.q4_0),
    "Q4_1": Kind(32, 20, quant_blocks.q4_1),
    "Q5_0": Kind(32, 22, quant_blocks.q5_0),
    "Q5_1": Kind(32, 24, quant_blocks.q5_1),
    "Q8_0": Kind(32, 34, quant_blocks.q8_0),
    "Q2_K": Kind(256, 84, quant_k.q2_k),
    "Q3_K": Kind(256, 110, quant_k.q3_k),
    "Q4_K": Kind(256, 144, quant_k.q4_k),
    "Q5_K": Kind(256, 176, quant_k.q5_k),
    "Q6_K": Kind(256, 210, quant_k.q6_k),
    "TQ1_0": Kind(256, 54, quant_k.tq1_0),
    "TQ2_0": Kind(256, 66, quant_k.tq2_0),
    "IQ1_S": Kind(256, 50, quant_iq.iq1_s),
    "IQ1_M": Kind(256, 56, quant_iq.iq1_m),
    "IQ2_XXS": Kind(256, 66, quant_iq.iq2_xxs),
    "IQ2_XS": Kind(256, 74, quant_iq.iq2_xs),
    "IQ2_S": Kind(256, 82, quant_iq.iq2_s),
    "IQ3_XXS": Kind(256, 98, quant_iq.iq3_xxs),
    "IQ3_S": Kind(256, 110, quant_iq.iq3_s),
    "IQ4_NL": Kind(32, 18, quant_blocks.iq4_nl),
    "IQ4_XS": Kind(256, 136, quant_blocks.iq4_xs),
    "MXFP4": Kind(32, 17, quant_blocks.mxfp4),
    "NVFP4": Kind(64, 36, quant_blocks.nvfp4),
    # not of GGUF: the two types of fp8 files (`fp8`)
    "F8_E4M3": Kind(1, 1, _float(torch.float8_e4m3fn)),
    "F8_E5M2": Kind(1, 1, _float(torch.float8_e5m2)),
}


@dataclass(frozen=True)
class Quantised:
    """A tensor in blocks. Rows are independent: any range of them is a view.

    data: (rows, bytes of a row) uint8, normally a view of the mapped file.
    kind: the type's name, one of `KINDS`.
    shape: of the values; rows = all but the last axis, (out, in) for a matrix.
    scale: (rows,) float32 that the rows of an fp8 matrix are multiplied by; None for 1.
    """

    data: Tensor
    kind: str
    shape: tuple[int, ...]
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        kind = KINDS[self.kind]
        rows, width = math.prod(self.shape[:-1]), self.shape[-1] // kind.size * kind.num_bytes
        assert self.shape[-1] % kind.size == 0, (self.kind, self.shape)
        assert self.data.dtype == torch.uint8, self.data.dtype
        assert self.data.shape == (rows, width), (self.kind, self.shape, self.data.shape)
        if self.scale is not None:
            assert kind.num_bytes == kind.size == 1, self.kind
            assert self.scale.shape == (rows,), (self.shape, self.scale.shape)
            assert self.scale.dtype == torch.float32, self.scale.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes as stored."""
        return self.data.numel() + (0 if self.scale is None else self.scale.nbytes)

    @property
    def device(self) -> torch.device:
        """Where the blocks lie, and where they are decoded."""
        return self.data.device

    def rows(self, start: int, stop: int) -> Quantised:
        """Rows [start, stop) of a matrix; a view."""
        data = self.data[start:stop]
        scale = None if self.scale is None else self.scale[start:stop]
        return Quantised(data, self.kind, (data.shape[0], self.shape[-1]), scale)

    def to(self, device: torch.device | str) -> Quantised:
        """The same on another device, still quantised."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, data=self.data.to(device), scale=scale)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode all of it.

        Args:
            dtype: float32, or a type that the float32 values are rounded to, once.
        Returns:
            A new tensor of `shape` on the blocks' device.
        """
        kind = KINDS[self.kind]
        size, num_bytes = kind.size, kind.num_bytes
        if self.scale is not None:
            size = num_bytes = max(1, self.shape[-1])  # a block is a whole row, of one scale
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        values, blocks = out.view(-1, size), self.data.reshape(-1, num_bytes)
        if blocks.storage_offset() % word_bytes(kind.num_bytes):
            blocks = blocks.clone()  # in someone's buffer at an odd place: words need even ones
        step = max(1, (CHUNK if self.device.type == "cpu" else DEVICE_CHUNK) // size)
        is_direct = dtype == torch.float32
        num_scratch = 0 if is_direct else min(step, len(values))
        scratch = out.new_empty((num_scratch, size), dtype=torch.float32)
        for start in range(0, len(values), step):
            part = values[start : start + step]
            decoded = part if is_direct else scratch[: len(part)]
            kind.decode(blocks[start : start + step], decoded)
            if self.scale is not None:
                decoded *= self.scale[start : start + step, None]
            if not is_direct:
                part.copy_(decoded)
        return out


Matrix = Tensor | Quantised


def plain(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """As a tensor: a plain one as it is, in its own type; a quantised one decoded to `dtype`."""
    return matrix if isinstance(matrix, Tensor) else matrix.dequantise(dtype)
