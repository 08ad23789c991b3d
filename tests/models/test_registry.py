"""From names to geometry and folders."""

from __future__ import annotations

import json

import pytest

from reelpool.errors import ConfigError, WeightError
from reelpool.models.registry import DEMO_FOLDER, find_spec, model_folder, spec_from_folder
from reelpool.models.spec import PRESETS, TransformerSpec
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
        ("wan2.1-t2v-14", "did you mean wan2.1-t2v-14b?"),
        ("/nowhere/at/all", "give demo or the path of a model folder"),
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


CHANGES = {  # id: (file, change, part of the message)
    "another pipeline": ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
    "no pipeline": ("model_index.json", {"_class_name": None}, "a model of class None"),
    "image model": (CONFIG, {"image_dim": 1280}, "image_dim 1280"),
    "image keys": (CONFIG, {"added_kv_proj_dim": 24}, "added_kv_proj_dim 24"),
    "two images": (CONFIG, {"pos_embed_seq_len": 514}, "pos_embed_seq_len 514"),
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
