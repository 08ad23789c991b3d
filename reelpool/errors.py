"""Every error a user can meet, as one tree.

    ReelpoolError
      ConfigError            a bad job file, argument or pool description
      PlanError              no plan can be made
        InfeasiblePlan       nothing fits: per card needed and available bytes
      WeightError            a weight file that cannot be used (file, tensor, found, expected)
        MissingTensor
        ShapeMismatch
        UnknownQuantType     a block type that this version cannot decode
      DeviceError
        OutOfDeviceMemory
      TransferError
        WireFormatError
      WorkerLost             a worker died or fell silent              [retryable]
      NumericError           a tensor that is not finite: stage, block, step
      StateError             a saved state that does not belong to this job
      Cancelled

Each class takes its fields as positional arguments and hands them to `super().__init__`: errors
cross process borders through Ray, which loses keyword-only fields (and then `except` misses the
class). `str(error)` is one sentence: what, where, found, expected, what to do. This module lies
below everything and imports nothing of reelpool.
"""

from __future__ import annotations

from typing import ClassVar


class ReelpoolError(Exception):
    """Base of all errors that carry a sentence for the user."""

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1


class ConfigError(ReelpoolError):
    """A value the user gave cannot be used: where it was given, what was found, what would do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, problem: str, advice: str = "") -> None:
        super().__init__(where, problem, advice)
        self.where, self.problem, self.advice = where, problem, advice

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" + (f"; {self.advice}" if self.advice else "")


class PlanError(ReelpoolError):
    """No plan can be made for this job on this pool."""


class InfeasiblePlan(PlanError):
    """Nothing fits: what was needed, what is there, the smallest change that would fit."""

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem, advice)
        self.problem, self.advice = problem, advice

    def __str__(self) -> str:
        return self.problem + (f"; {self.advice}" if self.advice else "")


class WeightError(ReelpoolError):
    """A weight or model file that cannot be used.

    Fields: the file, what was found there, what was expected, what to do about it.
    """

    def __init__(self, file: str, found: str, expected: str, advice: str = "") -> None:
        super().__init__(file, found, expected, advice)
        self.file, self.found, self.expected, self.advice = file, found, expected, advice

    def __str__(self) -> str:
        tail = f"; {self.advice}" if self.advice else ""
        return f"{self.file}: found {self.found}, expected {self.expected}{tail}"


class MissingTensor(WeightError):
    """A tensor the model needs is not in its file."""

    def __init__(self, file: str, tensor: str, expected: str, advice: str = "") -> None:
        ReelpoolError.__init__(self, file, tensor, expected, advice)
        self.file, self.tensor, self.expected, self.advice = file, tensor, expected, advice
        self.found = "nothing"

    def __str__(self) -> str:
        tail = f"; {self.advice}" if self.advice else ""
        # an index may name anything; a line break would make two sentences of one
        name = self.tensor if self.tensor.isprintable() else repr(self.tensor)
        return f"{self.file}: tensor {name} is missing, expected {self.expected}{tail}"


class ShapeMismatch(WeightError):
    """A tensor has another shape than the model's configuration says."""

    def __init__(
        self, file: str, tensor: str, found: tuple[int, ...], expected: tuple[int, ...]
    ) -> None:
        ReelpoolError.__init__(self, file, tensor, found, expected)
        self.file, self.tensor = file, tensor
        self.found, self.expected = str(list(found)), str(list(expected))

    def __str__(self) -> str:
        return (
            f"{self.file}: tensor {self.tensor} has shape {self.found}, "
            f"expected {self.expected}; the file is damaged or belongs to another model"
        )


class UnknownQuantType(WeightError):
    """A tensor is stored in a type of blocks that this version cannot decode."""

    def __init__(self, file: str, tensor: str, found: str, expected: str) -> None:
        ReelpoolError.__init__(self, file, tensor, found, expected)
        self.file, self.tensor, self.found, self.expected = file, tensor, found, expected

    def __str__(self) -> str:
        return (
            f"{self.file}: tensor {self.tensor} is stored as {self.found}, expected one of "
            f"{self.expected}; use a file quantised to one of these"
        )


class DeviceError(ReelpoolError):
    """A card cannot do what was asked of it."""


class OutOfDeviceMemory(DeviceError):
    """A card's memory (or a CPU card's byte budget) ran out."""

    retryable: ClassVar[bool] = True

    def __init__(self, device: str, what: str, budget_bytes: int) -> None:
        super().__init__(device, what, budget_bytes)
        self.device, self.what, self.budget_bytes = device, what, budget_bytes

    def __str__(self) -> str:
        return (
            f"{self.device} ran out of memory during {self.what} "
            f"(budget {self.budget_bytes / 2**20:.0f} MiB); give it more or use a smaller size"
        )


class TransferError(ReelpoolError):
    """Bytes did not travel between two processes."""


class WireFormatError(TransferError):
    """A packet that is damaged or was not made by this version."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(found, expected)
        self.found, self.expected = found, expected

    def __str__(self) -> str:
        return f"wire packet: found {self.found}, expected {self.expected}"


class WorkerLost(ReelpoolError):
    """A worker died or fell silent while it held a call."""

    retryable: ClassVar[bool] = True

    def __init__(self, worker: str, what: str, reason: str) -> None:
        super().__init__(worker, what, reason)
        self.worker, self.what, self.reason = worker, what, reason

    def __str__(self) -> str:
        return f"worker {self.worker} was lost during {self.what}: {self.reason}"


class NumericError(ReelpoolError):
    """A tensor is not finite: the users' black video, caught where it starts."""

    def __init__(self, stage: str, where: str, advice: str = "") -> None:
        super().__init__(stage, where, advice)
        self.stage, self.where, self.advice = stage, where, advice

    def __str__(self) -> str:
        tail = f"; {self.advice}" if self.advice else ""
        return f"{self.stage}: values that are not finite in {self.where}{tail}"


class StateError(ReelpoolError):
    """A saved state that is damaged or does not belong to this job."""

    def __init__(self, what: str, found: str, expected: str) -> None:
        super().__init__(what, found, expected)
        self.what, self.found, self.expected = what, found, expected

    def __str__(self) -> str:
        return f"{self.what}: found {self.found}, expected {self.expected}"


class Cancelled(ReelpoolError):
    """The user asked to stop."""

    exit_code: ClassVar[int] = 130

    def __str__(self) -> str:
        return "cancelled"
