"""Wan VAEs under their original names, from diffusers' ones; facts/wan.md section 5.3."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from reelpool.models.spec import VaeSpec

Value = TypeVar("Value")

TOP = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
PLACES = {
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
}
LAYERS = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def to_original(weights: Mapping[str, Value], spec: VaeSpec) -> dict[str, Value]:
    return {original_name(name, spec): value for name, value in weights.items()}


def original_name(name: str, spec: VaeSpec) -> str:
    side, _, rest = name.partition(".")
    if side in TOP:
        return f"{TOP[side]}.{rest}"
    for ours, theirs in PLACES.items():
        if rest.startswith(ours + "."):
            return f"{side}.{theirs}.{_layer(rest[len(ours) + 1 :])}"
    way, num_blocks = ("down", spec.num_res_blocks)
    if side == "decoder":
        way, num_blocks = ("up", spec.num_res_blocks + 1)
    stage, _, rest = rest.removeprefix(f"{way}_blocks.").partition(".")
    match = re.fullmatch(r"(?:resnets\.(\d+)|(?:down|up)samplers?(?:\.0)?)\.(.+)", rest)
    if match is None:  # the encoder of 2.1: a flat list
        return f"{side}.downsamples.{stage}.{_layer(rest)}"
    inner, layer = match[1] or num_blocks, _layer(match[2])
    if spec.is_residual:
        return f"{side}.{way}samples.{stage}.{way}samples.{inner}.{layer}"
    return f"{side}.upsamples.{int(stage) * (num_blocks + 1) + int(inner)}.{layer}"


def _layer(name: str) -> str:
    layer, _, rest = name.partition(".")
    return f"{LAYERS[layer]}.{rest}" if layer in LAYERS else name
