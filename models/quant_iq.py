"""Decoders of GGUF's IQ1, IQ2 and IQ3 types: 256 values as points of a codebook, with signs.

The codebooks come from gguf-py (they are ggml's constants), read when the first such block is
decoded. A point of eight or four int8 values is one word of a table; signs are words too, all bits
of a byte set where its value is negated. Tools: `quant_blocks`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .quant_blocks import apply, cut, halves, look_up, table


def _quants(kind: str) -> Any:
    from gguf import quants  # a second of numpy imports that only these types need

    return getattr(quants, kind)


def _points(kind: str) -> Tensor:
    """The codebook: (points, 4 or 8) float32."""
    kind_of = _quants(kind)
    kind_of.init_grid()
    return torch.from_numpy(kind_of.grid[0, 0].copy())


@cache
def _grid(kind: str, device: torch.device) -> Tensor:
    return table(_points(kind).to(torch.int8), device)


@cache
def _shifted_grid(device: torch.device) -> Tensor:
    """IQ1's points times eight, moved by +1, then all moved by -1: values are in eighths."""
    points = 8 * _points("IQ1_S")
    return table(torch.cat([points + 1, points - 1]).to(torch.int8), device)


def _sign_rows() -> Tensor:
    """(256, 8) int8: -1 where a byte's bit is set."""
    return -((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).to(torch.int8)


@cache
def _signs(device: torch.device) -> Tensor:
    return table(_sign_rows(), device)


def _even_sign_rows() -> Tensor:
    """(128, 8) int8: signs of a seven-bit code. The eighth makes the number of them even."""
    codes = torch.frombuffer(bytearray(_quants("IQ2_XXS").ksigns), dtype=torch.uint8)
    return _sign_rows()[codes.long()]


@cache
def _even_signs(device: torch.device) -> Tensor:
    return table(_even_sign_rows(), device)


@cache
def _even_sign_pairs(device: torch.device) -> Tensor:
    """The 16 signs of two seven-bit codes side by side."""
    rows, pairs = _even_sign_rows(), torch.arange(128 * 128)
    return table(torch.cat([rows[pairs & 127], rows[pairs >> 7]], 1), device)


@cache
def _upper_bits(bits: int, count: int, device: torch.device) -> Tensor:
    """The fields of a byte, `count` of `bits` each, as int16 numbers above a byte."""
    fields = torch.arange(256).unsqueeze(1) >> (bits * torch.arange(count))
    return table(((fields & (2**bits - 1)) << 8).to(torch.int16), device)


@cache
def _upper_bits_iq1_s(device: torch.device) -> Tensor:
    """Four fields of three bits each, and the top bit above each of them."""
    codes = torch.arange(65536).unsqueeze(1)
    fields = (codes >> (3 * torch.arange(4))) & 7
    return table(((fields | (codes >> 15 << 3)) << 8).to(torch.int16), device)


def _index(low: Tensor, upper: Tensor) -> Tensor:
    """Bytes, and the bits above them as `look_up` gives them: int16 indices, flat."""
    return low.flatten().to(torch.int16).bitwise_or_(upper.view(torch.int16))


def _signed(points: Tensor, signs: Tensor) -> Tensor:
    """Negate the bytes of `points` where those of `signs` are set: flat int8."""
    flipped = points.view(torch.int64) ^ signs.view(torch.int64)
    return flipped.view(torch.int8).sub_(signs.view(torch.int8))


def _nibble_scales(packed: Tensor) -> Tensor:
    """Both nibbles of each byte, the lower one first: (n, bytes) become (n, 2 bytes) float32."""
    both = torch.stack([packed & 15, packed >> 4], -1)
    return both.flatten(1).to(torch.float32)


def _aux(blocks: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Words of 28 sign bits and a 4-bit scale: (signs as words, scales (n, words) float32)."""
    pairs = torch.stack([words & 0x3FFF, (words >> 14) & 0x3FFF], -1)
    scales = ((words >> 28) & 15).to(torch.float32).add_(0.5)
    return look_up(_even_sign_pairs(blocks.device), pairs), scales


def iq2_xxs(blocks: Tensor, out: Tensor) -> None:
    """IQ2_XXS: d (s + 1/2) / 4 times signed points: half d, per 32 values 4 points and a word."""
    index, words = cut(blocks, 2, 66).view(torch.int32).view(-1, 8, 2).unbind(-1)
    signs, scales = _aux(blocks, words)
    points = look_up(_grid("IQ2_XXS", blocks.device), index.contiguous().view(torch.uint8))
    out.copy_(_signed(points, signs).view(out.shape))
    apply(out, scales.mul_(halves(blocks, 0) * 0.25))


def iq2_xs(blocks: Tensor, out: Tensor) -> None:
    """IQ2_XS: d (s + 1/2) / 4 times signed points: half d, 32 of 9 + 7 sign bits, 8 bytes of s."""
    codes = cut(blocks, 2, 66).view(torch.uint16).to(torch.int32)
    points = look_up(_grid("IQ2_XS", blocks.device), codes & 511)
    out.copy_(_signed(points, look_up(_even_signs(blocks.device), codes >> 9)).view(out.shape))
    apply(out, _nibble_scales(cut(blocks, 66, 74)).add_(0.5).mul_(halves(blocks, 0) * 0.25))


def iq2_s(blocks: Tensor, out: Tensor) -> None:
    """IQ2_S: d (s + 1/2) / 4 times signed points: half d, 32 points, signs, upper bits, s."""
    device = blocks.device
    index = _index(cut(blocks, 2, 34), look_up(_upper_bits(2, 4, device), cut(blocks, 66, 74)))
    signs = look_up(_signs(device), cut(blocks, 34, 66))
    out.copy_(_signed(look_up(_grid("IQ2_S", device), index), signs).view(out.shape))
    apply(out, _nibble_scales(cut(blocks, 74, 82)).add_(0.5).mul_(halves(blocks, 0) * 0.25))


def iq3_xxs(blocks: Tensor, out: Tensor) -> None:
    """IQ3_XXS: d (s + 1/2) / 2 times signed points: half d, 64 points, words as in IQ2_XXS."""
    points = look_up(_grid("IQ3_XXS", blocks.device), cut(blocks, 2, 66))
    signs, scales = _aux(blocks, cut(blocks, 66, 98).view(torch.int32))
    out.copy_(_signed(points, signs).view(out.shape))
    apply(out, scales.mul_(halves(blocks, 0) * 0.5))


def iq3_s(blocks: Tensor, out: Tensor) -> None:
    """IQ3_S: d (2 s + 1) times signed points: half d, 64 points, upper bits, signs, s."""
    device = blocks.device
    index = _index(cut(blocks, 2, 66), look_up(_upper_bits(1, 8, device), cut(blocks, 66, 74)))
    signs = look_up(_signs(device), cut(blocks, 74, 106))
    out.copy_(_signed(look_up(_grid("IQ3_S", device), index), signs).view(out.shape))
    apply(out, _nibble_scales(cut(blocks, 106, 110)).mul_(2).add_(1).mul_(halves(blocks, 0)))


def iq1_s(blocks: Tensor, out: Tensor) -> None:
    """IQ1_S: d (2 s + 1) (point +- 1/8): half d, 32 points, 8 words of upper bits, s, sign."""
    device = blocks.device
    words = cut(blocks, 34, 50).view(torch.uint16).to(torch.int32)
    index = _index(cut(blocks, 2, 34), look_up(_upper_bits_iq1_s(device), words))
    out.copy_(look_up(_shifted_grid(device), index).view(torch.int8).view(out.shape))
    scales = ((words >> 12) & 7).to(torch.float32).mul_(2).add_(1)
    apply(out, scales.mul_(halves(blocks, 0) * 0.125))


def iq1_m(blocks: Tensor, out: Tensor) -> None:
    """IQ1_M: d (2 s + 1) (point +- 1/8): 32 points, 32 of 3 upper bits and sign, 4 of 12-bit s.

    The top nibbles of the four scale words are d.
    """
    device = blocks.device
    index = _index(cut(blocks, 0, 32), look_up(_upper_bits(4, 2, device), cut(blocks, 32, 48)))
    out.copy_(look_up(_shifted_grid(device), index).view(torch.int8).view(out.shape))
    words = cut(blocks, 48, 56).view(torch.uint16).to(torch.int32)  # (n, 4)
    nibbles = (words >> 12) << torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device)
    d = nibbles.sum(1, keepdim=True).to(torch.uint16).view(torch.float16).to(torch.float32)
    shifts = torch.tensor([0, 3, 6, 9], dtype=torch.int32, device=device)
    scales = ((words.unsqueeze(-1) >> shifts) & 7).flatten(1).to(torch.float32)
    apply(out, scales.mul_(2).add_(1).mul_(d * 0.125))
