"""Decoders of GGUF's small blocks (Q4_0 to Q8_0, IQ4_NL, 4-bit floats), and the tools of all.

A decoder takes `blocks`, (n, bytes of a block) uint8, and fills `out`, (n, values of a block)
float32. Two facts carry the design:

- Every product of scales and codes fits into float32's 24 bits, so that factors may be taken in any
  order and powers of two may move between them: the result equals gguf-py's bit for bit. Only the
  subtraction of a minimum rounds, once, as there.
- torch spends its time on rows, not on bytes: a strided row costs about 4 ns, however short. So
  codes are unpacked eight bytes at a time in contiguous buffers, 16-byte runs move as one complex
  number, and tables are read by whole words.

Source of the layouts: ggml-common.h and ggml-quants.c of llama.cpp; gguf-py's quants.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_WORDS = {
    16: torch.complex128,
    8: torch.int64,
    4: torch.int32,
    2: torch.int16,
    1: torch.uint8,
}
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


def word_bytes(*numbers: int) -> int:
    """The widest word, in bytes, that divides all of the numbers.

    >>> word_bytes(144, 16), word_bytes(18)
    (16, 2)
    """
    return next(width for width in _WORDS if not any(number % width for number in numbers))


def lanes(byte: int, width: int = 8) -> int:
    """A signed word with the same byte in each lane.

    >>> hex(lanes(0x0F, 4)), lanes(0xFF)
    ('0xf0f0f0f', -1)
    """
    return int.from_bytes(bytes([byte]) * width, "little", signed=True)


def cut(blocks: Tensor, start: int, stop: int) -> Tensor:
    """A contiguous copy of bytes [start, stop) of every block: (n, stop - start) uint8."""
    word = _WORDS[word_bytes(start, stop, blocks.shape[1])]
    part = blocks[:, start:stop].view(word)
    return part.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def halves(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """The float16 numbers at byte `start` of every block: (n, count) float32."""
    return cut(blocks, start, start + 2 * count).view(torch.float16).to(torch.float32)


def apply(out: Tensor, scales: Tensor, mins: Tensor | None = None) -> None:
    """Multiply groups of equal size by their scales and subtract their minima, in place.

    Args:
        out: (n, values) float32 codes.
        scales: (n, groups) float32.
        mins: (n, groups) float32.
    """
    groups = out.view(*scales.shape, -1)
    groups.mul_(scales.unsqueeze(-1))
    if mins is not None:
        groups.sub_(mins.unsqueeze(-1))


def low_nibbles(codes: Tensor) -> Tensor:
    """The lower four bits of each byte; contiguous uint8, the size a multiple of 8."""
    return (codes.view(torch.int64) & lanes(0x0F)).view(torch.uint8)


def high_nibbles(codes: Tensor) -> Tensor:
    """The upper four bits of each byte; contiguous uint8, the size a multiple of 8."""
    return ((codes.view(torch.int64) >> 4) & lanes(0x0F)).view(torch.uint8)


def interleave(first: Tensor, second: Tensor, width: int = 16) -> Tensor:
    """Runs of `width` bytes taken from both in turn: twice (n, run) become (n, 2 run) uint8."""
    word = _WORDS[width]
    both = torch.empty(first.shape[0], 2 * first.shape[1], dtype=torch.uint8, device=first.device)
    runs = both.view(word).view(-1, 2)
    runs[:, 0].copy_(first.view(word).flatten())
    runs[:, 1].copy_(second.view(word).flatten())
    return both


def table(rows: Sequence[Sequence[int]] | Tensor, device: torch.device) -> Tensor:
    """A table for `look_up`: each row of int8 or int16 values becomes one word."""
    values = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.int8)
    word = _WORDS[values.shape[1] * values.element_size()]
    return values.contiguous().view(word).flatten().to(device)


def look_up(words: Tensor, index: Tensor) -> Tensor:
    """The table's words at `index`, flat."""
    return torch.index_select(words, 0, index.flatten().to(torch.int32))


