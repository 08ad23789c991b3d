"""The one thing a network asks of a weight matrix: multiply by it.

The matrix is plain, or quantised and decoded anew for each use; rows of several kinds may lie on
top of each other. What a LoRA adds runs beside the matrix, which it never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant import Matrix, Quantised

# Values decoded at a time. A fresh 50 MB tensor costs the processor more in page faults than its
# decoding (Q4_K (5120, 2560) to float32, 64 tokens: 716 ms whole, 74 ms so), and little memory is
# bound at once. On a card that memory is the reason, and launches want larger pieces.
PIECE = 2**22
DEVICE_PIECE = 2**24
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


@dataclass(frozen=True)
class Side:
    """A term beside a matrix: scale · (x downᵀ) upᵀ, added to outputs [start, start + rows of up).

    The scale multiplies the narrow product in the middle. So factors keep the bits they are stored
    with, and another strength touches no weight: folded into `up` it would round every factor once
    more in bfloat16, and need a copy of them for each strength. (`add_` with alpha would be free,
    but rounds alpha to bfloat16 on a CPU: a strength off by up to 0.4 %.)

    up: (rows, rank), or (rows, in) where `down` is None, in the type of x.
    down: (rank, in).
    """

    up: Tensor
    down: Tensor | None
    scale: float
    start: int = 0

    @property
    def stop(self) -> int:
        """The output behind the last."""
        return self.start + self.up.shape[0]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add to (..., out) in place what (..., in) gives."""
        if self.down is None:
            term = product(x, self.up, None).mul_(self.scale)
        else:
            term = product(product(x, self.down, None).mul_(self.scale), self.up, None)
        y[..., self.start : self.stop].add_(term)


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b with W as (out, in); a tuple holds rows of several kinds, from the top down.

    sides: added one after the other, in their order.
    """

    weight: Matrix | tuple[Matrix, ...]
    bias: Tensor | None
    sides: tuple[Side, ...] = ()

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The weight's matrices, from the top down: one, unless rows of several kinds meet."""
        return self.weight if isinstance(self.weight, tuple) else (self.weight,)

    @property
    def dtype(self) -> torch.dtype:
        """What x should come in: the type of a plain weight, else that of the bias."""
        tensors = [t for t in (*self.matrices, self.bias) if isinstance(t, Tensor)]
        return tensors[0].dtype if tensors else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out). Quantised weights are decoded to the type of x."""
        results = [
            result
            for matrix, start, stop in self._spans()
            for result in _products(x, matrix, None if self.bias is None else self.bias[start:stop])
        ]
        y = results[0] if len(results) == 1 else torch.cat(results, -1)
        for side in self.sides:
            side.add_to(y, x)
        return y

    def rows(self, start: int, stop: int) -> Linear:
        """The part that makes outputs [start, stop); a view."""
        kept = [
            _rows(matrix, max(start - a, 0), stop - a)
            for matrix, a, b in self._spans()
            if a < stop and start < b
        ]
        bias = None if self.bias is None else self.bias[start:stop]
        sides = tuple(
            replace(
                side,
                up=side.up[max(start - side.start, 0) : stop - side.start],
                start=max(side.start - start, 0),
            )
            for side in self.sides
            if side.start < stop and start < side.stop
        )
        return Linear(kept[0] if len(kept) == 1 else tuple(kept), bias, sides)

    def _spans(self) -> Iterator[tuple[Matrix, int, int]]:
        """Each matrix and the outputs [start, stop) it makes."""
        start = 0
        for matrix in self.matrices:
            stop = start + matrix.shape[0]
            yield matrix, start, stop
            start = stop


Fill = Callable[[Sequence[Tensor], torch.dtype], Tensor]


def gather(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Rows on top of each other in a type; a single tensor that has it is not copied."""
    cast = [part.to(dtype) for part in parts]
    return cast[0] if len(cast) == 1 else torch.cat(cast)


def stack(parts: list[Linear], dtype: torch.dtype | None = None, fill: Fill = gather) -> Linear:
    """Put several matrices over the same input on top of each other.

    Neighbours of one kind become one matrix, and one product makes all their outputs.

    Args:
        parts: from the top down.
        dtype: of plain weights and biases in the result; None for what the first of a run has.
        fill: makes each tensor of the result out of the parts', given its type.
    """
    biases = [part.bias for part in parts if part.bias is not None]
    matrices = [matrix for part in parts for matrix in part.matrices]
    joined = [_join(list(run), dtype, fill) for _, run in groupby(matrices, _kind)]
    bias = fill(biases, dtype or biases[0].dtype) if biases else None
    sides, start = [], 0
    for part in parts:
        sides += [replace(side, start=start + side.start) for side in part.sides]
        start += sum(matrix.shape[0] for matrix in part.matrices)
    return Linear(joined[0] if len(joined) == 1 else tuple(joined), bias, tuple(sides))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b, (..., in) to (..., out), by the fastest kernel there is.

    torch multiplies float32 on a CPU by MKL, which leaves AVX-512 unused on AMD's: oneDNN takes
    0.45 of its time there (EPYC, 2 threads, 1280 x 1536 x 4608: 37 instead of 83 ms).
    """
    if (
        _HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    ):
        done: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return done
    return F.linear(x, weight, bias)


def _products(x: Tensor, matrix: Matrix, bias: Tensor | None) -> Iterator[Tensor]:
    """Multiply, a quantised matrix decoded in pieces: results that lie side by side."""
    if isinstance(matrix, Tensor):
        yield product(x, matrix, bias)
        return
    rows, columns = matrix.shape
    step = max(1, (PIECE if matrix.device.type == "cpu" else DEVICE_PIECE) // columns)
    for start in range(0, max(rows, 1), step):
        piece = matrix.rows(start, start + step).dequantise(x.dtype)
        yield product(x, piece, None if bias is None else bias[start : start + step])


def _kind(matrix: Matrix) -> str:
    """What rows must have in common to be joined: the type, and whether they have scales."""
    if isinstance(matrix, Tensor):
        return ""
    return matrix.kind if matrix.scale is None else f"{matrix.kind} scaled"


def _rows(matrix: Matrix, start: int, stop: int) -> Matrix:
    return matrix[start:stop] if isinstance(matrix, Tensor) else matrix.rows(start, stop)


def _join(run: list[Matrix], dtype: torch.dtype | None, fill: Fill) -> Matrix:
    """Concatenate the rows of matrices of one kind."""
    if isinstance(run[0], Tensor):
        tensors = [matrix for matrix in run if isinstance(matrix, Tensor)]
        return fill(tensors, dtype or tensors[0].dtype)
    quantised = [matrix for matrix in run if isinstance(matrix, Quantised)]
    shape = (sum(matrix.shape[0] for matrix in run), run[0].shape[1])
    scales = [m.scale for m in quantised if m.scale is not None]
    scale = fill(scales, torch.float32) if scales else None
    return Quantised(fill([m.data for m in quantised], torch.uint8), run[0].kind, shape, scale)
