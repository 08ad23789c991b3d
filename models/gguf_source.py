"""GGUF files as a `WeightSource`: the header is checked whole, the rest is read on demand.

Opening maps the file and walks its header once, so that it costs kilobytes however large the file
is. Every number of the header is checked against the bytes that are there before it is believed.

Source: the format's specification (ggml/docs/gguf.md), versions 2 and 3, little endian; quantised
tensors as in gguf-py 0.19. City96's `comfy.gguf.orig_shape.<tensor>` restores the shape of tensors
that were flattened to fit into four axes.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch

from reelpool.errors import MissingTensor, UnknownQuantType, WeightError

from .quant import KINDS, Matrix, Quantised
from .weights import MAX_COUNT, MAX_HEADER_BYTES, TensorInfo, check_overlap, mapped_tensor

AGAIN = "download or copy the file again"
MAX_AXES = 8  # ggml has 4, converters of video models write 5
MAX_ALIGNMENT = 2**20
MAX_ENTRIES = 2**16  # of tensors, and of metadata: models have thousands
MAX_NAME_BYTES = 2**16 - 1  # the format's own limit
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."

_PLAIN = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
# numbers of ggml's types that `quant.KINDS` decodes
_QUANTISED = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_KNOWN_TO_GGML = {9: "Q8_1", 15: "Q8_K", 41: "Q1_0"}  # and never in a weight file

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip # noqa: E501


class GgufSource:
    """One GGUF file, memory-mapped. Safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            UnknownQuantType: if a tensor is stored in a type that cannot be decoded.
            WeightError: if the file is missing, truncated or not a GGUF file.
        """
        self.path = path
        self._map = _open(path)
        header = _Header(path, self._map)
        self._infos = header.tensors
        self.metadata: Mapping[str, object] = header.metadata

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)

    def names(self) -> Iterator[str]:
        """All tensor names, in the file's order."""
        return iter(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Place of one tensor; raises MissingTensor."""
        try:
            return self._infos[name]
        except KeyError:
            raise MissingTensor(self.where, name, "it among the file's tensors") from None

    def get(self, name: str) -> torch.Tensor:
        """A view of the mapped bytes of a plain tensor.

        Raises:
            MissingTensor: if there is none of that name.
            WeightError: if it is quantised.
        """
        info = self.info(name)
        if info.quant:
            raise WeightError(self.where, f"tensor {name} as {info.quant}", "a plain tensor")
        return mapped_tensor(self._map, info)

    def matrix(self, name: str) -> Matrix:
        """A view of the mapped bytes, quantised tensors as they are stored.

        Raises:
            MissingTensor: if there is none of that name.
        """
        info = self.info(name)
        if not info.quant:
            return mapped_tensor(self._map, info)
        rows = math.prod(info.shape[:-1])
        raw = replace(info, shape=(rows, info.num_bytes // rows))
        data = mapped_tensor(self._map, raw)
        if info.start % 16:
            data = data.clone()  # blocks are read by words; only odd third-party files need this
        return Quantised(data, info.quant, info.shape)


@dataclass(frozen=True)
class _Value:
    """Where a metadata value lies: `count` of a type at `start`; an array even if it has one."""

    kind: int
    start: int
    count: int
    is_array: bool


class Metadata(Mapping[str, object]):
    """Key-value pairs of a GGUF file: numbers, strings, and lists of them.

    Values are decoded when asked for: a tokenizer's hundred thousands of words may lie among them.
    Bytes that are not UTF-8 come as surrogates.
    """

    def __init__(self, mapping: mmap.mmap, values: Mapping[str, _Value]) -> None:
        self._map = mapping
        self._values = values

    def __getitem__(self, key: str) -> object:
        value = self._values[key]
        decoded: list[object] = []
        if value.kind == _STRING:
            place = value.start
            for _ in range(value.count):
                start = place + 8
                place = start + int.from_bytes(self._map[place:start], "little")
                decoded.append(self._map[start:place].decode("utf-8", "surrogateescape"))
        else:
            layout = f"<{value.count}{_SCALARS[value.kind]}"
            decoded.extend(struct.unpack_from(layout, self._map, value.start))
        return decoded if value.is_array else decoded[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Header:
    """Reads a header from its start to its end, and checks what it reads.

    Attributes:
        metadata: the key-value pairs.
        tensors: name to place.
    """

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self._path = path
        self._map = mapping
        self._size = len(mapping)
        self._limit = min(self._size, MAX_HEADER_BYTES)
        self._place = 0
        num_tensors, num_values = self._preamble()
        values: dict[str, _Value] = {}
        for _ in range(num_values):
            key = self._text("a metadata key")
            if key in values:
                self._refuse(f"metadata {key!r} twice", "each key once")
            values[key] = self._value(key)
        self.metadata = Metadata(mapping, values)
        self._values = values
        self._alignment = self._read_alignment()
        stored = self._stored_tensors(num_tensors)
        data = -(-self._place // self._alignment) * self._alignment
        self.tensors = {name: self._info(name, *entry, data) for name, entry in stored.items()}
        check_overlap(path, self.tensors)

    def _refuse(self, found: str, expected: str, advice: str = AGAIN) -> NoReturn:
        raise WeightError(str(self._path), found, expected, advice)

    def _take(self, count: int, what: str) -> int:
        """Move on by `count` bytes; where they begin."""
        start = self._place
        if count > self._limit - start:
            self._refuse(
                f"{what} of {count} bytes at byte {start}",
                f"the header to end within {self._limit} bytes",
                "it is truncated or damaged: " + AGAIN,
            )
        self._place = start + count
        return start

    def _number(self, width: int, what: str) -> int:
        start = self._take(width, what)
        return int.from_bytes(self._map[start : start + width], "little")

    def _text(self, what: str) -> str:
        length = self._number(8, what)
        if length > MAX_NAME_BYTES:
            self._refuse(f"{what} of {length} bytes", f"at most {MAX_NAME_BYTES}")
        start = self._take(length, what)
        text = self._map[start : start + length].decode("utf-8", "replace")
        if not text or not text.isprintable() or "\ufffd" in text:
            self._refuse(f"{what} {text[:80]!r} at byte {start}", "printable UTF-8")
        return text

    def _preamble(self) -> tuple[int, int]:
        """Check the fixed fields: (number of tensors, number of metadata values)."""
        magic = self._map[:4]
        if magic != b"GGUF":
            self._refuse(f"a file that begins with {magic!r}", "b'GGUF'", "is it a GGUF file?")
        self._take(4, "the magic")
        version = self._number(4, "the version")
        if version and version % 2**16 == 0:
            self._refuse("big-endian numbers", "little-endian ones", "convert it anew")
        if version not in (2, 3):
            self._refuse(f"GGUF version {version}", "version 2 or 3", "convert it anew")
        counts = self._number(8, "the number of tensors"), self._number(8, "the number of values")
        # the least that an entry takes: a key of one byte, a type and a byte; a name of one byte,
        # the number of axes, a type and an offset
        for count, least, what in zip(counts, (25, 14), ("tensors", "values"), strict=True):
            if count > MAX_ENTRIES or count * least > self._limit - self._place:
                self._refuse(
                    f"{count} {what} announced",
                    f"as many as fit into the file, {MAX_ENTRIES} at most",
                )
        return counts

    def _read_alignment(self) -> int:
        found = self._small("general.alignment", 1) or [32]
        if found[0] not in (2**power for power in range(MAX_ALIGNMENT.bit_length())):
            self._refuse(f"an alignment of {found[0]}", f"a power of two up to {MAX_ALIGNMENT}")
        return found[0]

    def _small(self, key: str, most: int) -> list[int]:
        """A metadata value of whole numbers, `most` at most; empty if there is none."""
        value = self._values.get(key)
        if value is None:
            return []
        if _SCALARS.get(value.kind, "?") in "?fd" or not 0 < value.count <= most:
            self._refuse(f"metadata {key} of type {value.kind}", f"up to {most} whole numbers")
        layout = f"<{value.count}{_SCALARS[value.kind]}"
        return list(struct.unpack_from(layout, self._map, value.start))

    def _value(self, key: str) -> _Value:
        """Skip one metadata value, checking that it is whole."""
        kind = self._number(4, f"metadata {key}")
        is_array, count = kind == _ARRAY, 1
        if is_array:
            kind, count = self._number(4, f"metadata {key}"), self._number(8, f"metadata {key}")
        start = self._place
        if kind == _STRING:
            for _ in range(count):
                self._take(self._number(8, f"metadata {key}"), f"metadata {key}")
        elif kind in _SCALARS:
            self._take(count * struct.calcsize("<" + _SCALARS[kind]), f"metadata {key}")
        else:
            self._refuse(f"metadata {key} of type {kind}", "numbers, strings or arrays of them")
        return _Value(kind, start, count, is_array)

    def _stored_tensors(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Name to (shape in torch's order, type number, offset), in the file's order."""
        stored: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text("a tensor name")
            if name in stored:
                self._refuse(f"tensor {name} twice", "each name once")
            axes = self._number(4, f"tensor {name}")
            if axes > MAX_AXES:
                self._refuse(f"tensor {name} with {axes} axes", f"at most {MAX_AXES}")
            start = self._take(8 * axes + 12, f"tensor {name}")
            *dims, kind, offset = struct.unpack_from(f"<{axes}QIQ", self._map, start)
            if not all(0 < dim < MAX_COUNT for dim in dims):
                self._refuse(f"tensor {name} of shape {dims[::-1]}", "whole sizes that fit a file")
            stored[name] = (tuple(reversed(dims)), kind, offset)
        return stored

    def _info(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int
    ) -> TensorInfo:
        """Check where a tensor lies. `data`: where offsets count from."""
        dtype, quant = _PLAIN.get(kind, torch.uint8), _QUANTISED.get(kind, "")
        if kind not in _PLAIN and not quant:
            found = f"{_KNOWN_TO_GGML.get(kind, 'unknown type')} ({kind})"
            known = ("F64", "F32", "F16", "BF16", "I8 to I64", *_QUANTISED.values())
            raise UnknownQuantType(str(self._path), name, found, ", ".join(known))
        shape = self._original_shape(name, shape)
        block, width = (KINDS[quant].size, KINDS[quant].num_bytes) if quant else (1, dtype.itemsize)
        if quant and (not shape or shape[-1] % block):
            self._refuse(
                f"tensor {name} of shape {list(shape)} as {quant}",
                f"rows of whole blocks of {block} values",
            )
        num_bytes = math.prod(shape) // block * width
        if offset % self._alignment:
            self._refuse(f"tensor {name} at offset {offset}", f"a multiple of {self._alignment}")
        if data + offset + num_bytes > self._size:
            self._refuse(
                f"{self._size} bytes with tensor {name} ending at {data + offset + num_bytes}",
                "the whole file",
                "it is truncated: " + AGAIN,
            )
        return TensorInfo(name, str(self._path), dtype, shape, data + offset, num_bytes, quant)

    def _original_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape before a converter flattened the tensor."""
        original = self._small(ORIGINAL_SHAPE + name, MAX_AXES)
        if not original:
            return shape
        if min(original) < 1 or math.prod(original) != math.prod(shape):
            self._refuse(
                f"tensor {name} of shape {list(shape)} with an original shape of {original}",
                "as many values in both",
            )
        return tuple(original)


def _open(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise WeightError(str(path), f"{size} bytes", "a GGUF file", AGAIN)
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise WeightError(str(path), "no such file", "the model's weights there", AGAIN) from None
    except OSError as error:
        raise WeightError(str(path), f"an unreadable file ({error})", "its bytes") from None
