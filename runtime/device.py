"""Cards and hosts: what is here, and a byte budget that holds on a card made of CPU.

A *card* is a CUDA device, or, on a machine without one, a process with a byte budget. The only
user of pynvml.
"""

from __future__ import annotations

import os
import platform
import socket
from contextlib import suppress
from dataclasses import dataclass

import psutil
import torch


@dataclass(frozen=True)
class Card:
    """One card: `name` is "cuda:0" or "cpu:0", `memory_bytes` what it may use."""

    name: str
    description: str
    memory_bytes: int
    dtypes: tuple[str, ...]

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return self.name.startswith("cuda")


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    ram_bytes: int
    ram_free_bytes: int
    num_cores: int


def detect_host() -> Host:
    """Name, RAM and cores of this machine; cores that this process may use."""
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Host(socket.gethostname(), memory.total, memory.available, cores or 1)


def compute_threads() -> int:
    """CPU threads that this host's cards may share: OMP_NUM_THREADS if set, else the cores.

    The bits of oneDNN's convolutions depend on it (3 threads differ from 1, 2, 4 and 8 on an EPYC
    with AVX-512), so CPU cards are of one kind only with equal numbers of threads.
    """
    stated = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(stated) if stated.isdecimal() and int(stated) else detect_host().num_cores


def detect_cards() -> tuple[Card, ...]:
    """CUDA cards as the driver reports them; else the CPU as one card."""
    cards = _cuda_cards() if torch.cuda.is_available() else ()
    return cards or (cpu_card(0),)


def cpu_card(index: int, memory_bytes: int | None = None) -> Card:
    """A CPU card; its memory is all free RAM unless a budget is given."""
    budget = detect_host().ram_free_bytes if memory_bytes is None else memory_bytes
    model = platform.processor() or platform.machine()
    return Card(f"cpu:{index}", f"CPU ({model})", budget, ("float32", "bfloat16"))


def default_dtype(card: Card) -> str:
    """Compute type of a card: float32 on CPU, else bfloat16, float16 where that is missing."""
    if not card.is_cuda:
        return "float32"
    return "bfloat16" if "bfloat16" in card.dtypes else "float16"


def torch_device(card_name: str) -> torch.device:
    """The torch device of a card; all CPU cards are the CPU."""
    return torch.device("cpu" if card_name.startswith("cpu") else card_name)


def limit_process_memory(budget_bytes: int) -> None:
    """Cap this process: it may allocate `budget_bytes` more than it holds now.

    RLIMIT_DATA counts anonymous memory only, so mapped weight files and Ray's shared memory stay
    outside of it. Call it after `import torch` (whose libraries are not the job's business); the
    allocator's refusal is a RuntimeError like CUDA's.
    """
    import resource  # Windows has none

    held = psutil.Process().memory_info().data
    resource.setrlimit(resource.RLIMIT_DATA, (held + budget_bytes, held + budget_bytes))


def _cuda_cards() -> tuple[Card, ...]:
    import pynvml

    totals: dict[int, int] = {}
    with suppress(pynvml.NVMLError):  # without NVML, torch's own numbers must do
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            totals[index] = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        pynvml.nvmlShutdown()
    cards = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        bf16 = ("bfloat16",) if props.major >= 8 else ()
        cards.append(
            Card(
                f"cuda:{index}",
                f"{props.name} (sm_{props.major}{props.minor})",
                totals.get(index, props.total_memory),
                ("float32", "float16", *bf16),
            )
        )
    return tuple(cards)
