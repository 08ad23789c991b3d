"""Every damaged or incomplete model folder ends in one sentence, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reelpool.errors import ConfigError, MissingTensor, ShapeMismatch, WeightError
from reelpool.models.files import open_model
from reelpool.models.weights import SafetensorsSource
from tests.tiny_models import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    copy_model,
    edit_json,
    edit_tensors,
    shard,
)

NEEDED = [
    "model_index.json",
    "transformer/config.json",
    TRANSFORMER,
    "text_encoder/config.json",
    TEXT_ENCODER,
    "vae/config.json",
    VAE,
    "tokenizer/tokenizer.json",
]
WEIGHTS = [TRANSFORMER, TEXT_ENCODER, VAE]
JSON_FILES = [
    *(file for file in NEEDED if file.endswith(".json")),
    "scheduler/scheduler_config.json",
]


@pytest.fixture
def folder(tiny_model, tmp_path):
    return copy_model(tiny_model, tmp_path / "model")


@pytest.fixture
def refusal(folder, monkeypatch):
    """Damage the folder, open it, give the error; reading a tensor fails the test."""

    def unread(self, name):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(SafetensorsSource, "get", unread)

    def run(damage: Callable[[Path], object], file: str) -> WeightError:
        damage(folder)
        with pytest.raises(WeightError) as caught:
            open_model(str(folder))
        sentence = str(caught.value)
        assert file in sentence
        assert ", expected " in sentence
        assert "\n" not in sentence
        return caught.value

    return run


@pytest.mark.parametrize("file", NEEDED)
def test_a_missing_file_is_named(refusal, file):
    error = refusal(lambda folder: (folder / file).unlink(), file)
    assert error.found == "no such file"


@pytest.mark.parametrize("file", NEEDED)
def test_a_folder_in_place_of_a_file_is_named(refusal, file):
    def damage(folder):
        (folder / file).unlink()
        (folder / file).mkdir()

    assert file in str(refusal(damage, file))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.3, 0.7, 0.9999])
@pytest.mark.parametrize("file", WEIGHTS)
def test_truncated_weights_are_named(refusal, file, share):
    def damage(folder):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(share * len(content))])

    error = refusal(damage, file)
    assert "bytes" in error.found


@pytest.mark.parametrize("file", WEIGHTS)
def test_garbage_in_the_header_is_named(refusal, file):
    def damage(folder):
        content = bytearray((folder / file).read_bytes())
        content[8:40] = b"\x00garbage" * 4
        (folder / file).write_bytes(content)

    assert refusal(damage, file).found == "a broken header"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'{"a": 1', b"[" * 10**5]
)
@pytest.mark.parametrize("file", JSON_FILES)
def test_broken_json_is_named(refusal, file, content):
    error = refusal(lambda folder: (folder / file).write_bytes(content), file)
    assert file in str(error)


@pytest.mark.parametrize("content", [b"{}", b'{"model": []}'])
def test_a_tokenizer_without_a_model_is_named(refusal, content):
    file = "tokenizer/tokenizer.json"
    error = refusal(lambda folder: (folder / file).write_bytes(content), file)
    assert file in str(error)


TENSORS = [
    (TRANSFORMER, "blocks.1.attn2.to_k.weight"),
    (TRANSFORMER, "scale_shift_table"),
    (TRANSFORMER, "condition_embedder.time_proj.bias"),
    (TEXT_ENCODER, "shared.weight"),
    (TEXT_ENCODER, "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
    (VAE, "decoder.conv_in.bias"),
]


@pytest.mark.parametrize(("file", "tensor"), TENSORS)
def test_a_missing_tensor_is_named(refusal, file, tensor):
    error = refusal(lambda folder: edit_tensors(folder / file, **{tensor: None}), file)
    assert isinstance(error, MissingTensor)
    assert error.tensor == tensor
    assert tensor in str(error)


@pytest.mark.parametrize(("file", "tensor"), TENSORS)
def test_a_tensor_of_another_shape_is_named(refusal, file, tensor):
    change = {tensor: torch.zeros(3, 5)}
    error = refusal(lambda folder: edit_tensors(folder / file, **change), file)
    assert isinstance(error, ShapeMismatch)
    assert error.tensor == tensor
    assert "[3, 5], expected [" in str(error)


@pytest.mark.parametrize("tensor", ["blocks.2.ffn.net.2.bias", "blocks.0.attn2.add_k_proj.bias"])
def test_a_tensor_too_many_in_the_transformer_is_named(refusal, tensor):
    change = {tensor: torch.zeros(24)}
    error = refusal(lambda folder: edit_tensors(folder / TRANSFORMER, **change), TRANSFORMER)
    assert error.found == f"tensor {tensor}"


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_missing_shard_is_named(refusal, file):
    stem = file.removesuffix(".safetensors")
    missing = f"{stem}-00002-of-00003.safetensors"
    error = refusal(lambda folder: shard(folder / file)[1].unlink(), missing)
    assert missing in str(error)


@pytest.mark.parametrize("file", WEIGHTS)
def test_a_truncated_shard_is_named(refusal, file):
    def damage(folder):
        last = shard(folder / file)[2]
        last.write_bytes(last.read_bytes()[:-1])

    truncated = file.replace(".safetensors", "-00003-of-00003.safetensors")
    assert truncated in str(refusal(damage, truncated))


@pytest.mark.parametrize("weight_map", [None, {}, [], {"x": 1}, {"x": ["y"]}, {"x": "../y"}])
def test_a_broken_index_is_named(refusal, weight_map):
    index = f"{TRANSFORMER}.index.json"

    def damage(folder):
        shard(folder / TRANSFORMER)
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))

    assert index in str(refusal(damage, index))


def test_a_tensor_the_index_forgot_is_named(refusal):
    def damage(folder):
        shard(folder / VAE)
        index = folder / f"{VAE}.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        del weight_map["decoder.conv_in.bias"]
        edit_json(index, weight_map=weight_map)

    error = refusal(damage, f"{VAE}.index.json")
    assert "tensor decoder.conv_in.bias is missing" in str(error)


CONFIGS = {  # id: (file, change, what the sentence must say)
    "I2V channels": ("transformer/config.json", {"in_channels": 36}, "in_channels 36"),
    "fewer layers": ("transformer/config.json", {"num_layers": 1}, "tensor blocks.1."),
    "more layers": ("transformer/config.json", {"num_layers": 3}, "tensor blocks.2."),
    "wider": ("transformer/config.json", {"attention_head_dim": 16}, "has shape"),
    "no cross norm": ("transformer/config.json", {"cross_attn_norm": False}, "norm2"),
    "layers as text": ("transformer/config.json", {"num_layers": "2"}, "num_layers '2'"),
    "VAE of other z_dim": (
        "vae/config.json",
        {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
        "[8, 4, 3, 3, 3], expected [16, 4, 3, 3, 3]",
    ),
    "VAE wider": ("vae/config.json", {"base_dim": 8, "decoder_base_dim": 8}, "has shape"),
    "VAE of lists": ("vae/config.json", {"dim_mult": "1,1,1"}, "dim_mult = '1,1,1'"),
    "text of other width": ("text_encoder/config.json", {"d_model": 64}, "d_model 64, expected 32"),
    "text deeper": ("text_encoder/config.json", {"num_layers": 3}, "num_layers 3, expected 2"),
    "text of T5": (
        "text_encoder/config.json",
        {"model_type": "t5"},
        "model_type 't5' in its config.json, expected umt5",
    ),
    "another pipeline": ("model_index.json", {"_class_name": "WanVACEPipeline"}, "WanVACEPipeline"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_does_not_fit_is_named(refusal, case):
    file, change, words = CONFIGS[case]
    part = file.split("/")[0]  # the config is named, or the weights that are not as it says
    error = refusal(lambda folder: edit_json(folder / file, **change), part)
    assert words in str(error)


def test_image_keys_in_a_config_do_not_make_an_image_model(folder):
    """Copies of the 5B model's config.json have them, and its weights do not."""
    spec = open_model(str(folder)).spec
    changes = {"image_dim": 1280, "added_kv_proj_dim": 24, "pos_embed_seq_len": 514}
    edit_json(folder / "transformer/config.json", **changes)
    assert open_model(str(folder)).spec == spec


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(WeightError, match=r"model_index\.json: found no such file"):
        open_model(str(tmp_path))
    with pytest.raises(ConfigError):
        open_model(str(tmp_path / "gone"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def playground(tiny_model, tmp_path_factory):
    return copy_model(tiny_model, tmp_path_factory.mktemp("play") / "model")


@given(data=st.data())
def test_any_json_value_anywhere_opens_or_is_refused(playground, data):
    file = playground / data.draw(st.sampled_from(JSON_FILES))
    before = file.read_text()
    content = json.loads(before)
    key = data.draw(st.sampled_from(sorted(content)))
    try:
        file.write_text(json.dumps({**content, key: data.draw(VALUES)}))
        open_model(str(playground))
    except WeightError as error:
        assert ", expected " in str(error)  # noqa: PT017  either outcome is right
    finally:
        file.write_text(before)
