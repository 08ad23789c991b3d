"""How text in a job's fields is read: sizes, numbers, files. Free of Ray and torch.

Each takes what the user wrote and gives what the field's type checks; what it cannot read goes on
unchanged, for the type to refuse.
"""

from __future__ import annotations

import re
from pathlib import Path

from reelpool.errors import ConfigError

from ..runtime.log import parse_bytes


def split_size(value: object) -> object:
    """Turn "832x480" into (832, 480); anything else goes on unchanged."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX]\s*(\d{1,6})\s*", value)
    return (int(match[1]), int(match[2])) if match else value


def split_guidance(value: object) -> object:
    """Turn "4,3" into (4.0, 3.0) and "4" into 4.0; anything else goes on unchanged."""
    if not isinstance(value, str):
        return value
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        return value
    return numbers if len(numbers) > 1 else numbers[0]


def split_lora(value: object) -> object:
    """Turn "a.safetensors:0.8,0.5" into its parts; a name whose end is no number is a file's."""
    if not isinstance(value, str):
        return value
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)"
    match = re.fullmatch(rf"(.+):({number})(?:,({number}))?", value.strip())
    if match is None:
        return {"file": value}
    low = {"low": float(match[3])} if match[3] else {}
    return {"file": match[1], "strength": float(match[2]), **low}


def read_bytes(value: object) -> object:
    """Turn "2GiB" into bytes; anything else goes on unchanged."""
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except ConfigError:
        return value


def listed(value: object) -> object:
    """Put a single value into a list."""
    return value if value is None or isinstance(value, list | tuple) else [value]


def say_something(text: str) -> str:
    """Refuse text of nothing but spaces."""
    if not text.strip():
        raise ValueError("empty")
    return text


def without_nul(path: Path) -> Path:
    """Expand `~`; refuse what no file system takes."""
    if "\0" in str(path):
        raise ValueError("no path")
    return path.expanduser()
