"""Cards and hosts, and the byte budget of a card made of CPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from reelpool.runtime.device import (
    Card,
    compute_threads,
    cpu_card,
    default_dtype,
    detect_cards,
    detect_host,
    torch_device,
)

MODERN = Card("cuda:0", "a card", 2**33, ("float32", "float16", "bfloat16"))
OLD = Card("cuda:1", "an old card", 2**33, ("float32", "float16"))

LIMITED = """
import sys
from pathlib import Path

import torch
from reelpool.errors import OutOfDeviceMemory
from reelpool.models.weights import SafetensorsSource
from reelpool.runtime.device import cpu_card
from reelpool.scheduler.worker import Worker

card = cpu_card(0, 96 * 2**20)
worker = Worker("w", card, 1, card.memory_bytes)
weights = SafetensorsSource(Path(sys.argv[1])).get("x")
print(int(weights[:: 2**12].max()))  # every page of 512 MiB has been read
kept = torch.ones(32 * 2**20, dtype=torch.uint8)
try:
    with worker._doing("denoise", 3, "step 3"):
        torch.ones(160 * 2**20, dtype=torch.uint8)
except OutOfDeviceMemory as error:
    print(error)
again = torch.ones(32 * 2**20, dtype=torch.uint8)  # and the process goes on
print(int(kept[-1] + again[-1]))
"""


def test_a_budget_is_refused_as_our_own_error_and_leaves_mapped_weights_out(tmp_path):
    size = 512 * 2**20
    header = {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    raw = json.dumps(header).encode()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + size)  # takes no room on the disk
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "x.safetensors")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "0",
        "cpu:0 ran out of memory during step 3 (budget 96 MiB); give it more or use a smaller size",
        "2",
    ]


def test_the_host_is_described():
    host = detect_host()
    assert 0 < host.ram_free_bytes <= host.ram_bytes
    assert host.num_cores >= 1
    assert host.name


def test_a_cpu_card_takes_its_budget_or_the_free_memory():
    assert cpu_card(3, 5).memory_bytes == 5
    free = cpu_card(0)
    assert 0 < free.memory_bytes <= detect_host().ram_bytes
    assert (free.name, free.is_cuda) == ("cpu:0", False)


def test_there_is_always_a_card():
    cards = detect_cards()
    assert cards
    assert all(card.is_cuda == torch.cuda.is_available() for card in cards)


@pytest.mark.parametrize(
    ("card", "dtype"), [(cpu_card(0, 1), "float32"), (MODERN, "bfloat16"), (OLD, "float16")]
)
def test_compute_type_of_a_card(card, dtype):
    assert default_dtype(card) == dtype


def test_torch_device_of_a_card():
    assert torch_device("cpu:3") == torch.device("cpu")
    assert torch_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("stated", "threads"), [("3", 3), ("4,2", 4), ("0", None), ("many", None), ("", None)]
)
def test_threads_are_the_stated_ones_or_the_cores(monkeypatch, stated, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", stated)
    assert compute_threads() == (threads or detect_host().num_cores)
