"""Question answering over a retriever, one question or many at once.

A task has one or more objectives, each a question with its golden answers. The policy searches as
often as it likes and ends with one answer to each, joined by ";", in the order of the questions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.metrics import exact_match, f1
from mem1_kernels.agent.retrieval import Retriever, show_passages
from mem1_kernels.agent.tags import MALFORMED, MEM1, ParsedTurn, TagSet

SEPARATOR = ";"


@dataclass(frozen=True)
class Question:
    """A question and the answers that count as right.

    Raises:
        ValueError: an empty question, or no golden answer.
    """

    question: str
    golden_answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("question: expected text, got none")
        if not any(gold.strip() for gold in self.golden_answers):
            raise ValueError(f"golden_answers: expected at least one for {self.question!r}")


@dataclass(frozen=True)
class QATask:
    """The questions of one episode.

    Args:
        questions: one an objective.
        golden_answers: for each question, the answers that count; None where nobody knows, and
            then the reward is 0 and there are no scores.
        topic: a line that says what the questions have in common, or "".
    """

    questions: tuple[str, ...]
    golden_answers: tuple[tuple[str, ...], ...] | None = None
    topic: str = ""

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("questions: expected at least one, got none")
        if self.golden_answers is not None and len(self.golden_answers) != len(self.questions):
            raise ValueError(
                f"golden_answers: expected {len(self.questions)}, got {len(self.golden_answers)}"
            )


def load_questions(path: str | Path) -> list[Question]:
    """Reads questions as NQ and HotpotQA have them: `question`, `golden_answers` (or `answer`).

    Args:
        path: a `.jsonl` file (an object a line) or a `.parquet` file (`mem1-kernels[data]`).

    Raises:
        ValueError: another kind of file, or a record without question or answers, with its number.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.strip()]
    elif path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(
                "pyarrow is not installed (`pip install mem1-kernels[data]`)"
            ) from error
        records = pyarrow.parquet.read_table(path).to_pylist()
    else:
        raise ValueError(f"path: expected a .jsonl or .parquet file, got {path.name!r}")
    questions = []
    for number, record in enumerate(records, 1):
        try:
            questions.append(_read_question(record))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, record {number}: expected question and golden_answers ({error})"
            ) from error
    return questions


def _read_question(record: Mapping[str, Any]) -> Question:
    golden = record["golden_answers"] if "golden_answers" in record else record["answer"]
    answers = [golden] if isinstance(golden, str) else golden
    if not isinstance(answers, list | tuple):
        raise TypeError(f"golden_answers: a string or a list of them, got {golden!r}")
    for answer in answers:
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise TypeError(f"golden_answers: strings or numbers, got {answer!r} among them")
    return Question(str(record["question"]), tuple(str(answer) for answer in answers))


def compose(
    dataset: Iterable[Question], objectives: int = 1, *, seed: int | None = 0
) -> list[QATask]:
    """Puts questions together into tasks of `objectives` questions each.

    Every question is used at most once: the order is shuffled by `seed` (None: left as it is), then
    cut into `len(dataset) // objectives` tasks; what remains is left out. A question that occurs
    twice counts once. Golden answers with a ";" cannot be given and are dropped, and questions that
    have no other answer with them.

    Raises:
        ValueError: fewer usable questions than `objectives`.

    >>> dataset = [Question(f"What is {n}?", (str(n),)) for n in range(7)]
    >>> tasks = compose(dataset, objectives=3, seed=None)
    >>> [task.golden_answers for task in tasks]
    [(('0',), ('1',), ('2',)), (('3',), ('4',), ('5',))]
    """
    if objectives < 1:
        raise ValueError(f"objectives: expected at least 1, got {objectives}")
    usable: dict[str, tuple[str, ...]] = {}
    for item in dataset:
        golden = tuple(gold for gold in item.golden_answers if SEPARATOR not in gold)
        if golden:
            usable.setdefault(item.question.strip(), golden)
    if len(usable) < objectives:
        raise ValueError(f"dataset: expected at least {objectives} questions, got {len(usable)}")
    pairs = list(usable.items())
    if seed is not None:
        random.Random(seed).shuffle(pairs)
    whole = len(pairs) // objectives * objectives
    tasks = []
    for start in range(0, whole, objectives):
        questions, golden_answers = zip(*pairs[start : start + objectives], strict=True)
        tasks.append(QATask(questions, golden_answers))
    return tasks


def split_answers(answer: str) -> list[str]:
    """The answers of an answer, in order.

    >>> split_answers("Paris; N'Djamena")
    ['Paris', "N'Djamena"]
    """
    return [part.strip() for part in answer.split(SEPARATOR)]


