"""How many bytes a piece of work takes at its most: tensors, a card's allocator, the process.

`meter(device)` counts what is made inside of a `with`, and only that: weights, caches and inputs
that were there before are not counted. On the CPU and on the meta device, which computes shapes
only, it is exact to the byte, so that the peak of a 14B forward is known without a card and without
weights. On an NVIDIA card torch's allocator keeps the count; that path has not been run on one.

It knows nothing of models. Meters of one kind may not be nested: on a card the inner one would
reset the outer one's peak.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")  # "5" makes the highest resident memory start again from now


class Meter(Protocol):
    """Bytes made since the meter began, those that are gone again not counted.

    After the `with` they stay as they were at its end.
    """

    @property
    def live_bytes(self) -> int:
        """Bytes that live now."""
        ...

    @property
    def peak_bytes(self) -> int:
        """The most that lived at a time."""
        ...


@contextmanager
def meter(device: torch.device) -> Iterator[Meter]:
    """Count the memory that work on a device takes, inside of a `with`.

    Args:
        device: a CUDA device, whose allocator is asked, scratch memory of kernels included; for any
            other, tensor storages are counted. On the meta device attention counts as what a fused
            kernel takes.
    """
    if device.type == "cuda":
        card = CardMemory(device)
        try:
            yield card
        finally:
            card.stop()
        return
    with LiveTensors(device.type) as live, FusedAttention():
        yield live


@dataclass(frozen=True)
class Made:
    """A tensor storage: how large, and the operator and shape that it first came from."""

    num_bytes: int
    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensor storages made inside of it, as long as they live.

    Exact for every operator that the dispatcher sees in this thread; scratch memory inside of a
    kernel is not seen. What existed before is not counted, nor are views of it, such as a
    transposed weight: storages are counted, not tensors, and an operator's input that was never
    some operator's output is known to be old.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        """Count nothing yet; tensors on devices of other types are never counted."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch types its class, not this
        self._device_type = device_type
        self._live: dict[int, Made] = {}
        self._at_peak: dict[int, Made] = {}
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._live_bytes = self._peak_bytes = self._num_made = 0

    @property
    def live_bytes(self) -> int:
        """Bytes that live now."""
        return self._live_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that lived at a time."""
        return self._peak_bytes

    @property
    def at_peak(self) -> list[Made]:
        """What lived when most did, the largest first."""
        return sorted(self._at_peak.values(), key=lambda made: -made.num_bytes)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count what is new in its result."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage())
        with self:  # in inference mode, operators made of others come whole: their inner
            result = func.decompose(*args, **kwargs)  # tensors are to be seen, too
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage not in self._known and storage.device.type == self._device_type:
                self._known.add(storage)
                self._count(storage, Made(storage.nbytes(), str(func), *_kind(tensor)))
        return result

    def _count(self, storage: torch.UntypedStorage, made: Made) -> None:
        self._num_made += 1
        self._live[self._num_made] = made
        self._live_bytes += made.num_bytes
        if self._live_bytes > self._peak_bytes:
            self._peak_bytes = self._live_bytes
            self._at_peak = dict(self._live)
        weakref.finalize(storage, self._forget, self._num_made)

    def _forget(self, number: int) -> None:
        self._live_bytes -= self._live.pop(number).num_bytes


class FusedAttention(TorchFunctionMode):
    """On the meta device, attention makes what a fused kernel makes: the output and a sum a row.

    There torch takes the plain formula with a score for every pair of tokens: 80 GiB at 14B,
    832x480x81, which no card ever holds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Send attention on the meta device to the fused operator."""
        attend = _fused_attention if func is F.scaled_dot_product_attention else func
        return attend(*args, **(kwargs or {}))


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    if not query.is_meta:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    made: torch.Tensor = fused(query, key, value, attn_mask=attn_mask)[0]
    return made


class CardMemory:
    """What torch's allocator gave out on a CUDA device since then. Not run on a card yet."""

    def __init__(self, device: torch.device) -> None:
        """Begin to count; resets the allocator's own peak."""
        self._device = device
        self._before = torch.cuda.memory_allocated(device)
        self._end: tuple[int, int] | None = None
        torch.cuda.reset_peak_memory_stats(device)

    def stop(self) -> None:
        """Keep the figures as they are."""
        self._end = (self.live_bytes, self.peak_bytes)

    @property
    def live_bytes(self) -> int:
        """Bytes given out now beyond those of the start; below 0 if older ones were freed."""
        return self._end[0] if self._end else self._now(torch.cuda.memory_allocated(self._device))

    @property
    def peak_bytes(self) -> int:
        """The most given out at a time beyond those of the start."""
        peak = torch.cuda.max_memory_allocated
        return self._end[1] if self._end else self._now(peak(self._device))

    def _now(self, num_bytes: int) -> int:
        return num_bytes - self._before


@dataclass(frozen=True)
class Peak:
    """Peak memory of one run.

    live_bytes: what `meter` counted.
    process_bytes: by how much the process's resident memory grew at its peak, kernels' scratch and
        the allocator's slack included; None where the system does not tell (other than Linux).
    """

    live_bytes: int
    process_bytes: int | None


def peak_of(run: Callable[[], object], device: torch.device | None = None) -> Peak:
    """Measure the memory of a program that has run before.

    Args:
        run: the program.
        device: where it computes, the CPU by default.
    """
    gc.collect()
    before = resident_bytes() if _reset_peak() else None
    with meter(device or torch.device("cpu")) as count:
        run()
    if before is None:
        return Peak(count.peak_bytes, None)
    highest = _status_bytes("VmHWM")
    return Peak(count.peak_bytes, None if highest is None else max(0, highest - before))


def resident_bytes() -> int | None:
    """This process's resident memory now; None where the system does not tell."""
    return _status_bytes("VmRSS")


def _reset_peak() -> bool:
    """Make the process's highest resident memory start again; whether that could be done."""
    try:
        RESET.write_text("5")
    except OSError:  # not Linux, or a container that forbids it
        return False
    return True


def _status_bytes(field: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(li.split()[1]) * 1024 for li in lines if li.startswith(f"{field}:")), None)


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _kind(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
