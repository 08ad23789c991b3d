"""LoRAs on the transformer's weights: which record a layer lies in, and the record with them.

What a LoRA does to one record is read once, at strength 1 (`load_change`), and put beside the
record's weights for a call (`with_changes`), which shares every matrix with it. The order of the
LoRAs is the order of the sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from .linear import Linear, Side
from .lora import LoraFile, LoraLayer, LoraReport
from .wan_weights import Weights


@dataclass(frozen=True)
class Shift:
    """A difference that is added to a vector or a table, in float32, the sum rounded once.

    values: float32. scale: at strength 1.
    index: of a bias 1, of anything else 0. start: of the first row that it is added to.
    """

    values: Tensor
    scale: float
    index: int = 0
    start: int = 0


@dataclass(frozen=True)
class Term:
    """One change of one field. path: names of the fields that lead to it from the record."""

    path: tuple[str, ...]
    value: Side | Shift


Change = tuple[Term, ...]  # all that one LoRA does to one record

# Where the layers lie: the path of fields, and which of the matrices stacked there.
_BLOCK: dict[str, tuple[str, int]] = {
    "modulation": ("modulation", 0),
    "self_attn.q": ("qkv", 0),
    "self_attn.k": ("qkv", 1),
    "self_attn.v": ("qkv", 2),
    "self_attn.norm_q": ("norm_q", 0),
    "self_attn.norm_k": ("norm_k", 0),
    "self_attn.o": ("out", 0),
    "norm3": ("cross_norm", 0),
    "cross_attn.q": ("cross_q", 0),
    "cross_attn.k": ("cross_kv", 0),
    "cross_attn.v": ("cross_kv", 1),
    "cross_attn.norm_q": ("cross_norm_q", 0),
    "cross_attn.norm_k": ("cross_norm_k", 0),
    "cross_attn.o": ("cross_out", 0),
    "cross_attn.k_img": ("image_kv", 0),
    "cross_attn.v_img": ("image_kv", 1),
    "cross_attn.norm_k_img": ("image_norm_k", 0),
    "ffn.0": ("ffn_in", 0),
    "ffn.2": ("ffn_out", 0),
}
_OUTER: dict[str, dict[str, tuple[str, int]]] = {
    "enter": {
        "patch_embedding": ("patch", 0),
        "time_embedding.0": ("time_in", 0),
        "time_embedding.2": ("time_out", 0),
        "time_projection.1": ("time_projection", 0),
        "fps_embedding": ("fps.table", 0),
        "fps_projection.0": ("fps.first", 0),
        "fps_projection.2": ("fps.second", 0),
    },
    "text": {"text_embedding.0": ("first", 0), "text_embedding.2": ("second", 0)},
    "image": {
        "img_emb.emb_pos": ("positions", 0),
        "img_emb.proj.0": ("norm_in", 0),
        "img_emb.proj.1": ("first", 0),
        "img_emb.proj.3": ("second", 0),
        "img_emb.proj.4": ("norm_out", 0),
    },
    "leave": {"head.modulation": ("modulation", 0), "head.head": ("head", 0)},
}


def load_change(file: LoraFile, report: LoraReport, part: str, weights: object) -> Change:
    """Read what a LoRA does to one record of weights.

    Args:
        file: the LoRA.
        report: what of it applies to the model.
        part: "enter", "text", "image", "leave", or "blocks.3".
        weights: the record, for the types its products are computed in.
    Returns:
        Terms at strength 1, on the CPU; none where the LoRA leaves the record alone.
    Raises:
        WeightError: if a tensor has values that are not finite.
    """
    places: Mapping[str, tuple[str, int]] = _OUTER.get(part) or {
        f"{part}.{layer}": place for layer, place in _BLOCK.items()
    }
    terms = []
    for target, (names, index) in places.items():
        layer = report.layers.get(target)
        if layer is not None:
            path = tuple(names.split("."))
            field: Any = weights
            for name in path:
                field = getattr(field, name)
            terms += [Term(path, value) for value in _values(file, layer, field, index)]
    return tuple(terms)


def with_changes(weights: Weights, changes: Sequence[tuple[Change, float]]) -> Weights:
    """The same record with LoRAs beside its matrices and added to its vectors.

    Args:
        weights: the record; it is not changed, and its matrices are shared.
        changes: from `load_change`, on the record's device, each with its strength.
    """
    fields: dict[str, list[tuple[tuple[str, ...], Side | Shift, float]]] = {}
    for change, strength in changes:
        for term in change:
            fields.setdefault(term.path[0], []).append((term.path[1:], term.value, strength))
    changed: dict[str, object] = {}
    for name, terms in fields.items():
        inner = getattr(weights, name)
        if terms[0][0]:
            nested = [((Term(path, value),), strength) for path, value, strength in terms]
            changed[name] = with_changes(inner, nested)
        else:
            changed[name] = _changed(inner, [(value, strength) for _, value, strength in terms])
    return cast(Weights, dataclasses.replace(cast(Any, weights), **changed)) if changed else weights


def _values(file: LoraFile, layer: LoraLayer, field: object, index: int) -> Iterator[Side | Shift]:
    """What a layer's entries do to the field it lies in.

    Matrices that are stacked have as many rows each, so the entry's own rows tell where it starts.
    """
    if isinstance(field, Linear):
        if layer.down:
            down = file.tensor(layer.down, field.dtype).flatten(1)
            up = file.tensor(layer.up, field.dtype).flatten(1)
            yield Side(up, down, layer.scale, index * up.shape[0])
        if layer.diff:
            whole = file.tensor(layer.diff, field.dtype).flatten(1)
            yield Side(whole, None, 1.0, index * whole.shape[0])
    elif layer.diff:
        yield Shift(file.tensor(layer.diff, torch.float32), 1.0)
    for name, scale in ((layer.up_bias, layer.scale), (layer.diff_b, 1.0)):
        if name:
            values = file.tensor(name, torch.float32)
            yield Shift(values, scale, 1, index * values.shape[0])


def _changed(field: object, terms: Sequence[tuple[Side | Shift, float]]) -> object:
    """A field with sides beside it and shifts added."""
    sides = tuple(
        replace(term, scale=term.scale * strength)
        for term, strength in terms
        if isinstance(term, Side)
    )
    shifts = [(term, strength) for term, strength in terms if isinstance(term, Shift)]
    if isinstance(field, Linear):
        bias = None if field.bias is None else _shifted(field.bias, shifts)
        return replace(field, bias=bias, sides=(*field.sides, *sides))
    if isinstance(field, tuple):  # weight and bias of a norm
        return tuple(
            _shifted(each, [pair for pair in shifts if pair[0].index == number])
            for number, each in enumerate(field)
        )
    assert isinstance(field, Tensor), field
    return _shifted(field, shifts)


def _shifted(tensor: Tensor, shifts: Sequence[tuple[Shift, float]]) -> Tensor:
    """The tensor plus its shifts, summed in float32 in their order."""
    if not shifts:
        return tensor
    total = tensor.float().clone()
    flat = total.view(-1)
    for shift, strength in shifts:
        values = shift.values.flatten()
        part = flat[shift.start : shift.start + len(values)]
        part.add_(values, alpha=shift.scale * strength)
    return total.to(tensor.dtype)
