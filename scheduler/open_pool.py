"""From a pool's description to a running pool, or to the cards it would have."""

from __future__ import annotations

from ..runtime.device import (
    Card,
    compute_threads,
    cpu_card,
    default_dtype,
    detect_cards,
    detect_host,
)
from .cards import PoolCard
from .events import Emit, PoolStarting
from .pool import InProcessPool, WorkerPool
from .pool_spec import PoolSpec, parse_pool
from .ray_environment import set_ray_environment


def describe_pool(text: str) -> tuple[PoolCard, ...]:
    """The cards that `open_pool` would give, for planning without starting anything.

    Raises:
        ConfigError: if the text is no pool.
    """
    spec = parse_pool(text)
    cards = _cards(spec)
    names = ["here"] if _in_process(spec, cards) else [f"worker-{i}" for i in range(len(cards))]
    host = detect_host().name
    return tuple(pool_card(name, host, card) for name, card in zip(names, cards, strict=True))


def open_pool(text: str, emit: Emit) -> WorkerPool:
    """Start the workers of a pool.

    Raises:
        ConfigError: if the text is no pool.
        PlanError: if workers do not come up.
    """
    spec = parse_pool(text)
    cards = _cards(spec)
    emit(PoolStarting(text, len(cards)))
    threads = compute_threads()
    if _in_process(spec, cards):
        return InProcessPool(cards[0], threads, emit)
    set_ray_environment()
    from .ray_pool import RayPool  # takes a second, reads the environment, and one card needs none

    return RayPool(cards, max(1, threads // len(cards)), spec.memory_bytes is not None, emit)


def pool_card(worker: str, host: str, card: Card) -> PoolCard:
    """A card as the planner sees it."""
    return PoolCard(
        worker,
        host,
        card.memory_bytes,
        card.dtypes,
        default_dtype(card),
        is_cpu=not card.is_cuda,
        host_ram_bytes=detect_host().ram_bytes,
    )


def _cards(spec: PoolSpec) -> tuple[Card, ...]:
    if spec.local_workers is None:
        return detect_cards()
    return tuple(cpu_card(index, spec.memory_bytes) for index in range(spec.local_workers))


def _in_process(spec: PoolSpec, cards: tuple[Card, ...]) -> bool:
    return spec.local_workers is None and len(cards) == 1
