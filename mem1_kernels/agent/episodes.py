"""Episodes: what stands between an engine, which speaks token ids, and a batch of environments.

    episodes = Episodes(make_environment, tasks, engine, generation)
    rollouts = engine.run(episodes.prompts, episodes.respond, episodes.generation)
    results = episodes.results(rollouts)

`MemoryEfficientAgent.run` is these three lines with a progress bar. Use them yourself where you
drive the engine.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mem1_kernels._text import printable
from mem1_kernels.agent.environment import (
    CHARACTERS_PER_TOKEN,
    Environment,
    EnvironmentBatch,
    Step,
    observation_ids,
)
from mem1_kernels.agent.metrics import TurnTokens
from mem1_kernels.agent.qa import QATask, split_answers
from mem1_kernels.agent.tags import MALFORMED, Content, ParsedTurn
from mem1_kernels.agent.text import TextCodec
from mem1_kernels.rollout import Engine, EngineError, Generation, Rollout, Turn
from mem1_kernels.rollout.engine import check_count
from mem1_kernels.trajectory import Trajectory

NOTES = "Your notes at the end of this user's earlier tasks:"
"""The line above what is remembered of a user, in the prompt."""


@dataclass
class TurnRecord:
    """One turn, for reading.

    Args:
        number: counted from 1.
        text: what the policy wrote, its tags included; ids where the environment speaks ids.
        kind: the kind of action, "malformed" where the turn could not be read.
        state, payload: what stood in the state tag and in the action tag; empty if malformed.
        closed: the turn ends with the closing tag of an action; False: it was cut.
        error: what is wrong with a malformed turn.
        observation: what came back, up to 64 characters (or ids) per token that may be seen of it;
            empty at the end of the episode.
        tokens: how many tokens the state, the action and the info have.
    """

    number: int
    text: Content
    kind: str
    state: Content
    payload: Content
    closed: bool
    error: str
    observation: Content
    tokens: TurnTokens


@dataclass
class Result:
    """What became of one task.

    Attributes:
        task: as it was given to the environment.
        answers: one per query, in order; "" where there is none. An answer of the wrong number of
            parts answers nothing: all are "", and `error` says so.
        answer: the payload of the answer as it was written, or None.
        reward, scores: as the environment says (no golden answers: 0, and no scores).
        turns: for reading, one record per turn.
        peak_context: the most tokens that were live at once, the prompt included.
        total_tokens: of the whole trajectory: what a full context would hold at the end.
        trajectory: all tokens under the retention policy; None where the episode could not begin.
        rollout: the trajectory with the log-probs it was sampled with, as a trainer takes it.
        seconds: wall time of the run that this task was part of.
        error: why the episode ended before its time, or "".
        failed: a tool, the environment or the engine ended it, not the policy.
    """

    task: Any
    prompt: Content
    turns: list[TurnRecord]
    answers: list[Any]
    answer: Content | None
    reward: float
    scores: dict[str, Any]
    rollout: Rollout | None
    seconds: float
    error: str
    failed: bool

    @property
    def trajectory(self) -> Trajectory | None:
        return self.rollout.trajectory if self.rollout else None

    @property
    def peak_context(self) -> int:
        return self.rollout.peak_context if self.rollout else 0

    @property
    def total_tokens(self) -> int:
        return self.rollout.trajectory.num_tokens if self.rollout else 0

    @property
    def states(self) -> list[Content]:
        """The internal state of each turn."""
        return [turn.state for turn in self.turns]

    @property
    def transcript(self) -> str:
        """The episode as text: per turn a heading, what was written and what came back.

        Only headings begin at the margin, so no text can forge one. Control characters are shown
        as escapes.
        """
        parts = [_block("prompt", self.prompt)]
        for turn in self.turns:
            marks = "" if turn.closed else ", cut: no closing tag"
            marks += f", unreadable: {_line(turn.error)}" if turn.error else ""
            written = textwrap.indent(_show(turn.text), "    ", lambda line: True)
            parts.append(
                f"--- turn {turn.number}: {turn.kind} "
                f"({turn.tokens.state} + {turn.tokens.action} tokens{marks})\n{written}"
            )
            if turn.observation:
                parts.append(_block(f"({turn.tokens.info} tokens)", turn.observation))
        return "\n".join(parts)

    def __str__(self) -> str:
        lines = [self.transcript, "--- result"]
        questions = self.task.questions if isinstance(self.task, QATask) else ()
        for number, answer in enumerate(self.answers, 1):
            asked = f"{_line(questions[number - 1])} " if questions else ""
            lines.append(f"{number}. {asked}-> {_line(answer) or '(no answer)'}")
        if not self.answers and self.answer is not None:
            lines.append(f"answer: {_line(self.answer)}")
        if self.error:
            lines.append(f"error: {_line(self.error)}")
        if self.scores:
            lines.append(f"reward {self.reward:.3f}, {self.scores}")
        share = f" ({self.peak_context / self.total_tokens:.0%})" if self.total_tokens else ""
        lines.append(
            f"{len(self.turns)} turn{'s' * (len(self.turns) != 1)}, {self.seconds:.1f} s, peak "
            f"{self.peak_context:,} of {self.total_tokens:,} tokens{share}"
        )
        return "\n".join(lines)


class Episodes:
    """A batch of episodes: prompts and observations as token ids, turns as their tags read them.

    The constructor begins the episodes. Whatever goes wrong with one of them (its environment
    raises, its ids are outside the vocabulary, the engine ends its row) ends that one, with the
    error recorded in its result.

    Args:
        make: makes one environment; called once per task.
        tasks: what `Environment.reset` takes.
        engine: says the tokenizer and the vocabulary. It is not run here.
        generation: how turns are generated; the stops and `state_tokens` come from the tags.
        max_info_tokens: the most tokens of an observation, its tags and hint included.
        workers: how many environments may act at once, for tools that wait for a network.
        on_turn: called with (task number, TurnRecord) after each turn.
        notes: for each task, what is remembered from earlier ones; it stands at the end of the
            prompt, as foreign text. "": nothing. Default: nothing for any task.

    Attributes:
        prompts: token ids of each episode that has begun; row r of the engine is one of them.
        generation: what to hand to the engine.
        places: for each row, the number of its task.
        records: for each task, its turns.

    Raises:
        TypeError: an environment that speaks text, and an engine without a tokenizer; notes, and
            an environment that speaks ids.
        ValueError: an argument out of its range, stops in the generation, or as many notes as tasks
            are expected.

    >>> import random, torch, transformers
    >>> from mem1_kernels.agent.tasks import ChainTask, TableEnvironment, VOCABULARY
    >>> from mem1_kernels.rollout import HFEngine
    >>> _ = torch.manual_seed(0)
    >>> engine = HFEngine(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
    ...     vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1)))
    >>> tasks = [ChainTask.sample(2, random.Random(seed)) for seed in range(3)]
    >>> episodes = Episodes(TableEnvironment, tasks, engine, Generation(max_new_tokens=8, seed=0))
    >>> rollouts = engine.run(episodes.prompts, episodes.respond, episodes.generation)
    >>> [result.reward for result in episodes.results(rollouts)]
    [0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        make: Callable[[], Environment],
        tasks: Sequence[Any],
        engine: Engine,
        generation: Generation,
        *,
        max_info_tokens: int = 600,
        workers: int = 1,
        on_turn: Callable[[int, TurnRecord], None] | None = None,
        notes: Sequence[str] | None = None,
    ) -> None:
        check_count("max_info_tokens", max_info_tokens)
        check_generation(generation)
        if notes is not None and len(notes) != len(tasks):
            raise ValueError(f"notes: expected one per task, {len(tasks)}, got {len(notes)}")
        self.started = time.perf_counter()
        self.batch = EnvironmentBatch(make, workers=workers)
        self.tags = self.batch.tags
        self.vocabulary = engine.vocabulary
        self.max_info_tokens = max_info_tokens
        self.on_turn = on_turn
        text = isinstance(self.tags.stops[0], str)
        if notes is not None and not text:
            raise TypeError("notes: expected an environment that speaks text, got one of token ids")
        self.contents = self.batch.reset(tasks)
        if notes is not None:
            for place in self.batch.active:
                self.contents[place] = f"{self.contents[place]}{self._remembered(notes[place])}"
        self.records: list[list[TurnRecord]] = [[] for _ in tasks]
        if text and engine.tokenizer is None:
            raise TypeError(
                "tokenizer: expected one beside a loaded model, as the environment speaks text"
            )
        self.codec = TextCodec(engine.tokenizer, self.tags) if text else None
        stops: tuple[Any, ...] = tuple(self.tags.stops)
        self.generation = replace(
            generation,
            stop_ids=engine.eos_ids if text else (*stops, *engine.eos_ids),
            stop_strings=stops if text else (),
            state_tokens=self.state_tokens,
        )
        self.prompts: list[list[int]] = []
        self.places: list[int] = []
        for place in self.batch.active:
            content: Any = self.contents[place]
            try:
                ids = content if self.codec is None else self.codec.prompt(content)
                if not ids:
                    raise ValueError("prompt: expected at least one token, got none")
                self.prompts.append(self._known("prompt", ids))
                self.places.append(place)
            except ValueError as error:
                self.batch.fail(place, error)

    def _remembered(self, notes: str) -> str:
        """The end of a prompt: what is remembered, which the tags must not be read in."""
        guard = getattr(self.tags, "guard", None)
        if not notes:
            return ""
        if guard is None:
            raise TypeError(f"notes: expected tags with guard, got {type(self.tags).__name__}")
        return f"\n\n{NOTES}\n{guard(notes)}\n"

    @property
    def turns(self) -> list[TurnRecord]:
        """All turns of all episodes."""
        return [turn for turns in self.records for turn in turns]

    def state_tokens(self, ids: list[int]) -> int:
        """How many of a turn's ids are its state."""
        return self.tags.state_length(ids, None if self.codec is None else self.codec.decode)

    def respond(self, turns: Sequence[Turn]) -> list[list[int] | None]:
        """The environments' side of a turn: what the engine calls after each one."""
        parsed = [self._parse(turn.token_ids) for turn in turns]
        said: list[ParsedTurn | None] = [None] * len(self.records)
        for turn, (_, read) in zip(turns, parsed, strict=True):
            said[self.places[turn.row]] = read
        for place in set(self.batch.active) - {self.places[turn.row] for turn in turns}:
            self.batch.stop(place, "the engine ended the row")
        steps = self.batch.step(said)
        replies = []
        for turn, (output, read) in zip(turns, parsed, strict=True):
            place = self.places[turn.row]
            step = steps[place]
            assert step is not None
            reply = self._reply(place, step, turn.number)
            state = self.state_tokens(turn.token_ids)
            record = TurnRecord(
                number=turn.number,
                text=output,
                kind=read.kind,
                state=read.state,
                payload=read.payload,
                closed=read.closed,
                error=read.error,
                observation=self._seen(step.observation) if reply is not None else "",
                tokens=TurnTokens(state, len(turn.token_ids) - state, len(reply or ())),
            )
            self.records[place].append(record)
            replies.append(reply)
            if self.on_turn is not None:
                self.on_turn(place, record)
        return replies

    def results(self, rollouts: Sequence[Rollout]) -> list[Result]:
        """One result per task, in order, once the engine has run.

        Args:
            rollouts: the engine's, one per prompt.
        """
        seconds = time.perf_counter() - self.started
        rows = dict(zip(self.places, rollouts, strict=True))
        for place, rollout in rows.items():
            if rollout.error:
                self.batch.fail(place, EngineError(rollout.error))
        return [self._result(place, rows.get(place), seconds) for place in range(len(self.records))]

    def _parse(self, ids: list[int]) -> tuple[Content, ParsedTurn]:
        """What the policy wrote, for reading, and as its tags read it."""
        codec = self.codec
        if codec is None:
            return ids, self.tags.parse(ids)
        output = codec.decode(ids)
        read = self.tags.parse(output, codec.opened)
        if not codec.knows(ids):
            message = "token ids that the tokenizer does not know"
            read = ParsedTurn(MALFORMED, "", "", read.closed, message)
        return output, read

    def _reply(self, place: int, step: Step, number: int) -> list[int] | None:
        """The ids of what came back; None where the episode is over."""
        left = self.generation.max_turns - number
        if step.done:
            return None
        if not left:
            self.batch.stop(place, f"no end after {number} turns")
            return None
        try:
            ids = observation_ids(
                step.observation,
                self.tags,
                codec=self.codec,
                max_tokens=self.max_info_tokens,
                turns_left=left,
            )
            return self._known("observation", ids)
        except Exception as error:  # whatever the tokenizer makes of it ends this episode only
            self.batch.fail(place, error)
            return None

    def _known(self, name: str, ids: list[int]) -> list[int]:
        """The ids, all of which the model must know."""
        limit = self.vocabulary
        if limit is not None and ids and not 0 <= min(ids) <= max(ids) < limit:
            raise ValueError(
                f"{name}: expected token ids from 0 to {limit - 1}, got {min(ids)} to {max(ids)}"
            )
        return ids

    def _seen(self, observation: Content) -> Content:
        """No more of an observation than could be seen."""
        return observation[: self.max_info_tokens * CHARACTERS_PER_TOKEN]

    def _result(self, place: int, rollout: Rollout | None, seconds: float) -> Result:
        episode, turns = self.batch.episodes[place], self.records[place]
        answer = turns[-1].payload if turns and turns[-1].kind == "answer" else None
        answers: list[Any] = []
        error = episode.error
        if isinstance(episode.task, QATask):
            wanted = len(episode.task.questions)
            answers = [""] * wanted
            if isinstance(answer, str):
                said = split_answers(answer, wanted)
                if len(said) == wanted:
                    answers = list(said)
                else:
                    error = error or f"expected {wanted} answers, got {len(said)}: {answer!r}"
        return Result(
            task=episode.task,
            prompt=self.contents[place],
            turns=turns,
            answers=answers,
            answer=answer,
            reward=episode.reward,
            scores=dict(episode.scores),
            rollout=rollout,
            seconds=seconds,
            error=error,
            failed=episode.failed,
        )


