"""Which token of a trajectory lies in which slot of a session, and what a drop does to them.

Plain numpy, on the scheduler's side: it decides here, and the workers only move bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Slots:
    """The slots of one session.

    Attributes:
        positions: int64, the trajectory position of each slot that was there at the last drop.
        offset: what the position of every later slot is ahead of its index: the tokens dropped.
    """

    positions: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    offset: int = 0

    def held(self, count: int) -> np.ndarray:
        """The positions of the first `count` slots, int64 `[count]`."""
        known = self.positions[:count]
        return np.concatenate([known, np.arange(len(known), count) + self.offset])


@dataclass
class Drop:
    """What a drop does.

    Attributes:
        source: int64 `[survivors]`, the old slot of what each slot holds afterwards.
        slots: the session afterwards.
    """

    source: np.ndarray
    slots: Slots

    @property
    def holes(self) -> np.ndarray:
        """The slots that are filled, ascending."""
        return np.flatnonzero(self.source != np.arange(len(self.source)))


def read_spans(asked: Any) -> list[tuple[int, int]]:
    """What a request asks to drop: pairs (start, end) of positions, the end exclusive.

    Raises:
        ValueError: anything else.

    >>> read_spans([[3, 5], [9, 9]])
    [(3, 5), (9, 9)]
    """

    def fits(span: Any) -> bool:
        numbers = isinstance(span, Sequence) and [type(x) for x in span] == [int, int]
        return numbers and 0 <= span[0] <= span[1]

    listed = isinstance(asked, Sequence) and not isinstance(asked, str | bytes)
    if not listed or not all(fits(span) for span in asked):
        raise ValueError(
            f"drop: expected pairs [start, end] of positions, 0 <= start <= end, got {asked!r}"
        )
    return [(start, end) for start, end in asked]


def read_asked(params: Any) -> tuple[list[tuple[int, int]], list[str]]:
    """What a request's sampling parameters ask of the plug-in: (spans to drop, texts that stop).

    They come from outside, and an exception in the scheduler would end the engine.

    Raises:
        ValueError: anything but `extra_args={"mem1": {"drop": spans, "stop": texts}}` or less.
    """
    asked = (getattr(params, "extra_args", None) or {}).get("mem1")
    if asked is None:
        return [], []
    if not isinstance(asked, dict) or not set(asked) <= {"drop", "stop"}:
        raise ValueError(f"mem1: expected an object with drop and stop, got {asked!r:.80}")
    stop = asked.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(x, str) and x for x in stop):
        raise ValueError(f"stop: expected a list of texts, got {stop!r:.80}")
    return read_spans(asked.get("drop", [])), stop


def drop(slots: Slots, count: int, spans: Sequence[tuple[int, int]]) -> Drop | None:
    """Drops the tokens at these positions from a session that holds `count` slots.

    With n survivors, those in slots >= n go to the dead slots < n, in order; all others stay.

    Returns:
        None where nothing is dropped.

    Raises:
        ValueError: nothing survives, or a span reaches behind what the session holds.

    >>> dropped = drop(Slots(), 6, [(1, 3)])
    >>> dropped.source.tolist(), dropped.slots.positions.tolist(), dropped.slots.offset
    ([0, 4, 5, 3], [0, 4, 5, 3], 2)
    """
    positions = slots.held(count)
    alive = np.ones(count, bool)
    for start, end in spans:
        if end > count + slots.offset:
            raise ValueError(
                f"drop: expected positions up to {count + slots.offset}, which the session holds, "
                f"got {end}"
            )
        alive &= (positions < start) | (positions >= end)
    survivors = int(alive.sum())
    if survivors == count:
        return None
    if survivors == 0:
        raise ValueError(f"drop: expected something to survive, got {list(spans)} of {count} slots")
    source = np.arange(survivors)
    source[~alive[:survivors]] = survivors + np.flatnonzero(alive[survivors:])
    return Drop(source, Slots(positions[source], slots.offset + count - survivors))


def in_order(moves: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Joins moves that may run at once, int64 `[2, moves]` each: (from, to).

    The drops of one step follow each other: a later one may write a block that an earlier one gave
    up, and so must come after what that one read. Those that do not touch each other are joined.

    >>> first, second = np.array([[5], [1]]), np.array([[9], [5]])
    >>> [moves.tolist() for moves in in_order([first, second])]
    [[[5], [1]], [[9], [5]]]
    >>> [moves.tolist() for moves in in_order([first, np.array([[9], [7]])])]
    [[[5, 9], [1, 7]]]
    """
    joined: list[list[np.ndarray]] = []
    touched: set[int] = set()
    for each in moves:
        if each.shape[1] == 0:
            continue
        here = set(each.ravel().tolist())
        if not joined or not touched.isdisjoint(here):
            joined.append([])
            touched = set()
        joined[-1].append(each)
        touched |= here
    return [np.concatenate(group, axis=1) for group in joined]
