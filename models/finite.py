"""Refuses weights that are not numbers, before they make a black video.

A NaN or an infinity in one tensor spreads to every value of a result. Files have them from a cast
to float16 that overflowed, a merge that went wrong, or a damaged download.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from reelpool.errors import WeightError

from .weights import WeightSource

# Of a matrix of more than WHOLE values, RUNS runs of rows are looked at, a SHARE-th of it in all.
# The whole of a 14B block in bfloat16 took 10 % of its loading time (2 cores of an EPYC, page cache
# warm: 205 instead of 187 ms), the runs take 3 ms; single rows cost as many page faults as all.
WHOLE = 2**20
RUNS = 4
SHARE = 16


def check_finite(source: WeightSource, name: str, value: Tensor) -> Tensor:
    """Check a tensor as it will be used, after the cast to the compute dtype.

    Vectors and small matrices are checked whole, large ones by a sample: a matrix or a column that
    is not finite is found, one bad value may pass and then shows in the first velocity, which
    `runtime.denoise` checks.

    The smallest and largest value tell: both carry a NaN on. They are found at 45 GB/s in bfloat16
    on two cores, where `isfinite().all()` makes 0.9.

    Args:
        source: where the tensor comes from, for the message.
        name: its name there.
        value: of a floating-point type; mapped bytes are read here, as they soon would be.
    Returns:
        `value`.
    Raises:
        WeightError: if there is a NaN or an infinity in what was looked at.
    """
    if value.is_meta or all(_is_finite(part) for part in _sample(value)):
        return value  # on the meta device, where bytes are counted, there are no values
    info = source.info(name)
    overflows = value.dtype == torch.float16 != info.dtype
    if overflows and _is_finite(source.get(name).float()):
        raise WeightError(
            info.file,
            f"tensor {info.name} with values too large for float16",
            f"at most {torch.finfo(value.dtype).max:g}",
            "compute in bfloat16 or float32",
        )
    raise WeightError(
        info.file,
        f"tensor {info.name} with NaN or infinity in it",
        "finite numbers",
        "the file is damaged or was badly made: download it again, or take another one",
    )


def _sample(value: Tensor) -> Iterator[Tensor]:
    """All of it, or runs of rows from the first to the last, as far apart as they go."""
    if value.ndim < 2 or value.numel() <= WHOLE:
        yield value
        return
    length = -(-value.shape[0] // (RUNS * SHARE))
    for run in range(RUNS):
        start = (value.shape[0] - length) * run // (RUNS - 1)
        yield value[start : start + length]


def _is_finite(value: Tensor) -> bool:
    return not value.numel() or all(math.isfinite(end.item()) for end in value.aminmax())
