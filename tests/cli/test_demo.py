"""`reelpool demo` as `make demo` calls it: two Ray workers, and Ray's doors locked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
def test_demo_splits_the_guidance_over_two_workers_behind_a_token(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-m", "reelpool", "demo", "--seed", "3", "--json", "-o", "demo.mp4"],
        cwd=tmp_path,
        env={**env, "HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    by_kind = {event["event"]: event for event in events}
    assert by_kind["plan"]["strategy"] == "cfg-split"
    ready = [event["worker"] for event in events if event["event"] == "worker_ready"]
    assert sorted(ready) == ["worker-0", "worker-1"]
    assert Path(events[-1]["video"]) == tmp_path / "demo.mp4"
    assert events[-1]["seconds"] < 60
    # the pool's token lives in the environment of its processes only
    assert not (home / ".ray").exists()
