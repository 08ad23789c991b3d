"""Which of a two-expert model's files is which: known by their names alone. Free of torch.

Keys and shapes of Wan 2.2's high-noise and low-noise experts are equal; every tool goes by the
words "high" and "low" in the names of files or folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .catalogue import is_weights, without_suffix

HIGH, LOW = 0, 1  # places in `ModelParts.transformers`
WORDS = ("high", "low")

# A word of its own, or before "noise". In camel case ("wan22I2VHigh") before no other word than
# "Noise", a version or a type, or "HighRes" would be high.
_EXPERT = re.compile(
    r"(?i:(?<![a-z])(?:high|low)(?=[^a-z]|noise|$))"
    r"|(?:High|Low)(?=[^A-Za-z]|Noise|[VvQq]\d|FP|BF|GGUF|$)"
)
_NOISE = re.compile(r"[ _.\-]?noise", re.IGNORECASE)
# folders that are called after what lies in them: "low_vram" is another thing
_FOLDER = re.compile(r"(?:high|low)(?:[ _.\-]?noise)?(?:[ _.\-]?model)?", re.IGNORECASE)
# models of one transformer, also of Wan 2.2: TI2V-5B, and merges of both experts
_ONE = re.compile(r"(?i:(?<![\d.])5b(?![a-z])|(?<![a-z])(?:ti2v|rapid|aio)(?![a-z]))|TI2V")
# a name with one of these belongs to a model of two experts
_TWO = re.compile(r"(?:high|low)[ _.\-]?noise|a14b", re.IGNORECASE)
_WAN22 = re.compile(r"wan[ _.\-]?2[ _.\-]?2", re.IGNORECASE)
_LARGE = re.compile(r"14b|i2v|t2v", re.IGNORECASE)  # of Wan 2.2 these come in two experts
# words for how weights are stored, in which the two experts of a user may differ
_QUANT = re.compile(
    r"(?<![a-z0-9])(?:ud|i?q\d(?:_(?:[01kslm]|nl|x+[sl]))*|(?:bf|fp|f)(?:8|16|32)"
    r"|e\dm\d(?:fn)?|scaled|mixed)(?![a-z0-9])"
)


def expert_of(path: Path) -> int | None:
    """HIGH or LOW by the file's name, else by its folder's; None if neither says.

    A file whose name says that it is a model of one transformer is neither.

    Examples:
        >>> expert_of(Path("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf"))
        0
        >>> expert_of(Path("low/wan.gguf")), expert_of(Path("Rectified_Flow.gguf"))
        (1, None)
    """
    if _ONE.search(path.name):
        return None
    folder = path.parent.name
    found = _words(path.name) or (_words(folder) if _FOLDER.fullmatch(folder) else [])
    return WORDS.index(found[0][0].lower()) if found else None


def is_half(path: Path) -> bool:
    """Whether a file is one expert of two: names say which, and that there are two."""
    if expert_of(path) is None:
        return False
    name = path.name if _words(path.name) else f"{path.parent.name}/{path.name}"
    return _TWO.search(name) is not None or (
        _WAN22.search(name) is not None and _LARGE.search(name) is not None
    )


def partner_name(path: Path) -> str:
    """What the other expert's file is called, if only the word differs."""
    return _swapped(path.name)


def partner(path: Path, searched: Callable[[], Sequence[Path]]) -> Path | None:
    """The other expert's file: beside, in a folder called likewise, in the search folders.

    If none has the right name, the one file beside that differs only in how its weights are stored:
    Q5_K_M beside Q4_K_M.

    Args:
        path: a file; one that is no expert has no other.
        searched: gives files in the search folders; called if need be.
    """
    own, name = expert_of(path), partner_name(path)
    if own is None:
        return None
    folder = path.parent.with_name(_swapped(path.parent.name)) if path.parent.name else path.parent
    for candidate in (path.with_name(name), folder / name, folder / path.name):
        if expert_of(candidate) == 1 - own and candidate.is_file():
            return candidate
    for candidate in searched() if name != path.name else ():  # else only its folder says which
        if candidate.name.lower() == name.lower():
            return candidate
    places = dict.fromkeys((path.parent, folder))
    near = [
        other for place in places for other in _weights_in(place) if _bare(other) == _bare(path)
    ]
    others = [other for other in near if expert_of(other) == 1 - own]
    return others[0] if len(others) == 1 else None


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file."""
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there
        return os.path.realpath(one) == os.path.realpath(other)


def _words(name: str) -> list[re.Match[str]]:
    """Where a name says "high" or "low"; before "noise" it counts more than elsewhere."""
    found = list(_EXPERT.finditer(name))
    return [match for match in found if _NOISE.match(name, match.end())] or found


def _weights_in(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if is_weights(name) and (folder / name).is_file()]


def _bare(path: Path) -> str:
    """A file's name without the expert, and without how its weights are stored."""
    name = without_suffix(path.name)
    for match in reversed(_words(name)):
        name = f"{name[: match.start()]}*{name[match.end() :]}"
    return re.sub(r"[ _.\-]", "", _QUANT.sub("", name.lower()))


def _swapped(name: str) -> str:
    for match in reversed(_words(name)):
        word = match[0]
        swapped = WORDS[1 - WORDS.index(word.lower())]
        if word.isupper():
            swapped = swapped.upper()
        elif word[0].isupper():
            swapped = swapped.capitalize()
        name = name[: match.start()] + swapped + name[match.end() :]
    return name