@cache
def _nibble_tables(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For two bytes at once: the values of their low nibbles, and of their high ones."""
    known = torch.tensor(values, dtype=torch.int8)
    pairs = torch.arange(65536, dtype=torch.int32)
    low = torch.stack([known[pairs & 15], known[(pairs >> 8) & 15]], 1)
    high = torch.stack([known[(pairs >> 4) & 15], known[pairs >> 12]], 1)
    return table(low, device), table(high, device)


def nibble_values(codes: Tensor, values: tuple[int, ...], width: int = 16) -> Tensor:
    """Look up both nibbles of each byte: runs of low ones and of high ones in turn.

    Args:
        codes: (n, bytes) uint8.
        values: the 16 values of a nibble, int8.
        width: bytes of a run, 8 or 16.
    Returns:
        (n, 2 bytes) int8.
    """
    low, high = _nibble_tables(values, codes.device)
    index = codes.view(torch.uint16).to(torch.int32)
    first = look_up(low, index).view(torch.uint8).view(codes.shape)
    second = look_up(high, index).view(torch.uint8).view(codes.shape)
    return interleave(first, second, width).view(torch.int8)


@cache
def _fifth_bits(device: torch.device) -> Tensor:
    """A byte's eight bits as eight bytes, 16 where the bit is set."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8)
    return table(((bits & 1) << 4).to(torch.int8), device)


def _five_bits(high: Tensor, codes: Tensor) -> Tensor:
    """(n, 4) bytes of fifth bits and (n, 16) of nibbles: (n, 32) uint8 codes."""
    nibbles = interleave(low_nibbles(codes), high_nibbles(codes))
    fifth = look_up(_fifth_bits(high.device), high).view(nibbles.shape[0], 4)
    return (nibbles.view(torch.int64) | fifth).view(torch.uint8)


def q4_0(blocks: Tensor, out: Tensor) -> None:
    """Q4_0: d (q - 8): half d, 16 bytes of nibbles."""
    codes = cut(blocks, 2, 18)
    nibbles = interleave(low_nibbles(codes), high_nibbles(codes))
    out.copy_(nibbles.view(torch.int8).sub_(8))
    apply(out, halves(blocks, 0))


def q4_1(blocks: Tensor, out: Tensor) -> None:
    """Q4_1: d q + m: halves d and m, 16 bytes of nibbles."""
    codes = cut(blocks, 4, 20)
    out.copy_(interleave(low_nibbles(codes), high_nibbles(codes)))
    apply(out, halves(blocks, 0), halves(blocks, 2).neg_())


def q5_0(blocks: Tensor, out: Tensor) -> None:
    """Q5_0: d (q - 16): half d, 32 fifth bits, 16 bytes of nibbles."""
    codes = _five_bits(cut(blocks, 2, 6), cut(blocks, 6, 22))
    out.copy_(codes.view(torch.int8).sub_(16))
    apply(out, halves(blocks, 0))


def q5_1(blocks: Tensor, out: Tensor) -> None:
    """Q5_1: d q + m: halves d and m, 32 fifth bits, 16 bytes of nibbles."""
    out.copy_(_five_bits(cut(blocks, 4, 8), cut(blocks, 8, 24)))
    apply(out, halves(blocks, 0), halves(blocks, 2).neg_())


def q8_0(blocks: Tensor, out: Tensor) -> None:
    """Q8_0: d q: half d, 32 bytes."""
    out.copy_(blocks[:, 2:].view(torch.int8))
    apply(out, halves(blocks, 0))


def iq4_nl(blocks: Tensor, out: Tensor) -> None:
    """IQ4_NL: d v[q]: half d, 16 bytes of nibbles into a table."""
    out.copy_(nibble_values(cut(blocks, 2, 18), _IQ4))
    apply(out, halves(blocks, 0))


def iq4_xs(blocks: Tensor, out: Tensor) -> None:
    """IQ4_XS: d (s - 32) v[q]: 256 values, scales s of 32 values; half d, 6 bytes of s, nibbles."""
    device = blocks.device
    low = cut(blocks, 4, 8).unsqueeze(-1) >> torch.tensor([0, 4], dtype=torch.uint8, device=device)
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=device)
    high = blocks[:, 2:4].view(torch.int16).to(torch.int32) >> shifts
    scales = (low.flatten(1) & 15).to(torch.int32) | ((high & 3) << 4)
    codes = cut(blocks, 8, 136)
    out.copy_(nibble_values(codes, _IQ4))
    apply(out, halves(blocks, 0) * (scales - 32))


@cache
def _e8m0(device: torch.device) -> Tensor:
    """Exponent bytes as float32, halved, for the doubled values."""
    return torch.tensor([2.0 ** (e - 128) for e in range(256)], dtype=torch.float32, device=device)


@cache
def _ue4m3(device: torch.device) -> Tensor:
    """Unsigned 8-bit floats as float32, halved, for the doubled values; 0x7F is zero."""

    def value(code: int) -> float:
        exponent, fraction = (code >> 3) & 15, code & 7
        if code == 0x7F:
            return 0.0
        if exponent == 0:
            return fraction * 2.0**-10
        return (1 + fraction / 8) * 2.0 ** (exponent - 8)

    return torch.tensor([value(code) for code in range(256)], dtype=torch.float32, device=device)


def mxfp4(blocks: Tensor, out: Tensor) -> None:
    """MXFP4: 2^e v[q]: exponent byte, 16 bytes of nibbles (e2m1)."""
    out.copy_(nibble_values(cut(blocks, 1, 17), _FP4))
    apply(out, look_up(_e8m0(blocks.device), blocks[:, 0]).unsqueeze(1))


def nvfp4(blocks: Tensor, out: Tensor) -> None:
    """NVFP4: S v[q]: groups of 16; four 8-bit float scales, 32 bytes of nibbles (e2m1)."""
    out.copy_(nibble_values(cut(blocks, 4, 36), _FP4, 8))
    apply(out, look_up(_ue4m3(blocks.device), blocks[:, :4]).view(-1, 4))
