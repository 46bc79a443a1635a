"""A task by its name: what evaluation and training need to play it.

| task | an episode | its size |
|---|---|---|
| chain, lookup | the token tasks of `tasks` | hops, keys |
| qa | questions and a corpus of your own | questions |
| factbook | the World Factbook, a tenth of its questions held out | questions |
| webshop | a purchase, in the procedural shop (a tenth of its goals held out) or on a server | 1 |
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from mem1_kernels._secrets import public_address
from mem1_kernels.agent.qa import Question, RetrievalQA, compose, load_questions
from mem1_kernels.agent.retrieval import is_address, open_retriever
from mem1_kernels.agent.tasks import ChainTask, LookupTask, TableEnvironment, TableTask, Teacher
from mem1_kernels.agent.webshop import RemoteSite, Shop, ShopSite, WebShop
from mem1_kernels.retention import Segment
from mem1_kernels.rollout import Turn

TASKS = ("chain", "lookup", "factbook", "qa", "webshop")
TOKEN_TASKS = ("chain", "lookup")
"""The tasks that speak token ids and need no tokenizer."""


@dataclass
class World:
    """A task to learn or to measure. Make your own to train on another environment.

    Args:
        draw: (size, random) -> a task, such as `environment.reset` takes.
        make: makes one environment; its `tags` say how turns are written.
        demonstrate: (task, random) -> segments with ids, and the reward: the teacher of the warm
            start. None: there is none.
        draw_eval: like draw, for evaluation. None: evaluation uses `draw`.
        tokenizer: a Hugging Face tokenizer if environments speak text, None if they speak ids.
        eval_tasks: size -> every task of the evaluation, in a fixed order. None: there is no such
            list, and evaluation draws.
        depth: for the retention policies `fold` and `sub_agents`: as `Generation.depth`. None: no
            branches.
        mark: as `Generation.mark`. None: no marks.
        info_name: as `Generation.info_name`. None: observations have no names.
        label: for training, after the episode: as for `Rollout.relabelled`. None: what the policy
            wrote is in the loss, with weight 1.
    """

    draw: Callable[[int, random.Random], Any]
    make: Callable[[], Any]
    demonstrate: Callable[[Any, random.Random], tuple[list[Segment], float]] | None = None
    draw_eval: Callable[[int, random.Random], Any] | None = None
    tokenizer: Any = None
    eval_tasks: Callable[[int], Sequence[Any]] | None = None
    depth: Callable[[Turn], int] | None = None
    mark: Callable[[list[int]], str | None] | None = None
    info_name: Callable[[Turn], str] | None = None
    label: Callable[[Sequence[Segment]], Sequence[Segment]] | None = None


def make_world(
    task: str,
    *,
    sizes: Sequence[int],
    eval_sizes: Sequence[int] = (),
    data: str = "",
    eval_data: str = "",
    corpus: str = "",
    topk: int = 3,
    hops: Sequence[int] = (1, 2),
    teacher_keep: float = 1.0,
    seed: int = 0,
    tokenizer: Any = None,
) -> World:
    """The world that `task` names.

    Args:
        task: one of `TASKS`.
        sizes, eval_sizes: the sizes that will be drawn; each is tried now.
        data: qa: questions (`.jsonl`, `.parquet`), or "factbook". webshop on a server: the numbers
            of its goals, such as "500:6000" (6000 not included).
        eval_data: qa, webshop on a server: as `data`, for evaluation; default: `data`.
        corpus: qa: what `open_retriever` takes. factbook: the same; default: the factbook.
            webshop: the address of a WebShop server; default: the procedural shop.
        topk: passages per search.
        hops: look-ups that a factbook question takes, 1 to 4.
        teacher_keep: chain, lookup: the chance that the teacher remembers (`Teacher`).
        seed: qa, factbook: of how questions are put together into tasks.
        tokenizer: a Hugging Face tokenizer for the tasks in text.

    Raises:
        ValueError: an unknown task, a size that the task does not have, an option that the task
            does not use.

    >>> world = make_world("chain", sizes=[2, 3])
    >>> world.draw(3, random.Random(0)).searches
    3
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    server = task == "webshop" and bool(corpus)
    used = {
        "data": task == "qa" or server,
        "eval_data": task == "qa" or server,
        "corpus": task not in TOKEN_TASKS,
        "tokenizer": task not in TOKEN_TASKS,
    }
    given = {"data": data, "eval_data": eval_data, "corpus": corpus, "tokenizer": tokenizer}
    for name, value in given.items():
        if value and not used[name]:
            kind = "the procedural shop" if task == "webshop" else f"task {task!r}"
            raise ValueError(f"{name}: expected none for {kind}, got {public_address(value)!r}")
    if task in TOKEN_TASKS:
        return _token_world(task, sizes, eval_sizes, teacher_keep)
    if task == "webshop":
        return _shop_world(sizes, eval_sizes, data, eval_data, corpus, tokenizer)

    if task == "factbook":
        questions = _factbook_questions(hops)
        random.Random(0).shuffle(questions)
        held_out, questions = questions[: len(questions) // 10], questions[len(questions) // 10 :]
    else:
        for name, value in (("data", data), ("corpus", corpus)):
            if not value:
                raise ValueError(f"{name}: expected one for task 'qa', got none")
        questions = _questions("data", data, hops)
        held_out = _questions("eval_data", eval_data, hops) if eval_data else questions
    retriever = open_retriever(corpus or "factbook")
    return _listed(
        lambda: RetrievalQA(retriever, topk=topk),
        lambda size: compose(questions, size, seed=seed),
        lambda size: compose(held_out, size, seed=seed),
        sizes,
        eval_sizes,
        tokenizer,
    )


def _listed(
    make: Callable[[], Any],
    tasks: Callable[[int], Sequence[Any]],
    eval_tasks: Callable[[int], Sequence[Any]],
    sizes: Iterable[int],
    eval_sizes: Iterable[int],
    tokenizer: Any,
) -> World:
    """A world whose tasks are lists, made once per size; a size without tasks raises now."""
    lists = {"sizes": cache(tasks), "eval_sizes": cache(eval_tasks)}
    for name, some in (("sizes", sizes), ("eval_sizes", eval_sizes)):
        _try_sizes(name, some, lists[name])
    return World(
        lambda size, rng: rng.choice(lists["sizes"](size)),
        make,
        draw_eval=lambda size, rng: rng.choice(lists["eval_sizes"](size)),
        tokenizer=tokenizer,
        eval_tasks=lists["eval_sizes"],
    )


def _try_sizes(option: str, sizes: Iterable[int], attempt: Callable[[int], Any]) -> None:
    for size in sizes:
        try:
            attempt(size)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None


def _questions(option: str, data: str, hops: Iterable[int]) -> list[Question]:
    if data == "factbook":
        return _factbook_questions(hops)
    return load_questions(data, option=option)


def _factbook_questions(hops: Iterable[int]) -> list[Question]:
    from mem1_kernels.agent.factbook import Factbook

    book = Factbook()
    return [question for number in hops for question in book.questions(number)]


def _token_world(
    task: str, sizes: Sequence[int], eval_sizes: Sequence[int], teacher_keep: float
) -> World:
    task_class = ChainTask if task == "chain" else LookupTask

    def demonstrate(task: TableTask, rng: random.Random) -> tuple[list[Segment], float]:
        return Teacher(teacher_keep, rng).play(task)

    for name, some in (("sizes", sizes), ("eval_sizes", eval_sizes)):
        _try_sizes(name, some, lambda size: task_class.sample(size, random.Random(0)))
    return World(task_class.sample, TableEnvironment, demonstrate)


def _shop_world(
    sizes: Sequence[int],
    eval_sizes: Sequence[int],
    data: str,
    eval_data: str,
    address: str,
    tokenizer: Any,
) -> World:
    goals: Sequence[Any]
    held_out: Sequence[Any]
    if address:
        if not is_address(address):
            got = public_address(address)
            raise ValueError(f"corpus: expected the address of a WebShop server, got {got!r}")
        try:
            environment = WebShop(RemoteSite(address))
        except ValueError as error:
            raise ValueError(f"corpus: {error}") from None
        goals = _numbers("data", data)
        held_out = _numbers("eval_data", eval_data) if eval_data else goals
    else:
        shop = Shop()
        environment = WebShop(ShopSite(shop))
        goals = shop.goals(len(shop.products))
        held_out, goals = goals[: len(goals) // 10], goals[len(goals) // 10 :]

    def of_size(goals: Sequence[Any], size: int) -> Sequence[Any]:
        if size != 1:
            raise ValueError(f"expected 1 for webshop, whose episodes have one goal, got {size}")
        return goals

    return _listed(
        lambda: copy.copy(environment),
        partial(of_size, goals),
        partial(of_size, held_out),
        sizes,
        eval_sizes,
        tokenizer,
    )


def _numbers(option: str, text: str) -> range:
    found = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    numbers = range(int(found[1]), int(found[2])) if found else range(0)
    if not numbers:
        raise ValueError(
            f"{option}: expected the numbers of a WebShop server's goals, such as 500:6000, "
            f"got {text!r}"
        )
    return numbers
