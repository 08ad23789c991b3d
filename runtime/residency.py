"""Which blocks of a transformer stay on a card, and how the others come by. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Residency:
    """What a block runner keeps on its card.

    resident: indices of the blocks that stay.
    ring_slots: places on the card, each as large as the largest block, that the others take turns
        in. One is enough; with two the next block comes while one computes.
    copy_gb_s: on a card made of CPU, 1e9 bytes a second that blocks come at, at most; None for as
        fast as memory is copied.
    """

    resident: frozenset[int]
    ring_slots: int = 2
    copy_gb_s: float | None = None

    def streamed(self, start: int, stop: int) -> tuple[int, ...]:
        """The blocks of a range [start, stop) that take turns; none if each has a place.

        >>> Residency(frozenset({0, 2}), 1).streamed(0, 5)
        (1, 3, 4)
        >>> Residency(frozenset({0, 2}), 3).streamed(0, 5)
        ()
        """
        passing = tuple(index for index in range(start, stop) if index not in self.resident)
        if len(passing) <= self.ring_slots:
            return ()
        if not self.ring_slots:
            raise ValueError(f"blocks {passing} neither stay on the card nor have a slot there")
        return passing


def spread(total: int, num_resident: int) -> tuple[int, ...]:
    """Indices of residents, evenly spread.

    So the blocks that come by follow residents, whose time hides their copies, and the gap from the
    last resident to the first of the next step is no longer than any other.

    >>> spread(10, 4)
    (0, 2, 5, 7)
    """
    return tuple(total * index // num_resident for index in range(num_resident))
