"""Time of a step with blocks that come by over the same step with all of them resident.

    python benchmarks/swap.py [--rounds 3] [--threads 2] [--layers 4]

1.3B geometry with random weights in a float32 file that is mapped, 1,280 tokens, cond and uncond.
Copies to the card are paced: the resident step is timed first, and the rate is set so that a step's
copies take the case's share of that time. Both sides take turns; a turn is one step that is not
counted (it uses up what the ring holds from before) and one that is, and the resident side waits
until the ring is full, so that its copies fall on nobody else's time. Two figures do not depend on
what else the machine does: the share of the step that stood still for blocks, and the processor
time of both sides (the swapped one's threads copy every streamed byte twice).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import machine, table
from safetensors.torch import save_file

from reelpool.models.keys import transformer_tensors
from reelpool.models.presets import PRESETS
from reelpool.models.spec import LatentShape, NumericsProfile, TransformerSpec
from reelpool.models.weights import SafetensorsSource
from reelpool.runtime.arena import packed_bytes
from reelpool.runtime.block_runner import BlockRunner, ForwardInput
from reelpool.runtime.residency import Residency, spread
from reelpool.runtime.types import BlockRange

RESULTS = Path(__file__).parent / "results" / "swap.json"
SHAPE = LatentShape(16, 5, 32, 32)  # 1,280 tokens


@dataclass(frozen=True)
class Case:
    """One measurement. copy_share: time of a step's copies over that of its computing."""

    name: str
    resident_share: float
    ring_slots: int
    copy_share: float
    at_most: float


CASES = (
    Case("none resident, copies 1/1.2 of computing", 0.0, 2, 1 / 1.2, 1.03),
    Case("half resident, copies 1/1.2 of computing", 0.5, 2, 1 / 1.2, 1.03),
    Case("half resident, one slot, copies 1/2.4", 0.5, 1, 1 / 2.4, 1.03),
    Case("none resident, copies 1.5 of computing", 0.0, 2, 1.5, 1.05),
    Case("half resident, copies 1.5 of computing", 0.5, 2, 1.5, 1.05),
)


def random_file(spec: TransformerSpec, path: Path) -> SafetensorsSource:
    """Weights of a geometry in float32, about as large as real ones."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in transformer_tensors(spec).items():
        values = torch.randn(shape, generator=draw)
        tensors[name] = 1 + 0.1 * values if "norm" in name else values / math.sqrt(shape[-1])
    save_file(tensors, path)
    return SafetensorsSource(path)


def step_of(runner: BlockRunner) -> list[torch.Tensor]:
    """Cond and uncond in one call."""
    spec = runner.spec
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(SHAPE.dims, generator=draw)
    forwards = []
    for name in ("cond", "uncond"):
        rows = torch.randn(512, spec.text_dim, generator=draw)
        rows[60:] = 0
        steps = torch.full((SHAPE.frames,), 500.0)
        forwards.append(ForwardInput(name, rows, SHAPE, latents, steps))
    whole = BlockRange(0, spec.num_layers, spec.num_layers)
    return [
        velocity for velocity in runner.run(whole, forwards) if isinstance(velocity, torch.Tensor)
    ]


@dataclass(frozen=True)
class Turn:
    """Seconds of a step: on the clock, on the processors, and waiting for blocks."""

    wall: float
    processor: float
    waited: float


def turn(runner: BlockRunner) -> Turn:
    """Time the second of two steps."""
    step_of(runner)
    stream = runner._stream
    assert stream is not None
    waited, processor, began = stream.waited, time.process_time(), time.perf_counter()
    step_of(runner)
    wall = time.perf_counter() - began
    return Turn(wall, time.process_time() - processor, stream.waited - waited)


def settle(runner: BlockRunner, pause: float) -> None:
    """Wait until no copy is under way and the host's buffers are full."""
    assert runner._stream is not None
    seen = (-1, -1)
    while runner._stream.copied != seen:
        seen = runner._stream.copied
        time.sleep(pause)


def measure(case: Case, resident: BlockRunner, source: SafetensorsSource, rounds: int) -> Any:
    """Both sides of a case in turns."""
    spec, numerics = resident.spec, resident.numerics
    total = spec.num_layers
    stay = frozenset(spread(total, round(case.resident_share * total)))
    streamed = [index for index in range(total) if index not in stay]
    num_bytes = sum(packed_bytes(resident._read, index) for index in streamed)
    compute = min(turn(resident).wall for _ in range(2))  # a neighbour's load makes it longer
    residency = Residency(stay, case.ring_slots, num_bytes / 1e9 / (case.copy_share * compute))
    copy = num_bytes / 1e9 / (residency.copy_gb_s or 1)
    swapped = BlockRunner(spec, source, numerics, torch.device("cpu"), residency)
    equal = all(torch.equal(*p) for p in zip(step_of(swapped), step_of(resident), strict=True))
    pairs = []
    for _ in range(rounds):
        ours = turn(swapped)
        settle(swapped, 1.2 * copy / len(streamed) + 0.5)
        pairs.append((ours, turn(resident)))
    swapped.free()
    ratios = [ours.wall / max(theirs.wall, copy) for ours, theirs in pairs]
    stalls = [ours.waited / ours.wall for ours, _ in pairs]
    processor = [ours.processor / theirs.processor for ours, theirs in pairs]
    return {
        **asdict(case),
        "blocks": total,
        "streamed_bytes": num_bytes,
        "copy_gb_s": residency.copy_gb_s,
        "copy_seconds": copy,
        "swapped_seconds": statistics.median(ours.wall for ours, _ in pairs),
        "resident_seconds": statistics.median(theirs.wall for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "waited_share": statistics.median(stalls),
        "processor_ratio": statistics.median(processor),
        "bits_equal": equal,
        "load": os.getloadavg()[0],
    }


def report(records: list[dict[str, Any]]) -> str:
    rows = [
        (
            record["name"],
            *(f"{record[key]:.2f}" for key in ("swapped_seconds", "resident_seconds")),
            f"{record['copy_seconds']:.2f}",
            f"{record['ratio']:.3f} ({record['low']:.3f}-{record['high']:.3f})",
            record["at_most"],
            f"{record['waited_share']:.3f}",
            f"{record['processor_ratio']:.3f}",
            record["bits_equal"],
            f"{record['load']:.1f}",
        )
        for record in records
    ]
    header = (
        "case",
        "s",
        "resident s",
        "copy s",
        "over the longer",
        "at most",
        "waited",
        "processor",
        "bits",
        "load",
    )
    return table(rows, header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    spec = replace(PRESETS["wan2.1-t2v-1.3b"].transformer, num_layers=given.layers)
    with tempfile.TemporaryDirectory() as folder:
        source = random_file(spec, Path(folder) / "weights.safetensors")
        everything = Residency(frozenset(range(given.layers)), 0)
        resident = BlockRunner(spec, source, NumericsProfile(), torch.device("cpu"), everything)
        records: list[dict[str, Any]] = []
        for case in (case for case in CASES if given.only in case.name):
            records.append(measure(case, resident, source, given.rounds))
            found = {"machine": machine(), "threads": given.threads, "results": records}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(report(records))


if __name__ == "__main__":
    main()
