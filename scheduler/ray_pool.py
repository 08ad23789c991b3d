"""The Ray pool: one actor per card, on this machine or on a running cluster.

Payloads are packets of uint8 arrays, which Ray moves out of band at wire speed. Actors are never
restarted and calls never retried by Ray: the executor alone issues calls. A reference is a Ray
ObjectRef; results go from worker to worker without passing through the driver.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, cast

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from reelpool.errors import PlanError, ReelpoolError, WorkerLost

from ..runtime.device import Card, detect_host
from ..runtime.wire import Packet
from .events import Emit, WorkerReady
from .pool import Ref, WorkerInfo
from .worker import Worker

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
OBJECT_STORE_BYTES = 512 * 2**20  # Ray's own default, 30 % of RAM, would compete with weights


class RayPool:
    """Workers as Ray actors. Owned by one driver thread."""

    def __init__(self, cards: Sequence[Card], num_threads: int, capped: bool, emit: Emit) -> None:
        """Start Ray on this machine and one worker per card.

        Args:
            cards: the cards.
            num_threads: CPU threads of each worker.
            capped: whether each card's memory is a hard cap on its process.
            emit: told about each worker that answers.
        Raises:
            PlanError: if a worker does not answer within two minutes.
        """
        self._started = time.perf_counter()
        _start_ray({_resource(index): 1.0 for index in range(len(cards))})
        self._actors: dict[str, Any] = {}
        infos = []
        for index, card in enumerate(cards):
            name = f"worker-{index}"
            limit = card.memory_bytes if capped else None
            options = _actor_class().options(resources={_resource(index): 1.0}, num_cpus=0)
            self._actors[name] = options.remote(name, card, num_threads, limit)
            infos.append(WorkerInfo(name, card, detect_host().name))
        self._infos = tuple(infos)
        self._calls: dict[str, tuple[str, str]] = {}  # by hex: a kept ref would pin its object
        self._await_workers(emit)

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """All workers, by index."""
        return self._infos

    def put(self, packet: Packet) -> Ref:
        """Put a packet into the object store (of the driver: never inside a worker)."""
        return cast(Ref, ray.put(packet))

    def submit(self, worker: str, method: str, *args: object) -> Ref:
        """Queue a compute call."""
        return self._call("compute", worker, method, args)

    def control(self, worker: str, method: str, *args: object) -> Ref:
        """Call a control method beside the computation in progress."""
        return self._call("control", worker, method, args)

    def wait(self, refs: Sequence[Ref], timeout_s: float) -> list[Ref]:
        """References that are done."""
        done, _ = ray.wait(list(refs), num_returns=1, timeout=timeout_s, fetch_local=False)
        return list(done)

    def get(self, ref: Ref) -> object:
        """The result of a call that is done, Ray's errors turned into ours."""
        worker, method = self._calls.pop(_hex(ref), ("driver", "put"))
        try:
            return ray.get(ref, timeout=START_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, ReelpoolError):
                raise error.cause from None
            raise
        except (RayActorError, ObjectLostError, WorkerCrashedError, GetTimeoutError) as error:
            raise WorkerLost(worker, method, str(error).strip().splitlines()[0]) from None

    def close(self) -> None:
        """End the workers and the Ray that was started for them."""
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        ray.shutdown()

    def _call(self, group: str, worker: str, method: str, args: tuple[object, ...]) -> Ref:
        bound = getattr(self._actors[worker], method).options(concurrency_group=group)
        ref = bound.remote(*args)
        self._calls[_hex(ref)] = (worker, method)
        return cast(Ref, ref)

    def _await_workers(self, emit: Emit) -> None:
        pings = {self.control(name, "ping"): info for name, info in self._pairs()}
        deadline = time.monotonic() + START_TIMEOUT_S
        while pings:
            done = self.wait(list(pings), timeout_s=1.0)
            for ref in done:
                info = pings.pop(ref)
                self.get(ref)
                seconds = time.perf_counter() - self._started
                emit(WorkerReady(info.name, info.card.name, info.card.memory_bytes, seconds))
            if not done and time.monotonic() > deadline:
                names = ", ".join(sorted(info.name for info in pings.values()))
                self.close()
                raise PlanError(f"{names} did not answer within {START_TIMEOUT_S:.0f} s")

    def _pairs(self) -> list[tuple[str, WorkerInfo]]:
        return [(info.name, info) for info in self._infos]


def _hex(ref: Ref) -> str:
    return str(cast(Any, ref).hex())


def _resource(index: int) -> str:
    """The custom resource that stands for a card: it tells a second driver who holds it."""
    return f"reelpool_card_{index}"


def _actor_class() -> Any:
    """`Worker` as an actor: one compute call at a time, control calls beside it."""
    return ray.remote(
        max_restarts=0,
        max_task_retries=0,
        concurrency_groups={"compute": 1, "control": 1},
    )(Worker)


def _start_ray(resources: dict[str, float]) -> None:
    ray.init(
        address="local",
        num_cpus=1,
        num_gpus=0,
        resources=resources,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
