"""Safetensors files: what is read, what is refused, and that nothing else ever comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from reelpool.errors import MissingTensor, ShapeMismatch, WeightError
from reelpool.models.open_weights import open_weights
from reelpool.models.weights import (
    DTYPES,
    RenamedSource,
    SafetensorsSource,
    check_tensors,
)

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "b": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4),
}


def write(path, header: Any, payload: bytes = b"", length: int | None = None):
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = (len(raw) if length is None else length).to_bytes(8, "little")
    path.write_bytes(size + raw + payload)
    return path


def entry(**changes: Any) -> Mapping[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def test_tensors_come_back_as_stored(file):
    source = SafetensorsSource(file)
    assert source.where == str(file)
    assert set(source.names()) == set(TENSORS)
    for name, tensor in TENSORS.items():
        info = source.info(name)
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert info.num_bytes == tensor.nbytes
        assert torch.equal(source.get(name), tensor)


@pytest.mark.parametrize("code", DTYPES)
def test_every_type_and_odd_offsets_are_read(tmp_path, code):
    dtype = DTYPES[code]
    raw = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(dtype)
    payload = b"\x09" + raw.view(torch.uint8).numpy().tobytes()
    offsets = [1, len(payload)]
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": code, "shape": [2, 3], "data_offsets": offsets},
    }
    source = SafetensorsSource(write(tmp_path / "x.safetensors", header, payload))
    stored = source.get("x")
    assert stored.dtype == dtype
    assert torch.equal(stored.view(torch.uint8), raw.view(torch.uint8))


def test_tensors_are_views_of_the_file(file):
    source = SafetensorsSource(file)
    assert source.get("a.weight").data_ptr() == source.get("a.weight").data_ptr()


def test_names_that_are_not_there_are_refused(file):
    source = SafetensorsSource(file)
    renamed = RenamedSource(source, {"ours": "a.bias", "gone": "c"})
    assert list(renamed.names()) == ["ours", "gone"]
    assert torch.equal(renamed.get("ours"), TENSORS["a.bias"])
    assert renamed.info("ours").name == "a.bias"
    for part, name in ((source, "c"), (renamed, "a.bias"), (renamed, "gone")):
        with pytest.raises(MissingTensor) as caught:
            part.get(name)
        assert str(file) in str(caught.value)
        assert caught.value.tensor == ("c" if name == "gone" else name)


def test_expected_shapes_are_checked(file):
    source = SafetensorsSource(file)
    check_tensors(source, {"a.weight": (2, 3), "b": ()})
    with pytest.raises(ShapeMismatch, match=r"a\.weight has shape \[2, 3\], expected \[3, 2\]"):
        check_tensors(source, {"b": (), "a.weight": (3, 2)})
    with pytest.raises(MissingTensor, match=r"tensor c is missing"):
        check_tensors(source, {"c": (1,)})


HEADERS = {  # id: (header, payload bytes, part of the message)
    "not JSON": (b"{", 0, "a broken header"),
    "not UTF-8": (b'{"\xff": 1}', 0, "a broken header"),
    "deep": (b"[" * 100_000, 0, "a broken header"),
    "endless number": (b'{"x": ' + b"9" * 5000 + b"}", 0, "a broken header"),
    "list": ([], 0, "no object"),
    "entry no object": ({"x": 1}, 0, "tensor x without dtype"),
    "entry empty": ({"x": {}}, 0, "tensor x without dtype"),
    "entry without offsets": ({"x": {"dtype": "F32", "shape": []}}, 0, "tensor x without dtype"),
    "other keys": ({"x": {"dtype": "F32", "extra": 1}}, 0, "tensor x without dtype"),
    "shape no list": (entry(shape=2), 8, "tensor x with shape 2"),
    "negative shape": (entry(shape=[-2]), 8, r"shape \[-2\]"),
    "fraction": (entry(shape=[2.0]), 8, r"shape \[2.0\]"),
    "true": (entry(shape=[True, 2]), 8, r"shape \[True, 2\]"),
    "one offset": (entry(data_offsets=[0]), 8, r"at \[0\]"),
    "offsets no list": (entry(data_offsets="08"), 8, "at 08"),
    "huge shape": (entry(shape=[2**70, 0], data_offsets=[0, 0]), 8, "tensor x with shape"),
    "huge rank": (entry(shape=[1] * 100, data_offsets=[0, 4]), 8, "tensor x with shape"),
    "unknown type": (entry(dtype="F4"), 8, "tensor x of type F4, expected one of F64"),
    "type no text": (entry(dtype=["F32"]), 8, "of type"),
    "type of lines": (entry(dtype="F\n32"), 8, r"tensor x of type 'F\\n32'"),
    "shape of lines": (entry(shape="\n"), 8, r"tensor x with shape '\\n' at \[0, 8\]"),
    "name of lines": ({"x\ny": entry()["x"]}, 8, r"a tensor name 'x\\ny', expected printable"),
    "other size": (entry(data_offsets=[0, 4]), 8, "tensor x of 4 bytes, expected 8 bytes"),
    "backwards": (entry(data_offsets=[8, 0]), 8, "tensor x of -8 bytes"),
    "past the end": (entry(), 7, "tensor x ending at .* truncated"),
    "overlap": ({**entry(), "y": entry(data_offsets=[4, 12])["x"]}, 12, "y overlapping x"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_damaged_header_is_refused(tmp_path, case):
    header, size, words = HEADERS[case]
    path = write(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(WeightError, match=words) as caught:
        SafetensorsSource(path)
    assert str(path) in str(caught.value)
    assert ", expected " in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_a_short_file_is_refused(file, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(WeightError, match=f"found {size} bytes"):
        SafetensorsSource(file)


@pytest.mark.parametrize("length", [2**63, 100 * 2**20 + 1, 1000])
def test_a_header_longer_than_its_file_is_refused(tmp_path, length):
    path = write(tmp_path / "x.safetensors", {}, length=length)
    with pytest.raises(WeightError, match=f"a header length of {length}"):
        SafetensorsSource(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(WeightError, match="no such file"):
        SafetensorsSource(tmp_path / "gone.safetensors")
    with pytest.raises(WeightError, match="unreadable"):
        SafetensorsSource(tmp_path)


WEIGHT_MAPS = {  # id: (weight_map, part of the message)
    "none": (None, "no weight_map"),
    "empty": ({}, "no weight_map"),
    "list": (["a"], "no weight_map"),
    "number": ({"a": 1}, "shard name 1"),
    "list in it": ({"a": ["one.safetensors"]}, "shard name"),
    "number and text": ({"a": "one.safetensors", "b": 1}, "shard name 1"),
    "no name": ({"a": ""}, "shard name ''"),
    "elsewhere": ({"a": "../one.safetensors"}, "in the same folder"),
    "absolute": ({"a": "/etc/passwd"}, "in the same folder"),
    "missing shard": ({"a": "two.safetensors"}, "two.safetensors: found no such file"),
    "not JSON": ("{", "no weight_map"),
}


@pytest.mark.parametrize("case", WEIGHT_MAPS)
def test_a_damaged_index_is_refused(tmp_path, case):
    weight_map, words = WEIGHT_MAPS[case]
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightError, match=words):
        open_weights(tmp_path, "model")


def test_shards_are_seen_as_one(tmp_path):
    names = list(TENSORS)
    shards = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for part in set(shards.values()):
        save_file({n: TENSORS[n] for n in names if shards[n] == part}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**shards, "lost": "part-0.safetensors"}}))
    source = open_weights(tmp_path, "model")
    assert source.where == str(index)
    assert set(source.names()) == {*TENSORS, "lost"}
    assert all(torch.equal(source.get(name), tensor) for name, tensor in TENSORS.items())
    assert source.info("a.bias").file == str(tmp_path / shards["a.bias"])
    with pytest.raises(MissingTensor, match=r"part-0\.safetensors: tensor lost is missing"):
        source.get("lost")
    with pytest.raises(MissingTensor, match=r"index\.json: tensor other is missing"):
        source.info("other")


WHOLE = save(TENSORS, {"format": "pt"})
FLIPS = st.lists(
    st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=8
)


@given(flips=FLIPS, length=st.integers(0, len(WHOLE)) | st.just(len(WHOLE)))
def test_random_damage_gives_tensors_or_a_weight_error(tmp_path_factory, flips, length):
    damaged = bytearray(WHOLE)
    for position, change in flips:
        damaged[position] ^= change
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    path.write_bytes(damaged[:length])
    try:
        source = SafetensorsSource(path)
        for name in source.names():
            tensor = source.get(name)
            assert tensor.nbytes == source.info(name).num_bytes <= length
    except WeightError as error:
        assert str(path) in str(error)  # noqa: PT017  either outcome is right


def test_a_missing_tensor_of_an_odd_name_is_still_one_line():
    assert "tensor 'a\\nb' is missing" in str(MissingTensor("f", "a\nb", "it"))
