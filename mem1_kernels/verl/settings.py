"""What verl's config, or a row of its data, says of episodes: `rollout.custom.mem1` and
`extra_info`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from mem1_kernels.agent.qa import QATask, RetrievalQA
from mem1_kernels.agent.retrieval import open_retriever
from mem1_kernels.agent.tags import MEM1, PAPER, WEBSHOP, TagSet
from mem1_kernels.agent.world import TASKS, World, make_world
from mem1_kernels.ppo.config import TOLERANCE, load_object, retention_of
from mem1_kernels.rollout import Generation
from mem1_kernels.trajectory import Positions, check_positions

TAGS = {"MEM1": MEM1, "PAPER": PAPER, "WEBSHOP": WEBSHOP}
"""The tags that a config can name; any others are `module:name`."""

OF_A_ROW = ("environment", "tags", "retention")
"""What a row of the data may say in place of the config."""


@dataclass(frozen=True)
class Settings:
    """The options under `actor_rollout_ref.rollout.custom.mem1`.

    Args:
        environment: a task of `mem1_kernels.agent.world` ("chain", "lookup", "qa", "factbook",
            "webshop"), or `module:name` of a `World` or of a function that makes one.
        tags: for environments that search: "MEM1", "PAPER", "WEBSHOP" or `module:name`. Default:
            the environment's own.
        retention: as the option of our own trainer: "mem1", "keep_last(2)", `module:function`, ...
        positions: "kept" or "reprefill". Default: "kept" for `rollout.name=mem1`, else "reprefill".
        max_turns: turns after which an episode ends.
        max_new_tokens: the most tokens of a turn.
        max_info_tokens: the most tokens of an observation, its tags and hint included.
        corpus: for "qa", "factbook" and "webshop", as for `make_world`.
        data: for "webshop" on a server, as for `make_world`.
        topk: passages per search.
        tolerance_max, tolerance_mean: the largest and the mean |log-prob of the rollout - log-prob
            of the actor| with which training goes on. Default: 1e-3 and 1e-4 where both compute in
            float32, else 2.0 and 0.05.

    Raises:
        TypeError, ValueError: an option that does not exist, of another type or out of its range.

    >>> Settings.read({"environment": "chain", "max_turns": 4}).max_turns
    4
    """

    environment: str = ""
    tags: str = ""
    retention: str = "mem1"
    positions: str = ""
    max_turns: int = 20
    max_new_tokens: int = 256
    max_info_tokens: int = 600
    corpus: str = ""
    data: str = ""
    topk: int = 3
    tolerance_max: float | None = None
    tolerance_mean: float | None = None

    def __post_init__(self) -> None:
        for name in ("environment", "tags", "retention", "positions", "corpus", "data"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected text, got {getattr(self, name)!r}")
        for name in ("max_turns", "max_new_tokens", "max_info_tokens", "topk"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name in ("tolerance_max", "tolerance_mean"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not value > 0):
                raise ValueError(f"{name}: expected a number above 0, got {value!r}")
        if not self.environment:
            raise ValueError("environment: expected one, such as 'chain', got none")
        if self.environment not in TASKS and ":" not in self.environment:
            names = ", ".join(TASKS)
            raise ValueError(
                f"environment: expected {names} or module:name, got {self.environment!r}"
            )
        if self.positions and check_positions(self.positions) == "compact":
            raise ValueError("positions: expected 'kept' or 'reprefill', got 'compact'")
        retention_of(self.retention)

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> Settings:
        """The settings that a mapping holds.

        Raises:
            ValueError: an option that does not exist; and as the class.
        """
        options = dict(options or {})
        if unknown := sorted(options.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"rollout.custom.mem1: there is no option {unknown[0]!r}")
        return cls(**options)

    def of_row(self, row: Mapping[str, Any]) -> Settings:
        """These settings with what a row of the data says in their place.

        >>> Settings("chain").of_row({"extra_info": {"retention": "keep_last(2)"}}).retention
        'keep_last(2)'
        """
        info = _said(row.get("extra_info"))
        given = {**info, **{name: row[name] for name in OF_A_ROW if row.get(name) is not None}}
        changes = {name: given[name] for name in OF_A_ROW if name in given}
        return replace(self, **changes) if changes else self

    def form(self, backend: str) -> Positions:
        """The positions of the rollouts of `rollout.name=backend`.

        Raises:
            ValueError: "kept" positions of a backend that sends the text again.
        """
        chosen = self.positions or ("kept" if backend == "mem1" else "reprefill")
        if chosen == "kept" and backend != "mem1":
            raise ValueError(
                "positions: 'kept' needs a rollout that keeps its KV cache over turns, "
                f"rollout.name=mem1, got {backend!r}"
            )
        return check_positions(chosen)

    def generation(self, temperature: float) -> Generation:
        """How turns are written; the tags bring the stops."""
        return Generation(
            retention=retention_of(self.retention),
            max_turns=self.max_turns,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
        )

    def tolerances(self, *dtypes: str) -> tuple[float, float]:
        """(largest, mean) gap of log-probs that passes, where rollout and actor compute in these.

        >>> Settings("chain").tolerances("float32", "fp32"), Settings("chain").tolerances("bf16")
        ((0.001, 0.0001), (2.0, 0.05))
        """
        exact = all(name in ("float32", "fp32", "float") for name in dtypes)
        largest, mean = TOLERANCE["float32" if exact else "bfloat16"]
        return self.tolerance_max or largest, self.tolerance_mean or mean

    def world(self) -> World:
        """The world that `environment` names, made once per process.

        Raises:
            ValueError: it cannot be imported, lacks a corpus, or brings tags of its own.
        """
        return _world(self.environment, self.tags, self.corpus, self.data, self.topk)


def task_of(row: Mapping[str, Any], world: World) -> Any:
    """The task of a row's episode, from its `extra_info`:

    - `questions`, and `golden_answers` (a list of lists): a `QATask`;
    - `task`: what `Environment.reset` takes, as it is;
    - `size` and `seed`: drawn by the world.

    Raises:
        ValueError: none of these.

    >>> world = Settings("chain").world()
    >>> task_of({"extra_info": {"size": 3, "seed": 7}}, world).searches
    3
    """
    info = _said(row.get("extra_info"))
    if "questions" in info:
        golden = info.get("golden_answers")
        return QATask(tuple(info["questions"]), None if golden is None else tuple(golden))
    if "task" in info:
        return info["task"]
    if "size" in info:
        if "seed" not in info:
            raise ValueError("extra_info: expected a seed beside the size, got none")
        return world.draw(int(info["size"]), random.Random(int(info["seed"])))
    raise ValueError(
        f"extra_info: expected questions, task, or size and seed, got {sorted(info) or 'nothing'}"
    )


def _said(info: Any) -> dict[str, Any]:
    """`extra_info` without what a table fills in with None, and with lists for arrays."""
    return {name: _plain(value) for name, value in dict(info or {}).items() if value is not None}


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def _world(environment: str, tags: str, corpus: str, data: str, topk: int) -> World:
    if environment == "qa":
        if not corpus:
            raise ValueError("corpus: expected one for environment 'qa', got none")
        retriever = open_retriever(corpus)
        world = World(_rows_ask, lambda: RetrievalQA(retriever, topk=topk))
    elif environment in TASKS:
        world = make_world(environment, sizes=(), data=data, corpus=corpus, topk=topk)
    else:
        world = load_object("environment", environment)
        world = world if isinstance(world, World) else world()
        if not isinstance(world, World):
            raise ValueError(
                "environment: expected a World, or a function that makes one, as "
                f"{environment!r}, got {type(world).__name__}"
            )
    if not tags:
        return world
    chosen = TAGS[tags] if tags in TAGS else load_object("tags", tags)
    return replace(world, make=_with_tags(world.make, chosen))


def _rows_ask(size: int, rng: random.Random) -> Any:
    raise ValueError("extra_info: expected questions, as environment 'qa' draws none")


def _with_tags(make: Callable[[], Any], tags: TagSet) -> Callable[[], Any]:
    environment = make()
    if not isinstance(environment, RetrievalQA):
        raise ValueError(
            f"tags: expected none for {type(environment).__name__}, which brings its own"
        )
    tagged = RetrievalQA(environment.retriever, topk=environment.topk, tags=tags)
    return lambda: copy.copy(tagged)
