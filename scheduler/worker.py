"""One card's process: takes calls, runs stages, answers while it computes.

Compute methods run one at a time in order; control methods (`stop`, `status`) are called from
another thread and only touch a flag and counters. `ray_pool` wraps this class in an actor,
`pool.InProcessPool` calls it directly.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reelpool.errors import Cancelled

from ..runtime import log
from ..runtime.device import Card, limit_process_memory
from ..runtime.residency import Residency
from ..runtime.stages import CardStages, memory_error
from ..runtime.types import BlockCall, BlockRange, DecodeCall, ImageCall, ModelRef
from ..runtime.wire import Packet

logger = logging.getLogger(__name__)


class Worker:
    """Runs the stages of jobs on one card. Compute methods: one thread. Control: any thread."""

    def __init__(
        self, name: str, card: Card, num_threads: int, memory_limit: int | None = None
    ) -> None:
        """Prepare the process.

        Args:
            name: the worker's name in plans and logs.
            card: the card to compute on.
            num_threads: CPU threads to compute with (Ray would leave one).
            memory_limit: bytes this process may allocate from now on; only for a worker that has
                a process of its own.
        """
        log.setup()
        self.name = name
        self._stages = CardStages(card)
        self._stop = threading.Event()
        self._progress: tuple[str, int] = ("idle", 0)
        torch.set_num_threads(num_threads)
        torch.backends.cudnn.benchmark = False
        if memory_limit is not None:
            limit_process_memory(memory_limit)

    def ping(self) -> int:
        """Answer once the worker is up: its process id."""
        return os.getpid()

    def load_blocks(
        self,
        model: ModelRef,
        blocks: BlockRange,
        expert: int = 0,
        residency: Residency | None = None,
    ) -> dict[str, float]:
        """Load a block range of an expert: seconds it took and bytes now held."""
        with self._doing("load", 0, f"load of blocks {blocks}"):
            seconds = self._stages.load_blocks(model, blocks, expert, residency)
            return {"seconds": seconds, "bytes": float(sum(self._stages.held_bytes().values()))}

    def encode_text(self, model: ModelRef, prompt: str) -> Packet:
        """Encode a prompt; see CardStages.encode_text."""
        with self._doing("encode_text", 0, "encode_text"):
            return self._stages.encode_text(model, prompt)

    def encode_image(self, call: ImageCall, images: Packet) -> Packet:
        """Encode a job's images; see ImageCall."""
        with self._doing("encode_image", 0, "encode_image"):
            return self._stages.encode_image(call, images)

    def run_blocks(self, call: BlockCall, inputs: Packet, *packets: Packet) -> Packet:
        """Run forwards over a block range; see BlockCall for the packets and their order."""
        prompts, image = (packets[:-1], packets[-1]) if call.has_image else (packets, None)
        with self._doing("denoise", call.step, f"step {call.step}, blocks {call.blocks}"):
            return self._stages.run_blocks(call, inputs, prompts, image, self._before_block)

    def decode(self, call: DecodeCall, latents: Packet) -> Packet:
        """Decode latent frames; see DecodeCall."""
        with self._doing("decode", call.start, f"decode of latents {call.start}:{call.stop}"):
            return self._stages.decode(call, latents)

    def end_stream(self, stream: str) -> None:
        """Drop a decode's cache."""
        self._stages.end_stream(stream)

    def free(self) -> None:
        """Drop everything loaded."""
        self._stages.free()

    def stop(self) -> None:
        """Control: make the running call raise Cancelled before its next block."""
        self._stop.set()

    def status(self) -> dict[str, object]:
        """Control: what it is doing, and since when it has been quiet."""
        doing, index = self._progress
        return {"worker": self.name, "doing": doing, "index": index, "time": time.time()}

    @contextmanager
    def _doing(self, doing: str, index: int, what: str) -> Iterator[None]:
        """Note progress, refuse when stopped, turn the allocator's refusal into our own error."""
        self._progress = (doing, index)
        self._check_stop()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            memory = memory_error(self._stages.card, what, error)
            if memory is None:
                raise
            raise memory from None
        finally:
            self._progress = ("idle", 0)

    def _before_block(self, index: int) -> None:
        self._progress = ("denoise", index)
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Cancelled()
