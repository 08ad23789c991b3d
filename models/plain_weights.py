"""Stored weights as plain tensors, for networks that are loaded whole: encoders and the VAE."""

from __future__ import annotations

import torch
from torch import Tensor

from .finite import check_finite
from .quant import plain
from .weights import WeightSource


def load_plain(
    source: WeightSource, name: str, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """One weight on a device, decoded there if it is quantised.

    What needs neither conversion nor transfer stays a read-only view of its file.

    Raises:
        MissingTensor: if there is none of that name.
        WeightError: if there is a NaN or an infinity in it.
    """
    value = plain(source.matrix(name).to(device), dtype).to(dtype)
    return check_finite(source, name, value)
