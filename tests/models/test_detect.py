"""From names and shapes to geometry and variant, with every trap that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from reelpool.errors import MissingTensor, WeightError
from reelpool.models.detect import detect
from reelpool.models.keys import transformer_tensors
from reelpool.models.layouts import open_transformer
from reelpool.models.presets import PRESETS
from reelpool.models.spec import TransformerSpec
from tests.model_forms import SPECS, T2V, config_of, original, tensors_of

LARGE = TransformerSpec(40, 128, 13824, 40, 16, 16)


def found(spec, config=None, name="wan", **changes):
    """Detect from a geometry's names and shapes; None takes a tensor away."""
    shapes = transformer_tensors(spec)
    shapes |= {key.replace("__", "."): shape for key, shape in changes.items()}
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    return detect("FILE", shapes, config or {}, "CONFIG", name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_told_by_the_shapes_of_its_weights(name):
    preset = PRESETS[name]
    spec, variant, image = found(preset.transformer, name=name)
    assert spec == preset.transformer
    assert (variant, image) == (preset.variant, preset.image)


@pytest.mark.parametrize("kind", SPECS)
def test_every_tiny_variant_is_told(kind):
    spec, variant, image = SPECS[kind]
    assert found(spec) == (spec, variant, image)


def test_the_config_of_the_5b_model_does_not_make_it_an_image_model():
    five = PRESETS["wan2.2-ti2v-5b"].transformer
    config = config_of(five) | {"image_dim": 1280, "added_kv_proj_dim": 3072}
    assert found(five, config) == (five, "ti2v", "first-frame")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("SkyReels-V2-DF-14B-540P/model.safetensors", "df"),
        ("Wan21_SkyReels_V2_DF_14B.gguf", "df"),
        ("skyreels-v2-diffusion-forcing.gguf", "df"),
        ("SkyReels-V2-T2V-14B-540P/model.safetensors", "t2v"),
        ("skyreels_pdf.gguf", "t2v"),
        ("models--Skywork--SkyReels-V2-T2V/3df1/model.safetensors", "t2v"),
        ("wan_df.gguf", "t2v"),
        ("wan.gguf", "t2v"),
    ],
)
def test_diffusion_forcing_without_rate_embedding_is_told_by_the_name(name, variant):
    assert found(LARGE, name=name)[1] == variant


def test_the_names_of_folders_above_count(tmp_path):
    folder = tmp_path / "models--Skywork--SkyReels-V2-DF-14B-540P" / "snapshots" / "3f9a" / "part"
    folder.mkdir(parents=True)
    path = original(folder, tensors_of(T2V), T2V)
    assert open_transformer(path)[1].variant == "df"


@pytest.mark.parametrize(("kind", "variant"), [("DF", "df"), ("T2V", "t2v")])
def test_the_number_of_a_commit_does_not_count(tmp_path, kind, variant):
    """It neither says df nor hides the repository's name, above two folders of its own."""
    repository = tmp_path / f"models--Skywork--SkyReels-V2-{kind}-14B-540P"
    folder = repository / "snapshots" / ("3df4" * 10) / "split_files" / "diffusion_models"
    folder.mkdir(parents=True)
    path = original(folder, tensors_of(T2V), T2V)
    assert open_transformer(path)[1].variant == variant


def test_norms_before_cross_attention_may_be_absent():
    spec = replace(LARGE, cross_norm=False)
    assert found(spec)[0] == spec


@pytest.mark.parametrize(
    ("channels", "image_dim", "words"),
    [
        (48, 1280, "a Fun-Control model: in_channels 48, out_channels 16 and image features"),
        (48, 0, "a Fun-Control model: in_channels 48"),
        (52, 0, "a Fun-Control model: in_channels 52"),
        (32, 0, "in_channels 32, out_channels 16, expected 16 in_channels"),
        (16, 1280, "in_channels 16, out_channels 16 and image features"),
    ],
)
def test_channels_that_no_variant_has_are_refused(channels, image_dim, words):
    with pytest.raises(WeightError) as caught:
        found(replace(LARGE, in_channels=channels, image_dim=image_dim))
    assert words in str(caught.value)
    assert "or 36 for images" in str(caught.value)


