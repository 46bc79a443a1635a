"""One episode over verl's rollout server, and the sample that it becomes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from mem1_kernels._text import error_text
from mem1_kernels.agent.episodes import Episodes, Result
from mem1_kernels.ppo.episodes import check_world
from mem1_kernels.rollout.engine import Generation, OnTokens, Respond, Rollout
from mem1_kernels.rollout.loop import RolloutRow, Written, open_rows, run_turns
from mem1_kernels.trajectory import Positions, Trajectory
from mem1_kernels.tree import unroll
from mem1_kernels.verl.layout import Run, encode_runs
from mem1_kernels.verl.settings import Settings, task_of

logger = logging.getLogger(__name__)

# A world and its lists of tasks are made once, however many episodes begin at the same time.
_WORLDS = threading.Lock()

Operation: TypeAlias = "tuple[str, list[Any]]"
"""What happened to a session's context: ("read", token ids), or ("drop", [[start, stop], ...]) in
positions."""


@dataclass(frozen=True)
class Request:
    """What a rollout server is asked to write.

    Args:
        context: the ids to go on from, where the server keeps nothing; else empty.
        operations: what happened to the session's context since it wrote last, where it keeps one.
        max_tokens: the most tokens to write.
        stop_ids, stop_strings: what ends the turn.
        temperature: of sampling; 0 is greedy.
        opens: the session begins with this turn.
        close: nothing is to be written; the session ends.
    """

    context: list[int]
    operations: list[Operation]
    max_tokens: int
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    temperature: float = 1.0
    opens: bool = False
    close: bool = False


@dataclass(frozen=True)
class Reply:
    """What it wrote: token ids, their log-probs, and the step whose weights it had (or None)."""

    token_ids: list[int]
    log_probs: list[float]
    step: int | None = None


Write: TypeAlias = Callable[[Request], Reply]
"""Asks the server, and waits. Whatever it raises ends the episode."""


class RemoteEngine:
    """An `Engine` whose turns are written elsewhere: by a server that keeps each row's context
    ("kept"), or by one that gets the live text every turn ("reprefill").

    Args:
        write: asks the server.
        positions: which of the two.
        tokenizer: of the model; it also finds stop strings that a server wrote on behind.
        room: the most tokens of a sample behind its prompt. An episode that has no room for another
            turn ends.

    Attributes:
        steps: the steps whose weights wrote the turns.
    """

    def __init__(self, write: Write, positions: Positions, tokenizer: Any, room: int) -> None:
        self.write = write
        self.positions = positions
        self.tokenizer = tokenizer
        self.room = room
        eos = getattr(tokenizer, "eos_token_id", None)
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self.steps: list[int] = []

    @property
    def vocabulary(self) -> int:
        """Ids from 0 to this number, exclusive, are known to the model."""
        return len(self.tokenizer)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, one after the other."""
        rows = open_rows(prompts, generation, self.positions, self.vocabulary)
        backend = _RemoteBackend(self, generation)
        try:
            return run_turns(rows, backend, respond, generation)
        finally:
            for row in rows:
                backend.retire(row)


@dataclass
class _Context:
    """What the backend knows of a row's context.

    Args:
        operations: for the server to catch up with; the first reads the prompt.
        length: tokens of the row's sample so far, at most.
        fresh: tokens that were read since the last turn.
        dropped: something was dropped since the last turn.
    """

    operations: list[Operation]
    length: int = 0
    fresh: int = 0
    dropped: bool = False


