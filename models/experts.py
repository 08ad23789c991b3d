"""Which of a two-expert model's files is which: known by their names alone. Free of torch.

Keys and shapes of Wan 2.2's high-noise and low-noise experts are equal; every tool goes by the
words "high" and "low" in the names of files or folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

HIGH, LOW = 0, 1  # places in `ModelParts.transformers`
WORDS = ("high", "low")

# a word of its own, or before "noise"; camel case only before "Noise", or "Flow" would be low
_EXPERT = re.compile(r"(?i:(?<![a-z])(high|low)(?=[^a-z]|noise|$))|(High|Low)(?=Noise)")
# a name with one of these belongs to a model of two experts
_TWO = re.compile(r"(high|low)[ _.\-]?noise|wan[ _.\-]?2[ _.\-]?2|a14b", re.IGNORECASE)


def expert_of(path: Path) -> int | None:
    """HIGH or LOW by the file's name, else its folder's; None if neither says.

    Examples:
        >>> expert_of(Path("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf"))
        0
        >>> expert_of(Path("low/wan.gguf")), expert_of(Path("Rectified_Flow.gguf"))
        (1, None)
    """
    for name in (path.name, path.parent.name):
        if match := _EXPERT.search(name):
            return WORDS.index((match[1] or match[2]).lower())
    return None


def is_half(path: Path) -> bool:
    """Whether a file is one expert of two: its name says which, and that there are two."""
    return (
        expert_of(path) is not None and _TWO.search(f"{path.parent.name}/{path.name}") is not None
    )


def partner_name(path: Path) -> str:
    """What the other expert's file is called, if only the word differs."""
    return _swapped(path.name)


def partner(path: Path, searched: Callable[[], Sequence[Path]]) -> Path | None:
    """The other expert's file: beside, in a folder called likewise, in the search folders.

    Args:
        path: a file for which `expert_of` gives an expert.
        searched: gives files in the search folders; called if need be.
    """
    name = partner_name(path)
    folder = path.parent.with_name(_swapped(path.parent.name)) if path.parent.name else path.parent
    for candidate in (path.with_name(name), folder / name, folder / path.name):
        if candidate != path and candidate.is_file():
            return candidate
    if name == path.name:  # only the folder says which: it would be the same name again
        return None
    return next((other for other in searched() if other.name.lower() == name.lower()), None)


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file."""
    return os.path.realpath(one) == os.path.realpath(other)


def _swapped(name: str) -> str:
    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = WORDS[1 - WORDS.index(word.lower())]
        if word.isupper():
            return swapped.upper()
        return swapped.capitalize() if word[0].isupper() else swapped

    return _EXPERT.sub(other, name)
