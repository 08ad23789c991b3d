"""What the benchmarks share: the machine's description, paired timing, a meter of live tensors."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[], object]


def machine() -> dict[str, object]:
    """Processor, memory, versions and the time of the measurement."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@dataclass(frozen=True)
class PairedTime:
    """Seconds of two programs that took turns, and the first over the second.

    ratio: median of the rounds' ratios; low and high are the smallest and largest of them.
    load: the machine's load average at the end; above the thread count others were computing too.
    """

    threads: int
    rounds: int
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    load: float

    def as_json(self) -> dict[str, Any]:
        """Rounded for the results file."""
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}


def paired(ours: Run, theirs: Run, rounds: int, threads: int) -> PairedTime:
    """Time two programs in turns: ours, theirs, ours, theirs. Both must have run before.

    A neighbour's load falls on both alike, and the median drops the rounds where it did not.
    """
    torch.set_num_threads(threads)
    times = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds)]
    ratios = [a / b for a, b in times]
    return PairedTime(
        threads=threads,
        rounds=rounds,
        ours=statistics.median(a for a, _ in times),
        theirs=statistics.median(b for _, b in times),
        ratio=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        load=os.getloadavg()[0],
    )


def _seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensor storages made inside of it, as long as they live.

    Byte-exact for every operator the dispatcher sees; scratch memory inside of a kernel is not
    seen. What existed before (weights, caches, inputs) is not counted, nor are views of it: an
    operator's input that was never some operator's output is known to be old.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.add(storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self._live += storage.nbytes()
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return result

    def _gone(self, num_bytes: int) -> None:
        self._live -= num_bytes


def _storages(tree: object) -> Iterator[Any]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


@dataclass(frozen=True)
class Peak:
    """Peak memory of one run.

    live: bytes of the tensors it made, at their most.
    process: by how much the process's resident memory grew at its peak, kernels' scratch and the
        allocator's slack included (Linux only).
    """

    live: int
    process: int | None


def peak_of(run: Run) -> Peak:
    """Measure the memory of a program that has run before."""
    gc.collect()
    before = psutil.Process().memory_info().rss
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the highest resident memory starts again from now
    with LiveTensors() as meter:
        run()
    if not reset.exists():
        return Peak(meter.peak, None)
    status = Path("/proc/self/status").read_text().splitlines()
    highest = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return Peak(meter.peak, highest - before)


def shares(run: Run, top: int = 8) -> list[dict[str, Any]]:
    """Operators by their own time: name, share of the whole, calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {"op": e.key, "share": round(e.self_cpu_time_total / total, 4), "calls": e.count}
        for e in events[:top]
    ]


def table(rows: Iterable[Iterable[object]], header: Iterable[str]) -> str:
    """Plain text columns."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