class _RemoteBackend:
    def __init__(self, engine: RemoteEngine, generation: Generation) -> None:
        self.engine = engine
        self.generation = generation
        self.contexts: dict[int, _Context] = {}

    def drop(self, row: RolloutRow, segments: Sequence[int]) -> None:
        """A server that keeps the context drops the segments before it writes."""
        context = self._context(row)
        begins = [0]
        for segment in row.segments:
            begins.append(begins[-1] + segment.num_tokens)
        spans = [[begins[i], begins[i + 1]] for i in segments if row.segments[i].num_tokens]
        if spans:
            context.operations.append(("drop", spans))
            context.dropped = True

    def read(self, row: RolloutRow, token_ids: Sequence[int]) -> None:
        """A server that keeps the context reads the observation before it writes."""
        context = self._context(row)
        context.operations.append(("read", list(token_ids)))
        context.fresh += len(token_ids)

    def retire(self, row: RolloutRow) -> None:
        """Ends the row's session, if there is one."""
        if self.contexts.pop(row.index, None) is None or self.engine.positions != "kept":
            return
        try:
            self.engine.write(Request([], [], 0, close=True))
        except Exception as error:  # what was written counts all the same
            logger.warning("a session could not be ended", exc_info=error)

    def write(self, rows: Sequence[RolloutRow], number: int) -> list[Written]:
        return [self._write(row) for row in rows]

    def _write(self, row: RolloutRow) -> Written:
        engine, generation, context = self.engine, self.generation, self._context(row)
        kept = engine.positions == "kept"
        live = row.live_ids()
        # In a tree a turn before which something was dropped repeats what is left.
        again = len(live) if context.dropped and not kept else context.fresh
        room = engine.room - context.length - again
        if room < 1:
            return Written([], [], False, f"no room for another turn in {engine.room} tokens")
        request = Request(
            context=[] if kept else row.prompt + live,
            operations=context.operations if kept else [],
            max_tokens=min(generation.max_new_tokens, room),
            stop_ids=tuple(generation.stop_ids),
            stop_strings=tuple(generation.stop_strings),
            temperature=generation.temperature,
            opens=not row.turns,
        )
        try:
            reply = engine.write(request)
            written = _read_reply(reply, request, engine.tokenizer)
        except Exception as error:  # a server that fails ends its own row
            logger.warning("a turn could not be written", exc_info=error)
            return Written([], [], False, error_text(error))
        if reply.step is not None:
            engine.steps.append(reply.step)
        context.operations, context.fresh, context.dropped = [], 0, False
        context.length += again + len(written.token_ids)
        row.peak_context = max(
            row.peak_context, len(row.prompt) + len(live) + len(written.token_ids)
        )
        return written

    def _context(self, row: RolloutRow) -> _Context:
        return self.contexts.setdefault(row.index, _Context([("read", list(row.prompt))]))


def _read_reply(reply: Reply, request: Request, tokenizer: Any) -> Written:
    """A reply up to its first stop: servers differ in whether they know stop strings."""
    ids, log_probs = list(reply.token_ids), list(reply.log_probs)
    if not ids or len(ids) > request.max_tokens:
        raise ValueError(f"rollout: expected 1 to {request.max_tokens} tokens, got {len(ids)}")
    if len(log_probs) != len(ids):
        raise ValueError(
            f"rollout: expected a log-prob for each of {len(ids)} tokens, got {len(log_probs)} "
            "(rollout.calculate_log_probs=True)"
        )
    end = first_stop(ids, request.stop_ids, request.stop_strings, tokenizer)
    if end is None:
        return Written(ids, log_probs, closed=False)
    return Written(ids[:end], log_probs[:end], closed=True)


def first_stop(
    ids: Sequence[int], stop_ids: Sequence[int], stop_strings: Sequence[str], tokenizer: Any
) -> int | None:
    """How many of the ids there are up to the first stop, the stop included; None: there is none.

    >>> first_stop([5, 3, 6, 3], [3], [], None)
    2
    """
    found = next((place + 1 for place, token in enumerate(ids) if token in stop_ids), None)
    if stop_strings:
        # A token holds at least one byte, so this many reach behind the longest stop.
        reach = max(len(stop.encode()) for stop in stop_strings)
        for end in range(1, len(ids) + 1 if found is None else found):
            tail = tokenizer.decode(ids[max(0, end - reach) : end])
            if any(stop in tail for stop in stop_strings):
                return end
    return found


