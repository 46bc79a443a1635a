"""Question answering over a retriever, one question or many at once.

A task has one or more objectives, each a question with its golden answers. The policy searches as
often as it likes and ends with one answer to each, joined by ";", in the order of the questions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mem1_kernels._text import valid_text
from mem1_kernels.agent._files import (
    REASON,
    is_number,
    named_error,
    open_binary,
    path_name,
    read_jsonl,
    shown,
)
from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.metrics import exact_match, f1
from mem1_kernels.agent.retrieval import Retriever, show_passages
from mem1_kernels.agent.tags import MALFORMED, MEM1, ParsedTurn, TagSet

SEPARATOR = re.compile("[;\uff1b]")  # ASCII, and the full-width one


@dataclass(frozen=True)
class Question:
    """A question and the answers that count as right.

    Raises:
        TypeError: another type than text, or one text in place of a sequence of answers.
        ValueError: an empty question, or no golden answer.

    >>> Question("What is the capital of Chad?", ["N'Djamena"]).golden_answers
    ("N'Djamena",)
    """

    question: str
    golden_answers: tuple[str, ...]

    def __post_init__(self) -> None:
        question = _text("question", self.question)
        golden = _texts("golden_answers", self.golden_answers)
        if not question.strip():
            raise ValueError("question: expected text, got none")
        if not any(gold.strip() for gold in golden):
            raise ValueError(f"golden_answers: expected at least one for {shown(question)}")
        object.__setattr__(self, "question", question)
        object.__setattr__(self, "golden_answers", golden)


@dataclass(frozen=True)
class QATask:
    """The questions of one episode.

    Args:
        questions: one per objective.
        golden_answers: for each question, the answers that count; None where nobody knows, and
            then the reward is 0 and there are no scores.
        topic: a line that says what the questions have in common, or "".

    Raises:
        TypeError: another type than text, or one text in place of a sequence.
        ValueError: no question, an empty one, a question without golden answers where others have
            some, or golden answers for another number of questions.
    """

    questions: tuple[str, ...]
    golden_answers: tuple[tuple[str, ...], ...] | None = None
    topic: str = ""

    def __post_init__(self) -> None:
        questions = _texts("questions", self.questions)
        if not questions:
            raise ValueError("questions: expected at least one, got none")
        for question in questions:
            if not question.strip():
                raise ValueError("questions: expected text, got an empty one among them")
        object.__setattr__(self, "questions", questions)
        object.__setattr__(self, "topic", _text("topic", self.topic))
        given: Any = self.golden_answers
        if given is None:
            return
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(
                "golden_answers: expected a sequence of answers per question, "
                f"got {type(given).__name__}"
            )
        if len(given) != len(questions):
            raise ValueError(f"golden_answers: expected {len(questions)}, got {len(given)}")
        golden = tuple(_texts("golden_answers", answers) for answers in given)
        for question, answers in zip(questions, golden, strict=True):
            if not answers:
                raise ValueError(f"golden_answers: expected at least one for {shown(question)}")
        object.__setattr__(self, "golden_answers", golden)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected text, got {type(value).__name__}")
    return valid_text(value)


def _texts(name: str, values: Any) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        got = f"the text {shown(values)}" if isinstance(values, str) else type(values).__name__
        raise TypeError(f"{name}: expected a sequence of texts, got {got}")
    return tuple(_text(name, value) for value in values)


def load_questions(path: str | Path, *, option: str = "") -> list[Question]:
    """Reads questions as NQ and HotpotQA have them: `question`, `golden_answers` (or `answer`).

    Args:
        path: a `.jsonl` file (an object per line) or a `.parquet` file (`mem1-kernels[data]`).
        option: what the caller calls `path`, for error messages.

    Raises:
        OSError: a file that cannot be read.
        ValueError: another kind of file, or a record without question or answers, with its
            number; see `read_jsonl`.
    """
    name = path_name(path, option)
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_jsonl(path, _read_question, option=option)
    if path.suffix != ".parquet":
        raise ValueError(
            f"{option or 'path'}: expected a .jsonl or .parquet file, got {str(path)!r}"
        )
    questions = []
    for number, record in enumerate(_read_parquet(path, name), 1):
        try:
            questions.append(_read_question(record))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}, record {number}: {str(error)[:REASON]}") from None
    if not questions:
        raise ValueError(f"{name}: expected at least one record, got none")
    return questions


def _read_parquet(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("pyarrow is not installed (`pip install mem1-kernels[data]`)") from error
    try:
        with open_binary(path, name) as file:
            return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name}: expected a parquet file ({reason})") from None
    except OSError as error:
        raise named_error(error, name) from None


def _read_question(record: Any) -> Question:
    if not isinstance(record, Mapping):
        raise TypeError("expected an object with question and golden_answers")
    golden = record.get("golden_answers", record.get("answer"))
    if "question" not in record or golden is None:
        raise ValueError("expected question and golden_answers (or answer)")
    answers = golden if isinstance(golden, list | tuple) else [golden]
    for answer in answers:
        if not isinstance(answer, str) and not is_number(answer):
            raise TypeError(f"golden_answers: expected texts or numbers, got {answer!r:.80}")
    return Question(record["question"], tuple(str(answer) for answer in answers))


def compose(
    dataset: Iterable[Question], objectives: int = 1, *, seed: int | None = 0
) -> list[QATask]:
    """Puts questions together into tasks of `objectives` questions each.

    Every question is used at most once: the order is shuffled by `seed` (None: left as it is), then
    cut into `len(dataset) // objectives` tasks; what remains is left out. A question that occurs
    twice counts once. With several objectives, golden answers with a ";" cannot be given and are
    dropped, and questions that have no other answer with them.

    Raises:
        ValueError: fewer usable questions than `objectives`.
        TypeError: a dataset of anything but `Question`; `objectives` that is not a whole number.

    >>> dataset = [Question(f"What is {n}?", (str(n),)) for n in range(7)]
    >>> tasks = compose(dataset, objectives=3, seed=None)
    >>> [task.golden_answers for task in tasks]
    [(('0',), ('1',), ('2',)), (('3',), ('4',), ('5',))]
    """
    if isinstance(objectives, bool) or not isinstance(objectives, int):
        raise TypeError(f"objectives: expected a whole number, got {objectives!r}")
    if objectives < 1:
        raise ValueError(f"objectives: expected at least 1, got {objectives}")
    usable: dict[str, tuple[str, ...]] = {}
    for item in dataset:
        if not isinstance(item, Question):
            raise TypeError(f"dataset: expected Questions, got {type(item).__name__}")
        golden = item.golden_answers
        if objectives > 1:
            golden = tuple(gold for gold in golden if not SEPARATOR.search(gold))
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


def split_answers(answer: str, count: int | None = None) -> list[str]:
    """The answers of an answer, in order.

    Args:
        count: how many questions there are. The answer to one question is not split, and a ";"
            behind the last answer makes no further one. None: not known.

    >>> split_answers("Paris; N'Djamena")
    ['Paris', "N'Djamena"]
    >>> split_answers("Paris; N'Djamena;", 2), split_answers("Rock; paper", 1)
    (['Paris', "N'Djamena"], ['Rock; paper'])
    """
    if count == 1:
        return [answer.strip()]
    parts = [part.strip() for part in SEPARATOR.split(answer)]
    if count is not None and len(parts) == count + 1 and not parts[-1]:
        del parts[-1]
    return parts


def score_answers(answer: str, golden_answers: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """EM and F1 for each objective, by the rule for rewards; all 0 for another number of answers.

    Args:
        answer: what the policy wrote in its answer tag, nothing else of the transcript.

    >>> score_answers("Paris; the blue Nile", [["Paris"], ["Nile", "River Nile"]])
    {'em': [1.0, 0.0], 'f1': [1.0, 0.6666666666666666]}
    >>> score_answers("Paris", [["Paris"], ["Nile"]])
    {'em': [0.0, 0.0], 'f1': [0.0, 0.0]}
    """
    answers = split_answers(answer, len(golden_answers))
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

    At the end, `scores` holds "em" and "f1", one number per objective, by the rule for rewards (the
    default of `metrics.normalize`). An unreadable turn and an empty query are answered by a line
    that says so; they cost a turn and do not end the episode.

    Args:
        retriever: a `BM25` corpus, a `RetrievalServer`, a `WebSearch` or your own.
        topk: passages per search.
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
        """Begins an episode.

        Raises:
            TypeError: a task that is not a `QATask`.
        """
        if not isinstance(task, QATask):
            raise TypeError(f"task: expected a QATask, got {type(task).__name__}")
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
