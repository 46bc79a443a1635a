"""The caches of a rollout replica: one session per episode, all in one cache that is pruned in
place, writing side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.hf import TrajectoryCache
from mem1_kernels.hf.patch import cache_keyword
from mem1_kernels.rollout.hf_engine import _sample
from mem1_kernels.verl.episode import Operation, Reply


@dataclass
class Job:
    """One turn to be written.

    Args:
        operations: what happens to the context before.
        max_tokens: the most tokens to write.
        stops: whether the ids written so far end with a stop.
        temperature: of sampling; 0 is greedy.

    Attributes:
        reply: what was written, once it is complete.
    """

    operations: deque[Operation]
    max_tokens: int
    stops: Callable[[list[int]], bool]
    temperature: float
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    reply: Reply | None = None


@dataclass
class _Row:
    """A row of the cache: `pending` ids are not yet in it, `logits` predict the next one."""

    pending: list[int] = field(default_factory=list)
    next_position: int = 0
    logits: Tensor | None = None
    job: Job | None = None


class Sessions:
    """Sessions by name over a patched causal LM. `step` goes on with all jobs by one forward pass,
    of whatever each has to read next, or of its newest token.

    Args:
        model: a patched causal LM, in eval mode.
        rows: the most sessions at once.
        generator: draws the samples.

    >>> from mem1_kernels.hf import patch
    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> model = patch(Qwen2ForCausalLM(Qwen2Config(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1)).eval())
    >>> sessions = Sessions(model, rows=2)
    >>> job = Job(deque([("read", [5, 6, 7])]), 4, lambda ids: False, temperature=0.0)
    >>> sessions.begin("a", job)
    >>> while sessions.step(): pass
    >>> len(job.reply.token_ids), sessions.held("a")
    (4, 6)
    """

    def __init__(self, model: Any, rows: int, generator: torch.Generator | None = None) -> None:
        self.model = model
        self.generator = generator
        self.cache = TrajectoryCache(model, batch_size=rows)
        self.keyword = cache_keyword(model)
        self.rows = [_Row() for _ in range(rows)]
        self.row_of: dict[str, int] = {}

    def begin(self, name: str, job: Job) -> None:
        """Takes a job for a session; a name that is new opens one.

        Raises:
            ValueError: the session is writing already, or there is no row left for a new one.
        """
        if name not in self.row_of:
            free = [row for row in range(len(self.rows)) if row not in self.row_of.values()]
            if not free:
                raise ValueError(f"sessions: expected at most {len(self.rows)} at once")
            self.row_of[name] = free[0]
            self.rows[free[0]] = _Row()
        row = self.rows[self.row_of[name]]
        if row.job is not None:
            raise ValueError(f"session {name!r} is writing already")
        row.job = job

    def close(self, name: str) -> None:
        """Ends a session; a name that is not known is none."""
        if name in self.row_of:
            row = self.row_of.pop(name)
            self.rows[row] = _Row()
            nothing = torch.zeros(1, self.cache.capacity, dtype=torch.bool)
            self.cache.prune_(keep=nothing, rows=[row])

    def held(self, name: str) -> int:
        """How many tokens a session's cache holds."""
        return int(self.cache.lengths[self.row_of[name]])

    @torch.no_grad()
    def step(self) -> bool:
        """One forward pass for all jobs; False where there is none."""
        if all(row.job is None for row in self.rows):
            return False
        self._operate()
        self._feed()
        ready = [row for row in self.rows if row.job and not row.job.operations]
        for temperature in {row.job.temperature for row in ready if row.job}:
            self._sample([r for r in ready if r.job and r.job.temperature == temperature])
        return True

    def _operate(self) -> None:
        """Queued operations of each row, up to the one that has to see what is pending."""
        keep: Tensor | None = None
        for index, row in enumerate(self.rows):
            if row.job is None:
                continue
            operations = row.job.operations
            while operations:
                kind, what = operations[0]
                if kind == "read":
                    row.pending += what
                elif row.pending:
                    break  # what was read before the drop saw what is dropped
                else:
                    if keep is None:
                        keep = torch.ones_like(self.cache.position_ids, dtype=torch.bool)
                    for start, stop in what:
                        place = self.cache.position_ids[index]
                        keep[index] &= (place < start) | (place >= stop)
                operations.popleft()
        if keep is not None:
            self.cache.prune_(keep=keep)

    def _feed(self) -> None:
        """Puts every row's pending tokens into the cache, and keeps each row's last logits."""
        counts = [len(row.pending) if row.job else 0 for row in self.rows]
        if not any(counts):
            return
        # All rows' tokens behind each other, so that nothing is padded.
        fed = [row for row, count in zip(self.rows, counts, strict=True) if count]
        token_ids = [token for row in fed for token in row.pending]
        positions = [row.next_position + n for row in fed for n in range(len(row.pending))]
        last = [end - 1 for end in accumulate(len(row.pending) for row in fed)]
        device = self.cache.device
        self.cache.expect(counts, packed=True)
        logits = self.model(
            input_ids=torch.tensor([token_ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=True,
            logits_to_keep=torch.tensor(last, device=device),
            **{self.keyword: self.cache},
        ).logits[0]
        for row, own in zip(fed, logits.float(), strict=True):
            row.logits = own
            row.next_position += len(row.pending)
            row.pending = []

    def _sample(self, rows: Sequence[_Row]) -> None:
        """One token for each row; it joins the cache with the next pass or the next job."""
        logits = torch.stack([row.logits for row in rows if row.logits is not None])
        jobs = [row.job for row in rows if row.job is not None]
        drawn = _sample(logits, jobs[0].temperature, self.generator)
        tokens, log_probs = (values.tolist() for values in drawn)
        for row, job, token, log_prob in zip(rows, jobs, tokens, log_probs, strict=True):
            job.token_ids.append(token)
            job.log_probs.append(log_prob)
            row.pending.append(token)
            if len(job.token_ids) == job.max_tokens or job.stops(job.token_ids):
                job.reply = Reply(job.token_ids, job.log_probs)
                row.job = None
