"""Keys that are stable, results that are whole or absent, the folder of a run."""

import dataclasses
import errno
import logging
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from reelpool.errors import ConfigError
from reelpool.models.weights import SafetensorsSource
from reelpool.runtime import results
from reelpool.runtime.results import ResultStore, RunDir, key_of


@dataclasses.dataclass(frozen=True)
class Shape:
    width: int
    sides: tuple[float, ...]


TENSORS = {
    "latents": torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4),
    "cut": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).t(),
    "flag": torch.tensor(True),
    "empty": torch.empty(0, 3, dtype=torch.float8_e4m3fn),
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
}
META = {"step": 3, "sigma": 0.1, "names": ["a", None], "nan": {"inf": float("inf")}}
KEY = key_of("denoise", seed=1)


def test_the_order_of_parts_does_not_matter():
    one = key_of("decode", size=(832, 480), guidance=5.0, nested={"b": [1, None], "a": True})
    two = key_of("decode", guidance=5.0, nested={"a": True, "b": (1, None)}, size=[832, 480])
    assert one == two


def test_a_key_never_changes_by_accident():
    # equal in every process and on every host; a change makes all stored results unreachable
    key = key_of("denoise", seed=1, shape=Shape(8, (0.5,)), prompt="x")
    assert key == "denoise-3884c662074dabd5ff8f8b715e5acadc"


def test_different_parts_give_different_keys():
    values = [1, 1.0, True, "1", b"1", None, [1], {"a": 1}, {1: "a"}, Shape(1, (1.0,)), 0.0, -0.0]
    values += [[[1], 2], [[1, 2]], "", [], {}, float("nan"), 2**70, Shape(1, (1.5,))]
    keys = {key_of("x", part=value) for value in values}
    assert len(keys) == len(values)
    assert key_of("x", a=1) != key_of("y", a=1)
    assert key_of("x", part=(1, 2)) == key_of("x", part=[1, 2])


def test_a_part_without_a_canonical_form_is_refused():
    for part in (torch.zeros(1), {1, 2}, object(), Path("x"), Shape):
        with pytest.raises(TypeError, match="digest"):
            key_of("x", part=part)


def test_a_key_cannot_leave_the_folder(tmp_path):
    with pytest.raises(ValueError, match="no result key"):
        ResultStore(tmp_path).path(results.ResultKey("../../etc/passwd"))
    with pytest.raises(ValueError, match="no result key"):
        key_of("a/b")


def test_a_result_comes_back(tmp_path):
    store = ResultStore(tmp_path / "deep" / "results")
    assert store.get(KEY) is None
    assert store.put(KEY, TENSORS, META) == store.path(KEY)
    loaded = store.get(KEY)
    assert loaded is not None
    tensors, meta = loaded
    assert meta == META
    assert list(tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name].float(), tensor.float())
    assert [file.name for file in store.root.iterdir()] == [store.path(KEY).name]
    store.drop(KEY)
    store.drop(KEY)
    assert store.get(KEY) is None


def test_other_tools_read_a_result(tmp_path):
    path = ResultStore(tmp_path).put(KEY, TENSORS)
    assert torch.equal(safetensors.torch.load_file(path)["latents"], TENSORS["latents"])
    assert torch.equal(SafetensorsSource(path).get("latents"), TENSORS["latents"])


def test_loaded_tensors_are_private(tmp_path):
    store = ResultStore(tmp_path)
    store.put(KEY, {"x": torch.zeros(5000)})
    tensors, _ = store.get(KEY)
    tensors["x"].fill_(1)
    again, _ = store.get(KEY)
    store.put(KEY, {"x": torch.full((5000,), 2.0)})
    store.drop(KEY)
    assert tensors["x"].sum() == 5000
    assert again["x"].sum() == 0


def test_a_damaged_result_is_absent_and_removed(tmp_path, caplog):
    store = ResultStore(tmp_path)
    path = store.put(KEY, TENSORS, META)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 7, 100, len(whole) - 1)] + [whole + b"x"]
    for place in (0, 3, 9, 60, len(whole) - 1, len(whole) - 40):
        changed = bytearray(whole)
        changed[place] ^= 0x41
        damaged.append(bytes(changed))
    for data in damaged:
        path.write_bytes(data)
        with caplog.at_level(logging.WARNING, "reelpool"):
            assert store.get(KEY) is None
        assert "counts as absent" in caplog.text
        caplog.clear()
        assert not path.exists()


