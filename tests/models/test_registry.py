"""From names to geometry and folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from reelpool.errors import ConfigError, WeightError
from reelpool.models.files import open_model
from reelpool.models.presets import PRESETS
from reelpool.models.registry import DEMO_FOLDER, find_spec, model_folder, spec_from_folder
from reelpool.models.spec import ImageEncoderSpec, TransformerSpec
from tests.tiny_models import copy_model, edit_json

CONFIG = "transformer/config.json"
TEXT = "text_encoder/config.json"


def test_demo_is_the_folder_that_ships_with_the_package():
    spec = find_spec("demo")
    demo = json.loads((DEMO_FOLDER / "demo.json").read_text())
    assert model_folder("demo") == DEMO_FOLDER
    assert spec.transformer.head_dim == 64
    assert (spec.defaults.width, spec.defaults.height) == (demo["width"], demo["height"])
    assert (spec.defaults.steps, spec.defaults.shift) == (demo["steps"], demo["shift"])
    assert spec.defaults.solver == demo["solver"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_geometry_without_weights(name):
    assert find_spec(name) is PRESETS[name]
    with pytest.raises(ConfigError, match="geometry without weights"):
        model_folder(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("demon", "did you mean demo?"),
        ("wan2.1-t2v-14", "did you mean wan2.1-t2v-14b"),
        ("/nowhere/at/all", "give demo, a model's file or folder, or a name that"),
    ],
)
def test_an_unknown_name_names_the_nearest(name, words):
    for find in (find_spec, model_folder):
        with pytest.raises(ConfigError) as caught:
            find(name)
        assert words in str(caught.value)


def test_a_folder_gives_its_geometry(tiny_model):
    spec = find_spec(str(tiny_model))
    assert spec.name == "tiny"
    assert spec.transformer == TransformerSpec(2, 12, 32, 2, 4, 4, text_dim=32)
    assert (spec.text.dim, spec.text.ffn_dim, spec.text.num_layers) == (32, 37, 2)
    assert (spec.text.max_distance, spec.text.eps) == (128, 1e-6)
    assert (spec.vae.z_dim, spec.vae.spatial_factor, spec.size_multiple) == (4, 8, 16)
    assert spec.defaults.shift == 3.0  # the scheduler's; the rest is Wan's
    assert spec.defaults.steps == 50


def test_demo_json_beside_the_index_gives_defaults(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    edit_json(folder / "demo.json", steps=7, shift=2.5, negative="blurry", grammar={})
    defaults = spec_from_folder(folder).defaults
    assert (defaults.steps, defaults.shift, defaults.negative) == (7, 2.5, "blurry")
    assert defaults.width == 832


def test_a_folder_without_scheduler_and_optional_keys_gets_the_defaults(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    edit_json(folder / CONFIG, eps=None, patch_size=None, qk_norm=None, cross_attn_norm=None)
    edit_json(folder / TEXT, layer_norm_epsilon=None, feed_forward_proj=None)
    spec, whole = spec_from_folder(folder), spec_from_folder(tiny_model)
    assert spec.transformer == whole.transformer
    assert spec.text == whole.text
    assert spec.defaults.shift == 5.0


def test_image_keys_beside_the_channels_of_a_text_model_are_not_believed(tiny_model, tmp_path):
    """Copies of the 5B config.json have them although its weights have no such tensors."""
    folder = copy_model(tiny_model, tmp_path / "model")
    edit_json(folder / CONFIG, image_dim=1280, added_kv_proj_dim=24, pos_embed_seq_len=514)
    spec = find_spec(str(folder))
    assert spec.transformer == find_spec(str(tiny_model)).transformer
    assert (spec.variant, spec.image, spec.image_encoder) == ("t2v", "", None)
    assert spec == replace(open_model(str(folder)).spec, quant="")


def test_an_image_model_has_an_image_encoder(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    edit_json(folder / "model_index.json", _class_name="WanImageToVideoPipeline")
    edit_json(folder / CONFIG, in_channels=12, image_dim=32, pos_embed_seq_len=10)
    with pytest.raises(WeightError, match="image_encoder"):
        find_spec(str(folder))
    (folder / "image_encoder").mkdir()
    edit_json(
        folder / "image_encoder" / "config.json",
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, hidden_act="gelu",
    )  # fmt: skip
    spec = find_spec(str(folder))
    assert spec.image_encoder == ImageEncoderSpec(32, 3, 2, 48, 28)
    assert (spec.transformer.image_dim, spec.transformer.image_positions) == (32, 10)
    assert (spec.variant, spec.image) == ("flf2v", "concat")
    edit_json(folder / "image_encoder" / "config.json", hidden_act=3)
    with pytest.raises(WeightError, match="hidden_act 3"):
        find_spec(str(folder))


def test_two_experts_are_of_one_geometry_and_have_a_boundary(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    spec = find_spec(str(folder))
    assert (spec.num_experts, spec.boundary) == (2, 0.875)
    edit_json(folder / "model_index.json", boundary_ratio=0.7)
    assert find_spec(str(folder)).boundary == 0.7
    assert find_spec(str(folder)) == replace(open_model(str(folder)).spec, quant="")
    edit_json(folder / "transformer_2" / "config.json", num_layers=3)
    with pytest.raises(WeightError, match="transformer_2"):
        find_spec(str(folder))


def test_the_pipeline_tells_what_weights_do_not(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    edit_json(
        folder / "model_index.json", expand_timesteps=True, _class_name="WanImageToVideoPipeline"
    )
    assert (find_spec(str(folder)).variant, find_spec(str(folder)).image) == ("ti2v", "first-frame")
    edit_json(
        folder / "model_index.json",
        expand_timesteps=None, _class_name="SkyReelsV2DiffusionForcingPipeline",
    )  # fmt: skip
    assert find_spec(str(folder)).variant == "df"
    assert find_spec(str(folder)) == replace(open_model(str(folder)).spec, quant="")


def test_a_single_file_gives_its_geometry_by_its_headers(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    parts = (
        ("vae", str(folder / "vae")),
        ("text_encoder", str(folder / "text_encoder")),
    )
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    spec = find_spec(str(file), parts)
    whole = find_spec(str(folder))
    assert (spec.transformer, spec.vae, spec.text) == (whole.transformer, whole.vae, whole.text)
    assert spec.quant == "fp32"


CHANGES = {  # id: (file, change, part of the message)
    "another pipeline": ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
    "no pipeline": ("model_index.json", {"_class_name": None}, "a model of class None"),
    "channels of an I2V": (CONFIG, {"in_channels": 36}, "in_channels 36, out_channels 4"),
    "norm by head": (CONFIG, {"qk_norm": "rms_norm"}, "qk_norm rms_norm"),
    "other patches": (CONFIG, {"patch_size": [1, 4, 4]}, r"patch_size \[1, 4, 4\]"),
    "heads as text": (CONFIG, {"num_attention_heads": "2"}, "num_attention_heads '2'"),
    "no layers": (CONFIG, {"num_layers": None}, "num_layers None"),
    "zero layers": (CONFIG, {"num_layers": 0}, "num_layers 0"),
    "half a head": (CONFIG, {"attention_head_dim": 12.5}, "attention_head_dim 12.5"),
    "too many": (CONFIG, {"ffn_dim": 2**40}, "ffn_dim"),
    "endless layers": (CONFIG, {"num_layers": 2**31 - 1}, "from 1 to 1000"),
    "endless text layers": (TEXT, {"num_layers": 2**31 - 1}, "from 1 to 1000"),
    "endless VAE": ("vae/config.json", {"num_res_blocks": 2**40}, "at most 10 of 1000"),
    "VAE too wide": ("vae/config.json", {"base_dim": 2**70}, "at most 65536"),
    "VAE multiplied": ("vae/config.json", {"dim_mult": [2**62] * 3}, "at most 65536"),
    "odd head": (CONFIG, {"attention_head_dim": 13}, "attention_head_dim 13"),
    "odd frequencies": (CONFIG, {"freq_dim": 255}, "freq_dim 255"),
    "norm as text": (CONFIG, {"cross_attn_norm": "no"}, "cross_attn_norm 'no'"),
    "eps as text": (CONFIG, {"eps": "small"}, "eps 'small'"),
    "negative eps": (CONFIG, {"eps": -1.0}, "eps -1.0"),
    "eps of nothing": (CONFIG, {"eps": float("nan")}, "eps nan"),
    "another encoder": (TEXT, {"model_type": "t5"}, "a text encoder of type t5"),
    "another width": (TEXT, {"d_model": 64}, "d_model 64, expected 32"),
    "another activation": (TEXT, {"feed_forward_proj": "relu"}, "feed_forward_proj 'relu'"),
    "words as text": (TEXT, {"vocab_size": "many"}, "vocab_size 'many'"),
    "distance as list": (TEXT, {"relative_attention_max_distance": [1]}, "max_distance"),
    "another VAE": ("vae/config.json", {"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
    "channels of the VAE": ("vae/config.json", {"z_dim": 16}, "16 values"),
    "shift as text": ("scheduler/scheduler_config.json", {"flow_shift": "3"}, "flow_shift '3'"),
    "steps as text": ("demo.json", {"steps": "20"}, "steps '20'"),
    "negative number": ("demo.json", {"negative": 5}, "negative 5"),
    "no frames": ("demo.json", {"frames": 0}, "frames 0"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_nonsense_is_refused_by_file_and_key(tiny_model, tmp_path, case):
    file, change, words = CHANGES[case]
    folder = copy_model(tiny_model, tmp_path / "model")
    edit_json(folder / file, **change)
    with pytest.raises(WeightError, match=words) as caught:
        find_spec(str(folder))
    assert file in str(caught.value)
    assert ", expected " in str(caught.value)
