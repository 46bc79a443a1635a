"""Retention policies: which segment of a trajectory drops which.

A policy (`mem1`, `keep_last(2)`, your own function) masks the trajectory in training and prunes
the KV cache in a rollout.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from torch import Tensor

ROLES = ("prompt", "state", "action", "info")
GENERATED = ("state", "action")


def listed(name: str, values: Any, expected: str) -> list[Any]:
    """The members of a sequence or an iterator.

    Raises:
        TypeError: it is neither, or it is text.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {expected}, got {type(values).__name__}")
    return list(values)


@dataclass(frozen=True)
class Segment:
    """A run of tokens that are kept or dropped together.

    Args:
        role: "prompt", "state", "action" or "info". The model generates state and action.
        tokens: the number of tokens, or their ids.
        turn: the number of its turn, from 0; a trajectory's turns never decrease.
        depth: in how many nested branches it was written (`fold` drops a branch at its return).
        trainable: whether it is in the loss. None: if the model generated it. True trains tool
            output, False leaves out what was generated, such as an attempt that was rejected.
        weight: of each of its tokens in the loss; a token of weight 2 counts as two tokens.
        name: what policies know it by: the tool that an info came from, or the kind of a state.

    Raises:
        TypeError: `trainable`, `weight` or `name` of another type.
        ValueError: an unknown role; tokens, a turn or a depth that are negative or no integers; a
            weight that is negative or not finite.

    >>> Segment("state", [11, 12, 13], turn=1).num_tokens
    3
    >>> Segment("info", 5, turn=1).in_loss, Segment("info", 5, turn=1, trainable=True).in_loss
    (False, True)
    """

    role: str
    tokens: int | Sequence[int] | Tensor
    turn: int = 0
    depth: int = 0
    trainable: bool | None = None
    weight: float = 1.0
    name: str = ""
    num_tokens: int = field(init=False)
    ids: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: expected one of {ROLES}, got {self.role!r}")
        for name in ("turn", "depth"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")
        if self.trainable is not None and type(self.trainable) is not bool:
            raise TypeError(f"trainable: expected True, False or None, got {self.trainable!r}")
        if type(self.weight) not in (int, float):
            raise TypeError(f"weight: expected a number, got {self.weight!r}")
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight: expected a finite number >= 0, got {self.weight}")
        if not isinstance(self.name, str):
            raise TypeError(f"name: expected text, got {self.name!r}")
        if isinstance(self.tokens, int) and not isinstance(self.tokens, bool):
            if self.tokens < 0:
                raise ValueError(f"tokens: expected a count >= 0, got {self.tokens}")
            count, ids = self.tokens, None
        else:
            tokens: Any = self.tokens
            values = tokens.tolist() if hasattr(tokens, "tolist") else tokens
            if not isinstance(values, (list, tuple, range)):
                got = type(values).__name__
                raise ValueError(f"tokens: expected a count or a 1-D sequence of ids, got {got}")
            for token in values:
                if type(token) is not int:
                    raise ValueError(f"tokens: expected integer ids, got {token!r:.80}")
            if values and min(values) < 0:
                raise ValueError(f"tokens: expected ids >= 0, got {min(values)}")
            if values and max(values) >= 2**63:
                raise ValueError(f"tokens: expected ids below 2^63, got {max(values)}")
            count, ids = len(values), tuple(values)
        object.__setattr__(self, "num_tokens", count)
        object.__setattr__(self, "ids", ids)

    def __repr__(self) -> str:
        said = {name: getattr(self, name) for name in ("role", "tokens", "turn", "depth")}
        for name, default in (("trainable", None), ("weight", 1.0), ("name", "")):
            if getattr(self, name) != default:
                said[name] = getattr(self, name)
        said |= {"num_tokens": self.num_tokens, "ids": self.ids}
        return f"Segment({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    @property
    def in_loss(self) -> bool:
        """Whether its tokens are in the loss."""
        return self.role in GENERATED if self.trainable is None else self.trainable


Expires: TypeAlias = Sequence[int]
Retention: TypeAlias = Callable[[Sequence[Segment]], "Expires | tuple[Expires, Expires]"]
"""A retention policy: a function of the segments. For each segment it returns the index of the
first segment that no longer sees it (`len(segments)`: it is never dropped). It may return a second
list: for each segment, the index of the first segment that its tokens see (its floor).

A rollout calls it with the segments so far and the one about to be written. So a drop that it once
returned must stay the same when segments are added; the rollout checks this.

It may have an attribute `placeholder`: token ids that stand for each segment that it dropped, where
an engine sends the live text again. A cache that is pruned holds no placeholders.
"""


def placeholder_of(retention: Retention) -> tuple[int, ...]:
    """The ids that stand for a segment that `retention` dropped, where text is sent again."""
    return tuple(getattr(retention, "placeholder", ()))


def after_turn_writes(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """The turns that generate something, and for each the index after its last such segment."""
    ends: dict[int, int] = {}
    for index, segment in enumerate(segments):
        if segment.role in GENERATED:
            ends[segment.turn] = index + 1
    return list(ends), list(ends.values())


def mem1(segments: Sequence[Segment]) -> list[int]:
    """MEM1 (arXiv 2506.15841, section 3.1): a turn is dropped when the next one has been generated.

    The prompt stays. The state, action and info of turn t expire at the end of what turn t+1
    generates, so the info of turn t+1 sees the prompt and that turn's state and action only.

    >>> turn = lambda t: [Segment("state", 2, t), Segment("action", 1, t), Segment("info", 5, t)]
    >>> mem1([Segment("prompt", 4), *turn(1), *turn(2)])
    [7, 6, 6, 6, 7, 7, 7]
    """
    turns, ends = after_turn_writes(segments)
    expires = []
    for segment in segments:
        following = bisect_right(turns, segment.turn)
        dropped = segment.role != "prompt" and following < len(turns)
        expires.append(ends[following] if dropped else len(segments))
    return expires


def mem1_release(segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    """The mask that the released MEM1 training code builds; it differs from the paper.

    A state expires with its own turn (so no state sees the one before it), an action and an info
    with the next turn, and info tokens see only their own block.

    >>> turn = lambda t: [Segment("state", 2, t), Segment("action", 1, t), Segment("info", 5, t)]
    >>> mem1_release([Segment("prompt", 4), *turn(1), *turn(2)])
    ([7, 4, 7, 7, 7, 7, 7], [0, 0, 0, 3, 0, 0, 6])
    """
    begins: dict[int, int] = {}
    for index, segment in enumerate(segments):
        if segment.role != "prompt":
            begins.setdefault(segment.turn, index)
    turns, starts = list(begins), [*begins.values(), len(segments), len(segments)]
    expires = []
    for segment in segments:
        following = bisect_right(turns, segment.turn)
        if segment.role == "prompt":
            expires.append(len(segments))
        else:
            expires.append(starts[following + (segment.role != "state")])
    floors = [index if segment.role == "info" else 0 for index, segment in enumerate(segments)]
    return expires, floors


def keep_all(segments: Sequence[Segment]) -> list[int]:
    """Full context: nothing is ever dropped.

    >>> keep_all([Segment("prompt", 4), Segment("state", 2, 1)])
    [2, 2]
    """
    return [len(segments)] * len(segments)


def keep_last(turns: int) -> Retention:
    """Keeps the prompt and the last `turns` turns, including the one being written.

    Policies with the same number of turns are equal. They can be pickled.

    Raises:
        TypeError: turns is no integer.
        ValueError: turns < 1.

    >>> keep_last(2)([Segment("prompt", 4), *(Segment("action", 1, t) for t in range(4))])
    [5, 3, 4, 5, 5]
    >>> keep_last(2)
    keep_last(2)
    """
    if type(turns) is not int:
        raise TypeError(f"turns: expected an integer, as in keep_last(2), got {turns!r}")
    if turns < 1:
        raise ValueError(f"turns: expected at least 1, got {turns}")
    return _KeepLast(turns)


@dataclass(frozen=True, repr=False)
class _KeepLast:
    turns: int

    @property
    def __name__(self) -> str:
        return f"keep_last({self.turns})"

    def __repr__(self) -> str:
        return self.__name__

    def __call__(self, segments: Sequence[Segment]) -> list[int]:
        begins: dict[int, int] = {}
        for index, segment in enumerate(segments):
            if segment.role != "prompt":
                begins.setdefault(segment.turn, index)
        numbers, starts = list(begins), list(begins.values())
        expires = []
        for segment in segments:
            dropper = bisect_right(numbers, segment.turn) - 1 + self.turns
            dropped = segment.role != "prompt" and dropper < len(numbers)
            expires.append(starts[dropper] if dropped else len(segments))
        return expires


def fold(segments: Sequence[Segment]) -> list[int]:
    """Context folding (arXiv 2510.11967): a branch is dropped when it returns.

    A segment of depth d expires at the first later segment of smaller depth, which is where its
    branch has returned. What the branch reports back is a segment of the outer depth.

    >>> fold([Segment("prompt", 4), Segment("action", 1, 1), Segment("action", 9, 2, depth=1),
    ...       Segment("info", 2, 2), Segment("action", 1, 3)])
    [5, 5, 3, 5, 5]
    """
    expires = [len(segments)] * len(segments)
    open_branches: list[int] = []
    for index, segment in enumerate(segments):
        while open_branches and segments[open_branches[-1]].depth > segment.depth:
            expires[open_branches.pop()] = index
        open_branches.append(index)
    return expires


def retained(
    segments: Sequence[Segment], retention: Retention
) -> tuple[list[int], list[int] | None]:
    """Calls `retention` and checks its result: (expires, floors or None), as segment indices.

    Raises:
        TypeError: the result is neither a list of integers nor a pair of such lists.
        ValueError: a result of another length, a segment that expires before it ends, or a floor
            after its own segment.

    >>> retained([Segment("prompt", 4), Segment("state", 2, 1)], keep_all)
    ([2, 2], None)
    """
    if not callable(retention):
        raise TypeError(f"retention: expected a function such as mem1, got {retention!r}")
    name = getattr(retention, "__name__", repr(retention))
    answer = retention(segments)
    floors: list[int] | None = None
    try:
        if len(answer) == 2 and not hasattr(answer[0], "__index__"):
            expires, floors = ([operator.index(i) for i in cast(Any, part)] for part in answer)
        else:
            expires = [operator.index(cast(Any, i)) for i in answer]
    except TypeError as error:
        raise TypeError(
            f"{name}: expected a list of segment indices or a pair of such lists ({error})"
        ) from None
    count = len(segments)
    for label, values in (("expires", expires), ("floors", floors)):
        if values is not None and len(values) != count:
            raise ValueError(f"{name}: expected {count} {label}, got {len(values)}")
    for index, end in enumerate(expires):
        if not index < end <= count:
            raise ValueError(
                f"{name}: segment {index} must expire at {index + 1}..{count}, got {end}"
            )
    for index, first in enumerate(floors or ()):
        if not 0 <= first <= index:
            raise ValueError(f"{name}: segment {index} must see from 0..{index}, got {first}")
    return expires, floors
