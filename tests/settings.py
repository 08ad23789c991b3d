"""Settings of small jobs for tests: the demo model, few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reelpool.scheduler.job import Settings


def demo_settings(folder: Path, name: str = "job-1", **changes: Any) -> Settings:
    """A job of 4 steps and 17 frames with the demo model, writing under `folder`.

    Guidance is that of both experts unless `guidance_low` is given.
    """
    values: dict[str, Any] = {
        "id": name,
        "prompt": "a yellow star moves right over a navy background",
        "negative": "",
        "model": "demo",
        "output": folder / f"{name}.mp4",
        "width": 64,
        "height": 64,
        "frames": 17,
        "fps": 8.0,
        "steps": 4,
        "guidance": 3.0,
        "shift": 3.0,
        "seed": 1,
        "solver": "unipc",
        "dtype": "auto",
        "attention": "sdpa",
        "save_latents": None,
        "run_dir": folder / f"{name}.run",
        "zoom": 1,
    }
    values |= changes
    return Settings(**{"guidance_low": values["guidance"], **values})
