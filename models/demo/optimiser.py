"""What both trainers share: Muon, averaged weights, the learning-rate curve, two processes by gloo.

Muon (Keller Jordan, 2024): momentum made orthogonal by Newton-Schulz steps, for matrices and for
convolution kernels flattened to matrices; everything else is AdamW's. On two shared cores two
processes of one thread each did three times the steps of one process with two threads.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTUM = 0.95
WEIGHT_DECAY = 0.01
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
NEWTON_SCHULZ_STEPS = 4
EMA_DECAY = 0.998


def join(rank: int, world_size: int, port: int) -> None:
    """Meet the other training process on this host; a single process does nothing."""
    if world_size > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)


def leave() -> None:
    """End the meeting, if there was one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def average_gradients(params: Sequence[Tensor]) -> None:
    """Average gradients over the processes, in bfloat16; a missing gradient counts as zero."""
    if not dist.is_initialized():
        return
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
    flat = torch.cat([grad.flatten() for grad in grads]).bfloat16()
    dist.all_reduce(flat)
    mean = flat.float() / dist.get_world_size()
    for param, piece in zip(params, mean.split([p.numel() for p in params]), strict=True):
        param.grad = piece.view_as(param).clone()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Each process orthogonalises its share of the matrices."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(list(params), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            updates = self._updates(params)
            for param, update in zip(params, updates, strict=True):
                rows, columns = param.shape[0], param[0].numel()
                param.mul_(1 - group["lr"] * WEIGHT_DECAY)
                scale = max(1.0, rows / columns) ** 0.5
                param.add_(update.view_as(param), alpha=-group["lr"] * scale)

    def _updates(self, params: list[Tensor]) -> list[Tensor]:
        """Orthogonalised momentum of every matrix, summed up over the processes' shares."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        groups: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for index, param in enumerate(params):
            assert param.grad is not None
            grad, state = param.grad.flatten(1), self.state[param]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - MOMENTUM)
            if index % size == rank:
                wanted = grad.lerp(state["momentum"], MOMENTUM)
                groups.setdefault((wanted.shape[0], wanted.shape[1]), []).append((index, wanted))
        updates = [torch.zeros(p.shape[0], p[0].numel()) for p in params]
        for members in groups.values():
            for (index, _), made in zip(
                members, orthogonalise(torch.stack([m for _, m in members])), strict=True
            ):
                updates[index] = made
        if size > 1 and updates:
            flat = torch.cat([update.flatten() for update in updates]).bfloat16()
            dist.all_reduce(flat)
            updates = list(flat.float().split([p.numel() for p in params]))
        return updates


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of (n, rows, columns) matrices near 1, in bfloat16."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = (x.mT if is_tall else x).float()
    return result


class Training:
    """Parameters, their two optimisers and their running average. Not thread-safe.

    Matrices chosen by `is_matrix` are Muon's, the rest AdamW's with clipped gradients. `average`
    holds the averaged weights, which are the ones to ship.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        is_matrix: Callable[[str, Tensor], bool],
        muon_lr: float,
        adam_lr: float,
    ) -> None:
        self.params = dict(params)
        matrices = [p for name, p in self.params.items() if is_matrix(name, p)]
        chosen = {id(p) for p in matrices}
        self._others = [p for p in self.params.values() if id(p) not in chosen]
        adam = torch.optim.AdamW(self._others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self._optimisers: list[torch.optim.Optimizer] = [adam]
        if matrices:
            self._optimisers.append(Muon(matrices, muon_lr))
        self._rates = [muon_lr if isinstance(o, Muon) else adam_lr for o in self._optimisers]
        self.average = {name: p.detach().clone() for name, p in self.params.items()}
        self.num_steps = 0

    def step(self, loss: Tensor, rate: float) -> None:
        """One update.

        Args:
            loss: this process's loss.
            rate: factor of both learning rates, 0 to 1 (`rate_at`).
        """
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(list(self.params.values()))
        torch.nn.utils.clip_grad_norm_(self._others, 1.0)
        for optimiser, lr in zip(self._optimisers, self._rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = lr * rate
            optimiser.step()
        self.num_steps += 1
        decay = min(EMA_DECAY, (1 + self.num_steps) / (10 + self.num_steps))
        with torch.no_grad():
            for name, param in self.params.items():
                self.average[name].lerp_(param, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if there had been no stop."""
        return {
            "params": {name: p.detach() for name, p in self.params.items()},
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self._optimisers],
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(state["params"][name])
                self.average[name].copy_(state["average"][name])
        for optimiser, saved in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.num_steps = state["num_steps"]


def rate_at(step: int, num_steps: int, warm_up: int, decay_from: float) -> float:
    """Factor of the learning rates: linear warm-up, constant, linear to 2 %.

    >>> [rate_at(step, 100, 10, 0.5) for step in (0, 9, 50, 75, 100)]
    [0.1, 1.0, 1.0, 0.5, 0.02]
    """
    progress = step / num_steps
    decay = 1.0 if progress <= decay_from else (1 - progress) / (1 - decay_from)
    return min(1.0, (step + 1) / warm_up) * max(0.02, decay)


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint so that a half-written one never takes its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        torch.save(dict(state), file)
    os.replace(file.name, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save`: tensors, numbers and text only."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def decibels(squared_error: Tensor) -> Tensor:
    """PSNR of errors of videos in [-1, 1].

    >>> float(decibels(torch.tensor(4.0)))
    -0.0
    """
    return -10 * torch.log10(squared_error / 4)


def mean_of_last(values: Sequence[float], count: int = 50) -> float:
    """Mean of the last values, for a log line; NaN of none."""
    last = values[-count:]
    return sum(last) / len(last) if last else math.nan
