"""A worker with a hard memory budget, in a process of its own as in production."""

import subprocess
import sys

CODE = """
import torch
from reelpool.errors import OutOfDeviceMemory
from reelpool.models.files import open_model
from reelpool.models.spec import NumericsProfile
from reelpool.runtime.device import cpu_card
from reelpool.runtime.types import BlockRange, ModelRef
from reelpool.scheduler.worker import Worker

budget = 12 * 2**20  # the demo's blocks alone are 23 MiB in float32
worker = Worker("small", cpu_card(0, budget), 1, budget)
model = ModelRef("demo", open_model("demo").digest, NumericsProfile())
try:
    worker.load_blocks(model, BlockRange(0, 6, 6))
except OutOfDeviceMemory as error:
    print(error)
print(worker.status()["doing"])
"""


def test_a_budget_too_small_for_the_model_is_one_clear_error():
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0].startswith("cpu:0 ran out of memory during load of blocks 0:6 (budget 12 MiB)")
    assert lines[1] == "idle"
