"""Turn-by-turn generation on a cache that is pruned as the retention policy says.

A rollout and a training step must compute the same function. So a `Rollout` carries the layout
that reproduces it, `collate` packs rollouts for a trainer, and `score` gives the log-probs that the
trainer will see: equal to those that were sampled from, up to rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.hf import TrajectoryCache, is_patched, patched
from mem1_kernels.hf.cache import rope_limit
from mem1_kernels.retention import Retention, Segment, mem1, retained
from mem1_kernels.trajectory import Layout, Trajectory, pack, unroll


@dataclass
class Turn:
    """What one row wrote in one turn.

    row: which prompt it belongs to; number: from 1; token_ids: what was sampled, the stop included;
    closed: whether a stop ended it, and not the token limit; depth: how deep in branches it stands.
    """

    row: int
    number: int
    token_ids: list[int]
    closed: bool
    depth: int = 0


@dataclass
class Rollout:
    """One finished trajectory.

    Attributes:
        trajectory: all its tokens, under the policy that pruned it.
        log_probs: float32 `[tokens]`, of each generated token when it was sampled (at the rollout's
            temperature); 0 elsewhere.
        positions: "kept" or "reprefill", the form that the rollout computed.
        peak_context: the most tokens its cache row held.
        turns: what was generated, turn by turn.
    """

    trajectory: Trajectory
    log_probs: Tensor
    positions: Literal["kept", "reprefill"]
    peak_context: int
    turns: list[Turn]

    def __repr__(self) -> str:
        return (
            f"Rollout({len(self.turns)} turns, {self.trajectory.num_tokens} tokens, at most "
            f"{self.peak_context} held, positions={self.positions!r})"
        )

    @property
    def layout(self) -> Layout:
        """The layout whose forward pass computes what this rollout computed."""
        return self.trajectory if self.positions == "kept" else unroll(self.trajectory)


AnyRow = TypeVar("AnyRow", bound="Row")
Respond = Callable[[Sequence[Turn]], Sequence["Sequence[int] | None"]]
"""The world's side: for each turn just written, the observation's token ids (perhaps none at all),
or None where the episode is over."""


class TrajectoryRollout:
    """Drives a causal LM through turns, a batch of ragged rows at once, on a pruned cache.

    Args:
        model: a transformers causal LM. It is patched while `run` runs and is otherwise untouched.
        retention: which segment drops which; what it says of the past must not change as segments
            are added, and it must drop between turns, not inside one (both are checked).
        positions: "kept" prunes the cache and lets positions go on counting; "reprefill" sends the
            live text behind the prompt again at compact positions, as an engine without pruning
            does. `Rollout.layout` is the right training form for either.
        max_turns: turns after which a row ends.
        max_new_tokens: tokens after which a turn is cut (`Turn.closed` is False then).
        stop_ids: token ids that end a turn (they belong to it).
        stop_strings: texts that end a turn; needs `tokenizer`.
        tokenizer: anything with `decode(ids) -> str`, for stop_strings only.
        state_tokens: how many of a turn's ids are its state, the rest being its action; all of them
            are action unless told. It matters only to policies that treat the two differently.
        depth: for `fold`: how deep in branches the observation behind a turn, and the next turn,
            are written. A turn that opens a branch gives `turn.depth + 1`, one that returns from it
            `turn.depth - 1`: its observation is what the branch reports. Unless told all are at 0.
        temperature: of sampling; 0 is greedy (log-probs are then those at temperature 1).
        capacity: slots of a cache row; it grows if None and raises if it does not suffice.
        ordered: keep the slots' order when pruning.

    Raises:
        TypeError: stops that are no integers or strings.
        ValueError: an argument out of its range, or stop_strings without a tokenizer.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> model = Qwen2ForCausalLM(Qwen2Config(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1))
    >>> rollouts = TrajectoryRollout(model, max_turns=6, max_new_tokens=4).run(
    ...     [[5, 9, 11], [7, 8]], lambda turns: [[20, 21, 22] for _ in turns])
    >>> [(rollout.trajectory.num_tokens, rollout.peak_context) for rollout in rollouts]
    [(42, 14), (41, 13)]
    >>> layout, sampled = collate(rollouts)
    >>> bool(torch.allclose(score(model, layout), sampled, atol=1e-5))
    True
    """

    def __init__(
        self,
        model: Any,
        *,
        retention: Retention = mem1,
        positions: Literal["kept", "reprefill"] = "kept",
        max_turns: int = 20,
        max_new_tokens: int = 256,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        tokenizer: Any = None,
        state_tokens: Callable[[list[int]], int] | None = None,
        depth: Callable[[Turn], int] | None = None,
        temperature: float = 1.0,
        capacity: int | None = None,
        ordered: bool = False,
    ) -> None:
        if positions not in ("kept", "reprefill"):
            raise ValueError(f"positions: expected 'kept' or 'reprefill', got {positions!r}")
        for name, value in (("max_turns", max_turns), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_temperature(temperature)
        stop_ids = read_ids("stop_ids", stop_ids)
        check_stop_strings(stop_strings)
        if stop_strings and tokenizer is None:
            raise ValueError("stop_strings: need a tokenizer, got none")
        self.model = model
        self.retention = retention
        self.positions = positions
        self.max_turns = max_turns
        self.max_new_tokens = max_new_tokens
        self.stop_ids = frozenset(stop_ids)
        self.stop_strings = tuple(stop_strings)
        self.tokenizer = tokenizer
        self.state_tokens = state_tokens
        self.depth = depth
        self.temperature = temperature
        self.capacity = capacity
        self.ordered = ordered

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        *,
        generator: torch.Generator | None = None,
        on_tokens: Callable[[int, Sequence[int]], None] | None = None,
    ) -> list[Rollout]:
        """Runs every prompt to its end and returns a Rollout for each, in order.

        Args:
            prompts: token ids of each row's prompt, none of them empty.
            respond: called after each turn with the rows that are still going.
            generator: for sampling; torch's default one unless given.
            on_tokens: called with a row and the ids just sampled in it, while a turn is written.

        Raises:
            TypeError: a prompt or a reply that is no sequence of integers.
            ValueError: no prompts or an empty one, ids outside the vocabulary, replies for another
                number of rows, or a policy that drops inside a turn, takes back a drop, or hides
                with a floor what the cache still holds.
            FloatingPointError: logits that are not numbers.
        """
        rows = [_CachedRow(self, index, ids) for index, ids in enumerate(read_prompts(prompts))]
        was_training = self.model.training
        self.model.eval()
        try:
            with patched(self.model):
                driver = _Driver(self, rows)
                driver.feed()
                active = rows
                for number in range(1, self.max_turns + 1):
                    for row in active:
                        driver.drop(row, row.drop_before(Segment("state", 0, number, row.depth)))
                    driver.feed()
                    self._write_turn(driver, active, number, generator, on_tokens)
                    going = ask(respond, active, last=number == self.max_turns)
                    for row, observed in going:
                        info = row.observation(observed)
                        driver.drop(row, row.drop_before(info))
                        row.add(info)
                        row.pending += info.ids or ()
                    still = {row.index for row, _ in going}
                    for row in active:
                        if row.index not in still:
                            driver.retire(row)
                    active = [row for row, _ in going]
                    driver.feed()
                    if not active:
                        break
        finally:
            self.model.train(was_training)
        return [row.finish() for row in rows]

    def _write_turn(
        self,
        driver: _Driver,
        active: Sequence[_CachedRow],
        number: int,
        generator: torch.Generator | None,
        on_tokens: Callable[[int, Sequence[int]], None] | None,
    ) -> None:
        for row in active:
            row.writing = []
        writing = list(active)
        closed: set[int] = set()
        for _ in range(self.max_new_tokens):
            if not writing:
                break
            logits = torch.stack([row.logits for row in writing])
            tokens, log_probs = _sample(logits, self.temperature, generator)
            still: list[_CachedRow] = []
            for row, token, log_prob in zip(
                writing, tokens.tolist(), log_probs.tolist(), strict=True
            ):
                if math.isnan(log_prob):
                    raise FloatingPointError(f"model: logits of row {row.index} are not numbers")
                row.writing.append(token)
                row.log_probs.append(log_prob)
                row.pending.append(token)
                if on_tokens is not None:
                    on_tokens(row.index, [token])
                if self._stops(row.writing):
                    closed.add(row.index)
                else:
                    still.append(row)
            driver.feed()
            writing = still
        for row in active:
            row.wrote(number, row.writing, row.index in closed)

    def _stops(self, ids: list[int]) -> bool:
        if ids[-1] in self.stop_ids:
            return True
        if not self.stop_strings:
            return False
        # A token holds at least one byte, so this many tokens reach behind the longest stop.
        reach = max(len(stop.encode()) for stop in self.stop_strings)
        tail = self.tokenizer.decode(ids[-reach:])
        return any(stop in tail for stop in self.stop_strings)


class Row:
    """The books of one trajectory while it is written, for an engine that drives a batch of them.

    Args:
        index: which prompt it belongs to; prompt: its ids.
        retention, positions, state_tokens, depth: as for `TrajectoryRollout`.

    Attributes:
        segments: what is written so far.
        dropped_at: for each segment, before which one it was dropped; 0: it is alive.
        turns: what was generated, turn by turn.
        depth: of what comes next.
        peak_context: the most tokens that were live at once, as the engine says.
    """

    def __init__(
        self,
        index: int,
        prompt: list[int],
        retention: Retention,
        positions: Literal["kept", "reprefill"],
        state_tokens: Callable[[list[int]], int] | None = None,
        depth_of: Callable[[Turn], int] | None = None,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.retention = retention
        self.positions = positions
        self.state_tokens = state_tokens
        self.depth_of = depth_of
        self.segments = [Segment("prompt", prompt)]
        self.dropped_at = [0]
        self.turns: list[Turn] = []
        self.log_probs: list[float] = []
        self.depth = 0
        self.peak_context = 0

    def drop_before(self, upcoming: Segment) -> list[int]:
        """Marks what `upcoming` and all after it no longer see, and returns which segments that is.

        Raises:
            ValueError: the policy hides with a floor what is alive, or drops a prompt that is
                sent again every turn.
        """
        expires, floors = retained([*self.segments, upcoming], self.retention)
        name = getattr(self.retention, "__name__", repr(self.retention))
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
                f"retention: {name} drops the prompt, behind which positions='reprefill' sends "
                "every turn"
            )
        return fresh

    def wrote(self, number: int, token_ids: list[int], closed: bool) -> None:
        """Takes over a turn that was generated.

        Raises:
            ValueError: state_tokens gave no length of a part of it.
        """
        state = self.state_tokens(list(token_ids)) if self.state_tokens else 0
        if type(state) is not int or not 0 <= state <= len(token_ids):
            raise ValueError(f"state_tokens: expected 0 to {len(token_ids)}, got {state!r}")
        self.add(Segment("state", token_ids[:state], number, self.depth))
        self.add(Segment("action", token_ids[state:], number, self.depth))
        self.turns.append(Turn(self.index, number, token_ids, closed, self.depth))

    def observation(self, observed: Sequence[int]) -> Segment:
        """The observation behind the last turn, which is to be dropped before, and then added."""
        turn = self.turns[-1]
        if self.depth_of is not None:
            self.depth = self.depth_of(turn)
        ids = read_ids(f"respond, row {self.index}", observed)
        return Segment("info", ids, turn.number, self.depth)

    def add(self, segment: Segment) -> None:
        """Takes over a segment, alive."""
        self.segments.append(segment)
        self.dropped_at.append(0)

    def live_ids(self) -> list[int]:
        """The ids of what is alive behind the prompt."""
        return [
            token
            for segment, dropped in zip(self.segments[1:], self.dropped_at[1:], strict=True)
            if not dropped
            for token in segment.ids or ()
        ]

    def finish(self) -> Rollout:
        """The finished trajectory.

        Raises:
            ValueError: by the whole trajectory the policy drops elsewhere than it did on the way.
        """
        trajectory = Trajectory(self.segments, self.retention)
        expires, _ = retained(self.segments, self.retention)
        for index, (said, done) in enumerate(zip(expires, self.dropped_at, strict=True)):
            if (done or len(self.segments)) != said:
                raise ValueError(
                    f"retention: segment {index} of row {self.index} expires at segment {said}, "
                    f"but the rollout dropped it at {done or 'none'}: a policy must drop between "
                    "turns and never change what it said of earlier drops"
                )
        log_probs = torch.zeros(trajectory.num_tokens)
        log_probs[trajectory.loss_mask] = torch.tensor(self.log_probs)
        return Rollout(trajectory, log_probs, self.positions, self.peak_context, self.turns)


def read_ids(name: str, values: Any) -> list[int]:
    """A sequence, tensor or array of integers as a list.

    Raises:
        TypeError: anything else.
    """
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, str) or not isinstance(listed, (Sequence, Set)):
        raise TypeError(f"{name}: expected token ids, got {type(values).__name__}")
    try:
        return [operator.index(value) for value in listed]
    except TypeError:
        raise TypeError(f"{name}: expected integer token ids, got {values!r}") from None


def read_prompts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts' ids.

    Raises:
        TypeError: prompts that are no sequences of integers.
        ValueError: no prompts, or an empty one.
    """
    read = [read_ids("prompts", prompt) for prompt in prompts]
    if not read or not all(read):
        raise ValueError("prompts: expected at least one, and none of them empty")
    return read


