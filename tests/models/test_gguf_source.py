"""GGUF files: what is read back, what is refused, and what opening costs."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from reelpool.errors import MissingTensor, UnknownQuantType, WeightError
from reelpool.models.gguf_source import GgufSource
from reelpool.models.quant import Quantised, plain
from reelpool.models.weights import MergedSource, RenamedSource
from tests.gguf_files import KINDS, PLAIN, compose, write


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(name="x", dims=(32,), kind=0, offset=0) -> bytes:
    axes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def pair(key, kind, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def ints(key, *values) -> bytes:
    return pair(key, 9, struct.pack(f"<IQ{len(values)}i", 5, len(values), *values))


def compose_file(
    tensors=(), pairs=(), payload=4096, magic=b"GGUF", version=3, counts=None
) -> bytes:
    counts = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * payload


@pytest.fixture
def save(tmp_path):
    def to_file(raw: bytes):
        (tmp_path / "x.gguf").write_bytes(raw)
        return tmp_path / "x.gguf"

    return to_file


def test_plain_tensors_come_back_equal(tmp_path):
    path = write(tmp_path / "x.gguf")
    source = GgufSource(path)
    assert source.where == str(path)
    assert list(source.names()) == list(PLAIN)
    for name, values in PLAIN.items():
        expected, info = torch.from_numpy(values), source.info(name)
        assert (info.dtype, info.shape, info.quant) == (expected.dtype, expected.shape, "")
        assert info.num_bytes == expected.nbytes
        assert torch.equal(source.get(name), expected)
        assert torch.equal(source.matrix(name), expected)


def test_bfloat16_comes_back_equal(tmp_path):
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    writer = GGUFWriter(tmp_path / "x.gguf", "wan")
    raw = values.view(torch.uint8).numpy()
    writer.add_tensor("x", raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufSource(tmp_path / "x.gguf").get("x")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, values)


def test_quantised_tensors_stay_as_they_are_stored(tmp_path):
    kinds = [kind for kind in KINDS if kind not in ("F16", "BF16")]
    path = write(tmp_path / "x.gguf", quantised=[(kind, kind, 3, 512) for kind in kinds])
    source = GgufSource(path)
    stored = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    for kind in kinds:
        info, matrix = source.info(kind), source.matrix(kind)
        assert isinstance(matrix, Quantised)
        assert (matrix.kind, matrix.shape) == (info.quant, info.shape) == (kind, (3, 512))
        assert matrix.num_bytes == info.num_bytes
        assert torch.equal(matrix.data, torch.from_numpy(stored[kind].copy()))
        assert matrix.data.data_ptr() == source.matrix(kind).data.data_ptr()  # a view
        assert plain(matrix, torch.bfloat16).shape == (3, 512)
        with pytest.raises(WeightError, match=f"tensor {kind} as {kind}, expected a plain"):
            source.get(kind)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_alignment_is_followed(tmp_path, alignment):
    quantised = [("q", "Q4_K", 2, 256), ("r", "Q6_K", 2, 256)]
    path = write(tmp_path / "x.gguf", quantised=quantised, alignment=alignment)
    source = GgufSource(path)
    assert all(source.info(name).start % alignment == 0 for name in source.names())
    assert torch.equal(source.get("half"), torch.from_numpy(PLAIN["half"]))
    assert torch.equal(source.matrix("r").data, torch.from_numpy(compose("Q6_K", 2, 256)))


def test_version_2_is_read(tmp_path):
    raw = bytearray(write(tmp_path / "x.gguf").read_bytes())
    raw[4] = 2
    (tmp_path / "x.gguf").write_bytes(raw)
    assert torch.equal(GgufSource(tmp_path / "x.gguf").get("long"), torch.tensor([2**40]))


def test_metadata_is_decoded_on_demand(tmp_path):
    words = ["\u2581a", "", "z" * 300]
    fields = [
        ("add_array", "tokenizer.ggml.tokens", words),
        ("add_array", "scores", [0.5, -1.0]),
        ("add_array", "flags", [True, False]),
        ("add_uint32", "wan.count", 7),
        ("add_float32", "wan.scale", 0.25),
        ("add_bool", "wan.flag", True),
        ("add_int64", "wan.low", -(2**40)),
    ]
    metadata = GgufSource(write(tmp_path / "x.gguf", fields=fields)).metadata
    assert metadata["general.architecture"] == "wan"
    assert metadata["tokenizer.ggml.tokens"] == words
    assert metadata["scores"] == [0.5, -1.0]
    assert metadata["flags"] == [True, False]
    assert [metadata[f"wan.{key}"] for key in ("count", "scale", "flag", "low")] == [
        7,
        0.25,
        True,
        -(2**40),
    ]
    assert len(metadata) == len(list(metadata)) == 8
    assert "gone" not in metadata


def test_flattened_tensors_get_their_shape_back(save):
    raw = compose_file(
        [entry("x", (8, 4)), entry("q", (64, 2), 8, 128)],
        [
            ints("comfy.gguf.orig_shape.x", 2, 2, 1, 8),
            ints("comfy.gguf.orig_shape.q", 4, 1, 32),
        ],
    )
    source = GgufSource(save(raw))
    assert source.get("x").shape == (2, 2, 1, 8)
    assert source.matrix("q").shape == (4, 1, 32)
    assert source.matrix("q").dequantise().shape == (4, 1, 32)


def test_it_works_behind_other_sources(tmp_path):
    path = write(tmp_path / "x.gguf", quantised=[("q", "Q8_0", 2, 32)])
    source = RenamedSource(MergedSource("both", {"q": GgufSource(path)}), {"ours": "q"})
    assert source.info("ours").quant == "Q8_0"
    assert isinstance(source.matrix("ours"), Quantised)
    with pytest.raises(WeightError, match="expected a plain tensor"):
        source.get("ours")
    for name in ("theirs", "q"):
        with pytest.raises(MissingTensor):
            source.matrix(name)
    with pytest.raises(MissingTensor, match="tensor gone is missing"):
        GgufSource(path).matrix("gone")


def test_a_file_without_tensors_is_read(save):
    assert list(GgufSource(save(compose_file(payload=0))).names()) == []


X = entry()
LONG = pair("a", 8, struct.pack("<Q", 2**60))
REFUSED = {  # id: (file, part of the message)
    "empty": (b"", "0 bytes, expected a GGUF file"),
    "short": (compose_file()[:20], "20 bytes, expected a GGUF file"),
    "magic": (compose_file(magic=b"GGML"), "begins with b'GGML', expected b'GGUF'"),
    "version 1": (compose_file(version=1), "version 1, expected version 2 or 3"),
    "version 4": (compose_file(version=4), "version 4"),
    "big-endian": (compose_file(version=3 << 24), "big-endian numbers"),
    "many tensors": (compose_file(counts=(2**62, 0)), f"{2**62} tensors announced"),
    "many values": (compose_file(counts=(0, 2**62)), f"{2**62} values announced"),
    "too few pairs": (compose_file(pairs=[LONG[:9]], counts=(0, 3)), "expected printable UTF-8"),
    "long string": (compose_file(pairs=[LONG]), f"metadata a of {2**60} bytes"),
    "long array": (
        compose_file(pairs=[pair("a", 9, struct.pack("<IQ", 6, 2**61))]),
        f"metadata a of {2**63} bytes",
    ),
    "array of arrays": (
        compose_file(pairs=[pair("a", 9, struct.pack("<IQ", 9, 1))]),
        "metadata a of type 9",
    ),
    "unknown value": (compose_file(pairs=[pair("a", 13, b"")]), "metadata a of type 13"),
    "key twice": (compose_file(pairs=[pair("a", 7, b"\1")] * 2), "metadata 'a' twice"),
    "long key": (compose_file(pairs=[struct.pack("<Q", 2**40)]), "at most 65535"),
    "no key": (compose_file(pairs=[text("")]), "a metadata key ''"),
    "key not UTF-8": (compose_file(pairs=[text(b"\xff")]), "a metadata key"),
    "name with a line end": (compose_file([entry("x\n")]), r"a tensor name 'x\n'"),
    "name twice": (compose_file([X, X]), "tensor x twice"),
    "header cut": (compose_file([X])[:50], "the header to end within 50 bytes"),
    "data cut": (compose_file([X], payload=127), "191 bytes with tensor x ending at 192"),
    "offset": (compose_file([entry(offset=2**50)]), "with tensor x ending at"),
    "overlap": (compose_file([entry("x"), entry("y", offset=96)]), "tensor y overlapping x"),
    "same place": (compose_file([entry("x"), entry("y")]), "tensor y overlapping x"),
    "odd offset": (compose_file([entry(offset=4)]), "at offset 4, expected a multiple of 32"),
    "axes": (compose_file([entry(dims=(1,) * 9)]), "tensor x with 9 axes, expected at most 8"),
    "axis of none": (compose_file([entry(dims=(4, 0))]), "tensor x of shape [0, 4]"),
    "huge axis": (compose_file([entry(dims=(2**63, 4))]), f"tensor x of shape [4, {2**63}]"),
    "huge product": (compose_file([entry(dims=(2**47,) * 8)]), "with tensor x ending at"),
    "ragged rows": (
        compose_file([entry(dims=(288, 4), kind=12)]),
        "tensor x of shape [4, 288] as Q4_K, expected rows of whole blocks of 256",
    ),
    "scalar block": (compose_file([entry(dims=(), kind=8)]), "tensor x of shape [] as Q8_0"),
    "other shape": (
        compose_file([X], [ints("comfy.gguf.orig_shape.x", 3, 3)]),
        "of shape [32] with an original shape of [3, 3]",
    ),
    "negative shape": (
        compose_file([X], [ints("comfy.gguf.orig_shape.x", -4, -8)]),
        "original shape of [-4, -8]",
    ),
    "shape of many": (
        compose_file([X], [ints("comfy.gguf.orig_shape.x", *[1] * 9)]),
        "up to 8 whole numbers",
    ),
    "shape in words": (
        compose_file([X], [pair("comfy.gguf.orig_shape.x", 8, text("32"))]),
        "metadata comfy.gguf.orig_shape.x of type 8",
    ),
    "alignment 0": (
        compose_file([X], [pair("general.alignment", 4, struct.pack("<I", 0))]),
        "an alignment of 0, expected a power of two",
    ),
    "alignment 24": (
        compose_file([X], [pair("general.alignment", 4, struct.pack("<I", 24))]),
        "an alignment of 24",
    ),
    "alignment in words": (
        compose_file([X], [pair("general.alignment", 8, text("32"))]),
        "metadata general.alignment of type 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_files_are_refused_in_a_sentence(save, case):
    raw, part = REFUSED[case]
    path = save(raw)
    with pytest.raises(WeightError) as caught:
        GgufSource(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [4, 9, 15, 31, 36, 41, 99, 2**32 - 1])
def test_types_that_cannot_be_decoded_are_refused(save, kind):
    path = save(compose_file([entry("blocks.0.ffn.0.weight", (256, 2), kind)]))
    with pytest.raises(UnknownQuantType) as caught:
        GgufSource(path)
    assert caught.value.tensor == "blocks.0.ffn.0.weight"
    assert f"({kind})" in caught.value.found
    assert "Q4_K" in str(caught.value)


def test_files_that_are_not_there_are_refused(tmp_path):
    for path, part in ((tmp_path / "gone.gguf", "no such file"), (tmp_path, "unreadable")):
        with pytest.raises(WeightError, match=part):
            GgufSource(path)


NUM_BLOCKS, ROWS, COLUMNS = 40, 13824, 5120
OPEN = """
import sys, time
from pathlib import Path
from reelpool.models.gguf_source import GgufSource
def kib(field):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from now
before = kib("VmRSS")
start = time.perf_counter()
source = GgufSource(Path(sys.argv[1]))
seconds = time.perf_counter() - start
matrix = source.matrix("blocks.39.ffn.2.weight").rows(0, 8).dequantise()
print(seconds, kib("VmHWM") - before, len(list(source.names())), matrix.abs().sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_opening_9_gb_takes_no_second_and_no_memory(tmp_path):
    """40 blocks of 14B geometry in Q4_K, 9.2 GB, all of it a hole in the file."""
    path, entries, offset = tmp_path / "large.gguf", [], 0
    for block in range(NUM_BLOCKS):
        for name, columns, rows in (
            *(
                (f"{kind}_attn.{part}", COLUMNS, COLUMNS)
                for kind in ("self", "cross")
                for part in "qkvo"
            ),
            ("ffn.0", COLUMNS, ROWS),
            ("ffn.2", ROWS, COLUMNS),
            *((f"more.{part}", COLUMNS, COLUMNS) for part in range(5)),
        ):
            entries.append(entry(f"blocks.{block}.{name}.weight", (columns, rows), 12, offset))
            offset += rows * columns // 256 * 144
    words = pair("tokens", 9, struct.pack("<IQ", 8, 50_000) + text("word") * 50_000)
    path.write_bytes(compose_file(entries, [words], payload=0))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + offset)
    assert path.stat().st_size > 9e9
    ran = subprocess.run(
        [sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True
    )
    seconds, grown_kib, count, total = map(float, ran.stdout.split())
    assert count == len(entries)
    assert total == 0
    assert seconds < 1  # measured 0.025
    assert grown_kib < 100 * 1024  # measured 9 MiB, most of it for decoding 8 rows
