"""Decoders of GGUF's K types and ternary types: blocks of 256 values. Tools: `quant_blocks`.

Where a group has a scale of its own, its codes may stay at the bits where they lie (4, 16 or 64
times too large) and the scale is divided instead: one mask for a plane of codes, no shift.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .quant_blocks import apply, cut, halves, lanes


@cache
def _row(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _words(blocks: Tensor, start: int, stop: int, *shape: int) -> Tensor:
    """Bytes [start, stop) of every block as words of eight: (*shape, words) int64."""
    return cut(blocks, start, stop).view(torch.int64).view(*shape, -1)


def _scale_min(blocks: Tensor, odd: float) -> tuple[Tensor, Tensor]:
    """Scales and minima of the eight groups of Q4_K and Q5_K: twice (n, 8) float32.

    Six bits each in 12 bytes: the first four whole, the others' upper bits above the first ones'.
    Scales of odd groups are multiplied by `odd`.
    """
    words = blocks[:, :16].view(torch.int32)
    low, mid, high = (words[:, place].clone() for place in (1, 2, 3))
    six, four, two = lanes(0x3F, 4), lanes(0x0F, 4), lanes(0x30, 4)
    scales = torch.stack([low & six, (high & four) | ((low >> 2) & two)], 1)
    mins = torch.stack([mid & six, ((high >> 4) & four) | ((mid >> 2) & two)], 1)
    d, m = halves(blocks, 0, 2).split(1, 1)
    d_of_group = d * _row((1.0, odd) * 4, blocks.device)
    return scales.view(torch.uint8) * d_of_group, mins.view(torch.uint8) * m


def _six_bits(first: Tensor, second: Tensor, high: Tensor) -> Tensor:
    """Nibbles with the bit pairs of `high` above them: three (n, ...) become (n, 4, ...).

    Low nibbles of both, then high nibbles of both; the pairs of a byte belong to the four in turn.
    """
    width = first.element_size()
    nibble, pair = lanes(0x0F, width), lanes(0x30, width)
    return torch.stack(
        [
            (first & nibble) | ((high << 4) & pair),
            (second & nibble) | ((high << 2) & pair),
            ((first >> 4) & nibble) | (high & pair),
            ((second >> 4) & nibble) | ((high >> 2) & pair),
        ],
        1,
    )


def q2_k(blocks: Tensor, out: Tensor) -> None:
    """Q2_K: d s q - m t: 16 bytes of 4-bit s and t, 64 of codes, halves d and m."""
    n = blocks.shape[0]
    codes = _words(blocks, 16, 80, 2 * n)
    planes = out.view(2 * n, 4, 32)
    for plane in range(4):
        planes[:, plane].copy_((codes & lanes(3 << 2 * plane)).view(torch.uint8))
    packed = cut(blocks, 0, 16).view(torch.int64)
    d, m = halves(blocks, 80, 2).split(1, 1)
    factors = tuple(0.25**plane for plane in range(4) for _ in range(2)) * 2
    scales = (packed & lanes(0x0F)).view(torch.uint8) * (d * _row(factors, blocks.device))
    apply(out, scales, ((packed >> 4) & lanes(0x0F)).view(torch.uint8) * m)


def q3_k(blocks: Tensor, out: Tensor) -> None:
    """Q3_K: d (s - 32) (q - 4): 32 bytes of third bits, 64 of codes, 12 of six-bit s, half d."""
    n = blocks.shape[0]
    third = _words(blocks, 0, 32, n)
    third = torch.stack([third, third >> 4], 1).view(2 * n, 4)
    codes = _words(blocks, 32, 96, 2 * n)
    bits, two = lanes(0x04), lanes(0x03)
    planes = torch.stack(
        [
            (codes & two) | ((third << 2) & bits),
            ((codes >> 2) & two) | ((third << 1) & bits),
            ((codes >> 4) & two) | (third & bits),
            ((codes >> 6) & two) | ((third >> 1) & bits),
        ],
        1,
    )
    out.copy_(planes.view(torch.int8).view(out.shape).sub_(4))
    first, second, high = cut(blocks, 96, 108).view(torch.int32).unbind(1)
    packed = _six_bits(first, second, high)
    apply(out, packed.view(torch.int8).sub_(32) * halves(blocks, 108))


def q4_k(blocks: Tensor, out: Tensor) -> None:
    """Q4_K: d s q - m t: halves d and m, 12 bytes of six-bit s and t, 128 of nibbles."""
    n = blocks.shape[0]
    codes = _words(blocks, 16, 144, 4 * n)
    planes = out.view(4 * n, 2, 32)
    planes[:, 0].copy_((codes & lanes(0x0F)).view(torch.uint8))
    planes[:, 1].copy_((codes & lanes(0xF0)).view(torch.uint8))
    apply(out, *_scale_min(blocks, 1 / 16))


def q5_k(blocks: Tensor, out: Tensor) -> None:
    """Q5_K: d s q - m t: as Q4_K with 32 bytes of fifth bits before the nibbles."""
    n = blocks.shape[0]
    fifth = _words(blocks, 16, 48, n)
    fifth = torch.stack([fifth, fifth >> 2, fifth >> 4, fifth >> 6], 1).view(4 * n, 4)
    codes = _words(blocks, 48, 176, 4 * n)
    planes = out.view(4 * n, 2, 32)
    bit, four = lanes(0x10), lanes(0x0F)
    planes[:, 0].copy_(((codes & four) | ((fifth << 4) & bit)).view(torch.uint8))
    planes[:, 1].copy_((((codes >> 4) & four) | ((fifth << 3) & bit)).view(torch.uint8))
    apply(out, *_scale_min(blocks, 1))


def q6_k(blocks: Tensor, out: Tensor) -> None:
    """Q6_K: d s (q - 32): 128 bytes of nibbles, 64 of upper bit pairs, 16 of int8 s, half d."""
    n = blocks.shape[0]
    codes = blocks[:, :128].view(torch.int16).view(n, 2, 2, 16)
    first, second = (
        codes[:, :, part].clone(memory_format=torch.contiguous_format) for part in (0, 1)
    )
    first, second = first.view(torch.int64).view(-1, 4), second.view(torch.int64).view(-1, 4)
    high = _words(blocks, 128, 192, 2 * n)
    planes = _six_bits(first, second, high)
    out.copy_(planes.view(torch.int8).view(out.shape).sub_(32))
    apply(out, cut(blocks, 192, 208).view(torch.int8) * halves(blocks, 208))


def tq1_0(blocks: Tensor, out: Tensor) -> None:
    """TQ1_0: d (t - 1): five base-3 digits a byte, 48 bytes, then four in each of 4; half d."""
    n = blocks.shape[0]
    codes = torch.empty(n, 256, dtype=torch.uint8, device=blocks.device)
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=blocks.device)[:, None]
    for first, width, digits, start in ((0, 32, 5, 0), (32, 16, 5, 160), (48, 4, 4, 240)):
        place = codes[:, start : start + width * digits].view(n, digits, width)
        torch.mul(blocks[:, None, first : first + width], powers[:digits], out=place)
    # the digit is the top one of the byte read as a fraction in base 3: byte * 3 >> 8
    digits_of = ((codes.to(torch.int16) * 3) >> 8).sub_(1)
    out.copy_(digits_of)
    apply(out, halves(blocks, 52))


def tq2_0(blocks: Tensor, out: Tensor) -> None:
    """TQ2_0: d (q - 1): 64 bytes of bit pairs, half d."""
    n = blocks.shape[0]
    codes = _words(blocks, 0, 64, 2 * n)
    planes = torch.stack([(codes >> 2 * plane) & lanes(3) for plane in range(4)], 1)
    out.copy_(planes.view(torch.int8).view(out.shape).sub_(1))
    apply(out, halves(blocks, 64))
