"""Results on disk: content-addressed tensors, and the folder of a run.

A key is the hash of everything that decides a result, so a file that is there is right. A file is
safetensors: any tool can open it. It is written under another name, flushed and renamed, and read
back only if its checksums hold; a damaged one counts as absent. This module does not know what the
tensors mean, and never evicts. Callers use keys and `path` only, so an index can be put behind it.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NewType

import numpy as np
import safetensors
from torch import Tensor

from reelpool.errors import ConfigError

from ..models.weights import DTYPES
from .log import timed
from .wire import byte_view

ResultKey = NewType("ResultKey", str)
Loaded = tuple[dict[str, Tensor], dict[str, object]]

CODE_VERSION = 1  # raise it when a stage gives other bits for the same arguments
KEPT_SNAPSHOTS = 2  # the newest may be damaged by the crash that makes it needed
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KEY = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{32}")
_logger = logging.getLogger(__name__)


def key_of(kind: str, **parts: object) -> ResultKey:
    """Give the key of a result: "<kind>-<32 hex digits>", equal in every process and on every host.

    Args:
        kind: the stage, `[a-z][a-z0-9_]*`.
        parts: all that decides the bits: None, bool, int, float, str, bytes, lists or tuples (the
            same), mappings in any order, dataclasses (by class name and fields). 1, 1.0 and True
            differ.

    Raises:
        TypeError: if a part is of another type, such as a tensor: give its digest.
    """
    content = json.dumps([CODE_VERSION, kind, _canonical(parts)], separators=(",", ":"))
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return _checked(ResultKey(f"{kind}-{digest}"))


def _checked(key: ResultKey) -> ResultKey:
    if not _KEY.fullmatch(key):  # a key becomes a file name
        raise ValueError(f"{key[:80]!r} is no result key; make keys with key_of()")
    return key


def _canonical(value: object) -> object:
    """Turn a value into JSON that is the same for equal values and tells types apart."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return ["int", str(int(value))]
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, str):
        return ["str", str(value)]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, list | tuple):
        return ["list", [_canonical(item) for item in value]]
    if isinstance(value, Mapping):
        pairs = [[_canonical(key), _canonical(item)] for key, item in value.items()]
        return ["map", sorted(pairs, key=lambda pair: json.dumps(pair[0]))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return ["class", type(value).__name__, _canonical(fields)]
    raise TypeError(f"a {type(value).__name__} has no canonical form; give its digest instead")


class ResultStore:
    """Tensors by key under one folder. Safe with several processes: every write is one rename."""

    def __init__(self, root: Path) -> None:
        """Create the folder.

        Raises:
            ConfigError: if it cannot be created.
        """
        self.root = root
        _make_folder(root)

    def path(self, key: ResultKey) -> Path:
        """Where the result of a key lies, or would."""
        return self.root / f"{_checked(key)}.safetensors"

    def put(
        self,
        key: ResultKey,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, object] | None = None,
    ) -> Path:
        """Store a result; on return it survives a power cut.

        Args:
            key: from `key_of`.
            tensors: strided, on any device, of a safetensors dtype.
            meta: JSON-like.

        Raises:
            ConfigError: if the folder is not writable or the disk is full.
            TypeError: if a dtype or a metadata value cannot be stored.
        """
        path = self.path(key)
        _write(path, key, tensors, meta or {})
        return path

    def get(self, key: ResultKey) -> Loaded | None:
        """Give a result, or None. A damaged file is removed, with a line in the log.

        The tensors are private views of the file: they stay when it is replaced or removed.
        """
        path = self.path(key)
        try:
            return _read(path, key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            _logger.warning("result %s cannot be read and counts as absent: %s", path, error)
            if not isinstance(error, OSError):
                path.unlink(missing_ok=True)
            return None

    def drop(self, key: ResultKey) -> None:
        """Remove a result, if it is there."""
        self.path(key).unlink(missing_ok=True)


class RunDir:
    """The folder of a run: job.json, plan.json, events.jsonl, results/ and the last snapshots."""

    def __init__(self, root: Path) -> None:
        """Create the folder, or open the one of an interrupted run.

        Raises:
            ConfigError: if it cannot be created.
        """
        self.root = root
        _make_folder(root)
        self.results = ResultStore(root / "results")
        self._snapshots = root / "snapshots"
        _make_folder(self._snapshots)

    def write_json(self, name: str, content: Mapping[str, object]) -> None:
        """Write `job.json` or `plan.json` at once; raises ConfigError."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        _replace(self.root / name, [text.encode()])

    def read_json(self, name: str) -> dict[str, object] | None:
        """Read what `write_json` wrote, or None.

        Raises:
            ConfigError: if the file is there but not a JSON object.
        """
        path = self.root / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(str(path), f"cannot be read ({error})", "start a new run") from error
        if not isinstance(content, dict):
            raise ConfigError(str(path), "is not a JSON object", "start a new run")
        return content

    def append_event(self, event: Mapping[str, object]) -> None:
        """Add one line to events.jsonl; raises ConfigError."""
        path = self.root / "events.jsonl"
        try:
            with path.open("ab+") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a crash cut the last line
                        file.write(b"\n")
                file.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise _disk_error(path, error) from error

    def events(self) -> Iterator[dict[str, object]]:
        """Yield the events so far; a line cut short by a crash is left out."""
        path = self.root / "events.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event

    def snapshot(
        self,
        step_index: int,
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, object] | None = None,
        series: str = "denoise",
    ) -> None:
        """Keep the state after a step; the last two of a series stay.

        Args:
            step_index: of the step that was done; it may start again at 0 in the next chunk.
            tensors: strided, of a safetensors dtype.
            meta: JSON-like.
            series: `[a-z][a-z0-9_]*`; one per job where a run has several.

        Raises:
            ConfigError: if the folder is not writable or the disk is full.
            TypeError: if a dtype or a metadata value cannot be stored.
        """
        numbers = self._numbers(series)
        number = numbers[-1] + 1 if numbers else 0
        path = self._snapshot_path(series, number)
        _write(path, path.stem, tensors, {"step_index": step_index, "meta": dict(meta or {})})
        for old in [*numbers, number][:-KEPT_SNAPSHOTS]:
            self._snapshot_path(series, old).unlink(missing_ok=True)

    def last_snapshot(
        self, series: str = "denoise"
    ) -> tuple[int, dict[str, Tensor], dict[str, object]] | None:
        """Give (step_index, tensors, meta) of the newest snapshot that is whole, or None."""
        for number in reversed(self._numbers(series)):
            path = self._snapshot_path(series, number)
            try:
                tensors, stored = _read(path, path.stem)
                step_index, meta = stored["step_index"], stored["meta"]
            except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
                _logger.warning("snapshot %s cannot be read and is passed over: %s", path, error)
                continue
            if isinstance(step_index, int) and isinstance(meta, dict):
                return step_index, tensors, meta
        return None

    def _snapshot_path(self, series: str, number: int) -> Path:
        return self._snapshots / f"{series}-{number:08d}.safetensors"

    def _numbers(self, series: str) -> list[int]:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", series):
            raise ValueError(f"{series[:80]!r} is no name of a series")
        names = (path.stem.split("-") for path in self._snapshots.glob(f"{series}-*.safetensors"))
        return sorted(int(parts[1]) for parts in names if parts[1].isdigit())


def _write(path: Path, key: str, tensors: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
    """Write a safetensors file with its checksums; raises ConfigError, TypeError."""
    views = {name: byte_view(tensor) for name, tensor in tensors.items()}
    about = json.dumps(
        {
            "key": key,
            "meta": meta,
            "tensors": {name: _facts(tensor, views[name]) for name, tensor in tensors.items()},
        }
    )
    header: dict[str, object] = {
        "__metadata__": {"reelpool": about, "crc32": str(zlib.crc32(about.encode()))}
    }
    # the widest first, as safetensors does: every tensor then lies aligned to its own size
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in names:
        dtype = _DTYPE_NAMES.get(tensors[name].dtype)
        if dtype is None or name == "__metadata__":
            raise TypeError(f"{name!r} of {tensors[name].dtype} cannot be stored")
        start, end = end, end + views[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # 8 bytes of length come first: the data starts at 64 n
    with timed(f"store {path.name}", end, logger=_logger):
        _replace(path, [struct.pack("<Q", len(text)), text, *(views[name].data for name in names)])


def _read(path: Path, key: str) -> Loaded:
    """Read and check what `_write` wrote; raises OSError, ValueError or SafetensorError."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = metadata.get("reelpool", "")
    if metadata.get("crc32") != str(zlib.crc32(text.encode())):
        raise ValueError("found another checksum of the metadata than was stored")
    about = json.loads(text)
    if about["key"] != key:
        raise ValueError(f"found key {about['key']}, expected {key}")
    expected = about["tensors"]
    if set(expected) != set(stored):
        raise ValueError(f"found tensors {sorted(stored)}, expected {sorted(expected)}")
    for name, facts in expected.items():
        found = _facts(stored[name], byte_view(stored[name]))
        if found != facts:
            raise ValueError(f"found {found} of tensor {name!r}, expected {facts}")
    return {name: stored[name] for name in expected}, about["meta"]


def _facts(tensor: Tensor, view: np.ndarray) -> list[object]:
    return [str(tensor.dtype), list(tensor.shape), zlib.crc32(view.data)]


def _replace(path: Path, parts: list[bytes | memoryview]) -> None:
    """Write a file so that its name shows the old content or the new; raises ConfigError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _disk_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _disk_error(folder, error) from error


def _disk_error(path: Path, error: OSError) -> ConfigError:
    """Say in one sentence why the disk refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        problem = f"the disk is full ({free / 2**20:.0f} MiB free)"
        return ConfigError(str(path), problem, "make room, or give another --run-dir")
    problem = f"cannot be written ({error.strerror or error})"
    return ConfigError(str(path), problem, "give a --run-dir in a folder that is writable")