def test_any_changed_byte_gives_the_same_or_nothing(tmp_path):
    store = ResultStore(tmp_path)
    path = store.put(KEY, {"x": torch.arange(5)}, {"a": 1})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        loaded = store.get(KEY)
        if loaded is not None:  # a byte of the padding
            assert loaded[0]["x"].dtype == torch.int64
            assert loaded[0]["x"].tolist() == [0, 1, 2, 3, 4]
            assert loaded[1] == {"a": 1}


def test_a_result_under_another_name_is_absent(tmp_path):
    store = ResultStore(tmp_path)
    other = key_of("denoise", seed=2)
    store.put(other, TENSORS)
    os.replace(store.path(other), store.path(KEY))
    assert store.get(KEY) is None


def test_a_foreign_file_is_absent(tmp_path):
    store = ResultStore(tmp_path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, store.path(KEY))
    assert store.get(KEY) is None


def test_what_cannot_be_stored_is_refused(tmp_path):
    store = ResultStore(tmp_path)
    with pytest.raises(TypeError, match="complex64"):
        store.put(KEY, {"x": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(TypeError):
        store.put(KEY, {}, {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_the_old_result_stays(tmp_path, monkeypatch):
    store = ResultStore(tmp_path)
    store.put(KEY, TENSORS)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"the disk is full .* make room"):
        store.put(KEY, {"x": torch.zeros(2)})
    assert [file.name for file in tmp_path.iterdir()] == [store.path(KEY).name]
    assert list(store.get(KEY)[0]) == list(TENSORS)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for make in (ResultStore, RunDir):
        with pytest.raises(ConfigError, match="cannot be written"):
            make(tmp_path / "file" / "run")
        with pytest.raises(ConfigError, match="cannot be written"):
            make(tmp_path / "file")


def test_a_run_keeps_job_plan_and_events(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.read_json("job.json") is None
    assert list(run.events()) == []
    run.write_json("job.json", {"prompt": "Bär"})
    run.write_json("plan.json", {"cards": [1]})
    run.append_event({"step": 1})
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"step": 2, "cut')  # a crash
    again = RunDir(tmp_path / "run")
    again.append_event({"step": 3})
    assert again.read_json("job.json") == {"prompt": "Bär"}
    assert list(again.events()) == [{"step": 1}, {"step": 3}]
    names = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert names == ["events.jsonl", "job.json", "plan.json", "results", "snapshots"]
    (tmp_path / "run" / "job.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        again.read_json("job.json")
    (tmp_path / "run" / "job.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        again.read_json("job.json")


def test_the_last_two_snapshots_stay(tmp_path):
    run = RunDir(tmp_path)
    assert run.last_snapshot() is None
    for number, step_index in enumerate([0, 1, 2, 0]):  # a new chunk starts at step 0 again
        run.snapshot(step_index, {"x": torch.tensor(number)}, {"chunk": step_index})
    run.snapshot(9, {"x": torch.tensor(99)}, series="denoise_2")
    step_index, tensors, meta = RunDir(tmp_path).last_snapshot()
    assert (step_index, tensors["x"].item(), meta) == (0, 3, {"chunk": 0})
    assert run.last_snapshot("denoise_2")[0] == 9
    assert len(list((tmp_path / "snapshots").iterdir())) == 3


def test_a_damaged_snapshot_gives_the_one_before(tmp_path, caplog):
    run = RunDir(tmp_path)
    for step_index in range(3):
        run.snapshot(step_index, {"x": torch.tensor(step_index)})
    newest = max((tmp_path / "snapshots").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    step_index, tensors, _ = run.last_snapshot()
    assert (step_index, tensors["x"].item()) == (1, 1)
    assert "passed over" in caplog.text
    run.snapshot(2, {"x": torch.tensor(2)})
    assert run.last_snapshot()[0] == 2
    with pytest.raises(ValueError, match="series"):
        run.last_snapshot("a*")
