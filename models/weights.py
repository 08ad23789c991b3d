"""Named tensors that lie in files: opened lazily, checked before use, never copied on opening.

A `WeightSource` knows the name, dtype, shape and byte range of every tensor and hands out views
of the mapped file. It does not know what the tensors mean (`keys`), nor where they go (`runtime`).
The mapping is read-only and shared: the page cache holds one copy for a host, however many workers
read it, and the bytes do not count against a worker's budget.
"""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from reelpool.errors import MissingTensor, ShapeMismatch, WeightError

from .quant import Matrix

MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
MAX_COUNT = 2**48  # of elements along an axis, and of bytes: more is no file, and torch overflows
MAX_RANK = 64  # torch's own limit

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype, shape and byte range in the file.

    quant: the name of its block type if it is quantised, one of `quant.KINDS`. The shape is that
    of the values then, the dtype uint8.
    """

    name: str
    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    quant: str = ""


class WeightSource(Protocol):
    """Named tensors, read on demand. Implementations: safetensors files, and maps over others."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""
        ...

    def names(self) -> Iterator[str]:
        """All tensor names."""
        ...

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of one tensor.

        Raises:
            MissingTensor: if there is none of that name.
        """
        ...

    def get(self, name: str) -> torch.Tensor:
        """A read-only view of the stored tensor, as stored (no conversion, no copy).

        Raises:
            WeightError: if it is quantised: `matrix` gives those.
        """
        ...

    def matrix(self, name: str) -> Matrix:
        """The same, or a quantised tensor as it is stored; `quant.plain` decodes it."""
        ...


class SafetensorsSource:
    """One safetensors file, memory-mapped. Safe to read from several threads.

    metadata: the header's `__metadata__`, unchecked.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            WeightError: if the file is missing, truncated or not a safetensors file.
        """
        self.path = path
        self._infos, self.metadata, size = _read_header(path)
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Place of one tensor; raises MissingTensor."""
        try:
            return self._infos[name]
        except KeyError:
            raise MissingTensor(self.where, name, "it among the file's tensors") from None

    def get(self, name: str) -> torch.Tensor:
        """A view of the mapped bytes; raises MissingTensor."""
        return mapped_tensor(self._map, self.info(name))

    def matrix(self, name: str) -> Matrix:
        """The same: nothing is quantised here."""
        return self.get(name)


class MergedSource:
    """Several sources seen as one: the shards of a folder."""

    def __init__(self, where: str, index: Mapping[str, WeightSource]) -> None:
        self._where = where
        self._index = dict(index)

    @property
    def where(self) -> str:
        """The folder or index file."""
        return self._where

    def names(self) -> Iterator[str]:
        """All tensor names."""
        return iter(self._index)

    def info(self, name: str) -> TensorInfo:
        """Place of one tensor; raises MissingTensor."""
        return self._part(name).info(name)

    def get(self, name: str) -> torch.Tensor:
        """A view of one tensor; raises MissingTensor."""
        return self._part(name).get(name)

    def matrix(self, name: str) -> Matrix:
        """A view of one tensor, quantised or not; raises MissingTensor."""
        return self._part(name).matrix(name)

    def _part(self, name: str) -> WeightSource:
        try:
            return self._index[name]
        except KeyError:
            raise MissingTensor(self._where, name, "it among the shards' tensors") from None


class RenamedSource:
    """A source seen through other names: `names` maps the wanted name to the stored one."""

    def __init__(self, source: WeightSource, names: Mapping[str, str]) -> None:
        self._source = source
        self._names = dict(names)

    @property
    def where(self) -> str:
        """The underlying file."""
        return self._source.where

    def names(self) -> Iterator[str]:
        """The wanted names."""
        return iter(self._names)

    def info(self, name: str) -> TensorInfo:
        """Place of one tensor; raises MissingTensor with the wanted name."""
        return self._source.info(self._stored(name))

    def get(self, name: str) -> torch.Tensor:
        """A view of one tensor; raises MissingTensor."""
        return self._source.get(self._stored(name))

    def matrix(self, name: str) -> Matrix:
        """A view of one tensor, quantised or not; raises MissingTensor."""
        return self._source.matrix(self._stored(name))

    def _stored(self, name: str) -> str:
        try:
            return self._names[name]
        except KeyError:
            raise MissingTensor(self.where, name, "it among the file's tensors") from None


