"""A block's weights in one run of bytes, and the way of such runs from the host to a card.

A block is laid out in a buffer of the host, goes to the card in one copy, and its tensors there are
views at the same offsets. Nothing goes the other way: weights are never changed, so what a slot
held is simply overwritten.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models.linear import Fill
from ..models.wan_weights import BlockWeights, Weights, map_tensors

# Of every tensor's first byte: as CUDA's allocator aligns tensors of their own, so that a kernel
# chooses the same way for both.
ALIGNMENT = 512
LoadBlock = Callable[[int, Fill], BlockWeights]


class Packer:
    """A `Fill` that lays tensors one behind the other in a buffer; without one it only counts.

    num_bytes: taken so far.
    """

    def __init__(self, buffer: Tensor | None = None) -> None:
        """Start at the beginning of a buffer of bytes, (n,) uint8."""
        self._buffer, self.num_bytes = buffer, 0

    def __call__(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Copy parts on top of each other; without a buffer, the result is on the meta device."""
        shape = torch.Size((sum(len(part) for part in parts), *parts[0].shape[1:]))
        start = -(-self.num_bytes // ALIGNMENT) * ALIGNMENT
        self.num_bytes = start + shape.numel() * dtype.itemsize
        if self._buffer is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        made = self._buffer[start : self.num_bytes].view(dtype).view(shape)
        row = 0
        for part in parts:
            made[row : row + len(part)].copy_(part)
            row += len(part)
        return made


def packed_bytes(load: LoadBlock, index: int) -> int:
    """Bytes of a block in one run. Reads no weights."""
    packer = Packer()
    load(index, packer)
    return packer.num_bytes


def moved(packed: Weights, buffer: Tensor) -> Weights:
    """The tensors that lie in another buffer where `packed` lies in its own."""

    def view(tensor: Tensor) -> Tensor:
        start = tensor.storage_offset() * tensor.element_size()
        return buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    return map_tensors(packed, view)


class CardCopies:
    """Copies from the host to one card, on a stream of their own where the card is a GPU.

    num_copies, num_bytes: so far, all of them from the host to the card.
    stopped: ends the waiting of a paced copy.
    """

    def __init__(self, device: torch.device, copy_gb_s: float | None = None) -> None:
        """Copies of `copy_gb_s` 1e9 bytes a second at most."""
        self.device, self.stopped = device, threading.Event()
        self.num_copies = self.num_bytes = 0
        self._copy_gb_s = copy_gb_s
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Memory to copy from: pinned for a GPU."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    def card_buffer(self, num_bytes: int) -> Tensor:
        """Memory to copy to."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> torch.cuda.Event | None:
        """The point that the card's computing has been told to go to; None on a CPU."""
        if self._stream is None:
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self.device).record_event()
        return event

    def copy(self, target: Tensor, staged: Tensor, after: torch.cuda.Event | None) -> None:
        """Copy, and return when the bytes are there.

        Args:
            target: on the card.
            staged: from `host_buffer`.
            after: what was read of `target` until this mark is read before it is overwritten.
        """
        began = time.perf_counter()
        if self._stream is None:
            target.copy_(staged)
        else:
            with torch.cuda.stream(self._stream):
                if after is not None:
                    self._stream.wait_event(after)
                target.copy_(staged, non_blocking=True)
            self._stream.synchronize()
        self.num_copies += 1
        self.num_bytes += staged.nbytes
        if self._copy_gb_s is not None:
            rest = staged.nbytes / (self._copy_gb_s * 1e9) - (time.perf_counter() - began)
            self.stopped.wait(max(0.0, rest))


def place_block(load: LoadBlock, index: int, device: torch.device) -> BlockWeights:
    """Read a block into memory of the card's own, which nothing else will take.

    Raises:
        WeightError: if there is a NaN or an infinity in it.
    """
    buffer = torch.empty(packed_bytes(load, index), dtype=torch.uint8)
    block = load(index, Packer(buffer))
    return block if device.type == "cpu" else moved(block, buffer.to(device))