@dataclass
class Played:
    """A finished episode as verl takes it.

    Args:
        prompt_ids, response_ids: the tokens of its layout, in their order.
        response_mask: 1 for what the policy wrote.
        log_probs: as sampled; 0 for what was not.
        runs: the layout of both (`mem1_kernels.verl.layout`).
        reward: of the whole episode.
        turns: how many the policy wrote.
        peak_context: the most tokens that its context held.
        error: why it ended before its time, or "".
        failed: the environment, a tool or the server ended it, not the policy.
        steps: the steps whose weights wrote it.
        scores: its measures at the end, one number each.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    log_probs: list[float]
    runs: list[Run]
    reward: float = 0.0
    turns: int = 0
    peak_context: int = 0
    error: str = ""
    failed: bool = False
    steps: list[int] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)


def play(settings: Settings, row: Any, engine: RemoteEngine, temperature: float) -> Played:
    """Plays the episode of a row of the data.

    An episode that ends before its time, for whatever reason, is a sample too: verl would fill the
    gap in silence. What was written until then is in it; if that is nothing, one masked token.
    """
    try:
        settings = settings.of_row(row)
        with _WORLDS:
            world = settings.world()
            task = task_of(row, world)
        if world.label is not None:
            raise ValueError("World.label: expected None, as verl's losses take no weights")
        generation = replace(
            settings.generation(temperature),
            depth=world.depth,
            mark=world.mark,
            info_name=world.info_name,
        )
        check_world(world, generation.retention)
        episodes = Episodes(
            world.make,
            [task],
            engine,
            generation,
            max_info_tokens=settings.max_info_tokens,
        )
        rollouts = []
        if episodes.prompts:
            rollouts = engine.run(episodes.prompts, episodes.respond, episodes.generation)
        (result,) = episodes.results(rollouts)
        return played(result, engine)
    except Exception as error:  # recorded; the trainer raises if no episode of a step goes well
        logger.warning("an episode failed", exc_info=error)
        return replace(_nothing(engine), error=error_text(error), failed=True)


def played(result: Result, engine: RemoteEngine) -> Played:
    """A result as a sample. It ends with a token of the policy: GAE would not see the reward of the
    last token if that one is masked."""
    sample = _nothing(engine)
    if result.rollout is not None:
        segments = result.rollout.trajectory.segments
        last = max((i for i, segment in enumerate(segments) if segment.in_loss), default=0)
        if last:
            sample = _sample(result.rollout, last + 1)
    sample.reward = result.reward
    sample.turns = len(result.turns)
    sample.peak_context = result.peak_context
    sample.error, sample.failed = result.error, result.failed
    sample.steps = engine.steps
    for name, score in result.scores.items():
        parts = score if isinstance(score, list) else [score]
        sample.scores[name] = sum(parts) / max(len(parts), 1)
    return sample


def _sample(rollout: Rollout, stop: int) -> Played:
    """The first `stop` segments of a rollout."""
    whole = rollout.trajectory
    trajectory = Trajectory(whole.segments[:stop], whole.retention)
    layout = trajectory if rollout.positions == "kept" else unroll(trajectory)
    assert layout.token_ids is not None
    cut = trajectory.spans[0].stop
    log_probs = rollout.log_probs[layout.source].masked_fill(~layout.loss_mask, 0)
    ids = layout.token_ids.tolist()
    return Played(
        prompt_ids=ids[:cut],
        response_ids=ids[cut:],
        response_mask=layout.loss_mask[cut:].to(torch.int64).tolist(),
        log_probs=log_probs[cut:].tolist(),
        runs=encode_runs(layout),
    )


def _nothing(engine: RemoteEngine) -> Played:
    """The sample of an episode in which nothing was written."""
    token = engine.eos_ids[0] if engine.eos_ids else 0
    return Played([token], [token], [0], [0.0], [(2, 2, 0, -1)])
