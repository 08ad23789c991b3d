"""Files and folders of weights: found by name, told by their first bytes, and what is refused."""

from __future__ import annotations

import collections
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save, save_file

from reelpool.errors import MissingTensor, WeightError
from reelpool.models.gguf_source import GgufSource
from reelpool.models.open_weights import TorchSource, open_weights
from reelpool.models.weights import SafetensorsSource
from tests.gguf_files import write as write_gguf

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, 2.0])}
NAMES = ["diffusion_pytorch_model.safetensors", "model.safetensors", "pytorch_model.bin"]


def put(path, tensors=TENSORS):
    if path.suffix in (".safetensors", ".sft"):
        save_file(dict(tensors), path)
    elif path.suffix == ".gguf":
        write_gguf(path, {name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        torch.save(dict(tensors), path)
    return path


def only(number):
    return {"x": torch.tensor([float(number)])}


@pytest.mark.parametrize("name", ["x.safetensors", "x.sft", "x.gguf", "x.pth", "x.pt", "x.bin", "x.ckpt"])  # fmt: skip # noqa: E501
def test_a_file_of_any_kind_opens(tmp_path, name):
    source = open_weights(put(tmp_path / name))
    assert set(source.names()) == set(TENSORS)
    for key, tensor in TENSORS.items():
        info = source.info(key)
        assert torch.equal(source.get(key), tensor)
        assert torch.equal(source.matrix(key), tensor)
        assert (info.shape, info.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert info.num_bytes == tensor.nbytes
        assert info.file == source.where == str(tmp_path / name)
    for look in (source.info, source.get, source.matrix):
        with pytest.raises(MissingTensor, match="tensor gone is missing"):
            look("gone")


def test_a_torch_file_is_mapped(tmp_path):
    torch.save({"x": torch.zeros(2**22)}, tmp_path / "x.pth")
    tensor = open_weights(tmp_path / "x.pth").get("x")
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if "x.pth" in line]
    assert any(int(a, 16) <= tensor.data_ptr() < int(b, 16) for a, b in ranges)


def test_a_folder_gives_the_stem_that_is_asked_for_then_the_usual_ones(tmp_path):
    for number, name in reversed(list(enumerate(["extra.safetensors", *NAMES]))):
        put(tmp_path / name, only(number))
        if number:  # the usual ones before later ones, whatever else is there
            assert open_weights(tmp_path).get("x").item() == number
    assert open_weights(tmp_path, "extra").get("x").item() == 0
    assert open_weights(tmp_path, "model").get("x").item() == 2
    assert open_weights(tmp_path, "gone").get("x").item() == 1


def test_a_folder_of_one_file_gives_it_whatever_it_is_called(tmp_path):
    put(tmp_path / "Wan-Q8_0.gguf")
    (tmp_path / "README.md").write_text("not weights")
    assert isinstance(open_weights(tmp_path), GgufSource)
    put(tmp_path / "other.safetensors")
    with pytest.raises(WeightError, match=r"several files .*Wan-Q8_0\.gguf, other\.safetensors"):
        open_weights(tmp_path)


def test_an_index_comes_before_a_single_file_of_its_name(tmp_path):
    put(tmp_path / "model.safetensors", only(0))
    put(tmp_path / "model-00001-of-00001.safetensors", only(1))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    for path in (tmp_path, index):
        assert open_weights(path).get("x").item() == 1
    index.unlink()
    assert open_weights(tmp_path).get("x").item() == 0


@pytest.mark.parametrize("suffix", ["safetensors", "gguf", "bin"])
def test_shards_without_an_index_are_merged(tmp_path, suffix):
    shards = [tmp_path / f"model-{n:05}-of-00003.{suffix}" for n in (1, 2, 3)]
    for number, path in enumerate(shards):
        put(path, {f"t{number}": torch.tensor([float(number)])})
    for path in (tmp_path, shards[0], shards[2]):
        source = open_weights(path)
        assert [source.get(f"t{n}").item() for n in range(3)] == [0, 1, 2]
    assert source.where == str(tmp_path / f"model.{suffix}")
    assert source.info("t1").file == str(shards[1])
    put(shards[1], {"t0": torch.zeros(1)})
    with pytest.raises(WeightError, match=r"00002-of-00003.*tensor t0, which .*00001-of-00003"):
        open_weights(tmp_path)
    shards[1].unlink()
    for path in (tmp_path, shards[0]):
        with pytest.raises(
            WeightError, match=r"00002-of-00003.*no such file, expected all 3 shards"
        ):
            open_weights(path)


def test_an_index_of_torch_shards_opens(tmp_path):
    put(tmp_path / "part.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "part.bin")}))
    assert torch.equal(open_weights(tmp_path).get("b"), TENSORS["b"])


def test_numbers_of_shards_have_bounds(tmp_path):
    for total in ("00000", "99999"):
        path = put(tmp_path / f"model-00001-of-{total}.safetensors")
        with pytest.raises(WeightError, match="expected 1 to 1000"):
            open_weights(path)


WRONG = {  # id: (name, first bytes, part of the message)
    "GGUF": (
        "x.safetensors",
        b"GGUF\3\0\0\0" + bytes(40),
        "found a GGUF file.* rename it to .gguf",
    ),
    "GGUF as pth": ("x.pth", b"GGUF\3\0\0\0" + bytes(40), "found a GGUF file.* rename it to .gguf"),
    "zip": ("x.safetensors", b"PK\x03\x04" + bytes(40), "found a torch .zip. file.*to .pth"),
    "zip as GGUF": ("x.gguf", b"PK\x03\x04" + bytes(40), "found a torch .zip. file"),
    "safetensors": ("x.gguf", save(TENSORS), "found a safetensors file.*rename it"),
    "safetensors as pth": ("x.pth", save(TENSORS), "found a safetensors file.*rename it"),
    "LFS": (
        "x.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid",
        "run git lfs pull",
    ),
    "LFS of GGUF": ("x.gguf", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "page": ("x.safetensors", b"<!DOCTYPE html><html>", "found a web page"),
    "page of pth": ("x.bin", b"<html><body>Access denied", "found a web page"),
    "old torch": ("x.pth", pickle.dumps({"a": 1}, 2) + bytes(40), "written since 1.6"),
    "empty": ("x.pth", b"", "x.pth: found a broken file"),
    "cut": ("x.pth", b"PK\x03\x04" + bytes(3), "x.pth: found a broken file"),
    "name": ("x.txt", b"", "a name that ends in '.txt', expected one of .safetensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_something_else_is_refused(tmp_path, case):
    name, content, words = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightError, match=words) as caught:
        open_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["x.safetensors", "x.gguf", "x.pth", "x.safetensors.index.json", "x"]
)
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(WeightError, match=f"{name}: found no such file"):
        open_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.gguf", "x.pth", "x.safetensors.index.json"])
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for opened in (tmp_path / name, tmp_path):
        with pytest.raises(WeightError, match=f"{name}: found a pipe"):
            open_weights(opened)


def test_names_that_no_disk_can_hold_are_refused(tmp_path):
    for name in ("a" * 300 + ".safetensors", "a" * 300 + ".gguf", "a" * 300 + ".pth", "a" * 300):
        with pytest.raises(WeightError, match=r"found (no such|an unreadable|a broken) file"):
            open_weights(tmp_path / name)


def test_an_empty_folder_names_the_file_that_it_lacks(tmp_path):
    with pytest.raises(WeightError, match=r"/model\.safetensors: found no such file"):
        open_weights(tmp_path, "model")


def test_the_containers_of_trainers_are_opened(tmp_path):
    for content in (
        {"state_dict": TENSORS},
        {"model": TENSORS, "step": 3},
        {"state_dict": {"module": TENSORS}},
        {"module": collections.OrderedDict(TENSORS), "optimizer": {"x": torch.zeros(1)}},
        {**TENSORS, "epoch": 3},
    ):
        torch.save(content, tmp_path / "x.pth")
        assert set(TorchSource(tmp_path / "x.pth").names()) == set(TENSORS)


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"a": torch.zeros(2), "evil": Evil()}, tmp_path / "x.pth")
    with pytest.raises(WeightError, match=r"a pickle that calls \w*.?print") as caught:
        open_weights(tmp_path / "x.pth")
    assert "use a .safetensors file" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "this must not run" not in capsys.readouterr().out


def test_pickles_without_plain_tensors_are_refused(tmp_path):
    repeated = torch.zeros(1).expand(2**20)
    for content, words in (
        ([1, 2], "no tensors by name"),
        ({"a": 1}, "no tensors by name"),
        ({"a": torch.eye(2).to_sparse()}, "as torch.sparse_coo"),
        ({"a": repeated}, "of 4194304 bytes that are 4 repeated"),
        ({"a": torch.empty(2, device="meta")}, "on meta"),
    ):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(WeightError, match=words):
            open_weights(tmp_path / "x.pth")


def test_a_view_of_a_larger_tensor_is_read_right(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"t": whole.T, "part": whole[1:, 1:]}, tmp_path / "x.pth")
    source = open_weights(tmp_path / "x.pth")
    assert torch.equal(source.get("t"), whole.T)
    assert source.get("t").is_contiguous()
    assert torch.equal(source.get("part"), whole[1:, 1:])


def test_a_folder_that_is_called_like_a_file_is_refused(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        with pytest.raises(WeightError, match=name):
            open_weights(tmp_path / name)


def test_metadata_of_a_safetensors_file_is_kept(tmp_path):
    save_file(dict(TENSORS), tmp_path / "x.safetensors", {"format": "pt"})
    assert SafetensorsSource(tmp_path / "x.safetensors").metadata == {"format": "pt"}
    put(tmp_path / "y.safetensors")
    assert SafetensorsSource(tmp_path / "y.safetensors").metadata == {}