def check_tensors(source: WeightSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that every expected tensor is there with the expected shape.

    Raises:
        MissingTensor, ShapeMismatch: for the first tensor that is not.
    """
    for name, shape in expected.items():
        info = source.info(name)
        if info.shape != shape:
            raise ShapeMismatch(info.file, info.name, info.shape, shape)


def full_shape(source: WeightSource, name: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor that must have `rank` axes, none of them empty; raises WeightError."""
    info = source.info(name)
    if len(info.shape) != rank or math.prod(info.shape) == 0:
        found = f"tensor {info.name} of shape {list(info.shape)}"
        raise WeightError(source.where, found, f"{rank} axes, none of them empty")
    return info.shape


def mapped_tensor(mapping: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    """A view of a tensor's bytes in its mapped file, in its dtype and shape."""
    if info.num_bytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    with warnings.catch_warnings():
        # torch warns that the buffer is read-only; nobody here writes to weights
        warnings.simplefilter("ignore", UserWarning)
        raw = torch.frombuffer(mapping, dtype=torch.uint8, count=info.num_bytes, offset=info.start)
    if info.start % info.dtype.itemsize:
        raw = raw.clone()  # a view needs aligned bytes; only odd third-party files need this
    return raw.view(info.dtype).view(info.shape)


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], Mapping[str, object], int]:
    """Parse and check a safetensors header: (place of each tensor, metadata, bytes of the file)."""
    again = "download or copy the file again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
                raise WeightError(
                    str(path),
                    f"{size} bytes and a header length of {length}",
                    "a safetensors file whose header fits into it",
                    again,
                )
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise WeightError(str(path), "no such file", "the model's weights there", again) from None
    except OSError as error:
        raise WeightError(str(path), f"an unreadable file ({error})", "its bytes") from None
    except (ValueError, RecursionError):
        raise WeightError(str(path), "a broken header", "a JSON header", again) from None
    if not isinstance(header, dict):
        raise WeightError(str(path), "a header that is no object", "a JSON object", again)
    metadata = header.pop("__metadata__", None)
    base = 8 + length
    infos = {name: _tensor_info(path, name, entry, base, size) for name, entry in header.items()}
    check_overlap(path, infos)
    return infos, metadata if isinstance(metadata, dict) else {}, size


def _tensor_info(path: Path, name: str, entry: object, base: int, size: int) -> TensorInfo:
    """Check one header entry."""
    if not name.isprintable():  # it would break the sentences that name it
        raise WeightError(str(path), f"a tensor name {name[:80]!r}", "printable text")
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise WeightError(str(path), f"tensor {name} without dtype, shape or data_offsets", "them")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise WeightError(
            str(path),
            f"tensor {name} with shape {_shown(shape)} at {_shown(offsets)}",
            "lists of whole numbers",
        )
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise WeightError(
            str(path),
            f"tensor {name} of type {_shown(entry['dtype'])}",
            "one of " + ", ".join(DTYPES),
        )
    start, stop = offsets
    needed = math.prod(shape) * dtype.itemsize
    if stop - start != needed:
        raise WeightError(
            str(path),
            f"tensor {name} of {stop - start} bytes",
            f"{needed} bytes for shape {list(shape)} of {entry['dtype']}",
        )
    if base + stop > size:
        raise WeightError(
            str(path),
            f"{size} bytes with tensor {name} ending at {base + stop}",
            "the whole file",
            "it is truncated: download or copy it again",
        )
    return TensorInfo(name, str(path), dtype, tuple(shape), base + start, needed)


def _shown(value: object) -> str:
    """A value for a message: short, on one line."""
    text = str(value)[:80]
    return text if text.isprintable() else repr(text)


def _are_counts(values: object) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MAX_RANK
        and all(type(v) is int and 0 <= v < MAX_COUNT for v in values)
    )


def check_overlap(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Check that no two tensors of a file share bytes; raises WeightError."""
    end, previous = 0, ""
    for info in sorted(infos.values(), key=lambda item: (item.start, item.num_bytes)):
        if info.start < end:
            raise WeightError(
                str(path), f"tensor {info.name} overlapping {previous}", "separate byte ranges"
            )
        end, previous = info.start + info.num_bytes, info.name
