"""Names of tensors: every one of diffusers' has its canonical name and back."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from reelpool.models import keys
from reelpool.models.spec import TransformerSpec


def theirs(spec):
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            ffn_dim=spec.ffn_dim,
            num_layers=spec.num_layers,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            text_dim=spec.text_dim,
            cross_attn_norm=spec.cross_norm,
        )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("cross_norm", [True, False])
def test_names_and_shapes_are_those_of_diffusers(cross_norm):
    spec = TransformerSpec(2, 12, 37, 11, 4, 4, text_dim=20, cross_norm=cross_norm)
    stored = theirs(spec)
    ours = keys.transformer_tensors(spec)
    assert {keys.to_diffusers(name): shape for name, shape in ours.items()} == stored
    names = keys.transformer_names_from_diffusers(stored)
    assert names == {name: keys.to_diffusers(name) for name in ours}


@pytest.mark.parametrize(
    ("ours", "diffusers"),
    [  # shared/facts/wan.md 2.2
        ("patch_embedding.weight", "patch_embedding.weight"),
        ("text_embedding.2.bias", "condition_embedder.text_embedder.linear_2.bias"),
        ("time_projection.1.weight", "condition_embedder.time_proj.weight"),
        ("head.modulation", "scale_shift_table"),
        ("head.head.bias", "proj_out.bias"),
        ("blocks.10.modulation", "blocks.10.scale_shift_table"),
        ("blocks.0.norm3.weight", "blocks.0.norm2.weight"),
        ("blocks.0.cross_attn.norm_k.weight", "blocks.0.attn2.norm_k.weight"),
        ("blocks.0.ffn.0.bias", "blocks.0.ffn.net.0.proj.bias"),
    ],
)
def test_names_follow_the_table(ours, diffusers):
    assert keys.to_diffusers(ours) == diffusers
    assert keys.transformer_names_from_diffusers([diffusers]) == {ours: diffusers}


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn2.add_k_proj.weight",
        "condition_embedder.image_embedder.norm1.weight",
        "blocks.x.attn1.to_q.weight",
        "attn1.to_q.weight",
        "proj_out",
        "",
    ],
)
def test_names_of_other_models_have_no_canonical_one(name):
    assert keys.transformer_names_from_diffusers([name]) == {}
