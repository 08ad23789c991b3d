"""Names of tensors: every one of diffusers' has its canonical name and back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel, WanTransformer3DModel

from reelpool.models import keys
from reelpool.models.spec import TransformerSpec


def theirs(spec, kind=WanTransformer3DModel, **extra):
    with torch.device("meta"):
        model = kind(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            ffn_dim=spec.ffn_dim,
            num_layers=spec.num_layers,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            text_dim=spec.text_dim,
            cross_attn_norm=spec.cross_norm,
            image_dim=spec.image_dim or None,
            added_kv_proj_dim=spec.dim if spec.image_dim else None,
            pos_embed_seq_len=spec.image_positions or None,
            **extra,
        )
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


SPEC = TransformerSpec(2, 12, 37, 11, 4, 4, text_dim=20)
WITH_IMAGE = replace(SPEC, in_channels=9, image_dim=22)


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, cross_norm=False),
        WITH_IMAGE,
        replace(WITH_IMAGE, image_positions=514),
    ],
)
def test_names_and_shapes_are_those_of_diffusers(spec):
    check_names(spec, theirs(spec))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("spec", [SPEC, WITH_IMAGE])
def test_names_and_shapes_of_skyreels_are_those_of_diffusers(spec, told):
    spec = replace(spec, fps_embedding=told)
    check_names(spec, theirs(spec, SkyReelsV2Transformer3DModel, inject_sample_info=told))


def check_names(spec, stored):
    ours = keys.transformer_tensors(spec)
    assert {keys.to_diffusers(name): shape for name, shape in ours.items()} == stored
    names = keys.transformer_names_from_diffusers(stored)
    assert names == {name: keys.to_diffusers(name) for name in ours}
    assert sum(math.prod(shape) for shape in ours.values()) == spec.num_params


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
        ("img_emb.proj.0.weight", "condition_embedder.image_embedder.norm1.weight"),
        ("img_emb.proj.1.bias", "condition_embedder.image_embedder.ff.net.0.proj.bias"),
        ("img_emb.proj.3.weight", "condition_embedder.image_embedder.ff.net.2.weight"),
        ("img_emb.proj.4.bias", "condition_embedder.image_embedder.norm2.bias"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ("blocks.7.cross_attn.k_img.weight", "blocks.7.attn2.add_k_proj.weight"),
        ("blocks.7.cross_attn.v_img.bias", "blocks.7.attn2.add_v_proj.bias"),
        ("blocks.7.cross_attn.norm_k_img.weight", "blocks.7.attn2.norm_added_k.weight"),
        ("fps_embedding.weight", "fps_embedding.weight"),
        ("fps_projection.0.bias", "fps_projection.net.0.proj.bias"),
        ("fps_projection.2.weight", "fps_projection.net.2.weight"),
    ],
)
def test_names_follow_the_table(ours, diffusers):
    assert keys.to_diffusers(ours) == diffusers
    assert keys.transformer_names_from_diffusers([diffusers]) == {ours: diffusers}


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn2.norm_added_q.weight",  # of older diffusers files, never used
        "blocks.0.cross_attn.add_k_proj.weight",
        "condition_embedder.image_embedder.norm3.weight",
        "image_embedder.pos_embed",
        "blocks.x.attn1.to_q.weight",
        "attn1.to_q.weight",
        "proj_out",
        "",
    ],
)
def test_names_of_other_models_have_no_canonical_one(name):
    assert keys.transformer_names_from_diffusers([name]) == {}