def check_generation(generation: Generation) -> None:
    """Raises TypeError or ValueError unless it leaves the stops to the environment's tags."""
    if not isinstance(generation, Generation):
        raise TypeError(f"generation: expected a Generation, got {type(generation).__name__}")
    own = ("stop_ids", "stop_strings", "state_tokens")
    given = [name for name in own if getattr(generation, name)]
    if given:
        raise ValueError(
            f"generation: expected no {given}, which the environment's tags bring with them"
        )


class TextStream:
    """Turns sampled ids into pieces of text, none of which ends inside a character.

    Args:
        episodes: whose rows are streamed.
        emit: called with (task number, piece of text).
    """

    def __init__(self, episodes: Episodes, emit: Callable[[int, str], None]) -> None:
        assert episodes.codec is not None
        self.decode = episodes.codec.decode
        self.places = episodes.places
        self.emit = emit
        self.ids: dict[int, list[int]] = {row: [] for row in range(len(self.places))}
        self.shown = dict.fromkeys(self.ids, 0)

    def add(self, row: int, ids: Sequence[int]) -> None:
        """Takes ids that were just sampled in a row."""
        self.ids[row] += ids
        self._show(row, whole=False)

    def end(self) -> None:
        """Shows what is left of all rows' turns."""
        for row, ids in self.ids.items():
            self._show(row, whole=True)
            ids.clear()
            self.shown[row] = 0

    def _show(self, row: int, *, whole: bool) -> None:
        text = self.decode(self.ids[row])
        if not whole and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return
        if len(text) > self.shown[row]:
            self.emit(self.places[row], text[self.shown[row] :])
            self.shown[row] = len(text)


def _show(content: Any) -> str:
    """Text or ids, for a terminal."""
    text = content.strip() if isinstance(content, str) else " ".join(map(str, content))
    return printable(text)


def _line(content: Any) -> str:
    """Text or ids on one line."""
    return " ".join(_show(content).split())


def _block(name: str, content: Content) -> str:
    """An indented block: what the policy read and did not write."""
    text = "\n".join(
        line
        for paragraph in _show(content).split("\n")
        for line in textwrap.wrap(paragraph, 96, break_on_hyphens=False) or [""]
    )
    return f"    | {name}\n" + textwrap.indent(text, "    | ", lambda line: True)
