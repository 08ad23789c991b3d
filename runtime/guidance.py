"""Classifier-free guidance: two velocities become one.

Source: Ho and Salimans, arXiv 2207.12598, in the form Wan uses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .types import Branch


def needs_uncond(guidance: float) -> bool:
    """Whether the model must be evaluated without the prompt too."""
    return guidance > 1


def combine(velocities: Mapping[Branch, Tensor], guidance: float) -> Tensor:
    """Push the velocity away from what the model would do without the prompt.

    Args:
        velocities: "cond" and, where `needs_uncond`, "uncond"; (1, C, F, h, w), any float dtype.
        guidance: 1 leaves "cond" as it is.
    Returns:
        (1, C, F, h, w) float32.
    """
    cond = velocities["cond"].to(torch.float32)
    if not needs_uncond(guidance):
        return cond
    uncond = velocities["uncond"].to(torch.float32)
    return uncond + guidance * (cond - uncond)
