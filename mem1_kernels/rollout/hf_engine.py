"""The engine in this process: a transformers causal LM on a cache that is pruned in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.hf import TrajectoryCache, patched
from mem1_kernels.hf.patch import cache_keyword, rope_of
from mem1_kernels.rollout.engine import (
    Generation,
    OnTokens,
    Respond,
    Rollout,
    check_count,
    eos_ids,
)
from mem1_kernels.rollout.loop import RolloutRow, Written, open_rows, run_turns
from mem1_kernels.trajectory import Positions, check_positions


class HFEngine:
    """Drives a transformers causal LM through turns, a batch of ragged rows at once.

    Args:
        model: the model. It is patched while `run` runs and is otherwise untouched.
        tokenizer: anything with `decode(ids) -> str`, for `stop_strings` only; a Hugging Face
            tokenizer where an agent speaks text.
        positions: "kept" prunes the cache and lets positions go on counting; "compact" also turns
            the keys that are left to positions without gaps, which stay below the peak context (a
            RoPE of fixed frequencies; policies such as `mem1` and `keep_last`); "reprefill" sends
            the live text behind the prompt again, without gaps, as an engine without pruning does.
            `Rollout.layout` is the right training form for either.
        capacity: slots per cache row; `run` raises if they do not suffice. None: the cache grows.
        ordered: keep the slots' order when pruning.

    Raises:
        ValueError: an argument out of its range.

    >>> from mem1_kernels.rollout import Generation, collate, score
    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> model = Qwen2ForCausalLM(Qwen2Config(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1))
    >>> rollouts = HFEngine(model).run(
    ...     [[5, 9, 11], [7, 8]],
    ...     lambda turns: [[20, 21, 22] for _ in turns],
    ...     Generation(max_turns=6, max_new_tokens=4),
    ... )
    >>> [(rollout.trajectory.num_tokens, rollout.peak_context) for rollout in rollouts]
    [(42, 14), (41, 13)]
    >>> layout, sampled = collate(rollouts)
    >>> bool(torch.allclose(score(model, layout), sampled, atol=1e-5))
    True
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        positions: Positions = "kept",
        capacity: int | None = None,
        ordered: bool = False,
    ) -> None:
        if capacity is not None:
            check_count("capacity", capacity)
        self.model = model
        self.tokenizer = tokenizer
        self.positions = check_positions(positions)
        self.capacity = capacity
        self.ordered = ordered
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.eos_ids = eos_ids(own, getattr(tokenizer, "eos_token_id", None))

    @property
    def vocabulary(self) -> int:
        """Ids from 0 to this number, exclusive, are known to the model."""
        return self.model.get_input_embeddings().weight.shape[0]

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation | None = None,
        on_tokens: OnTokens | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> list[Rollout]:
        """Runs every prompt to its end; one rollout per prompt, in order.

        Args:
            prompts: token ids of each row's prompt, none of them empty.
            respond: called after each turn with the rows that are still going.
            generation: what to sample, and until when. Default: `Generation()`.
            on_tokens: called with a row and the ids just sampled in it, while a turn is written.
            generator: draws the samples, in place of one that `generation.seed` makes.

        Raises:
            TypeError: a prompt that is not a sequence of integers.
            ValueError: no prompts or an empty one, ids outside the vocabulary, replies for another
                number of rows, stop_strings without a tokenizer, or a policy that drops inside a
                turn without a mark, takes back a drop, or hides with a floor what the cache still
                holds. (A reply that cannot be used ends its row: see `run_turns`.)
            FloatingPointError: logits that are not numbers.
        """
        generation = Generation() if generation is None else generation
        rows = open_rows(prompts, generation, self.positions, self.vocabulary)
        if generation.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings: need a tokenizer, got none")
        if generator is None and generation.seed is not None:
            device = next(self.model.parameters()).device
            generator = torch.Generator(device).manual_seed(generation.seed)
        was_training = self.model.training
        self.model.eval()
        try:
            with patched(self.model):
                backend = _CacheBackend(self, rows, generation, generator, on_tokens)
                return run_turns(rows, backend, respond, generation)
        finally:
            self.model.train(was_training)


