"""Tiny transformers with every kind of layer, and LoRAs for them in every form there is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reelpool.models.keys import to_diffusers, transformer_tensors
from reelpool.models.lora import Lora
from reelpool.models.lora_keys import layer_of
from reelpool.models.quant import Matrix, Quantised
from reelpool.models.spec import LatentShape, TransformerSpec
from reelpool.runtime.block_runner import BlockRunner, ForwardInput
from reelpool.runtime.types import BlockRange
from tests.tiny_models import FLOAT32, latents_of, prompt_rows

TEXT = TransformerSpec(2, 16, 64, 2, 4, 4, text_dim=32, freq_dim=32)
EVERY = replace(TEXT, in_channels=8, image_dim=24, image_positions=6, fps_embedding=True)
SHAPE = LatentShape(4, 3, 4, 6)
RANK = 4
ALPHA = 2.0  # alpha / rank is a power of two: forms without alpha hold the same bits


class Source:
    """Tensors by name, as a file gives them."""

    where = "memory"

    def __init__(self, tensors: Mapping[str, Matrix]) -> None:
        self.tensors = tensors

    def names(self) -> Any:
        return iter(self.tensors)

    def matrix(self, name: str) -> Matrix:
        return self.tensors[name]

    get: Any = matrix
    info: Any = None


@dataclass(frozen=True)
class Entry:
    """What a LoRA does to one layer."""

    down: Tensor | None = None
    up: Tensor | None = None
    diff: Tensor | None = None
    diff_b: Tensor | None = None


def random_weights(spec: TransformerSpec, seed: int = 0) -> dict[str, Tensor]:
    """Canonical names; every tensor away from 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in transformer_tensors(spec).items():
        fan = math.prod(shape[1:])
        noise = torch.randn(shape, generator=draw)
        is_norm = "norm" in name or name in ("img_emb.proj.0.weight", "img_emb.proj.4.weight")
        weights[name] = 1 + 0.1 * noise if is_norm else noise / max(fan, 4) ** 0.5
    return weights


def entries_of(spec: TransformerSpec, seed: int = 1, differences: bool = True) -> dict[str, Entry]:
    """An entry for every layer: factors for matrices, differences for all else.

    differences: False leaves factors only, which every form can hold.
    """
    draw = torch.Generator().manual_seed(seed)
    entries: dict[str, Entry] = {}

    def noise(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=draw) / max(shape[-1], 4) ** 0.5

    for name, shape in transformer_tensors(spec).items():
        target = layer_of(name)
        entry = entries.get(target, Entry())
        if name.endswith(".bias"):
            entry = replace(entry, diff_b=noise(*shape)) if differences else entry
        elif len(shape) > 1 and name.endswith(".weight") and target != "fps_embedding":
            up = noise(shape[0], RANK, *[1] * (len(shape) - 2))
            entry = replace(entry, down=3 * noise(RANK, *shape[1:]), up=5 * up)
            if differences and target in ("head.head", "blocks.1.ffn.0", "patch_embedding"):
                entry = replace(entry, diff=noise(*shape))
        elif differences:
            entry = replace(entry, diff=noise(*shape))
        if entry != Entry():
            entries[target] = entry
    return entries


def merged(
    weights: Mapping[str, Matrix], entries: Mapping[str, Entry], strength: float = 1.0
) -> dict[str, Tensor]:
    """The weights with the LoRA in them: summed in float64, rounded once to float32."""
    result = {}
    for name, matrix in weights.items():
        weight = matrix.dequantise() if isinstance(matrix, Quantised) else matrix
        entry, total = entries.get(layer_of(name), Entry()), weight.double()
        if name.endswith(".bias"):
            if entry.diff_b is not None:
                total = total + strength * entry.diff_b.double()
        else:
            if entry.down is not None and entry.up is not None:
                product = entry.up.double().flatten(1) @ entry.down.double().flatten(1)
                total = total + strength * ALPHA / RANK * product.view(weight.shape)
            if entry.diff is not None:
                total = total + strength * entry.diff.double().view(weight.shape)
        result[name] = total.float()
    return result


