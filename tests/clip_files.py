"""Tiny CLIP vision towers under the names of Wan's own `.pth`; wan/modules/clip.py of Wan2.1."""

from __future__ import annotations

import torch
from torch import Tensor

OUTER = {
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "pre_layrnorm.weight": "pre_norm.weight",
    "pre_layrnorm.bias": "pre_norm.bias",
    "post_layernorm.weight": "post_norm.weight",
    "post_layernorm.bias": "post_norm.bias",
}
LAYERS = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


def to_original(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """A whole XLMRobertaCLIP's names: the tower, its head, some of the text tower."""
    tower = {ours.removeprefix("vision_model."): tensor for ours, tensor in weights.items()}
    dim = len(tower["embeddings.class_embedding"])
    made = {theirs: tower[ours] for ours, theirs in OUTER.items() if ours in tower}
    made["cls_embedding"] = tower["embeddings.class_embedding"].view(1, 1, dim)
    made["pos_embedding"] = tower["embeddings.position_embedding.weight"].unsqueeze(0)
    made["head"] = torch.zeros(dim, 4)
    for index in range(num_layers):
        for kind in ("weight", "bias"):
            block = f"encoder.layers.{index}"
            for ours, theirs in LAYERS.items():
                made[f"transformer.{index}.{theirs}.{kind}"] = tower[f"{block}.{ours}.{kind}"]
            made[f"transformer.{index}.attn.to_qkv.{kind}"] = torch.cat(
                [tower[f"{block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
    visual = {f"visual.{name}": tensor for name, tensor in made.items()}
    text = {"textual.blocks.0.attn.q.weight": torch.zeros(2, 2), "log_scale": torch.zeros(())}
    return text | visual