UNSUPPORTED = {
    "vace_patch_embedding.weight": "VACE",
    "vace_blocks.0.before_proj.weight": "VACE",
    "control_adapter.conv.weight": "Fun-Camera",
    "casual_audio_encoder.encoder.final_linear.weight": "Wan 2.2 S2V",
    "audio_injector.injector.0.k.weight": "Wan 2.2 S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Wan 2.2 Animate",
    "pose_patch_embedding.weight": "Wan 2.2 Animate",
    "ref_conv.weight": "Fun-Control",
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_variants_that_cannot_be_run_are_named(tmp_path, name, prefix):
    tensors = {prefix + key: tensor for key, tensor in tensors_of(T2V).items()}
    tensors[prefix + name] = torch.zeros(4)
    save_file(tensors, tmp_path / "wan.safetensors")
    with pytest.raises(WeightError) as caught:
        open_transformer(tmp_path / "wan.safetensors")
    assert f"found a {UNSUPPORTED[name]} model (tensor {prefix}{name})" in str(caught.value)


def test_an_add_on_of_vace_alone_is_named(tmp_path):
    save_file({"vace_blocks.0.norm3.bias": torch.zeros(4)}, tmp_path / "vace.safetensors")
    with pytest.raises(WeightError, match="a VACE model"):
        open_transformer(tmp_path / "vace.safetensors")


OTHERS = {  # a tensor's name: what the file is said to be
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "a LoRA",
    "lora_unet_blocks_0_ffn_0.lora_down.weight": "a LoRA",
    "decoder.conv1.weight": "a VAE",
    "decoder.conv_in.weight": "a VAE",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "tensor encoder",
    "token_embedding.weight": "a text encoder",
    "token_embd.weight": "a text encoder",
    "vision_model.embeddings.class_embedding": "a CLIP image encoder",
    "double_blocks.0.img_attn.proj.weight": "another kind of transformer",
    "model.diffusion_model.input_blocks.0.0.weight": "an image model",
    "something": "tensor something and others",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_something_else_is_named(tmp_path, name):
    save_file({name: torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightError) as caught:
        open_transformer(tmp_path / "x.safetensors")
    assert f"found {OTHERS[name]}" in str(caught.value)
    assert "expected a Wan transformer" in str(caught.value)


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(WeightError, match="found no tensors, expected a Wan transformer"):
        open_transformer(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "text_embedding.0.weight",
        "head.head.weight",
        "patch_embedding.weight",
        "time_embedding.0.weight",
        "blocks.0.ffn.0.weight",
    ],
)
def test_what_the_geometry_is_read_from_must_be_there_and_have_axes(name):
    key = name.replace(".", "__")
    with pytest.raises(MissingTensor) as caught:
        found(LARGE, **{key: None})
    assert caught.value.tensor == name
    for shape in ((), (3,), (0, 4), (2**40, 4), (7, 5, 3)):
        with pytest.raises(WeightError) as caught:
            found(LARGE, **{key: shape})
        assert name.split(".")[0] in str(caught.value)


def test_image_features_without_their_layer_are_refused():
    image = replace(LARGE, in_channels=36, image_dim=1280)
    with pytest.raises(MissingTensor, match=r"img_emb\.proj\.1\.weight"):
        found(image, img_emb__proj__1__weight=None)


def test_numbers_of_blocks_have_bounds():
    with pytest.raises(WeightError, match="1000001 blocks, expected 1 to 1000"):
        found(LARGE, blocks__1000000__modulation=(1, 6, 5120))
    assert found(LARGE, blocks__44__modulation=(1, 6, 5120))[0].num_layers == 45


CONFIGS = {  # id: (change, part of the message)
    "layers as text": ({"num_layers": "40"}, "num_layers '40', expected a whole number"),
    "endless layers": ({"num_layers": 10**6}, "from 1 to 1000"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads 0"),
    "half a head": ({"attention_head_dim": 12.5}, "attention_head_dim 12.5"),
    "true": ({"ffn_dim": True}, "ffn_dim True"),
    "norm by head": ({"qk_norm": "rms_norm"}, "qk_norm 'rms_norm'"),
    "patches": ({"patch_size": [1, 4, 4]}, "patch_size [1, 4, 4]"),
    "odd head": ({"attention_head_dim": 13}, "heads of 13"),
    "odd frequencies": ({"freq_dim": 255}, "freq_dim 255, expected even"),
    "eps as text": ({"eps": "small"}, "eps 'small'"),
    "negative eps": ({"eps": -1.0}, "eps -1.0"),
    "eps of nothing": ({"eps": float("nan")}, "eps nan"),
    "norm as text": ({"cross_attn_norm": "no"}, "cross_attn_norm 'no'"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_nonsense_in_a_config_is_refused_by_key(case):
    change, words = CONFIGS[case]
    with pytest.raises(WeightError) as caught:
        found(LARGE, config_of(LARGE) | change)
    assert words in str(caught.value)
    assert "CONFIG" in str(caught.value)
