"""Whatever happens to a transformer's files: a named error or a model that is read, all of it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelpool.errors import WeightError
from reelpool.models.layouts import open_transformer
from reelpool.models.quant import Quantised
from reelpool.models.spec import TransformerSpec
from tests import model_forms as forms
from tests.damage import damage, damages

SPEC = TransformerSpec(1, 8, 8, 1, 2, 2, text_dim=8, freq_dim=8)
INDEX = "diffusion_pytorch_model.safetensors.index.json"
CONFIG = "config.json"
MAX_BYTES = 2**21  # of Python's own; the files have 20 KiB
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
SHAPES = st.lists(st.integers(0, 9) | st.sampled_from([-1, 2**31, 2**62]), max_size=6)
TYPES = st.sampled_from(["F32", "BF16", "F8_E4M3", "U8", "I64", "F4", ""])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A whole transformer of each form: what to open, and the file to damage."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(form: str) -> tuple[Path, Path]:
        if form not in made:
            folder = tmp_path_factory.mktemp(form)
            (folder / CONFIG).write_text(json.dumps(forms.config_of(SPEC)))
            path = forms.LOSSLESS[form](folder, forms.tensors_of(SPEC), SPEC)
            file = folder / INDEX if form == "sharded" else path
            made[form] = path, file
            check(path)
        return made[form]

    return of


def check(path: Path) -> None:
    """Open a transformer and look at everything in it."""
    _, traits, source = open_transformer(path)
    assert traits.quant
    for name in source.names():
        matrix = source.matrix(name)
        if isinstance(matrix, Quantised):
            matrix.dequantise()
        assert matrix.shape == source.info(name).shape


def survive(path: Path, file: Path, raw: bytes) -> None:
    """Open it with other bytes in one of its files."""
    whole = file.read_bytes()
    tracemalloc.start()
    refusal = None
    try:
        file.write_bytes(raw)
        check(path)
    except WeightError as error:
        refusal = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        file.write_bytes(whole)
    assert peak < MAX_BYTES
    if refusal is not None:
        assert str(file.parent) in refusal
        assert "\n" not in refusal


HEADERS = {"original": 4096, "gguf": 2048, "sharded": 2048, "pth": 4096}


@pytest.mark.parametrize("form", HEADERS)
@given(data=st.data())
def test_damaged_bytes_give_named_errors_or_a_model(folders, form, data):
    path, file = folders(form)
    raw = file.read_bytes()
    changes = data.draw(damages(len(raw), min(len(raw), HEADERS[form])))
    survive(path, file, damage(raw, changes))


@given(data=st.data())
def test_damaged_entries_of_a_header_give_named_errors_or_a_model(folders, data):
    path, file = folders("original")
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        change = data.draw(
            st.sampled_from(["shape", "dtype", "data_offsets", "all", "name", "gone"])
        )
        entry = header.pop(name)
        if change == "name":
            header[data.draw(st.text(max_size=9) | st.sampled_from(sorted(header)))] = entry
        elif change == "all":
            header[name] = data.draw(JSON_VALUES)
        elif change != "gone":
            values = TYPES if change == "dtype" else SHAPES
            changed = data.draw(values | JSON_VALUES)
            header[name] = {**entry, change: changed} if isinstance(entry, dict) else changed
    text = json.dumps(header).encode()
    survive(path, file, len(text).to_bytes(8, "little") + text + raw[end:])


@given(data=st.data())
def test_damaged_entries_of_an_index_give_named_errors_or_a_model(folders, data):
    path, file = folders("sharded")
    content = json.loads(file.read_text())
    files = [
        *content["weight_map"].values(),
        "gone",
        "..",
        CONFIG,
        "a" * 300,
        "a\nb",
        "\ud800",
        "a/b",
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(content["weight_map"])))
        value = data.draw(st.sampled_from(files) | JSON_VALUES)
        change = data.draw(st.sampled_from(["set", "set", "add", "gone", "map"]))
        if change == "set":
            content["weight_map"][name] = value
        elif change == "add":
            content["weight_map"][data.draw(st.text(max_size=9))] = value
        elif change == "gone" and len(content["weight_map"]) > 1:
            del content["weight_map"][name]
        elif change == "map":
            content = {"weight_map": data.draw(JSON_VALUES)}
            break
    survive(path, file, json.dumps(content).encode())


@given(data=st.data())
def test_damaged_values_of_a_config_give_named_errors_or_a_model(folders, data):
    path, _ = folders("original")
    config = json.loads((path.parent / CONFIG).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON_VALUES)
    survive(path.parent, path.parent / CONFIG, json.dumps(config).encode())
