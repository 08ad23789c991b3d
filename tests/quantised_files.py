"""Tiny files to quantise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from reelpool.models.quantise import Progress, Report, write_quantised
from reelpool.models.quantise_plan import plan_quantised
from reelpool.models.quantise_rules import TARGETS, find_target
from reelpool.models.spec import TransformerSpec
from tests.model_forms import T2V, original, tensors_of


def run(path: Path, out: Path, kind: str, progress: Progress | None = None) -> Report:
    return write_quantised(plan_quantised(path, out, find_target(kind)), progress)


def wan(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    spec: TransformerSpec = T2V,
    **changes: Tensor,
) -> tuple[Path, dict[str, Tensor]]:
    """A file with original names, and what is in it. Write `a__b` for the name `a.b`."""
    tensors = tensors_of(spec, dtype)
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return original(folder, tensors, spec), tensors


def out_of(folder: Path, kind: str) -> Path:
    """A name for the new file."""
    return folder / f"out{TARGETS[kind].suffix}"
