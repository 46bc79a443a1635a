"""A row's turns as chunks of a session: what is computed when, and what is dropped before it.

Shared by the engines that speak to vLLM, in this process and over HTTP; it knows neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mem1_kernels.rollout.engine import Generation
from mem1_kernels.rollout.loop import RolloutRow, Written


@dataclass
class Chunk:
    """What a session computes at once.

    Args:
        token_ids: read by the model, at the positions that follow.
        drop: positions (start, end) that leave the cache before.
        max_tokens: the most tokens to sample behind them. vLLM keeps no KV of the last one.
        writes: whether what is sampled counts.
    """

    token_ids: list[int] = field(default_factory=list)
    drop: list[tuple[int, int]] = field(default_factory=list)
    max_tokens: int = 1
    writes: bool = False


class Turns:
    """What a row has to tell vLLM, turn by turn.

    "kept": a session. What was read before a drop is computed before it: as a chunk of its own,
    whose one sampled token is not used, unless the turn begins right there. "reprefill": one
    request per turn, with all that is live.

    Args:
        row: the row.
        generation: how it is written.
        tokenizer: for `stop_strings` of turns that are written token by token.
    """

    def __init__(self, row: RolloutRow, generation: Generation, tokenizer: Any = None) -> None:
        self.row = row
        self.generation = generation
        self.tokenizer = tokenizer
        self.kept = row.positions == "kept"
        self.pending = [Chunk(list(row.prompt))]
        self.number = 0
        self.written = Written([], [], closed=False)
        self.done = False
        self.asked = 0
        # A token holds at least one byte, so this many tokens reach behind the longest stop.
        self.reach = max((len(stop.encode()) for stop in generation.stop_strings), default=0)

    def drop(self, segments: Sequence[int]) -> None:
        """`row.segments[i]`, for each i in `segments`, has left the context."""
        spans, end = [], 0
        for index, segment in enumerate(self.row.segments):
            begin, end = end, end + segment.num_tokens
            if index in segments and begin < end:
                spans.append((begin, end))
        if not spans or not self.kept:
            return
        if self.pending[-1].token_ids:
            self.pending.append(Chunk())
        self.pending[-1].drop += spans

    def read(self, token_ids: Sequence[int]) -> None:
        """An observation has joined the context."""
        self._held()
        self.pending[-1].token_ids += token_ids

    def begin(self, number: int) -> None:
        """Turn `number` begins."""
        self.number = number
        self.written = Written([], [], closed=False)
        self.done = False

    def chunks(self) -> list[Chunk]:
        """What to compute next: of the last one, what is sampled belongs to the turn."""
        left = self.generation.max_new_tokens - len(self.written.token_ids)
        by_token = self.generation.mark is not None
        if not self.kept:
            marked = self.written.token_ids[self.row.marked :]
            ids = self.row.prompt + self.row.live_ids() + marked
            self.asked = 1 if by_token else left
            return [Chunk(ids, max_tokens=self.asked, writes=True)]
        chunks, self.pending = self.pending, []
        if chunks[-1].token_ids:
            chunks[-1].max_tokens = 1 if by_token else left
        else:
            # Nothing was read since the last drop: the turn's first token follows what was read
            # before it, and is the first to be computed after it.
            self.pending = [chunks.pop()]
        chunks[-1].writes = True
        self.asked = chunks[-1].max_tokens
        return chunks

    def heard(self, token_ids: Sequence[int], log_probs: Sequence[float], stopped: bool) -> None:
        """What was sampled behind the last of `chunks()`; fewer tokens than asked for, and no stop:
        the engine ran out of room."""
        written, generation = self.written, self.generation
        if not stopped and len(token_ids) < self.asked:
            done = len(written.token_ids) + len(token_ids)
            self.fail(
                f"the turn was cut after {done} tokens: the row's live tokens reached "
                "max_model_len; enlarge it, or drop more"
            )
            return
        written.token_ids += token_ids
        written.log_probs += log_probs
        if not self.pending:
            self.pending = [Chunk()]
        self.pending[-1].token_ids += token_ids[-1:]
        written.closed = stopped or self._stops()
        self._held()
        self.drop(self.row.wrote_on(self.number, written.token_ids))
        self.done = written.closed or len(written.token_ids) >= generation.max_new_tokens

    def fail(self, why: str) -> None:
        """The row cannot go on."""
        self.written = Written([], [], closed=False, error=why)
        self.done = True

    def _stops(self) -> bool:
        """Whether the last token completes a stop."""
        ids = self.written.token_ids
        if ids[-1] in self.generation.stop_ids:
            return True
        if not self.reach:
            return False
        tail = self.tokenizer.decode(ids[-self.reach :])
        return any(stop in tail for stop in self.generation.stop_strings)

    def _held(self) -> None:
        """Raises the row's `peak_context` to what is live."""
        row = self.row
        parts = zip(row.segments, row.dropped_at, strict=True)
        live = sum(segment.num_tokens for segment, dropped in parts if not dropped)
        written = (
            self.written.token_ids if not row.turns or row.turns[-1].number < self.number else []
        )
        row.peak_context = max(row.peak_context, live + len(written) - row.marked)
