"""LoRAs on one card: what they do to each record of weights, read once and kept for the next call.

A record with its LoRAs is made anew for every call, which costs no product and copies no matrix: so
strengths may differ from call to call. It does not know jobs.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..models.lora import Lora, LoraReport
from ..models.lora_weights import Change, load_change, with_changes
from ..models.spec import TransformerSpec
from ..models.wan_weights import Weights, map_tensors, tensors_of

# LoRAs kept beyond those of the call at hand: jobs that take turns would read theirs in every step
# (rank 64 of a 14B model: 600 MB).
MAX_LORAS = 4


@dataclass
class _Held:
    """A LoRA's report for this transformer, and its changes by record."""

    report: LoraReport
    changes: dict[str, Change] = field(default_factory=dict)


class LoraCache:
    """LoRAs for one transformer on one device. Not thread-safe. Owned by a BlockRunner."""

    def __init__(self, spec: TransformerSpec, device: torch.device) -> None:
        """Nothing is read yet."""
        self._spec, self._device = spec, device
        self._active: tuple[Lora, ...] = ()
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def use(self, loras: Sequence[Lora]) -> str:
        """Say which LoRAs `apply` puts on, in their order; those of strength 0 are left out.

        Returns:
            A key that tells sets and strengths apart, "" for none: what is kept and depends on
            weights must be kept by it.
        Raises:
            WeightError: if no entry of one of them fits this transformer.
        """
        self._active = ()
        active = tuple(lora for lora in loras if lora.strength)
        for lora in active:
            digest = lora.file.digest
            if digest not in self._held:
                self._held[digest] = _Held(lora.file.match(self._spec))
            self._held.move_to_end(digest)
        needed = len({lora.file.digest for lora in active})
        while len(self._held) > max(MAX_LORAS, needed):
            self._held.popitem(last=False)
        self._active = active
        if not active:
            return ""
        parts = "".join(f"{lora.file.digest}:{lora.strength!r};" for lora in active)
        return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    def apply(self, part: str, weights: Weights, keep: bool = True) -> Weights:
        """A record of weights with the LoRAs in use: itself where they leave it alone.

        Args:
            part: as in `load_change`.
            weights: the record, on the device.
            keep: False for a record that leaves the device after use: so do its factors.
        Raises:
            WeightError: if a LoRA has values that are not finite.
        """
        changes = []
        for lora in self._active:
            held = self._held[lora.file.digest]
            change = held.changes.get(part)
            if change is None:
                loaded = load_change(lora.file, held.report, part, weights)
                change = map_tensors(loaded, lambda tensor: tensor.to(self._device))
                if keep:
                    held.changes[part] = change
            changes.append((change, lora.strength))
        return with_changes(weights, changes)

    @property
    def num_bytes(self) -> int:
        """Bytes of factors and differences on the device."""
        tensors = (
            t for held in self._held.values() for t in tensors_of(tuple(held.changes.values()))
        )
        return sum(tensor.nbytes for tensor in tensors)

    def clear(self) -> None:
        """Drop all; the next call reads what it needs."""
        self._held.clear()
        self._active = ()
