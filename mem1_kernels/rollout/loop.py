"""The turn loop: drop, write, read, until every row has ended.

There is one loop for all engines. An engine brings a `Backend`, which holds the rows' context and
writes their turns; the loop asks the retention policy what to drop, asks the environment for
observations, and keeps the record that training needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from mem1_kernels._text import error_text
from mem1_kernels.retention import Segment, listed, placeholder_of, retained
from mem1_kernels.rollout.engine import (
    EngineError,
    Generation,
    Respond,
    Rollout,
    Turn,
    check_count,
    read_ids,
)
from mem1_kernels.trajectory import ONE_RUN, Positions, Trajectory


@dataclass
class Written:
    """One turn as a backend wrote it.

    Args:
        token_ids: what was sampled, the stop included.
        log_probs: of each of them.
        closed: whether a stop ended the turn.
        error: why the row cannot go on, or "". With an error, the turn does not count.
    """

    token_ids: list[int]
    log_probs: list[float]
    closed: bool
    error: str = ""


class Backend(Protocol):
    """What an engine does for the turn loop. The loop calls, for each row and turn:

    1. `drop` with what the new turn no longer sees;
    2. `write`, for all rows at once; a backend whose `marks` is True calls `row.wrote_on` there
       after every token, and drops what that returns before the next one;
    3. `drop` with what the observation no longer sees, and `read` with the observation;
    4. `retire`, once, when the row has ended.
    """

    def drop(self, row: RolloutRow, segments: Sequence[int]) -> None:
        """`row.segments[i]`, for each i in `segments`, has left the context.

        What was read before this call was read while these segments were still there.
        """

    def write(self, rows: Sequence[RolloutRow], number: int) -> Sequence[Written]:
        """Writes turn `number` of each row, and raises the rows' `peak_context` as needed."""

    def read(self, row: RolloutRow, token_ids: Sequence[int]) -> None:
        """An observation has joined the context."""

    def retire(self, row: RolloutRow) -> None:
        """The row has ended; its context is no longer needed."""


