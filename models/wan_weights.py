"""Weights of the Wan transformer as plain frozen records, and how they are read.

A block's weights are independent of any other's, so that blocks may come and go. The query, key and
value matrices are stacked: one product makes all three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .linear import Linear, stack
from .spec import TransformerSpec
from .weights import WeightSource


@dataclass(frozen=True)
class BlockWeights:
    """Weights of one block. Modulation and `cross_norm` are float32, the rest compute dtype."""

    modulation: Tensor  # (6, dim): shift, scale, gate of attention, then of the FFN
    qkv: Linear  # (3 dim, dim): query, key and value rows on top of each other
    norm_q: Tensor
    norm_k: Tensor
    out: Linear
    cross_norm: tuple[Tensor, Tensor] | None
    cross_q: Linear
    cross_kv: Linear
    cross_norm_q: Tensor
    cross_norm_k: Tensor
    cross_out: Linear
    ffn_in: Linear
    ffn_out: Linear


@dataclass(frozen=True)
class EnterWeights:
    """Weights before the blocks. The time embedding is float32."""

    patch: Linear
    time_in: Linear
    time_out: Linear
    time_projection: Linear


@dataclass(frozen=True)
class TextWeights:
    """The two layers that bring text rows to the transformer's width."""

    first: Linear
    second: Linear


@dataclass(frozen=True)
class LeaveWeights:
    """Weights after the blocks. Modulation is float32."""

    modulation: Tensor  # (2, dim)
    head: Linear


def load_enter(spec: TransformerSpec, source: WeightSource, dtype: torch.dtype) -> EnterWeights:
    """Read the layers before the blocks from canonical names."""
    patch = source.get("patch_embedding.weight").to(dtype).flatten(1)
    return EnterWeights(
        Linear(patch, source.get("patch_embedding.bias").to(dtype)),
        _linear(source, "time_embedding.0", torch.float32),
        _linear(source, "time_embedding.2", torch.float32),
        _linear(source, "time_projection.1", dtype),
    )


def load_text(source: WeightSource, dtype: torch.dtype) -> TextWeights:
    """Read the text projection from canonical names."""
    return TextWeights(
        _linear(source, "text_embedding.0", dtype), _linear(source, "text_embedding.2", dtype)
    )


def load_leave(source: WeightSource, dtype: torch.dtype) -> LeaveWeights:
    """Read the head from canonical names."""
    modulation = source.get("head.modulation").to(torch.float32).squeeze(0)
    return LeaveWeights(modulation, _linear(source, "head.head", dtype))


def load_block(
    spec: TransformerSpec, source: WeightSource, index: int, dtype: torch.dtype
) -> BlockWeights:
    """Read one block from canonical names, the query, key and value matrices stacked."""
    prefix = f"blocks.{index}."

    def linear(name: str) -> Linear:
        return _linear(source, prefix + name, dtype)

    def vector(name: str, to: torch.dtype = dtype) -> Tensor:
        return source.get(prefix + name).to(to)

    cross_norm = None
    if spec.cross_norm:
        cross_norm = (vector("norm3.weight", torch.float32), vector("norm3.bias", torch.float32))
    return BlockWeights(
        modulation=vector("modulation", torch.float32).squeeze(0),
        qkv=stack([linear(f"self_attn.{part}") for part in "qkv"]),
        norm_q=vector("self_attn.norm_q.weight"),
        norm_k=vector("self_attn.norm_k.weight"),
        out=linear("self_attn.o"),
        cross_norm=cross_norm,
        cross_q=linear("cross_attn.q"),
        cross_kv=stack([linear("cross_attn.k"), linear("cross_attn.v")]),
        cross_norm_q=vector("cross_attn.norm_q.weight"),
        cross_norm_k=vector("cross_attn.norm_k.weight"),
        cross_out=linear("cross_attn.o"),
        ffn_in=linear("ffn.0"),
        ffn_out=linear("ffn.2"),
    )


def _linear(source: WeightSource, name: str, dtype: torch.dtype) -> Linear:
    """A layer: plain weights in `dtype`, quantised ones as they are stored."""
    matrix = source.matrix(f"{name}.weight")
    weight = matrix.to(dtype) if isinstance(matrix, Tensor) else matrix
    return Linear(weight, source.get(f"{name}.bias").to(dtype))


Weights = TypeVar("Weights")


def tensors_of(part: object) -> Iterator[Tensor]:
    """All tensors inside of weights or of what is made from them."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from tensors_of(getattr(part, field.name))


def map_tensors(part: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    """The same weights with every tensor changed, to another device for instance."""

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, tuple):
            return tuple(walk(item) for item in value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return dataclasses.replace(
                value, **{f.name: walk(getattr(value, f.name)) for f in fields}
            )
        return value

    return cast(Weights, walk(part))