def _theirs(target: str) -> str:
    suffix = "" if target.endswith(("modulation", "emb_pos")) else ".weight"
    return to_diffusers(target + suffix).removesuffix(".weight")


def _under(target: str) -> str:
    return target.replace(".", "_")


# how a form writes a layer's name, the ends of its factors, and whether it stores alpha
FORMS = {
    "diffusers": (lambda t: f"transformer.{_theirs(t)}", "lora_A.weight", "lora_B.weight", False),
    "peft": (
        lambda t: f"base_model.model.{_theirs(t)}",
        "lora_A.default.weight",
        "lora_B.default.weight",
        False,
    ),
    "finetrainers": (
        lambda t: f"diffusion_model.{_theirs(t)}",
        "lora_A.weight",
        "lora_B.weight",
        True,
    ),
    "comfyui": (lambda t: f"diffusion_model.{t}", "lora_down.weight", "lora_up.weight", True),
    "comfyui-peft": (lambda t: f"diffusion_model.{t}", "lora_A.weight", "lora_B.weight", False),
    "whole-prefix": (
        lambda t: f"model.diffusion_model.{t}",
        "lora_down.weight",
        "lora_up.weight",
        True,
    ),
    "musubi": (lambda t: f"lora_unet_{_under(t)}", "lora_down.weight", "lora_up.weight", True),
    "wan-fun": (lambda t: f"lora_unet__{_under(t)}", "lora_down.weight", "lora_up.weight", True),
    "kohya-diffusers": (
        lambda t: f"lora_unet_{_under(_theirs(t))}",
        "lora_down.weight",
        "lora_up.weight",
        True,
    ),
    "lycoris": (lambda t: f"lycoris_{_under(t)}", "lora_down.weight", "lora_up.weight", True),
    "diffsynth": (
        lambda t: f"pipe.dit.{t}",
        "lora_A.default.weight",
        "lora_B.default.weight",
        False,
    ),
    "bare": (lambda t: t, "lora_A.default.weight", "lora_B.default.weight", False),
}


def write(form: str, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The tensors of a LoRA file of one form."""
    name, down, up, has_alpha = FORMS[form]
    tensors: dict[str, Tensor] = {}
    for target, entry in entries.items():
        layer = name(target)
        if entry.down is not None and entry.up is not None:
            tensors[f"{layer}.{down}"] = entry.down
            tensors[f"{layer}.{up}"] = entry.up if has_alpha else ALPHA / RANK * entry.up
            if has_alpha:
                tensors[f"{layer}.alpha"] = torch.tensor(ALPHA)
        if entry.diff is not None:
            if form == "comfyui" and target.endswith(".modulation"):  # as lightx2v names them
                tensors[f"{layer.removesuffix('.modulation')}.diff_m"] = entry.diff
            else:
                tensors[f"{layer}.diff"] = entry.diff
        if entry.diff_b is not None:
            tensors[f"{layer}.diff_b"] = entry.diff_b
    return tensors


def runner_of(
    spec: TransformerSpec, weights: Mapping[str, Matrix], dtype: str = "float32"
) -> BlockRunner:
    numerics = replace(FLOAT32, dtype=dtype)
    return BlockRunner(spec, Source(weights), numerics, torch.device("cpu"))


def forward_of(spec: TransformerSpec, shape: LatentShape = SHAPE) -> ForwardInput:
    """A forward with all that the model takes."""
    images: dict[str, Any] = {}
    if spec.image_dim:
        rows = prompt_rows(spec.image_positions, spec.image_dim, seed=7)[: spec.image_positions]
        images = {"image_key": "i", "image_embeds": rows, "condition": latents_of(shape, seed=8)}
    steps = torch.tensor([900.0, 400.5, 30.0])
    return ForwardInput(
        "t", prompt_rows(5, spec.text_dim), shape, latents_of(shape), steps, **images
    )


def velocity(runner: BlockRunner, loras: Sequence[Lora] = ()) -> Tensor:
    total = runner.spec.num_layers
    (result,) = runner.run(BlockRange(0, total, total), [forward_of(runner.spec)], loras=loras)
    assert isinstance(result, Tensor)
    return result
