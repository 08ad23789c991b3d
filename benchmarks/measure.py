"""What the benchmarks share: the machine's description, paired timing, the share of operators."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

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
