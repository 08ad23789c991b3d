"""Opening a model folder: the whole check, the digest, shards."""

from __future__ import annotations

import shutil

import pytest
import torch

from reelpool.errors import ConfigError
from reelpool.models.files import SAMPLE_BYTES, files_digest, open_model
from reelpool.models.keys import transformer_tensors
from tests.tiny_models import TEXT_ENCODER, TRANSFORMER, VAE, copy_model, edit_json, shard


def test_demo_and_a_folder_open_under_canonical_names(tiny_model):
    for name in ("demo", str(tiny_model)):
        files = open_model(name)
        assert set(files.transformer.names()) == set(transformer_tensors(files.spec.transformer))
        assert len(files.digest) == 32


def test_a_name_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        open_model(str(tmp_path / "gone"))


def test_shards_open_to_the_same_tensors(tiny_model, tmp_path):
    folder = copy_model(tiny_model, tmp_path / "model")
    for file in (TRANSFORMER, TEXT_ENCODER, VAE):
        assert len(shard(folder / file)) == 3
    whole, cut = open_model(str(tiny_model)), open_model(str(folder))
    for part in ("transformer", "text_encoder", "vae"):
        one, other = getattr(whole, part), getattr(cut, part)
        assert set(one.names()) == set(other.names())
        assert all(torch.equal(one.get(name), other.get(name)) for name in one.names())


def test_digest_is_that_of_the_content_wherever_it_lies(tiny_model, tmp_path):
    digest = open_model(str(tiny_model)).digest
    copy = copy_model(tiny_model, tmp_path / "another name")
    (copy / "README.md").write_text("what lies beside is not the model")
    (copy / "gone.json").symlink_to(tmp_path / "nowhere")
    (copy / "folder.json").mkdir()
    assert open_model(str(copy)).digest == digest
    edit_json(copy / "model_index.json", extra=1)
    assert open_model(str(copy)).digest != digest


@pytest.mark.parametrize("file", [TRANSFORMER, TEXT_ENCODER, VAE])
def test_digest_sees_one_changed_byte_of_small_weights(tiny_model, tmp_path, file):
    copy = copy_model(tiny_model, tmp_path / "model")
    path = copy / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert open_model(str(copy)).digest != open_model(str(tiny_model)).digest


def test_digest_of_a_large_file_samples_its_start_end_and_size(tmp_path):
    path = tmp_path / "x.safetensors"
    content = bytearray(40 * SAMPLE_BYTES)

    def digest():
        path.write_bytes(content)
        return files_digest([path], tmp_path)

    seen = {digest()}
    for position in (0, SAMPLE_BYTES - 1, len(content) - SAMPLE_BYTES, len(content) - 1):
        content[position] ^= 1
        seen.add(digest())
    content.append(0)
    seen.add(digest())
    shutil.move(path, tmp_path / "y.safetensors")
    seen.add(files_digest([tmp_path / "y.safetensors"], tmp_path))
    assert len(seen) == 7
