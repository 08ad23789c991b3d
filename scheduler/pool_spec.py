"""The text of `--pool`, understood. Free of Ray and torch, so that a slip is told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from reelpool.errors import ConfigError

from ..runtime.log import parse_bytes

MAX_LOCAL_WORKERS = 64
WHERE = "--pool"


@dataclass(frozen=True)
class PoolSpec:
    """What pool is wanted.

    local_workers: number of CPU workers, each a process of its own; None for every card here.
    memory_bytes: hard budget of each of them, None for none.
    """

    local_workers: int | None
    memory_bytes: int | None


def parse_pool(text: str) -> PoolSpec:
    """Understand `auto` and `local:N[,MEMORY]`.

    Raises:
        ConfigError: if it is neither, naming the nearest that is.

    >>> parse_pool("local:2,3GiB")
    PoolSpec(local_workers=2, memory_bytes=3221225472)
    """
    if text == "auto":
        return PoolSpec(None, None)
    kind, _, rest = text.partition(":")
    if kind != "local":
        advice = "use auto, local:2 or, with a memory budget, local:2,2GiB"
        raise ConfigError(WHERE, f"found {text[:60]!r}", advice)
    number, comma, memory = rest.partition(",")
    if not re.fullmatch(r"[0-9]{1,4}", number):
        raise ConfigError(WHERE, f"found {text[:60]!r}", "say how many workers: local:2")
    if not 1 <= int(number) <= MAX_LOCAL_WORKERS:
        near = 1 if int(number) < 1 else MAX_LOCAL_WORKERS
        raise ConfigError(WHERE, f"found {number} workers", f"the nearest is local:{near}")
    budget = parse_bytes(memory, WHERE) if comma else None
    if budget is not None and budget < 1:
        raise ConfigError(WHERE, "found no memory", "write it like local:2,2GiB")
    return PoolSpec(int(number), budget)
