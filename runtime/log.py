"""Log lines with measured numbers, and the sizes and times in them.

The library logs through stdlib `logging` and adds no handler; the command line and a worker's start
call `setup`. This module does not know what is measured.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal

from reelpool.errors import ConfigError

ENVIRONMENT = "REELPOOL_LOG"
_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
_logger = logging.getLogger(__name__)

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgtp])(i?b?))?(b?)\s*", re.IGNORECASE)


def setup(level: str | None = None) -> None:
    """Send the log of reelpool to stderr. Called by the command line and by a worker at its start.

    A second call changes the level and adds nothing.

    Args:
        level: debug, info, warning or error; else REELPOOL_LOG, else warning.

    Raises:
        ConfigError: if the level is not one of these.
    """
    where = "log level" if level else ENVIRONMENT
    name = (level or os.environ.get(ENVIRONMENT) or "warning").lower()
    if name not in _LEVELS:
        raise ConfigError(where, f"{name!r} is no log level", f"use one of {', '.join(_LEVELS)}")
    root = logging.getLogger("reelpool")
    root.setLevel(_LEVELS[name])
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        handler = _StderrHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
        root.addHandler(handler)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic only in stubs
    """Ours, so that `setup` knows it again."""


@dataclass
class Timing:
    """What a `timed` block measured; complete when the block ends.

    num_bytes may be set inside the block, when it is known only then.
    """

    name: str
    num_bytes: int | None = None
    seconds: float = 0.0

    @property
    def gbps(self) -> float | None:
        """10^9 bytes per second, or None where no bytes were counted."""
        if self.num_bytes is None or self.seconds <= 0:
            return None
        return self.num_bytes / self.seconds / 1e9

    def __str__(self) -> str:
        parts = [self.name]
        if self.num_bytes is not None:
            parts.append(format_bytes(self.num_bytes))
        parts.append(format_seconds(self.seconds))
        if self.gbps is not None:
            parts.append(f"{self.gbps:.1f} GB/s")
        return " ".join(parts)


@contextmanager
def timed(
    name: str,
    num_bytes: int | None = None,
    *,
    logger: logging.Logger = _logger,
    level: int = logging.DEBUG,
) -> Iterator[Timing]:
    """Time a block and log one line, such as "h2d 512 MiB 0.041 s 13.1 GB/s".

    Wall-clock time: on a CUDA card the caller synchronises inside the block.

    Args:
        name: what is done, the line's first word.
        num_bytes: how much is moved, if anything is.
        logger: whose line it is.
        level: DEBUG per step and transfer, INFO per stage and chunk.

    Yields:
        The timing, whose `seconds` is set when the block ends, also by an error.
    """
    timing = Timing(name, num_bytes)
    start = time.perf_counter()
    outcome = " (failed)"
    try:
        yield timing
        outcome = ""
    finally:
        timing.seconds = time.perf_counter() - start
        logger.log(level, "%s%s", timing, outcome)


def format_bytes(num_bytes: float) -> str:
    """Write a size for people: "512 MiB", "1.5 GiB".

    >>> format_bytes(512 * 2**20), format_bytes(1.5 * 2**30), format_bytes(-7)
    ('512 MiB', '1.5 GiB', '-7 B')
    """
    size, sign = abs(num_bytes), "-" if num_bytes < 0 else ""
    unit = 0
    while size >= 1023.95 and unit < len(_BINARY) - 1:  # 1023.95 is where "%.1f" says 1024.0
        size /= 1024
        unit += 1
    text = f"{size:.0f}" if unit == 0 else f"{size:.1f}".removesuffix(".0")
    return f"{sign}{text} {_BINARY[unit]}"


def format_seconds(seconds: float) -> str:
    """Write a time for people.

    >>> format_seconds(0.0412), format_seconds(12.3), format_seconds(125), format_seconds(3725)
    ('0.041 s', '12.3 s', '2 min 05 s', '1 h 02 min')
    """
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds < 59.95:
        decimals = 3 if seconds < 0.9995 else 2 if seconds < 9.995 else 1
        return f"{seconds:.{decimals}f} s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def parse_bytes(text: str, where: str = "size") -> int:
    """Read a size: "8 GiB" and "8G" are 8 * 2**30, "8 GB" is 8 * 10**9, "512" is bytes.

    A single letter is binary, as memory is sold.

    Args:
        text: a number that is not negative, and a unit.
        where: where the user wrote it, for the message.

    Raises:
        ConfigError: if it is not a size.

    >>> parse_bytes("8 GiB") == parse_bytes("8g") == 8 * 2**30, parse_bytes("1.5GB")
    (True, 1500000000)
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match[2] and match[4]):
        raise ConfigError(where, f"{text[:40]!r} is not a size", "write it like 8GiB or 512MiB")
    prefix, suffix = match[2], (match[3] or "").lower()
    base = 1000 if suffix == "b" else 1024
    power = " kmgtp".index(prefix.lower()) if prefix else 0
    return int(Decimal(match[1]) * base**power)