class RolloutRow:
    """The record of one trajectory while it is written.

    Args:
        index: which prompt it belongs to.
        prompt: its ids.
        generation: how it is written.
        positions: the form that the engine computes.
        vocabulary: ids from 0 to this number, exclusive, are known to the model; None: unknown.

    Attributes:
        segments: what is written so far.
        dropped_at: for each segment, the index of the segment before which it was dropped; 0: it
            is in the context.
        turns: what was generated, turn by turn.
        depth: of what comes next.
        peak_context: the most tokens that the context held at once; the backend says it.
        error: why the row ended before its time, or "".
        raised: what ended it, if that was an exception.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        generation: Generation,
        positions: Positions,
        vocabulary: int | None = None,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.generation = generation
        self.positions = positions
        self.vocabulary = vocabulary
        self.segments = [Segment("prompt", prompt)]
        self.dropped_at = [0]
        self.turns: list[Turn] = []
        self.log_probs: list[float] = []
        self.depth = 0
        self.peak_context = 0
        self.error = ""
        self.raised: Exception | None = None
        self.marked = 0  # how many tokens of the turn being written are in segments already
        self._check_known("prompts", prompt)

    def drop_before(self, upcoming: Segment) -> list[int]:
        """Marks what `upcoming` and all after it no longer see; returns those segments' indices.

        Raises:
            ValueError: the policy hides with a floor what is in the context, or drops a prompt
                that is sent again every turn.
        """
        retention = self.generation.retention
        expires, floors = retained([*self.segments, upcoming], retention)
        name = getattr(retention, "__name__", repr(retention))
        if floors is not None:
            raise ValueError(
                f"retention: expected a policy without floors, got {name}: a floor hides keys that "
                "later tokens see again, so an engine can neither drop them nor hide them"
            )
        now = len(self.segments)
        fresh = [past for past in range(now) if expires[past] <= now and not self.dropped_at[past]]
        for past in fresh:
            self.dropped_at[past] = now
        if self.positions == "reprefill" and self.dropped_at[0]:
            raise ValueError(
                f"retention: {name} drops the prompt, but positions='reprefill' sends every turn "
                "behind the prompt"
            )
        if self.positions == "compact":
            alive = [
                not dropped
                for segment, dropped in zip(self.segments, self.dropped_at, strict=True)
                if segment.num_tokens
            ]
            if not alive[0] or alive[1:] != sorted(alive[1:]):
                raise ValueError(f"retention: {ONE_RUN}; {name} leaves others")
        return fresh

    def wrote_on(self, number: int, token_ids: Sequence[int]) -> list[int]:
        """Ends a segment inside a turn, if the token just written is a mark.

        Args:
            number: of the turn.
            token_ids: what the turn holds so far.

        Returns:
            The indices of the segments that the next token and all after it no longer see.

        What `mark` raises, and what is no name, ends the row once its turn is written.

        Raises:
            ValueError: as for `drop_before`.
        """
        if self.generation.mark is None or self.raised is not None:
            return []
        fresh = list(token_ids[self.marked :])
        try:
            name = self.generation.mark(list(fresh))
            if name is None:
                return []
            segment = Segment("state", fresh, number, self.depth, name=name)
        except Exception as error:  # whatever foreign code raises for a row ends this row only
            self.raised = error
            return []
        self.add(segment)
        self.marked = len(token_ids)
        return self.drop_before(Segment("state", 0, number, self.depth))

    def wrote(self, number: int, written: Written) -> None:
        """Adds a turn that was generated, or what of it is behind its last mark.

        Raises:
            ValueError: `state_tokens` gave a number that is not the length of a part of it.
        """
        ids, state_tokens = written.token_ids, self.generation.state_tokens
        state = state_tokens(list(ids)) if state_tokens else 0
        if type(state) is not int or not 0 <= state <= len(ids):
            raise ValueError(f"state_tokens: expected 0 to {len(ids)}, got {state!r}")
        begin, self.marked = self.marked, 0
        state = max(state, begin)
        parts = (("state", ids[begin:state]), ("action", ids[state:]))
        for segment in [Segment(role, part, number, self.depth) for role, part in parts]:
            self.add(segment)
        self.log_probs += written.log_probs
        self.turns.append(Turn(self.index, number, ids, written.closed, self.depth))

    def observation(self, observed: Sequence[int]) -> Segment:
        """The observation behind the last turn: first drop what it does not see, then add it.

        Raises:
            TypeError: what is observed is not a sequence of integers, a depth is no integer, or a
                name no text.
            ValueError: ids outside the vocabulary, or a depth below 0.
        """
        turn, info_name = self.turns[-1], self.generation.info_name
        ids = read_ids(f"respond, row {self.index}", observed)
        self._check_known("respond", ids)
        name = "" if info_name is None else info_name(turn)
        if self.generation.depth is not None:
            depth = self.generation.depth(turn)
            check_count("depth", depth, 0)
            self.depth = depth
        return Segment("info", ids, turn.number, self.depth, name=name)

    def broke_off(self, number: int) -> None:
        """Takes back what marks have ended of a turn that does not count."""
        while self.segments[-1].turn == number:
            self.segments.pop()
            self.dropped_at.pop()
        self.dropped_at = [min(dropped, len(self.segments)) for dropped in self.dropped_at]
        self.marked = 0

    def _check_known(self, name: str, ids: list[int]) -> None:
        """Raises ValueError unless the model knows the ids."""
        limit = self.vocabulary
        if limit is not None and ids and not 0 <= min(ids) <= max(ids) < limit:
            raise ValueError(
                f"{name}, row {self.index}: expected token ids from 0 to {limit - 1}, "
                f"got {min(ids)} to {max(ids)}"
            )

    def add(self, segment: Segment) -> None:
        """Adds a segment to the context."""
        self.segments.append(segment)
        self.dropped_at.append(0)

    def live_ids(self) -> list[int]:
        """The ids in the context behind the prompt, with the policy's placeholder for each segment
        that was dropped: what an engine sends again."""
        placeholder = placeholder_of(self.generation.retention)
        return [
            token
            for segment, dropped in zip(self.segments[1:], self.dropped_at[1:], strict=True)
            if segment.num_tokens
            for token in (placeholder if dropped else segment.ids or ())
        ]

    def finish(self) -> Rollout:
        """The finished trajectory.

        Raises:
            ValueError: for the whole trajectory the policy drops elsewhere than it did on the way.
        """
        retention = self.generation.retention
        trajectory = Trajectory(self.segments, retention)
        expires, _ = retained(self.segments, retention)
        for index, (said, done) in enumerate(zip(expires, self.dropped_at, strict=True)):
            if (done or len(self.segments)) != said:
                raise ValueError(
                    f"retention: segment {index} of row {self.index} expires at segment {said}, "
                    f"but the rollout dropped it at {done or 'none'}: a policy must drop between "
                    "turns or at marks, and never change what it said of earlier drops"
                )
        log_probs = torch.zeros(trajectory.num_tokens)
        rollout = Rollout(
            trajectory, log_probs, self.positions, self.peak_context, self.turns, self.error
        )
        log_probs[rollout.sampled] = torch.tensor(self.log_probs)
        return rollout


def open_rows(
    prompts: Sequence[Sequence[int]],
    generation: Generation,
    positions: Positions,
    vocabulary: int | None = None,
) -> list[RolloutRow]:
    """One row per prompt.

    Args:
        vocabulary: ids from 0 to this number, exclusive, are known to the model; None: unknown.

    Raises:
        TypeError: prompts that are not sequences of integers, or no `Generation`.
        ValueError: no prompts, an empty one, or one with ids outside the vocabulary.
    """
    if not isinstance(generation, Generation):
        raise TypeError(f"generation: expected a Generation, got {type(generation).__name__}")
    read = [read_ids("prompts", prompt) for prompt in listed("prompts", prompts, "a list")]
    if not read or not all(read):
        raise ValueError("prompts: expected at least one, and none of them empty")
    return [
        RolloutRow(index, ids, generation, positions, vocabulary) for index, ids in enumerate(read)
    ]


def run_turns(
    rows: Sequence[RolloutRow], backend: Backend, respond: Respond, generation: Generation
) -> list[Rollout]:
    """Runs every row to its end; one rollout per row, in order.

    A row that the backend cannot go on with ends with its error, and the others go on. So does a
    row whose reply is not a sequence of ids that the model knows, or for which `state_tokens`,
    `depth`, `mark` or `info_name` of the generation raises.

    Raises:
        EngineError: no row at all could write its first turn.
        TypeError: `respond` returns no sequence.
        ValueError: replies for another number of rows; a policy that drops inside a turn without a
            mark, takes back a drop, or hides with a floor what the context still holds; marks for
            an engine that writes whole turns.
        Exception: what was raised for the first row, where something was for every row in its first
            turn.
    """
    if generation.mark is not None and not getattr(backend, "marks", False):
        raise ValueError(
            "mark: this engine writes whole turns, so nothing can be dropped inside one; expected "
            "None, or HFEngine"
        )
    active = list(rows)
    for number in range(1, generation.max_turns + 1):
        for row in active:
            backend.drop(row, row.drop_before(Segment("state", 0, number, row.depth)))
        written = backend.write(active, number)
        for row, turn in zip(active, written, strict=True):
            if turn.error:
                row.error = turn.error
                row.broke_off(number)
                backend.retire(row)
            else:
                with _ends_alone(row, backend):
                    if row.raised is not None:
                        raise row.raised
                    row.wrote(number, turn)
                if row.error:
                    row.broke_off(number)
        active = [row for row in active if not row.error]
        if not active:
            break
        replies = respond([row.turns[-1] for row in active])
        replies = listed("respond", replies, "a list of replies")
        if len(replies) != len(active):
            raise ValueError(f"respond: expected {len(active)} replies, got {len(replies)}")
        going = []
        for row, observed in zip(active, replies, strict=True):
            if observed is None or number == generation.max_turns:
                backend.retire(row)
                continue
            with _ends_alone(row, backend):
                info = row.observation(observed)
            if row.error:
                continue
            backend.drop(row, row.drop_before(info))
            row.add(info)
            backend.read(row, info.ids or ())
            going.append(row)
        active = going
        if number == 1 and rows[0].raised and all(row.raised for row in rows):
            raise rows[0].raised
    if not any(row.turns for row in rows):
        raise rows[0].raised or EngineError(rows[0].error)
    return [row.finish() for row in rows]


@contextmanager
def _ends_alone(row: RolloutRow, backend: Backend) -> Iterator[None]:
    """What is raised inside ends this row, with the error recorded."""
    try:
        yield
    except Exception as error:  # whatever foreign code raises for a row ends this row only
        row.raised = error
        row.error = error_text(error)
        backend.retire(row)
