"""What a stream through the VAE carries from one call to the next, as a value.

Knows nothing of the network but that its caches have names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reelpool.errors import StateError

CACHE_PREFIX = "cache."


@dataclass(frozen=True, eq=False)
class VaeState:
    """All that a stream carries from one call to the next.

    num_done: latent frames already processed.
    caches: module path -> last input frames of that temporal convolution, at most 2.
    pending: encode only: float32 pixel frames that do not fill a group yet.
    """

    num_done: int = 0
    caches: Mapping[str, Tensor] = field(default_factory=dict)
    pending: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        pending = [] if self.pending is None else [self.pending]
        return sum(tensor.nbytes for tensor in [*self.caches.values(), *pending])

    def to_tensors(self) -> dict[str, Tensor]:
        """Name everything as tensors (no copies), so that a safetensors file can hold it."""
        tensors = {CACHE_PREFIX + path: cache for path, cache in self.caches.items()}
        tensors["num_done"] = torch.tensor(self.num_done)
        if self.pending is not None:
            tensors["pending"] = self.pending
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> VaeState:
        """Inverse of `to_tensors`.

        Raises:
            StateError: if `num_done` is missing or there are tensors of other names.
        """
        rest = dict(tensors)
        num_done, pending = rest.pop("num_done", None), rest.pop("pending", None)
        if num_done is None or num_done.dtype != torch.int64 or num_done.shape or num_done < 0:
            raise StateError(
                "VAE state", f"num_done = {num_done}", "one whole number, not negative"
            )
        for name in rest:
            if not name.startswith(CACHE_PREFIX):
                raise StateError("VAE state", f"tensor {name}", "num_done, pending and cache.*")
        caches = {name.removeprefix(CACHE_PREFIX): cache for name, cache in rest.items()}
        return cls(int(num_done.item()), caches, pending)
