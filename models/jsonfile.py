"""Small JSON files of a model folder, read with bounds and clear errors. Free of torch."""

from __future__ import annotations

import json
from pathlib import Path

from reelpool.errors import WeightError

MAX_BYTES = 100 * 2**20


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        WeightError: if the file is missing, too large, or not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise WeightError(str(path), f"{size} bytes", f"at most {max_bytes}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightError(
            str(path), "no such file", "it in the model folder", "copy the folder again"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightError(str(path), f"unreadable JSON ({error})", "a JSON object") from None
    if not isinstance(data, dict):
        raise WeightError(str(path), f"a JSON {type(data).__name__}", "a JSON object")
    return data
