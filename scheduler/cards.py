"""A pool's cards as the planner sees them: plain numbers, free of Ray and torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolCard:
    """One worker's card.

    worker: its name in routes. memory_bytes: what it may use. dtypes: what it computes in.
    is_cpu: the card is the CPU. host_ram_bytes: memory of its host; 0 if unknown.
    """

    worker: str
    host: str
    memory_bytes: int
    dtypes: tuple[str, ...]
    default_dtype: str
    is_cpu: bool = True
    host_ram_bytes: int = 0
