"""What an agent acts in: one small protocol, and a batch of such environments.

    prompt = environment.reset(task)
    observation, reward, done, scores = environment.step(turn)

A prompt and an observation are text (`str`) for language models or token ids (`list[int]`) for the
small tasks; `environment.tags` says how turns are written and is of the same kind. The environment
gets a `ParsedTurn` that its tags have read from what the policy generated, and nothing else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, Protocol

from mem1_kernels._text import error_text, printable, valid_text
from mem1_kernels.agent.tags import Content, ParsedTurn, Tags
from mem1_kernels.agent.text import TextCodec

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 64


class ToolError(RuntimeError):
    """A tool could not do its work: no answer from a server, a reply that makes no sense."""


class Step(NamedTuple):
    """What an action led to.

    Fields:
        observation: what the policy sees next, without tags; empty where the episode is over.
        reward: earned by this action.
        done: the episode is over.
        scores: at the end of an episode, its measures by name ("em", "f1", ...), each a number or
            one number an objective.
    """

    observation: Content
    reward: float = 0.0
    done: bool = False
    scores: Mapping[str, Any] = {}


class Environment(Protocol):
    """An environment runs one episode at a time; what is expensive (a corpus, a shop) is shared.

    A malformed turn reaches `step` like any other (`turn.kind == "malformed"`, `turn.error`): the
    environment says whether it ends the episode or is answered by an observation.
    """

    tags: Tags

    def reset(self, task: Any) -> Content:
        """Begins an episode and returns its prompt."""

    def step(self, turn: ParsedTurn) -> Step | tuple[Content, float, bool]:
        """Does what the turn says; raises `ToolError` where a tool fails."""


@dataclass
class Episode:
    """What is known of an episode so far.

    `error` says why one ended before its time, and `failed` that a tool or the environment did it.
    """

    task: Any
    turns: int = 0
    reward: float = 0.0
    done: bool = False
    error: str = ""
    failed: bool = False
    scores: dict[str, Any] = field(default_factory=dict)


class EnvironmentBatch:
    """Several episodes side by side: lists in, lists out.

    Whatever an environment or a tool raises ends its own episode, with the reward earned so far and
    the error recorded, and leaves the others alone. Text that comes out of an environment is made
    valid Unicode: a lone surrogate becomes U+FFFD.

    Args:
        make: makes one environment; called once per place in the batch.
        workers: how many steps may run at once, for tools that wait for a network.

    >>> from mem1_kernels.agent.tags import MEM1
    >>> class Echo:
    ...     tags = MEM1
    ...     def reset(self, task):
    ...         self.word = task
    ...         return f"Say {task}."
    ...     def step(self, turn):
    ...         return "", float(turn.payload == self.word), True
    >>> batch = EnvironmentBatch(Echo)
    >>> batch.reset(["hello", "bye"])
    ['Say hello.', 'Say bye.']
    >>> turn = MEM1.parse("<think>easy</think><answer>hello</answer>")
    >>> [step.reward for step in batch.step([turn, turn])]
    [1.0, 0.0]
    >>> batch.active
    []
    """

    def __init__(self, make: Callable[[], Environment], *, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        self.make = make
        self.workers = workers
        self.environments: list[Environment] = [make()]
        for name in ("tags", "reset", "step"):
            if not hasattr(self.environments[0], name):
                kind = type(self.environments[0]).__name__
                raise TypeError(f"environment: expected tags, reset and step; {kind} has no {name}")
        self.episodes: list[Episode] = []

    @property
    def tags(self) -> Tags:
        """How turns are written in these environments."""
        return self.environments[0].tags

    @property
    def active(self) -> list[int]:
        """The places whose episode goes on."""
        return [place for place, episode in enumerate(self.episodes) if not episode.done]

    def reset(self, tasks: Sequence[Any]) -> list[Content]:
        """Begins one episode per task; one that cannot begin is over, and its prompt empty.

        Raises:
            Exception: if no episode began, the first error that is not a `ToolError`: then it is
                the tasks that are wrong, or the environment.
        """
        while len(self.environments) < len(tasks):
            self.environments.append(self.make())
        self.episodes = [Episode(task) for task in tasks]
        errors: list[Exception] = []

        def begin(place: int) -> Content:
            try:
                return _content("reset", self.environments[place].reset(tasks[place]), self.tags)
            except Exception as error:
                errors.append(error)
                self.fail(place, error)
                return ""

        prompts = self._map(begin, range(len(tasks)))
        wrong = [error for error in errors if not isinstance(error, ToolError)]
        if wrong and len(errors) == len(tasks):
            raise wrong[0]
        return prompts

    def step(self, turns: Sequence[ParsedTurn | None]) -> list[Step | None]:
        """One turn per episode: None where it is over, and None comes back there.

        Raises:
            ValueError: as many turns as episodes are expected, and a turn for exactly the active.
        """
        if len(turns) != len(self.episodes):
            raise ValueError(f"turns: expected {len(self.episodes)}, got {len(turns)}")
        places = [place for place, turn in enumerate(turns) if turn is not None]
        if places != self.active:
            raise ValueError(f"turns: expected them at {self.active}, got them at {places}")

        def act(place: int) -> Step:
            turn = turns[place]
            assert turn is not None
            episode = self.episodes[place]
            episode.turns += 1
            try:
                step = _checked(self.environments[place].step(turn), self.tags)
            except Exception as error:  # whatever a tool raises ends its own episode only
                self.fail(place, error)
                return Step("", 0.0, True)
            episode.reward += step.reward
            episode.done = step.done
            episode.scores.update(step.scores)
            return step

        steps = dict(zip(places, self._map(act, places), strict=True))
        return [steps.get(place) for place in range(len(turns))]

    def stop(self, place: int, error: str) -> None:
        """Ends the episode at `place` from outside, such as when it is out of turns."""
        self.episodes[place].done = True
        self.episodes[place].error = error

    def fail(self, place: int, error: Exception) -> None:
        """Ends the episode at `place` with what its environment, a tool or the engine raised."""
        message = error_text(error)
        logger.warning("episode %d ends: %s", place, printable(message), exc_info=error)
        self.stop(place, message)
        self.episodes[place].failed = True

    def _map(self, function: Callable[[int], Any], places: Iterable[int]) -> list[Any]:
        if self.workers == 1:
            return [function(place) for place in places]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(function, places))


def _content(name: str, content: Content, tags: Tags) -> Content:
    """A prompt or an observation, in valid Unicode if it is text.

    Raises:
        TypeError: ids where the tags are text, the reverse, or neither.
    """
    speaks_ids = isinstance(tags.stops[0], int)
    ids = isinstance(content, list) and all(type(i) is int for i in content)
    if not (isinstance(content, str) or ids) or (content and ids != speaks_ids):
        wanted = "list[int]" if speaks_ids else "str"
        raise TypeError(f"{name}: expected {wanted}, got {type(content).__name__}")
    return valid_text(content) if isinstance(content, str) else content


def _checked(answer: Step | tuple, tags: Tags) -> Step:
    """The answer as a step, its reward as a float.

    Raises:
        TypeError, ValueError: an answer that is not a step.
    """
    if not isinstance(answer, Step) and len(answer) != 3:
        raise TypeError(f"step: expected a Step or 3 values, got {len(answer)}")
    step = Step(*answer)
    done, scores = step.done, step.scores
    reward: Any = step.reward
    observation = _content("observation", step.observation, tags)
    if done not in (True, False):
        raise TypeError(f"done: expected True or False, got {done!r}")
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores: expected a mapping, got {type(scores).__name__}")
    numbers = {}
    for name, score in scores.items():
        parts = list(score) if isinstance(score, list | tuple) else [score]
        if not all(isinstance(part, Real) and math.isfinite(part) for part in parts):
            raise ValueError(f"scores: expected finite numbers as {name!r}, got {score!r}")
        parts = [float(part) for part in parts]
        numbers[name] = parts if isinstance(score, list | tuple) else parts[0]
    if not isinstance(reward, Real) or not math.isfinite(reward):
        raise ValueError(f"reward: expected a finite number, got {reward!r}")
    return Step(observation, float(reward), bool(done), numbers)


def observation_ids(
    observation: Content,
    tags: Tags,
    *,
    codec: TextCodec | None = None,
    max_tokens: int | None = None,
    turns_left: int | None = None,
) -> list[int]:
    """The token ids of an observation in its tags, no more than `max_tokens` of them.

    What is too long loses its end, at a whole character; the tags and the hint are always whole. Of
    a text no more than 64 characters per allowed token are looked at, so an enormous page costs no
    more than a long one. Where the chat template leaves a tag open for the policy to go on in, the
    observation ends with that tag too, so every turn begins alike.

    Args:
        codec: turns text into ids. Not needed for an observation of ids.
        max_tokens: the most ids, tags and hint included; None for no limit.
        turns_left: for the hint; None for no hint.

    Raises:
        ValueError: the tags and the hint alone are longer than `max_tokens`.
        TypeError: a text without `codec`.

    >>> from mem1_kernels.agent.tags import TokenTags
    >>> tags = TokenTags(state=(1, 2), actions={"search": (3, 4)}, info=(7, 8))
    >>> observation_ids([30, 31, 32], tags, max_tokens=4)
    [7, 30, 31, 8]
    """
    if isinstance(observation, str) and max_tokens is not None:
        observation = observation.strip()[: max_tokens * CHARACTERS_PER_TOKEN]
    head, body, tail = tags.wrap(observation, turns_left)
    if isinstance(head, str) and codec is None:
        raise TypeError("codec: expected a TextCodec for an observation of text, got None")
    before, after = (_trusted(part, codec) for part in (head, tail))
    if codec is not None and isinstance(tail, str):
        after += codec.encode_trusted(codec.opened)
    room = None if max_tokens is None else max_tokens - len(before) - len(after)
    if room is not None and room < 0:
        needed = len(before) + len(after)
        raise ValueError(f"max_tokens: expected at least {needed} for the tags, got {max_tokens}")
    if not isinstance(body, str):
        return [*before, *body[:room], *after]
    assert codec is not None
    inside = codec.encode(body)
    if room is not None and len(inside) > room:
        inside = codec.whole_characters(inside[:room], body)
    return [*before, *inside, *after]


def _trusted(content: Content, codec: TextCodec | None) -> list[int]:
    if not isinstance(content, str):
        return content
    assert codec is not None
    return codec.encode_trusted(content)
