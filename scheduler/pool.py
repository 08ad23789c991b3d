"""The contract between executor and workers, and the pool that needs no Ray.

A pool holds workers, one per card. `submit` returns at once with a reference; references may be
arguments of later calls, on any worker. A worker runs its calls in the order of submission and
blocks behind an argument that is late, so the order is the plan's business. Payloads are packets.
Whoever drives a pool runs in one thread; the pool is not thread-safe.
"""

from __future__ import annotations

import concurrent.futures as futures
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..runtime.device import Card, detect_host
from ..runtime.wire import Packet
from .events import Emit, WorkerReady
from .worker import Worker


@dataclass(frozen=True)
class WorkerInfo:
    """One worker: its name in plans, its card, its host."""

    name: str
    card: Card
    host: str


class Ref(Protocol):
    """A result that is or will be there. Opaque; hashable."""

    def __hash__(self) -> int: ...


class WorkerPool(Protocol):
    """Workers that take calls."""

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """All workers, in a stable order."""
        ...

    def put(self, packet: Packet) -> Ref:
        """Make a packet of the driver's available to workers."""
        ...

    def submit(self, worker: str, method: str, *args: object) -> Ref:
        """Queue a compute call: a method of `Worker`; top-level references are resolved."""
        ...

    def control(self, worker: str, method: str, *args: object) -> Ref:
        """Call a control method, which does not wait for the computation in progress."""
        ...

    def wait(self, refs: Sequence[Ref], timeout_s: float) -> list[Ref]:
        """Those of `refs` that are done, waiting until one is, or the time is over."""
        ...

    def get(self, ref: Ref) -> object:
        """The result of a call that is done.

        Raises:
            ReelpoolError: what the call raised; WorkerLost if its worker died.
        """
        ...

    def close(self) -> None:
        """End all workers."""
        ...


class InProcessPool:
    """One worker in this process, on a thread of its own. Ends with the process."""

    def __init__(self, card: Card, num_threads: int, emit: Emit) -> None:
        """Start the worker at once: there is nothing to wait for."""
        began = time.perf_counter()
        self._worker = Worker("here", card, num_threads)
        self._info = WorkerInfo("here", card, detect_host().name)
        self._compute = futures.ThreadPoolExecutor(1, "compute")
        self._control = futures.ThreadPoolExecutor(1, "control")
        emit(WorkerReady("here", card.name, card.memory_bytes, time.perf_counter() - began))

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """The one worker."""
        return (self._info,)

    def put(self, packet: Packet) -> Ref:
        """Wrap the packet; nothing is copied."""
        done: futures.Future[object] = futures.Future()
        done.set_result(packet)
        return done

    def submit(self, worker: str, method: str, *args: object) -> Ref:
        """Queue a call on the compute thread."""
        return self._compute.submit(self._run, method, args)

    def control(self, worker: str, method: str, *args: object) -> Ref:
        """Run a call on the control thread."""
        return self._control.submit(self._run, method, args)

    def wait(self, refs: Sequence[Ref], timeout_s: float) -> list[Ref]:
        """References that are done."""
        pending = [ref for ref in refs if isinstance(ref, futures.Future)]
        done, _ = futures.wait(pending, timeout_s, futures.FIRST_COMPLETED)
        return [ref for ref in refs if ref in done]

    def get(self, ref: Ref) -> object:
        """The result, or the error the call raised."""
        assert isinstance(ref, futures.Future)
        return ref.result()

    def close(self) -> None:
        """Let the threads end; calls that have not begun are dropped."""
        self._worker.stop()
        self._compute.shutdown(wait=True, cancel_futures=True)
        self._control.shutdown(wait=True, cancel_futures=True)

    def _run(self, method: str, args: tuple[object, ...]) -> object:
        values = [arg.result() if isinstance(arg, futures.Future) else arg for arg in args]
        return getattr(self._worker, method)(*values)
