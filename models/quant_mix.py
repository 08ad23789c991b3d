"""Bytes of a transformer's weights by quantisation, without weights. Free of torch.

In a GGUF file the 2-D weights of the blocks are stored in the type that the file is named after,
in mixed types some of them one or two steps higher, norms, biases and modulation in float32, the
2-D weights outside of the blocks in 16 bits. In bf16, fp16 and fp8 files everything but what is
quantised takes 2 bytes.
Source: city96/ComfyUI-GGUF's converter and llama.cpp's mixes; the first few layers, which llama.cpp
raises further in some mixes, are counted like the others (0.3 % of a 14B file at most).
"""

from __future__ import annotations

import math

from .keys import block_tensors, outer_tensors
from .spec import TransformerSpec

# type: (values of one block, bytes of it)
_BLOCKS = {
    "float64": (1, 8), "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "fp8": (1, 1),
    "q8_0": (32, 34), "q6_k": (256, 210), "q5_k": (256, 176), "q5_1": (32, 24), "q5_0": (32, 22),
    "q4_k": (256, 144), "q4_1": (32, 20), "q4_0": (32, 18), "iq4_nl": (32, 18),
    "iq4_xs": (256, 136), "q3_k": (256, 110), "q2_k": (256, 84), "mxfp4": (32, 17),
    "nvfp4": (64, 36), "iq3_s": (256, 110), "iq3_xxs": (256, 98), "iq2_s": (256, 82),
    "iq2_xs": (256, 74), "iq2_xxs": (256, 66), "iq1_m": (256, 56), "iq1_s": (256, 50),
    "tq2_0": (256, 66), "tq1_0": (256, 54),
}  # fmt: skip

# quantisation: type of the blocks' matrices, of `.v`, of `.ffn.2`
_MIXES = {
    "bf16": ("bf16", "bf16", "bf16"),
    "fp16": ("f16", "f16", "f16"),
    "fp8": ("fp8", "fp8", "fp8"),
    "q8_0": ("q8_0", "q8_0", "q8_0"),
    "q6_k": ("q6_k", "q6_k", "q6_k"),
    "q5_k_m": ("q5_k", "q6_k", "q6_k"),
    "q5_k_s": ("q5_k", "q5_k", "q5_k"),
    "q5_k": ("q5_k", "q5_k", "q5_k"),
    "q5_1": ("q5_1", "q5_1", "q5_1"),
    "q5_0": ("q5_0", "q5_0", "q5_1"),
    "q4_k_m": ("q4_k", "q6_k", "q6_k"),
    "q4_k_s": ("q4_k", "q4_k", "q5_k"),
    "q4_k": ("q4_k", "q4_k", "q4_k"),
    "q4_1": ("q4_1", "q4_1", "q4_1"),
    "q4_0": ("q4_0", "q4_0", "q4_1"),
    "iq4_nl": ("iq4_nl", "iq4_nl", "iq4_nl"),
    "iq4_xs": ("iq4_xs", "iq4_xs", "iq4_xs"),
    "q3_k_l": ("q3_k", "q5_k", "q5_k"),
    "q3_k_m": ("q3_k", "q4_k", "q4_k"),
    "q3_k_s": ("q3_k", "q3_k", "q3_k"),
    "q2_k": ("q2_k", "q3_k", "q2_k"),
}
QUANTS = tuple(_MIXES)
_PLAIN = {  # and what is not quantised
    "bf16": "bf16", "fp16": "f16", "fp8": "bf16", "fp32": "f32", "float64": "float64",
}  # fmt: skip


def block_bytes(spec: TransformerSpec, quant: str) -> int:
    """Bytes of one block's weights as a file stores them.

    Args:
        spec: the transformer.
        quant: one of `QUANTS`; "" counts 16 bits. What a file's weights are found to be
            (`ModelTraits.quant`) goes too: "fp8_e4m3 scaled", "iq3_s", "fp32".
    """
    quant = counted_name(quant)
    return sum(
        _tensor_bytes(shape, stored_type(name, shape, quant))
        for name, shape in block_tensors(spec, 0).items()
    )


def other_bytes(spec: TransformerSpec, quant: str) -> int:
    """Bytes of the weights outside of the blocks, which no mix quantises."""
    quant = counted_name(quant)
    small, matrices = _PLAIN.get(quant, "f32"), _PLAIN.get(quant, "bf16")
    return sum(
        _tensor_bytes(shape, matrices if len(shape) == 2 else small)
        for shape in outer_tensors(spec).values()
    )


def transformer_bytes(spec: TransformerSpec, quant: str) -> int:
    """Bytes of one whole transformer; a two-expert model has two."""
    return spec.num_layers * block_bytes(spec, quant) + other_bytes(spec, quant)


def counted_name(quant: str) -> str:
    """A quantisation by the name under which it is counted.

    >>> counted_name("fp8_e4m3 scaled"), counted_name("")
    ('fp8', 'bf16')
    """
    if quant.startswith("fp8"):
        return "fp8"
    return quant or "bf16"


def stored_type(name: str, shape: tuple[int, ...], quant: str) -> str:
    """Type of a tensor of a block; rows that are not made of whole blocks stay in 16 bits.

    Args:
        name: canonical.
        shape: of its values.
        quant: as for `block_bytes`, less the words behind "fp8".
    """
    if len(shape) != 2 or quant == "fp32":
        return _PLAIN.get(quant, "f32")
    matrices, values, down = _MIXES.get(quant, (quant, quant, quant))
    kind = down if name.endswith(".ffn.2.weight") else matrices
    if name.endswith(".v.weight"):
        kind = values
    return kind if shape[-1] % _BLOCKS[kind][0] == 0 else "f16"


def value_bytes(kind: str) -> float:
    """Bytes of one value of a stored type."""
    size, num_bytes = _BLOCKS[kind]
    return num_bytes / size


def _tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    size, num_bytes = _BLOCKS[kind]
    return math.prod(shape) // size * num_bytes
