"""Blocks that do not fit a card come by in turns, the next one while the present one computes.

Two threads work ahead of the computation: one reads blocks out of their mapped file into a pair of
host buffers (this is where page faults, conversion and the check for NaN fall), the other copies
them to whichever slot of the ring is free. Both go round and round in the order of the blocks, so
what a step begins with is fetched when the step before ends. Quantised bytes travel as stored.

On a GPU this code was not run: the event a slot is given back with, and the wait for the copy
stream, are there, but no machine with one was at hand.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from queue import SimpleQueue

import torch
from torch import Tensor

from ..models.wan_weights import BlockWeights
from .arena import CardCopies, LoadBlock, Packer, moved, packed_bytes

NUM_STAGING = 2  # host buffers: one is filled while the other is copied


@dataclass(frozen=True, eq=False)
class _Block:
    """A block in a buffer of the host, or in a slot."""

    index: int
    weights: BlockWeights
    buffer: Tensor
    num_bytes: int


@dataclass(frozen=True, eq=False)
class _Slot:
    """A free place on the card. after: the computing that must be through with what is in it."""

    buffer: Tensor
    after: torch.cuda.Event | None


@dataclass(frozen=True, eq=False)
class _Ring:
    """What the threads share. None in a queue means: stop. An error goes along to the end.

    It knows nothing of the stream above it, which may so be dropped while the threads wait.
    """

    order: tuple[int, ...]
    load: LoadBlock
    copies: CardCopies
    buffers: SimpleQueue[Tensor | None] = field(default_factory=SimpleQueue)
    staged: SimpleQueue[_Block | BaseException | None] = field(default_factory=SimpleQueue)
    slots: SimpleQueue[_Slot | None] = field(default_factory=SimpleQueue)
    ready: SimpleQueue[_Block | BaseException] = field(default_factory=SimpleQueue)

    @property
    def is_stopped(self) -> bool:
        """Whether the threads were told to end."""
        return self.copies.stopped.is_set()


class BlockStream:
    """Streams blocks through a ring of slots on a card. Not thread-safe. Owned by a BlockRunner.

    num_bytes: of the slots, on the card. host_bytes: of the buffers, on the host, pinned for a GPU.
    waited: seconds that the computation stood still for blocks, so far.
    """

    def __init__(
        self, load: LoadBlock, device: torch.device, num_slots: int, copy_gb_s: float | None = None
    ) -> None:
        """Nothing is read yet.

        Args:
            load: reads a block; called in a thread. It must not hold this stream.
            device: the card.
            num_slots: places on the card.
            copy_gb_s: see `Residency`.
        """
        self._load, self._device = load, device
        self._num_slots, self._copy_gb_s = num_slots, copy_gb_s
        self._ring: _Ring | None = None
        self._end: weakref.finalize[..., BlockStream] | None = None
        self.num_bytes = self.host_bytes = 0
        self.waited = 0.0

    @property
    def order(self) -> tuple[int, ...]:
        """The blocks that come by."""
        return () if self._ring is None else self._ring.order

    def open(self, order: tuple[int, ...]) -> None:
        """Say which blocks come by, and in which order; the first of them are fetched.

        Nothing happens if these were coming by already.

        Args:
            order: indices, more than there are slots; every pass takes all of them by `use`.
        """
        if self.order == order:
            return
        self.close()
        if not order:
            return
        assert len(order) > self._num_slots > 0, (order, self._num_slots)
        size = max(packed_bytes(self._load, index) for index in order)
        copies = CardCopies(self._device, self._copy_gb_s)
        ring = _Ring(order, self._load, copies)
        for _ in range(self._num_slots):
            # marked: the memory may have been another tensor's, which is still being read
            ring.slots.put(_Slot(copies.card_buffer(size), copies.mark()))
        for _ in range(NUM_STAGING):
            ring.buffers.put(copies.host_buffer(size))
        threads = [
            threading.Thread(target=work, args=(ring,), name=f"blocks-{work.__name__}", daemon=True)
            for work in (_stage, _copy)
        ]
        # also when this is dropped, and before the interpreter ends: a thread of torch's code that
        # outlives it aborts the process
        self._end = weakref.finalize(self, _end, ring, threads)
        try:
            for thread in threads:
                thread.start()
        except RuntimeError:  # the system gives no more of them
            self.close()
            raise
        self._ring = ring
        self.num_bytes, self.host_bytes = self._num_slots * size, NUM_STAGING * size

    @contextmanager
    def use(self, index: int) -> Iterator[BlockWeights]:
        """A block's weights on the card, while its turn lasts; waits until they are there.

        Raises:
            WeightError, MissingTensor: what went wrong with reading the block, or one after it.
        """
        ring = self._ring
        assert ring is not None
        began = time.perf_counter()
        block = ring.ready.get()
        self.waited += time.perf_counter() - began
        if isinstance(block, BaseException):
            raise block
        assert block.index == index, (block.index, index)
        yield block.weights
        ring.slots.put(_Slot(block.buffer, ring.copies.mark()))

    def close(self) -> None:
        """End the threads and drop ring and buffers. A pass that broke off must end so."""
        if self._end is not None:
            self._end()
        self._ring = self._end = None
        self.num_bytes = self.host_bytes = 0

    @property
    def copied(self) -> tuple[int, int]:
        """Copies and bytes from host to card since `open`."""
        if self._ring is None:
            return 0, 0
        return self._ring.copies.num_copies, self._ring.copies.num_bytes


def _end(ring: _Ring, threads: list[threading.Thread]) -> None:
    """End the threads; a paced copy is not waited for."""
    ring.copies.stopped.set()
    for queue in (ring.buffers, ring.staged, ring.slots):
        queue.put(None)
    for thread in threads:
        # the garbage collector may call this in any thread; one that was not started has no id
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join()


@torch.inference_mode()
def _stage(ring: _Ring) -> None:
    """Read blocks into host buffers, round and round."""
    try:
        for index in cycle(ring.order):
            buffer = ring.buffers.get()
            if buffer is None or ring.is_stopped:
                return
            packer = Packer(buffer)
            weights = ring.load(index, packer)
            ring.staged.put(_Block(index, weights, buffer, packer.num_bytes))
    except BaseException as error:  # whatever it is, who waits for the block raises it
        ring.staged.put(error)


@torch.inference_mode()
def _copy(ring: _Ring) -> None:
    """Copy what was read into free slots, round and round."""
    try:
        while True:
            block = ring.staged.get()
            if isinstance(block, BaseException):
                raise block
            slot = ring.slots.get()
            if block is None or slot is None or ring.is_stopped:
                return
            size = block.num_bytes
            ring.copies.copy(slot.buffer[:size], block.buffer[:size], slot.after)
            weights = moved(block.weights, slot.buffer)
            ring.buffers.put(block.buffer)
            ring.ready.put(_Block(block.index, weights, slot.buffer, size))
    except BaseException as error:  # whatever it is, who waits for the block raises it
        ring.ready.put(error)