def score_answers(answer: str, golden_answers: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """EM and F1 for each objective; all 0 where the number of answers is wrong.

    Args:
        answer: what the policy wrote in its answer tag, nothing else of the transcript.

    >>> score_answers("Paris; the blue Nile", [["Paris"], ["Nile", "River Nile"]])
    {'em': [1.0, 0.0], 'f1': [1.0, 0.6666666666666666]}
    >>> score_answers("Paris", [["Paris"], ["Nile"]])
    {'em': [0.0, 0.0], 'f1': [0.0, 0.0]}
    """
    answers = split_answers(answer)
    if len(answers) != len(golden_answers):
        zeros = [0.0] * len(golden_answers)
        return {"em": zeros, "f1": list(zeros)}
    pairs = list(zip(answers, golden_answers, strict=True))
    return {
        "em": [exact_match(said, golden) for said, golden in pairs],
        "f1": [f1(said, golden) for said, golden in pairs],
    }


class RetrievalQA:
    """Answers questions by searching; the reward is the share of objectives matched exactly.

    At the end, `scores` holds "em" and "f1", one number an objective. An unreadable turn and an
    empty query are answered by a line that says so; they cost a turn and end nothing.

    Args:
        retriever: a `BM25` corpus, a `RetrievalServer`, a `WebSearch` or your own.
        topk: passages a search.
        tags: how turns are written; needs the actions "search" and "answer".

    >>> from mem1_kernels.agent.retrieval import BM25, Passage
    >>> environment = RetrievalQA(BM25([Passage("1", "Chad\\nIts capital is N'Djamena.")]))
    >>> prompt = environment.reset(QATask(("What is the capital of Chad?",), (("N'Djamena",),)))
    >>> environment.step(MEM1.parse("<think>?</think><search>capital Chad</search>")).observation
    "Doc 1(Title: Chad) Its capital is N'Djamena."
    >>> environment.step(MEM1.parse("<think>Found.</think><answer>N'Djamena</answer>")).reward
    1.0
    """

    def __init__(self, retriever: Retriever, *, topk: int = 3, tags: TagSet = MEM1) -> None:
        if topk < 1:
            raise ValueError(f"topk: expected at least 1, got {topk}")
        missing = {"search", "answer"} - tags.actions.keys()
        if missing:
            raise ValueError(f"tags: expected the actions search and answer, got no {missing}")
        self.retriever = retriever
        self.topk = topk
        self.tags = tags
        self._task: QATask | None = None

    def reset(self, task: QATask) -> str:
        """Begins an episode."""
        self._task = task
        return prompt(task, self.tags)

    def step(self, turn: ParsedTurn) -> Step:
        """Searches, or scores the answer.

        Raises:
            RuntimeError: no episode has begun.
            ToolError: the retriever failed.
        """
        if self._task is None:
            raise RuntimeError("step: expected reset(task) first")
        if turn.kind == MALFORMED:
            search, answer = self.tags.actions["search"], self.tags.actions["answer"]
            return Step(
                f"This turn could not be read. Write one {self.tags.state} block, then one "
                f"{search} block or one {answer} block, and nothing else."
            )
        if turn.kind == "answer":
            golden = self._task.golden_answers
            scores = score_answers(str(turn.payload), golden) if golden else {}
            reward = sum(scores["em"]) / len(scores["em"]) if scores else 0.0
            return Step("", reward, True, scores)
        if not turn.payload:
            return Step("The query was empty.")
        (found,) = self.retriever.search([str(turn.payload)], self.topk)
        return Step(show_passages(found))


def prompt(task: QATask, tags: TagSet = MEM1) -> str:
    """What the policy is told: the rules of the format, then the questions.

    The questions and the topic come from outside: tags in them are defused (`TagSet.guard`).
    """
    state, search, answer = tags.state, tags.actions["search"], tags.actions["answer"]
    several = len(task.questions) > 1
    form = (
        f"{len(task.questions)} answers in the order of the questions, separated by semicolons"
        if several
        else "the answer"
    )
    questions = "\n".join(
        f"{number}. {tags.guard(question)}" if several else tags.guard(question)
        for number, question in enumerate(task.questions, 1)
    )
    topic = f"{tags.guard(task.topic)}\n\n" if task.topic else ""
    return f"""You answer questions with the help of a search engine, turn by turn.

In every turn, first write <{state}> ... </{state}>. It is your only memory: older turns, queries \
and search results are removed, so carry over all that you still need and reason in it.
Then do one of two things:
- <{search}> ... </{search}> with a short query about one question. The results come back in \
<{tags.info}> ... </{tags.info}>.
- <{answer}> ... </{answer}> with {form}. Use as few words as possible and do not explain. \
This ends the task.

{topic}{questions}
"""