@dataclass
class _CacheRow:
    """What the cache knows of a row: `pending` ids are not yet in it, `logits` predict the next."""

    pending: list[int]
    next_position: int = 0
    written: int = 0  # tokens that were ever in the cache
    index: Tensor = field(default_factory=lambda: torch.arange(0))  # by position: which of these
    alive: Tensor | None = None  # by position: what the next prune leaves
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class _CacheBackend:
    """The turn loop's backend on one TrajectoryCache: ragged feeds, and drops of all rows at once.

    Drops are collected and done before the next feed, so a turn boundary costs one prune.
    """

    marks = True

    def __init__(
        self,
        engine: HFEngine,
        rows: Sequence[RolloutRow],
        generation: Generation,
        generator: torch.Generator | None,
        on_tokens: OnTokens | None,
    ) -> None:
        self.model = engine.model
        self.tokenizer = engine.tokenizer
        self.generation = generation
        self.generator = generator
        self.on_tokens = on_tokens
        self.device = next(self.model.parameters()).device
        self.rows = rows
        self.held = [_CacheRow(list(row.prompt)) for row in rows]
        self.cache = TrajectoryCache(
            self.model,
            batch_size=len(rows),
            capacity=engine.capacity,
            ordered=engine.ordered,
            rope=rope_of(self.model) if engine.positions == "compact" else None,
        )
        self.keyword = cache_keyword(self.model)
        self.keep: Tensor | None = None  # bool [batch, capacity], what the next feed prunes by
        # A token holds at least one byte, so this many tokens reach behind the longest stop.
        stops = generation.stop_strings
        self.reach = max((len(stop.encode()) for stop in stops), default=0)

    def write(self, rows: Sequence[RolloutRow], number: int) -> list[Written]:
        """Samples one turn in each row, all rows side by side."""
        self._feed()
        turns = {row.index: Written([], [], closed=False) for row in rows}
        row_of = {row.index: row for row in rows}
        writing = [row.index for row in rows]
        for _ in range(self.generation.max_new_tokens):
            if not writing:
                break
            logits = torch.stack([self.held[index].logits for index in writing])
            sampled = _sample(logits, self.generation.temperature, self.generator)
            tokens, log_probs = (values.tolist() for values in sampled)
            for index, token, log_prob in zip(writing, tokens, log_probs, strict=True):
                if math.isnan(log_prob):
                    raise FloatingPointError(f"model: logits of row {index} are not numbers")
                turn = turns[index]
                turn.token_ids.append(token)
                turn.log_probs.append(log_prob)
                self.held[index].pending.append(token)
                if self.on_tokens is not None:
                    self.on_tokens(index, [token])
                turn.closed = self._stops(turn.token_ids)
            for index in writing:
                row = row_of[index]
                self.drop(row, row.wrote_on(number, turns[index].token_ids))
            self._feed()
            writing = [index for index in writing if not turns[index].closed]
        return list(turns.values())

    def read(self, row: RolloutRow, token_ids: Sequence[int]) -> None:
        """The observation goes into the cache with the next feed."""
        self.held[row.index].pending += token_ids

    def drop(self, row: RolloutRow, segments: Sequence[int]) -> None:
        """Drops the segments' slots, or, for re-prefill, sends again what is left."""
        if not any(row.segments[past].num_tokens for past in segments):
            return
        held = self.held[row.index]
        if held.pending:
            self._feed()  # what was read before this drop still saw these segments
        if row.positions != "reprefill":
            marks = [
                torch.full((segment.num_tokens,), not dropped)
                for segment, dropped in zip(row.segments, row.dropped_at, strict=True)
            ]
            alive = torch.cat(marks)
            if row.positions == "compact":
                alive = alive[held.index]
            self._prune(row.index, alive)
        else:
            # Only the prompt's keys are those of a fresh prefill; its last token is sent again too,
            # in case nothing else is and its logits are needed.
            begin = len(row.prompt) - 1
            self._prune(row.index, torch.arange(held.next_position) < begin)
            held.next_position = begin
            held.pending = row.prompt[begin:] + row.live_ids()

    def retire(self, row: RolloutRow) -> None:
        """Empties the row's cache."""
        held = self.held[row.index]
        held.pending = []
        self._prune(row.index, torch.zeros(max(held.next_position, 1), dtype=torch.bool))

    def _prune(self, index: int, alive: Tensor) -> None:
        """From the next feed, keeps only those of the row's slots whose position `alive` marks."""
        if self.keep is None:
            self.keep = torch.ones_like(self.cache.position_ids, dtype=torch.bool)
        positions = self.cache.position_ids[index].clamp(0, len(alive) - 1).long()
        if self.cache.rope is not None:
            self.held[index].alive = alive[: len(self.held[index].index)]
        self.keep[index] = alive.to(self.keep.device)[positions]

    def _feed(self) -> None:
        """Drops what is to be dropped, of all rows at once, puts every row's pending tokens into
        the cache and keeps each row's last logits."""
        if self.keep is not None:
            self.cache.prune_(keep=self.keep)
            self.keep = None
            for held in self.held:
                if held.alive is not None:
                    held.index = held.index[held.alive]
                    held.next_position = len(held.index)
                    held.alive = None
        counts = [len(held.pending) for held in self.held]
        if not any(counts):
            return
        # All rows' tokens behind each other: no padding, and nothing of rows that are done.
        token_ids = [token for held in self.held for token in held.pending]
        positions = [
            held.next_position + column
            for held, count in zip(self.held, counts, strict=True)
            for column in range(count)
        ]
        last = torch.tensor([end - 1 for end in accumulate(counts)])
        feeding = torch.tensor(counts) > 0
        self.cache.expect(counts, packed=True)
        logits = self.model(
            input_ids=torch.tensor([token_ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=True,
            logits_to_keep=last[feeding].to(self.device),
            **{self.keyword: self.cache},
        ).logits[0]
        lengths = self.cache.lengths.tolist()
        own = iter(logits.float())
        for row, held, count in zip(self.rows, self.held, counts, strict=True):
            if count:
                held.logits = next(own)
                held.next_position += count
                added = torch.arange(held.written, held.written + count)
                held.index = torch.cat([held.index, added])
                held.written += count
                held.pending = []
                row.peak_context = max(row.peak_context, lengths[row.index])

    def _stops(self, ids: list[int]) -> bool:
        if ids[-1] in self.generation.stop_ids:
            return True
        if not self.reach:
            return False
        tail = self.tokenizer.decode(ids[-self.reach :])
        return any(stop in tail for stop in self.generation.stop_strings)


def _sample(
    logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens `[rows]` drawn from `[rows, vocabulary]` logits, and their log-probs."""
    log_probs = torch.log_softmax(logits / (temperature or 1.0), 1)
    if temperature == 0:
        tokens = logits.argmax(1)
    else:
        # torch.multinomial draws a random number per entry, which on a CPU takes ten times as long.
        sums = log_probs.double().exp().cumsum(1)
        point = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device, generator=generator)
        tokens = torch.searchsorted(sums, point * sums[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=sums.shape[1] - 1)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


class TrajectoryRollout(HFEngine):
    """Deprecated: `HFEngine`, whose `run` takes the options as one `Generation`.

    Args:
        model, positions, tokenizer, capacity, ordered: as for `HFEngine`.
        options: the fields of `Generation`.
    """

    def __init__(
        self,
        model: Any,
        *,
        positions: Positions = "kept",
        tokenizer: Any = None,
        capacity: int | None = None,
        ordered: bool = False,
        **options: Any,
    ) -> None:
        warnings.warn(
            "TrajectoryRollout is deprecated: use HFEngine(model).run(prompts, respond, "
            "Generation(...))",
            DeprecationWarning,
            stacklevel=2,
        )
        super().__init__(model, tokenizer, positions=positions, capacity=capacity, ordered=ordered)
        self.generation = Generation(**options)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation | None = None,
        on_tokens: OnTokens | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> list[Rollout]:
        """As `HFEngine.run`, with the options given to the constructor by default."""
        chosen = self.generation if generation is None else generation
        return super().run(prompts, respond, chosen, on_tokens, generator=generator)
