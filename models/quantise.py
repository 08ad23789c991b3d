"""Writes a transformer anew with its matrices quantised, tensor by tensor.

Whatever form it is read from, the file has the original Wan names and opens again as a model's
transformer. Memory holds one tensor and a stripe of its rows in float32 at a time. The types of
GGUF are gguf-py's own arithmetic, bit for bit.

fp8 is ComfyUI's scaled form: w = fp8 · scale with one scale for a matrix, its largest value at the
end of the type's range.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from reelpool.errors import ConfigError, WeightError

from .layouts import open_transformer
from .quant import Quantised
from .quantise_files import Bytes, Stored, write_gguf, write_safetensors
from .quantise_plan import (
    CONFIG,
    FP8,
    FP8_MARK,
    Work,
    heads_of,
    is_usual,
    mib,
    partial_of,
    scale_name,
)
from .weights import WeightSource

# Values turned to float32 at a time (64 MiB), and of these by one thread. A matrix of 14B has 70 M.
STRIPE = 2**24
PIECE = 2**20
LARGEST = 65504.0  # of float16, in which the scales of GGUF's blocks are
FP8_LARGEST = 448.0  # of float8_e4m3fn
NOTHING = 1e-30  # a matrix of numbers below counts as zeros: its scale might be no normal number

Progress = Callable[[int, int], None]
"""Told after each block: how many are done, and of how many."""


@dataclass(frozen=True)
class Report:
    """What was written.

    before, after: the types' names.
    bytes_before, bytes_after: of the transformer's tensors as they were and are stored.
    bytes_by_type, tensors_by_type: of the new ones.
    """

    out: Path
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    bytes_by_type: dict[str, int]
    tensors_by_type: dict[str, int]
    seconds: float


def write_quantised(work: Work, progress: Progress | None = None) -> Report:
    """Write the file, under another name until it is whole and has been opened once.

    Raises:
        ConfigError: if the disk refuses.
        WeightError: if there are numbers that cannot be stored: NaN, infinity, too large ones.
    """
    began = time.perf_counter()
    try:
        _write(work, progress)
    except OSError as error:
        raise _disk_error(work.out, error) from error
    kinds = sorted({tensor.kind for tensor in work.tensors})
    of = {kind: [tensor for tensor in work.tensors if tensor.kind == kind] for kind in kinds}
    return Report(
        out=work.out,
        before=work.traits.quant,
        after=work.target.name,
        bytes_before=sum(work.source.info(name).num_bytes for name in work.source.names()),
        bytes_after=work.num_bytes,
        bytes_by_type={kind: sum(t.num_bytes for t in each) for kind, each in of.items()},
        tensors_by_type={kind: len(each) for kind, each in of.items()},
        seconds=time.perf_counter() - began,
    )


def _write(work: Work, progress: Progress | None) -> None:
    """Write, check and rename; what is there if that fails is taken away again."""
    new, config = partial_of(work.out), work.out.with_name(CONFIG)
    with ExitStack() as undo:
        undo.callback(new.unlink, missing_ok=True)
        if not is_usual(work.spec) and not config.exists():
            undo.callback(config.unlink, missing_ok=True)
            config.write_text(json.dumps(heads_of(work.spec), indent=2) + "\n", encoding="utf-8")
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            parts = _parts(work, pool, progress)
            if work.target.is_gguf:
                write_gguf(new, work.target.kind, work.tensors, parts)
            else:
                write_safetensors(new, work.tensors, parts)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        if open_transformer(new)[0] != work.spec:
            problem = "has this model's width and other heads, and would be taken for its own"
            raise ConfigError(str(config), problem, "write to another folder")
        os.replace(new, work.out)
        undo.pop_all()


def _parts(
    work: Work, pool: ThreadPoolExecutor, progress: Progress | None
) -> Iterator[tuple[str, Bytes]]:
    """Names and bytes of all tensors, one after the other."""
    by_block = groupby(work.tensors, lambda tensor: _block_index(tensor.name))
    for index, tensors in by_block:
        for tensor in tensors:
            if tensor.name == FP8_MARK:
                yield tensor.name, np.zeros(tensor.byte_shape, np.uint8)
            elif tensor.kind == FP8:
                data, scale = _scaled_fp8(work.source, tensor)
                yield tensor.name, data
                yield scale_name(tensor.name), np.atleast_1d(scale).view(np.uint8)
            elif not tensor.name.endswith(".scale_weight"):
                yield tensor.name, _gguf_bytes(work.source, tensor, pool)
        if progress and index is not None:
            progress(index + 1, work.spec.num_layers)


def _block_index(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def _gguf_bytes(source: WeightSource, tensor: Stored, pool: ThreadPoolExecutor) -> Bytes:
    """A tensor in a type of GGUF, F32 and the 16-bit ones among them, as gguf-py makes it."""
    out = np.empty(tensor.byte_shape, np.uint8)
    rows = out.reshape(-1, tensor.byte_shape[-1])
    step = max(1, PIECE // tensor.shape[-1])
    encode = partial(_encode, GGMLQuantizationType[tensor.kind])
    limit = math.inf if tensor.kind in ("F32", "BF16") else LARGEST
    start = 0
    for stripe in _stripes(source, tensor.name, limit):
        for encoded in pool.map(encode, (piece.numpy() for piece in stripe.split(step))):
            rows[start : start + len(encoded)] = encoded
            start += len(encoded)
    return out


def _encode(kind: GGMLQuantizationType, values: npt.NDArray[np.float32]) -> Bytes:
    # Of blocks of numbers below 1e-38 gguf-py divides by what is almost 0. Their scale becomes 0 in
    # float16, whatever the codes are.
    with np.errstate(over="ignore", invalid="ignore"):
        encoded: npt.NDArray[np.generic] = quantize(values, kind)
    return encoded.view(np.uint8)


def _scaled_fp8(source: WeightSource, tensor: Stored) -> tuple[Bytes, np.float32]:
    """A matrix as float8_e4m3fn, rounded to the nearest, and the scale that brings it back."""
    ends = [stripe.aminmax() for stripe in _stripes(source, tensor.name, math.inf)]
    largest = max(max(-low.item(), high.item()) for low, high in ends)
    scale = np.float32(largest / FP8_LARGEST if largest > NOTHING else 1)
    out = np.empty(tensor.byte_shape, np.uint8)
    start = 0
    for stripe in _stripes(source, tensor.name, math.inf):
        # the largest may come out at 448.00003, which rounds to 448; NaN begins at 464
        codes = (stripe / float(scale)).to(torch.float8_e4m3fn).view(torch.uint8)
        out[start : start + len(codes)] = codes.numpy()
        start += len(codes)
    return out, scale


def _stripes(source: WeightSource, name: str, limit: float) -> Iterator[Tensor]:
    """A tensor as (rows, columns) float32, some rows at a time.

    Raises:
        WeightError: if there is a NaN, an infinity or a number beyond the limit.
    """
    matrix = source.matrix(name)
    rows = matrix if isinstance(matrix, Quantised) else matrix.reshape(-1, matrix.shape[-1])
    step = max(1, STRIPE // rows.shape[-1])
    for start in range(0, rows.shape[0], step):
        if isinstance(rows, Quantised):
            stripe = rows.rows(start, start + step).dequantise()
        else:
            stripe = rows[start : start + step].float()
        low, high = (end.item() for end in stripe.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            found, expected = "NaN or infinity in it", "finite numbers"
            advice = "the file is damaged or was badly made: take another one"
        elif max(-low, high) > limit:
            found, expected = f"values up to {max(-low, high):g}", f"at most {limit:g}"
            advice = "begin with a bfloat16 file, or quantise to fp8"
        else:
            yield stripe
            continue
        info = source.info(name)
        raise WeightError(info.file, f"tensor {info.name} with {found}", expected, advice)


def _disk_error(path: Path, error: OSError) -> ConfigError:
    """Say in one sentence why the disk refused."""
    # numpy reports a short write without a number
    if error.errno in (errno.ENOSPC, errno.EDQUOT, None):
        free = shutil.disk_usage(path.parent).free
        return ConfigError(str(path), f"the disk is full ({mib(free)} free)", "make room")
    problem = f"cannot be written ({error.strerror or error})"
    return ConfigError(str(path), problem, "write to a folder that is writable")