def check_stop_strings(stop_strings: Sequence[str]) -> None:
    """Raises TypeError or ValueError unless they are strings, none of them empty."""
    if isinstance(stop_strings, str):
        raise TypeError("stop_strings: expected a sequence of strings, got one string")
    for stop in stop_strings:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop_strings: expected strings that are not empty, got {stop!r}")


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless one can sample at it."""
    if not temperature >= 0:
        raise ValueError(f"temperature: expected 0 or more, got {temperature}")


def ask(
    respond: Respond, rows: Sequence[AnyRow], *, last: bool
) -> list[tuple[AnyRow, Sequence[int]]]:
    """The rows that go on behind the turns just written, each with its observation.

    Raises:
        ValueError: replies for another number of rows.
    """
    replies = respond([row.turns[-1] for row in rows])
    if len(replies) != len(rows):
        raise ValueError(f"respond: expected {len(rows)} replies, got {len(replies)}")
    answered = zip(rows, replies, strict=True)
    return [(row, reply) for row, reply in answered if reply is not None and not last]


class _CachedRow(Row):
    """A row with a cache row. `pending` are ids not yet in the cache; `logits` predict the next
    token; `writing` is the turn that is being written."""

    logits: Tensor

    def __init__(self, rollout: TrajectoryRollout, index: int, prompt: list[int]) -> None:
        super().__init__(
            index,
            prompt,
            rollout.retention,
            rollout.positions,
            rollout.state_tokens,
            rollout.depth,
        )
        self.pending = list(prompt)
        self.writing: list[int] = []
        self.next_position = 0


class _Driver:
    """The model-facing half: one cache, ragged feeds, drops."""

    def __init__(self, rollout: TrajectoryRollout, rows: Sequence[_CachedRow]) -> None:
        self.rows = rows
        self.model = rollout.model
        self.device = next(self.model.parameters()).device
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.cache = TrajectoryCache(
            self.model, batch_size=len(rows), capacity=rollout.capacity, ordered=rollout.ordered
        )
        self.keep: Tensor | None = None  # bool [batch, capacity], what the next feed prunes by

    def feed(self) -> None:
        """Drops what is to be dropped, of all rows at once, puts every row's pending tokens into
        the cache and keeps each row's last logits."""
        if self.keep is not None:
            self.cache.prune_(keep=self.keep)
            self.keep = None
        for row in self.rows:
            if row.pending and not 0 <= min(row.pending) <= max(row.pending) < self.vocabulary:
                raise ValueError(
                    f"row {row.index}: expected token ids from 0 to {self.vocabulary - 1}, "
                    f"got {min(row.pending)} to {max(row.pending)}"
                )
        counts = torch.tensor([len(row.pending) for row in self.rows])
        width = int(counts.max())
        if width == 0:
            return
        token_ids = torch.zeros(len(self.rows), width, dtype=torch.int64)
        positions = torch.zeros_like(token_ids)
        for row in self.rows:
            count = len(row.pending)
            token_ids[row.index, :count] = torch.tensor(row.pending, dtype=torch.int64)
            positions[row.index] = row.next_position + torch.arange(width).clamp(
                max=max(count - 1, 0)
            )
        last, where = torch.unique(counts.clamp(min=1) - 1, return_inverse=True)
        self.cache.expect(counts)
        logits = self.model(
            input_ids=token_ids.to(self.device),
            position_ids=positions.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last.to(self.device),
        ).logits.float()
        held = self.cache.lengths.tolist()
        for row in self.rows:
            if row.pending:
                row.logits = logits[row.index, where[row.index]]
                row.next_position += len(row.pending)
                row.pending = []
                row.peak_context = max(row.peak_context, held[row.index])

    def drop(self, row: _CachedRow, segments: Sequence[int]) -> None:
        """Drops these segments, which `row` no longer counts as alive, from its cache."""
        if not any(row.segments[past].num_tokens for past in segments):
            return
        if row.positions == "kept":
            marks = [
                torch.full((segment.num_tokens,), not dropped)
                for segment, dropped in zip(row.segments, row.dropped_at, strict=True)
            ]
            self._prune(row, torch.cat(marks))
        else:
            # Only the prompt's keys are those of a fresh prefill; its last token is sent again too,
            # in case nothing else is and its logits are needed.
            begin = len(row.prompt) - 1
            self._prune(row, torch.arange(row.next_position) < begin)
            row.next_position = begin
            row.pending = row.prompt[begin:] + row.live_ids()

    def retire(self, row: _CachedRow) -> None:
        """Empties a finished row's cache."""
        row.pending = []
        self._prune(row, torch.zeros(max(row.next_position, 1), dtype=torch.bool))

    def _prune(self, row: _CachedRow, alive: Tensor) -> None:
        """Keeps only those of the row's slots whose position `alive` marks, from the next feed."""
        if self.keep is None:
            self.keep = torch.ones_like(self.cache.position_ids, dtype=torch.bool)
        positions = self.cache.position_ids[row.index].clamp(0, len(alive) - 1).long()
        self.keep[row.index] = alive.to(self.keep.device)[positions]


