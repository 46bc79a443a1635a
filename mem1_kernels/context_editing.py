"""Retention policies that people run: cleared tool results, stripped reasoning, sub-agents, blocks
that a summary replaces.

As all policies, they are functions of the segments (see `mem1_kernels.retention`). They can be
pickled, and those made with the same arguments are equal.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from mem1_kernels.retention import GENERATED, Retention, Segment, after_turn_writes, fold


def strip_reasoning(keep: int = 0) -> Retention:
    """Drops the reasoning (the states) of earlier turns; actions and observations stay.

    A state is dropped when `keep` further turns have been written. With 0 it goes when its own turn
    is, so that the observation does not see it; with 1, as Anthropic's context editing has it, the
    next turn still does.

    Args:
        keep: the written turns whose states stay.

    Raises:
        TypeError: keep is no integer.
        ValueError: keep < 0.

    Source: the strategy `clear_thinking_20251015` of Anthropic's context editing; chat templates of
    reasoning models.

    >>> turn = lambda t: [Segment("state", 9, t), Segment("action", 1, t), Segment("info", 5, t)]
    >>> strip_reasoning()([Segment("prompt", 4), *turn(1), *turn(2)])
    [7, 3, 7, 7, 6, 7, 7]
    """
    _check_counts(keep=keep)
    return _StripReasoning(keep)


@dataclass(frozen=True, repr=False)
class _StripReasoning:
    keep: int

    @property
    def __name__(self) -> str:
        return f"strip_reasoning({self.keep})"

    def __repr__(self) -> str:
        return self.__name__

    def __call__(self, segments: Sequence[Segment]) -> list[int]:
        turns, ends = after_turn_writes(segments)
        expires = []
        for segment in segments:
            dropper = bisect_right(turns, segment.turn) - 1 + self.keep
            dropped = segment.role == "state" and dropper < len(turns)
            expires.append(ends[dropper] if dropped else len(segments))
        return expires


def clear_tool_results(
    trigger: int,
    keep: int = 3,
    *,
    exclude: Sequence[str] = (),
    at_least: int = 0,
    placeholder: Sequence[int] = (),
) -> Retention:
    """Clears old tool results (infos) where a turn begins with a context that has grown too large.

    Then all results but the last `keep` are cleared, if that clears at least `at_least` tokens.

    Args:
        trigger: tokens; a context with more is cleared.
        keep: the newest results, which stay.
        exclude: tools (`Segment.name`) whose results are never cleared, and do not count as kept.
        at_least: tokens; where fewer would be cleared, nothing is.
        placeholder: token ids that stand for each cleared result where an engine sends the live
            text again. A cache that is pruned in place holds nothing in its stead. The trigger does
            not count them.

    Raises:
        TypeError: numbers or ids that are no integers, or names that are no texts.
        ValueError: negative ones.

    Source: the strategy `clear_tool_uses_20250919` of Anthropic's context editing.

    >>> turn = lambda t: [Segment("action", 1, t), Segment("info", 5, t)]
    >>> policy = clear_tool_results(12, keep=1)
    >>> policy([Segment("prompt", 4), *turn(1), *turn(2), *turn(3)])
    [7, 7, 5, 7, 7, 7, 7]
    >>> policy
    clear_tool_results(12, keep=1)
    """
    _check_counts(trigger=trigger, keep=keep, at_least=at_least)
    if isinstance(exclude, str) or not all(isinstance(name, str) for name in exclude):
        raise TypeError(f"exclude: expected a sequence of names, got {exclude!r}")
    _check_counts(**{f"placeholder[{at}]": token for at, token in enumerate(placeholder)})
    return _ClearToolResults(trigger, keep, tuple(exclude), at_least, tuple(placeholder))


@dataclass(frozen=True, repr=False)
class _ClearToolResults:
    trigger: int
    keep: int
    exclude: tuple[str, ...]
    at_least: int
    placeholder: tuple[int, ...]

    @property
    def __name__(self) -> str:
        said = [f"{self.trigger}", f"keep={self.keep}"]
        for name in ("exclude", "at_least", "placeholder"):
            if value := getattr(self, name):
                said.append(f"{name}={value}")
        return f"clear_tool_results({', '.join(said)})"

    def __repr__(self) -> str:
        return self.__name__

    def __call__(self, segments: Sequence[Segment]) -> list[int]:
        expires = [len(segments)] * len(segments)
        context = 0  # tokens
        results: list[int] = []  # those that are there and may be cleared
        turn: int | None = None
        for index, segment in enumerate(segments):
            if segment.role in GENERATED and segment.turn != turn:
                turn = segment.turn
                old = results[: max(len(results) - self.keep, 0)]
                freed = sum(segments[result].num_tokens for result in old)
                if context > self.trigger and freed >= self.at_least:
                    for result in old:
                        expires[result] = index
                    results = results[len(old) :]
                    context -= freed
            context += segment.num_tokens
            if segment.role == "info" and segment.num_tokens and segment.name not in self.exclude:
                results.append(index)
        return expires


def sub_agents(segments: Sequence[Segment]) -> list[int]:
    """Sub-agents: a branch is dropped at its return, as by `fold`, and one that failed is undone.

    A branch is what has a larger `depth`. It returns with the first segment of smaller depth. If
    that is an info of the name "rollback", the turn that opened the branch is dropped too: what
    that turn wrote at the outer depth. The context is then what it was before that turn, and the
    info.

    >>> call, back = Segment("action", 1, 1), Segment("info", 2, 2, name="rollback")
    >>> inside = [Segment("info", 5, 1, depth=1), Segment("action", 9, 2, depth=1)]
    >>> sub_agents([Segment("prompt", 4), call, *inside, back, Segment("action", 1, 3)])
    [6, 4, 4, 4, 6, 6]
    """
    expires = fold(segments)
    openers: list[tuple[int, list[int]]] = []  # (depth, what opened a branch of it)
    depth = 0
    for index, segment in enumerate(segments):
        opened: list[int] = []
        while openers and openers[-1][0] > segment.depth:
            _, opened = openers.pop()
        if segment.role == "info" and segment.name == "rollback":
            for past in opened:
                expires[past] = min(expires[past], index)
        if segment.depth > depth:
            openers.append((segment.depth, _turn_before(segments, index)))
        depth = segment.depth
    return expires


def _turn_before(segments: Sequence[Segment], index: int) -> list[int]:
    """The segments that were written, just before `index`, in one turn and at one depth."""
    last = segments[index - 1] if index else None
    found: list[int] = []
    for past in range(index - 1, -1, -1):
        segment = segments[past]
        if last is None or segment.role not in GENERATED:
            break
        if (segment.turn, segment.depth) != (last.turn, last.depth):
            break
        found.append(past)
    return found


def memento(segments: Sequence[Segment]) -> list[int]:
    """Blocks of reasoning that leave the context, inside a turn, once their summary is written.

    A segment of the name "block" is dropped at the end of the next one of the name "summary", which
    has seen it. In a rollout the names come from `Generation.mark`.

    Source: MEMENTO, arXiv 2604.09852.

    >>> block = Segment("state", 9, 1, name="block")
    >>> summary = Segment("state", 2, 1, name="summary")
    >>> memento([Segment("prompt", 4), block, summary, block, summary, Segment("action", 1, 1)])
    [6, 3, 6, 5, 6, 6]
    """
    expires = [len(segments)] * len(segments)
    blocks: list[int] = []
    for index, segment in enumerate(segments):
        if segment.name == "block":
            blocks.append(index)
        elif segment.name == "summary":
            for block in blocks:
                expires[block] = index + 1
            blocks = []
    return expires


def _check_counts(**values: object) -> None:
    for name, value in values.items():
        if type(value) is not int:
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
