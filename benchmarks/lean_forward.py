"""Time of the lean forward over the plain one: token chunks, and heads in groups.

    python benchmarks/lean_forward.py [--rounds 5] [--threads 2]

1.3B geometry with random weights, 7,168 tokens, float32, 2 blocks, a step of cond and uncond. Plain
takes all tokens and all heads at once; the others take the profile's chunk of 2,048 tokens, and
more or fewer groups of heads. Each runs in turn with the plain one, so that a neighbour's load
falls on both.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from against_diffusers import SHAPES, SMALL, Step, random_model, random_prompts
from measure import machine, paired, table

from reelpool.models.spec import NumericsProfile
from reelpool.runtime.meter import peak_of

RESULTS = Path(__file__).parent / "results" / "lean_forward.json"
SPEC = replace(SMALL, num_layers=2)
PLAIN = NumericsProfile(token_chunk=2**30)
CASES = {  # name: (profile, at most so many times the plain forward)
    "token chunks": (NumericsProfile(), 1.02),
    "4 head groups": (NumericsProfile(head_groups=4), 1.12),
    "8 head groups": (NumericsProfile(head_groups=8), 1.12),
}


def measure(rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """Time over the plain forward, peak bytes and the largest difference of each case."""
    torch.set_num_threads(threads)
    model = random_model(SPEC, torch.float32)
    prompts = random_prompts(SPEC, 60)

    def step(numerics: NumericsProfile) -> Step:
        return Step(SPEC, model, SHAPES[7168], numerics, prompts)

    plain = step(PLAIN)
    expected, records = plain.ours()[0], {}
    plain_peak = peak_of(plain.ours).live_bytes
    for name, (numerics, most) in CASES.items():
        lean = step(numerics)
        difference = (lean.ours()[0] - expected).abs().max().item()
        records[name] = {
            "numerics": asdict(numerics),
            "at_most": most,
            "time": paired(lean.ours, plain.ours, rounds, threads).as_json(),
            "peak_bytes": peak_of(lean.ours).live_bytes,
            "plain_peak_bytes": plain_peak,
            "largest_difference": difference,
        }
    return records


def report(records: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, record in records.items():
        when = record["time"]
        rows.append(
            (
                name,
                f"{when['ours']:.3f}",
                f"{when['theirs']:.3f}",
                f"{when['ratio']:.3f} ({when['low']:.3f}-{when['high']:.3f})",
                record["at_most"],
                *(f"{record[k] / 2**20:.1f}" for k in ("peak_bytes", "plain_peak_bytes")),
                f"{record['largest_difference']:.1e}",
                f"{when['load']:.1f}",
            )
        )
    header = ("case", "s", "plain s", "ratio", "at most", "MiB", "plain MiB", "difference", "load")
    return table(rows, header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    records = measure(given.rounds, given.threads)
    RESULTS.write_text(json.dumps({"machine": machine(), "results": records}, indent=1) + "\n")
    print(report(records))


if __name__ == "__main__":
    main()
