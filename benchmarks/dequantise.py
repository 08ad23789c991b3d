"""Decoding GGUF blocks: ours over gguf-py's and diffusers', every type, equal threads and types.

    python benchmarks/dequantise.py                # every type: about 90 s
    python benchmarks/dequantise.py --only Q4_K    # types whose name contains "Q4_K"

The matrix has 2048 x 2048 values, as many as `Linear` decodes at a time: a tensor above 32 MiB
costs more in page faults than in decoding, whoever decodes. Blocks are random bytes with scales as
models have them. Two programs take turns (`measure.paired`). gguf-py decodes to float32 only, so it
is measured there.
Diffusers is measured twice and the faster one counts: as its layers call it (float16, then to the
type of the layer), and with its functions told to compute in the type of the result.
GB/s are of results written; divide by 4 (float32) or 2 for values. Results are merged by type into
results/dequantise.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from measure import PairedTime, machine, paired, table
from torch import Tensor

from reelpool.models.quant import KINDS, Quantised

RESULTS = Path(__file__).parent / "results" / "dequantise.json"
SHAPE = (2048, 2048)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = {"gguf-py": 1.3, "diffusers": 1.0}  # times as fast
SCALES = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}  # of the first half


def matrix(kind: str) -> Quantised:
    """Random blocks. Scales and minima are small: NaN and infinite numbers take longer."""
    block, draw = KINDS[kind], np.random.default_rng(0)
    count = SHAPE[0] * SHAPE[1] // block.size
    blocks = draw.integers(0, 256, (count, block.num_bytes), dtype=np.uint8)
    if kind == "BF16":
        blocks[:] = torch.randn(count, 1).bfloat16().view(torch.uint8).numpy()
    elif kind not in ("MXFP4", "NVFP4", "IQ1_M"):
        start = SCALES.get(kind, 0)
        numbers = 2 if kind in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K") else 1
        halves = (draw.standard_normal((count, numbers)) / 64).astype(np.float16)
        blocks[:, start : start + 2 * numbers] = halves.view(np.uint8)
    return Quantised(torch.from_numpy(blocks.reshape(SHAPE[0], -1)), kind, SHAPE)


def diffusers_runs(stored: Quantised, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """Diffusers' ways to the same result; empty if it cannot decode the type."""
    kind = KINDS[stored.kind]
    decode = dequantize_functions.get(GGMLQuantizationType[stored.kind])
    if decode is None:
        return []
    blocks = stored.data.view(-1, kind.num_bytes)

    def as_in_layers() -> Tensor:
        return decode(blocks, kind.size, kind.num_bytes).reshape(SHAPE).to(dtype)

    def told() -> Tensor:
        return decode(blocks, kind.size, kind.num_bytes, dtype).reshape(SHAPE).to(dtype)

    return [as_in_layers, told]


def measure(kind: str, dtype: torch.dtype, threads: int, rounds: int) -> dict[str, Any]:
    """One type to one dtype."""
    stored = matrix(kind)

    def ours() -> Tensor:
        return stored.dequantise(dtype)

    others: dict[str, PairedTime] = {}
    if dtype == torch.float32:
        data, number = stored.data.numpy(), GGMLQuantizationType[kind]
        others["gguf-py"] = paired(ours, lambda: dequantize(data, number), rounds, threads)
    runs = [paired(ours, run, rounds, threads) for run in diffusers_runs(stored, dtype)]
    if runs:
        others["diffusers"] = max(runs, key=lambda time: time.ratio)
    num_bytes = SHAPE[0] * SHAPE[1] * dtype.itemsize
    seconds = min([time.ours for time in others.values()], default=float("nan"))
    return {
        "type": kind,
        "dtype": str(dtype).removeprefix("torch."),
        "ours_gb_s": round(num_bytes / seconds / 1e9, 2),
        "others": {
            name: {"gb_s": round(num_bytes / time.theirs / 1e9, 2), **time.as_json()}
            for name, time in others.items()
        },
    }


def show(results: list[dict[str, Any]]) -> None:
    rows, missed = [], []
    for result in results:
        row = [result["type"], result["dtype"], result["ours_gb_s"]]
        for name, target in TARGETS.items():
            other = result["others"].get(name)
            row += ["-", "-"] if other is None else [other["gb_s"], f"{1 / other['ratio']:.1f}x"]
            if other is not None and 1 / other["ratio"] < target:
                missed.append(f"{result['type']} {result['dtype']} against {name}")
        rows.append(row)
    header = ("type", "to", "ours GB/s", "gguf-py GB/s", "faster", "diffusers GB/s", "faster")
    print(table(rows, header))
    print("targets", TARGETS, "missed by " + ", ".join(missed) if missed else "all met")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="types whose name contains this")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    merged = {(r["type"], r["dtype"]): r for r in stored.get("results", [])}
    for kind in (kind for kind in KINDS if kind != "F16" and arguments.only in kind):
        for dtype in DTYPES:
            if dtype != torch.float32 and not diffusers_runs(matrix(kind), dtype):
                continue  # nothing to compare with
            result = measure(kind, dtype, arguments.threads, arguments.rounds)
            merged[kind, result["dtype"]] = result
    results = list(merged.values())
    RESULTS.parent.mkdir(exist_ok=True)
    content = {"machine": machine(), "shape": SHAPE, "targets": TARGETS, "results": results}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
