"""Weights of the Wan transformer as plain frozen records, and how they are read and checked.

A block's weights are independent of any other's, so that blocks may come and go. The query, key and
value matrices are stacked: one product makes all three.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .finite import check_finite
from .linear import Fill, Linear, gather, stack
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
    image_kv: Linear | None = None  # only of models that attend to an image
    image_norm_k: Tensor | None = None


@dataclass(frozen=True)
class FpsWeights:
    """Weights that bring the frame rate into the modulation (SkyReels-V2)."""

    table: Tensor  # (2, dim): 16 frames per second, any other
    first: Linear
    second: Linear  # (6 dim, dim)


@dataclass(frozen=True)
class EnterWeights:
    """Weights before the blocks. The time embedding is float32."""

    patch: Linear
    time_in: Linear
    time_out: Linear
    time_projection: Linear
    fps: FpsWeights | None = None


@dataclass(frozen=True)
class TextWeights:
    """The two layers that bring text rows to the transformer's width."""

    first: Linear
    second: Linear


@dataclass(frozen=True)
class ImageWeights:
    """What brings image features to the transformer's width. Norms and positions are float32."""

    positions: Tensor | None  # (rows, image_dim), only of models of first and last frame
    norm_in: tuple[Tensor, Tensor]
    first: Linear
    second: Linear
    norm_out: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LeaveWeights:
    """Weights after the blocks. Modulation is float32."""

    modulation: Tensor  # (2, dim)
    head: Linear


def load_enter(spec: TransformerSpec, source: WeightSource, dtype: torch.dtype) -> EnterWeights:
    """Read the layers before the blocks from canonical names."""
    patch = _tensor(source, "patch_embedding.weight", dtype).flatten(1)
    fps = None
    if spec.fps_embedding:
        fps = FpsWeights(
            _tensor(source, "fps_embedding.weight", dtype),
            _linear(source, ["fps_projection.0"], dtype),
            _linear(source, ["fps_projection.2"], dtype),
        )
    return EnterWeights(
        Linear(patch, _tensor(source, "patch_embedding.bias", dtype)),
        _linear(source, ["time_embedding.0"], torch.float32),
        _linear(source, ["time_embedding.2"], torch.float32),
        _linear(source, ["time_projection.1"], dtype),
        fps,
    )


def load_text(source: WeightSource, dtype: torch.dtype) -> TextWeights:
    """Read the text projection from canonical names."""
    return TextWeights(
        _linear(source, ["text_embedding.0"], dtype), _linear(source, ["text_embedding.2"], dtype)
    )


def load_image(
    spec: TransformerSpec, source: WeightSource, dtype: torch.dtype
) -> ImageWeights | None:
    """Read the image embedding from canonical names; None for a model without one."""
    if not spec.image_dim:
        return None
    positions = None
    if spec.image_positions:
        positions = _tensor(source, "img_emb.emb_pos", torch.float32).squeeze(0)
    return ImageWeights(
        positions,
        _norm(source, "img_emb.proj.0"),
        _linear(source, ["img_emb.proj.1"], dtype),
        _linear(source, ["img_emb.proj.3"], dtype),
        _norm(source, "img_emb.proj.4"),
    )


def load_leave(source: WeightSource, dtype: torch.dtype) -> LeaveWeights:
    """Read the head from canonical names."""
    modulation = _tensor(source, "head.modulation", torch.float32).squeeze(0)
    return LeaveWeights(modulation, _linear(source, ["head.head"], dtype))


def load_block(
    spec: TransformerSpec,
    source: WeightSource,
    index: int,
    dtype: torch.dtype,
    fill: Fill = gather,
) -> BlockWeights:
    """Read one block from canonical names, the query, key and value matrices stacked.

    Args:
        spec: geometry.
        source: the weights.
        index: of the block.
        dtype: compute type, of all plain weights but norms and modulation.
        fill: makes every tensor of the block, so that all may lie in one buffer.
    Raises:
        WeightError: if there is a NaN or an infinity in it.
    """
    prefix = f"blocks.{index}."

    def linear(*names: str) -> Linear:
        return _linear(source, [prefix + name for name in names], dtype, fill)

    def vector(name: str, dtype: torch.dtype = dtype) -> Tensor:
        return _tensor(source, prefix + name, dtype, fill)

    def norm(name: str) -> tuple[Tensor, Tensor]:
        weight, bias = (vector(f"{name}.{part}", torch.float32) for part in ("weight", "bias"))
        return weight, bias

    image_kv, image_norm_k = None, None
    if spec.image_dim:
        image_kv = linear("cross_attn.k_img", "cross_attn.v_img")
        image_norm_k = vector("cross_attn.norm_k_img.weight")
    return BlockWeights(
        modulation=vector("modulation", torch.float32).squeeze(0),
        qkv=linear("self_attn.q", "self_attn.k", "self_attn.v"),
        norm_q=vector("self_attn.norm_q.weight"),
        norm_k=vector("self_attn.norm_k.weight"),
        out=linear("self_attn.o"),
        cross_norm=norm("norm3") if spec.cross_norm else None,
        cross_q=linear("cross_attn.q"),
        cross_kv=linear("cross_attn.k", "cross_attn.v"),
        cross_norm_q=vector("cross_attn.norm_q.weight"),
        cross_norm_k=vector("cross_attn.norm_k.weight"),
        cross_out=linear("cross_attn.o"),
        ffn_in=linear("ffn.0"),
        ffn_out=linear("ffn.2"),
        image_kv=image_kv,
        image_norm_k=image_norm_k,
    )


def _linear(
    source: WeightSource, names: Sequence[str], dtype: torch.dtype, fill: Fill = gather
) -> Linear:
    """Layers over one input as one: plain weights in `dtype`, quantised ones as they are stored."""
    parts = [Linear(source.matrix(f"{n}.weight"), source.get(f"{n}.bias")) for n in names]
    whole, start = stack(parts, dtype, fill), 0
    for name, part in zip(names, parts, strict=True):
        stop = start + sum(matrix.shape[0] for matrix in part.matrices)
        made = whole.rows(start, stop)
        for matrix in made.matrices:
            values = matrix if isinstance(matrix, Tensor) else matrix.scale
            if values is not None:
                check_finite(source, f"{name}.weight", values)
        assert made.bias is not None
        check_finite(source, f"{name}.bias", made.bias)
        start = stop
    return whole


def _norm(source: WeightSource, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm that is computed in float32."""
    weight, bias = (_tensor(source, f"{name}.{part}", torch.float32) for part in ("weight", "bias"))
    return weight, bias


def _tensor(source: WeightSource, name: str, dtype: torch.dtype, fill: Fill = gather) -> Tensor:
    return check_finite(source, name, fill([source.get(name)], dtype))


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