def _sample(
    logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens `[rows]` drawn from `[rows, vocabulary]` logits, and their log-probs."""
    log_probs = torch.log_softmax(logits / (temperature or 1.0), 1)
    if temperature == 0:
        tokens = logits.argmax(1)
    else:
        tokens = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def collate(
    rollouts: Sequence[Rollout | Sequence[Rollout]],
    *,
    positions: Literal["kept", "reprefill"] | None = None,
) -> tuple[Layout, Tensor]:
    """Packs rollouts for one training pass; a sequence among them is a group behind one prompt.

    Args:
        rollouts: all of one form of positions; each is laid out as it was computed.
        positions: the form that the trainer is set up for, to be held against the rollouts'.

    Returns:
        The layout and its sampled log-probs, float32 `[tokens]` (0 where nothing was sampled).

    Raises:
        TypeError: something that is no Rollout or sequence of them.
        ValueError: nothing to pack, rollouts of two forms, or of another form than `positions`:
            their log-probs differ by whole units, so training would be off-policy.
    """
    if isinstance(rollouts, Rollout):
        raise TypeError("rollouts: expected a sequence, got one Rollout")
    flat: list[Rollout] = []
    for item in rollouts:
        flat += [item] if isinstance(item, Rollout) else item
    for rollout in flat:
        if not isinstance(rollout, Rollout):
            raise TypeError(f"rollouts: expected Rollouts, got {type(rollout).__name__}")
    forms = {rollout.positions for rollout in flat}
    if len(forms) != 1:
        raise ValueError(f"rollouts: expected positions of one form, got {sorted(forms) or 'none'}")
    if positions not in (None, "kept", "reprefill"):
        raise ValueError(f"positions: expected 'kept' or 'reprefill', got {positions!r}")
    if positions is not None and forms != {positions}:
        raise ValueError(
            f"rollouts: their positions are {forms.pop()!r}, the trainer's {positions!r}; "
            "that pairing is off-policy"
        )
    layout = pack(
        [
            item.layout if isinstance(item, Rollout) else [member.layout for member in item]
            for item in rollouts
        ]
    )
    sampled = torch.cat([rollout.log_probs for rollout in flat])[layout.source]
    return layout, sampled.masked_fill(~layout.loss_mask, 0)


def score(model: Any, layout: Layout, *, temperature: float = 1.0) -> Tensor:
    """Log-probs of a layout's generated tokens in one masked forward pass; differentiable.

    Args:
        model: a transformers causal LM, patched for the call if it is not.
        layout: with token ids; from `collate`, `pack`, `unroll` or a Trajectory.
        temperature: the rollout's (0 counts as 1, as there).

    Returns:
        float32 `[tokens]`, 0 where nothing was generated.

    Raises:
        ValueError: the layout has no token ids, or a generated token that nothing predicts; a
            temperature < 0; positions past those where a "dynamic" or "longrope" RoPE changes; a
            model under gradient checkpointing that is not patched.
    """
    check_temperature(temperature)
    if layout.token_ids is None:
        raise ValueError("layout: has no token ids; its segments were given as counts")
    generated = layout.loss_mask.nonzero().flatten()
    before = layout.predecessor[generated]
    if bool((before < 0).any()):
        raise ValueError("layout: its first token is generated, but nothing predicts it")
    again = model.training and getattr(model, "is_gradient_checkpointing", False)
    if again and torch.is_grad_enabled() and not is_patched(model):
        raise ValueError(
            "model: with gradient checkpointing the backward pass runs its layers again; patch() "
            "it for both"
        )
    limit = rope_limit(model)
    if limit is not None and (last := int(layout.position_ids.max())) >= limit:
        raise ValueError(
            f"layout: expected positions less than {limit}, from where this model's RoPE (dynamic "
            f"or longrope) turns keys otherwise than the rollout's, got {last}"
        )
    device = next(model.parameters()).device
    plan = BlockPlan.from_expiry(layout.expiry, layout.floor).to(device)
    with patched(model):
        logits = model(
            input_ids=layout.token_ids[None].to(device),
            position_ids=layout.position_ids[None].to(device),
            plan=plan,
            use_cache=False,
            logits_to_keep=before.to(device),
        ).logits[0]
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), 1)
    picked = log_probs.gather(1, layout.token_ids[generated].to(device)[:, None])[:, 0]
    return picked.new_zeros(layout.num_tokens).index_put((generated.to(device),), picked)
