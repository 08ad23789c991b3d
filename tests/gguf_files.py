"""GGUF files for tests, and blocks of every type composed by hand: random bytes, sane scales."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import _type_traits

KINDS = ["F16", *(kind.name for kind in _type_traits)]
# where the float16 numbers of a block lie
_HALVES = {
    "F16": [0],
    "Q4_1": [0, 2],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "TQ1_0": [52],
    "TQ2_0": [64],
}
# negative, zero of both signs, subnormal, the largest
_SCALES = np.array([0.01, -0.37, 0.0, -0.0, 6e-8, -3e-6, 1.0, -2.5, 65504.0], np.float16)


def compose(
    kind: str,
    rows: int,
    columns: int,
    seed: int = 0,
    extremes: bool = True,
    spread: float = 0.125,
) -> np.ndarray:
    """Rows of random blocks: (rows, bytes of a row) uint8.

    extremes: every second scale is 0, subnormal, negative or the largest.
    spread: of the other scales.
    """
    block, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows * columns // block, width), dtype=np.uint8)
    halves = (spread * draw.standard_normal((len(blocks), 2))).astype(np.float16)
    if extremes:
        halves[1::2] = draw.choice(_SCALES, halves[1::2].shape)
    if kind == "IQ1_M":  # the four nibbles of the half lie at the top of four words
        words = blocks[:, 48:].view(np.uint16)
        words &= 0x0FFF
        words |= (halves[:, :1].view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & 15) << 12
    elif kind == "BF16":
        numbers = draw.standard_normal((len(blocks), 1), np.float32).view(np.uint32)
        blocks[:] = (numbers >> 16).astype(np.uint16).view(np.uint8)
    elif kind == "MXFP4":  # exponents from the subnormal ones up; above, values are infinite
        blocks[:, 0] = draw.integers(0, 252, len(blocks))
    elif kind != "NVFP4":  # whose scales are bytes: any will do
        for number, start in enumerate(_HALVES.get(kind, [0])):
            blocks[:, start : start + 2] = halves[:, number : number + 1].view(np.uint8)
    return blocks.reshape(rows, -1)


PLAIN = {
    "patch_embedding.weight": np.arange(96, dtype=np.float32).reshape(4, 3, 2, 2, 2),
    "half": np.linspace(-1, 1, 6, dtype=np.float16).reshape(2, 3),
    "blocks.0.modulation": np.ones((1, 6, 8), np.float32),
    "count": np.array([[1, -2, 3]], np.int32),
    "long": np.array([2**40], np.int64),
    "short": np.array([-7], np.int16),
    "byte": np.array([-8, 8], np.int8),
    "double": np.array([0.1]),
}


def write(path, tensors=PLAIN, quantised=(), fields=None, alignment=None, blocks=()):
    """A file as gguf-py writes it.

    quantised: (name, kind, rows, columns), composed here.
    blocks: (name, kind, bytes).
    """
    writer = GGUFWriter(path, "wan")
    if alignment:
        writer.add_custom_alignment(alignment)
    for add, *arguments in fields or ():
        getattr(writer, add)(*arguments)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    composed = [
        (name, kind, compose(kind, rows, columns)) for name, kind, rows, columns in quantised
    ]
    for name, kind, data in (*composed, *blocks):
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
