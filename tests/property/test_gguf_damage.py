"""Whatever happens to a GGUF file: a named error or a file that is read, and never much memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelpool.errors import WeightError
from reelpool.models.gguf_source import GgufSource
from reelpool.models.quant import Quantised
from tests.damage import damage, damages
from tests.gguf_files import write

MAX_BYTES = 2**20  # of Python's own; the file has 4 KiB
FIELDS = [
    ("add_uint32", "general.alignment", 32),
    ("add_array", "tokens", ["a", "bc", ""]),
    ("add_array", "comfy.gguf.orig_shape.half", [3, 2]),
]
QUANTISED = [
    ("blocks.0.ffn.0.weight", "Q4_K", 2, 256),
    ("q", "Q8_0", 3, 64),
    ("i", "IQ2_S", 1, 256),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A file's bytes, and how many of them are header."""
    path = write(tmp_path_factory.mktemp("gguf") / "whole.gguf", quantised=QUANTISED, fields=FIELDS)
    source = GgufSource(path)
    return path.read_bytes(), min(source.info(name).start for name in source.names())


def read_all(path: Path) -> None:
    """Open a file and look at everything in it."""
    source = GgufSource(path)
    for name in source.names():
        matrix = source.matrix(name)
        if isinstance(matrix, Quantised):
            matrix.dequantise()
        assert matrix.shape == source.info(name).shape
    for key in source.metadata:
        assert source.metadata[key] is not None


def check(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    tracemalloc.start()
    refusal = None
    try:
        read_all(path)
    except WeightError as error:
        refusal = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < MAX_BYTES
    if refusal is not None:
        assert str(path) in refusal
        assert "\n" not in refusal


def test_the_whole_file_is_read(tmp_path, whole):
    check(tmp_path / "x.gguf", whole[0])
    read_all(tmp_path / "x.gguf")


@settings(max_examples=max(300, settings.default.max_examples))
@given(data=st.data())
def test_damaged_files_give_named_errors_or_are_read(tmp_path_factory, whole, data):
    raw, header = whole
    changes = data.draw(damages(len(raw), header))
    check(tmp_path_factory.getbasetemp() / "damaged.gguf", damage(raw, changes))


def test_every_cut_of_the_header_is_refused(tmp_path, whole):
    raw, header = whole
    for size in range(0, header, 7):
        (tmp_path / "x.gguf").write_bytes(raw[:size])
        with pytest.raises(WeightError):
            GgufSource(tmp_path / "x.gguf")
