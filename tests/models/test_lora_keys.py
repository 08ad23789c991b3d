"""Every way to write a layer's name leads to the one canonical name, and no other name does."""

from __future__ import annotations

import re

import pytest

from reelpool.models.keys import transformer_tensors
from reelpool.models.lora_keys import layer_names, layer_of, read_key
from tests.lora_files import EVERY, FORMS

NAMES = layer_names()
TARGETS = sorted({layer_of(name) for name in transformer_tensors(EVERY)})


def read(name):
    return read_key(name, NAMES)


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_is_found_in_every_form(form):
    write, down, up, _ = FORMS[form]
    for target in TARGETS:
        for end, kind in ((down, "down"), (up, "up"), ("alpha", "alpha"), ("diff", "diff")):
            key = read(f"{write(target)}.{end}")
            assert (key.target, key.kind, key.problem) == (target, kind, "")


def test_no_two_layers_share_a_name():
    for table in (NAMES.outer, NAMES.inner):
        assert all(ours in table and table[ours] == ours for ours in table.values())
    for form, (write, *_) in FORMS.items():
        assert len({write(target) for target in TARGETS}) == len(TARGETS), form


def test_blocks_of_any_number_are_found():
    for number in ("0", "7", "39", "120"):
        key = read(f"lora_unet_blocks_{number}_cross_attn_k_img.lora_up.weight")
        assert key.target == f"blocks.{number}.cross_attn.k_img"


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("blocks.3.attn1.to_out.lora_A.weight", "blocks.3.self_attn.o"),
        ("transformer.blocks.3.attn2.to_out.0.lora_B.weight", "blocks.3.cross_attn.o"),
        ("transformer_2.blocks.3.attn2.to_q.lora_A.weight", "blocks.3.cross_attn.q"),
        ("transformer.blocks.3.norm2.diff", "blocks.3.norm3"),  # the names of the two differ
        ("diffusion_model.blocks.3.norm3.diff", "blocks.3.norm3"),
        ("transformer.scale_shift_table.diff", "head.modulation"),
        ("transformer.blocks.3.scale_shift_table.diff", "blocks.3.modulation"),
        ("diffusion_model.blocks.3.diff_m", "blocks.3.modulation"),
        ("diffusion_model.blocks.3.modulation.diff_m", "blocks.3.modulation"),
        ("lora_unet_blocks_3.diff_m", "blocks.3.modulation"),
        ("diffusion_model.head.diff_m", "head.modulation"),
        ("diffusion_model.head.head.diff", "head.head"),
        ("base_model.model.model.diffusion_model.blocks.3.ffn.0.lora_A.weight", "blocks.3.ffn.0"),
        ("transformer.proj_out.lora_A.weight", "head.head"),
        ("lycoris_blocks_3_ffn_2.lora_up.weight", "blocks.3.ffn.2"),
        ("blocks.3.ffn.2.lora_B", "blocks.3.ffn.2"),
    ],
)
def test_special_names(name, target):
    key = read(name)
    assert (key.target, key.problem) == (target, "")


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (".lora_A.weight", "down"),
        (".lora_A.my_adapter.weight", "down"),
        (".lora_down.weight", "down"),
        (".lora.down.weight", "down"),
        ("_lora.down.weight", "down"),
        (".lora_linear_layer.down.weight", "down"),
        (".lora_B", "up"),
        (".lora_B.default", "up"),
        (".lora_up.weight", "up"),
        (".lora_B.bias", "up_bias"),
        (".lora_B.default.bias", "up_bias"),
        (".lora_up.bias", "up_bias"),
        (".alpha", "alpha"),
        (".diff", "diff"),
        (".diff_b", "diff_b"),
        (".w_norm", "diff"),
        (".b_norm", "diff_b"),
        (".dora_scale", "dora"),
        (".lora_magnitude_vector", "dora"),
        (".lora_magnitude_vector.default.weight", "dora"),
        (".set_weight", "set_weight"),
        (".reshape_weight", "set_weight"),
        (".hada_w1_a", "loha"),
        (".hada_t2", "loha"),
        (".lokr_w1", "lokr"),
        (".lokr_w2_b", "lokr"),
        (".lora_mid.weight", "tucker"),
        (".oft_blocks", "oft"),
        (".lora_A.scale_weight", "scaled"),
        (".lora_up.weight_scale", "scaled"),
        (".lora_B.default.weight.scale_weight", "scaled"),
    ],
)
def test_what_an_entry_holds(ending, kind):
    key = read("diffusion_model.blocks.0.self_attn.q" + ending)
    assert (key.kind, key.target) == (kind, "blocks.0.self_attn.q")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", "of a text encoder"),
        ("text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight", "text encoder"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "Stable Diffusion"),
        ("lora_unet_input_blocks_1_1_proj_in.lora_up.weight", "Stable Diffusion"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux or Hunyuan"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "Flux or Hunyuan"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "another model"),
        ("diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight", "VACE"),
        ("lora_unet_blocks_0_self_attn_qkv.lora_up.weight", "no layer"),
        ("lora_unet_blocks_x_self_attn_q.lora_up.weight", "no layer"),
        ("blocks.-1.self_attn.q.alpha", "no layer"),
        ("diffusion_model.blocks.0.self_attn.q.diff_m", "no layer"),
        ("model.model.model.lora_A.weight", "no layer"),
        ("diffusion_model.blocks.0.self_attn.q.weight", "no entry of a LoRA"),
        ("blocks.0.self_attn.q", "no entry of a LoRA"),
        (".lora_A.weight", "no entry of a LoRA"),
        ("", "no entry of a LoRA"),
    ],
)
def test_strangers_are_told_apart(name, problem):
    key = read(name)
    assert key.target == ""
    assert re.search(problem, key.problem)


def test_a_name_of_any_length_is_read_at_once():
    for part in ("model.", "lora_", "blocks.0.", "_", "lora_unet_"):
        assert read(part * 20_000 + ".alpha").target == ""
