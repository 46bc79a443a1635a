"""Two small tasks in token ids that are learned in minutes and need a memory.

An episode has a random table from nine nodes to nine nodes, on three shelves of three places. A
search names a shelf and returns its three documents in random order. A document is one token: it
gives a place and the table's value for the node at that place. One of the three matters.

- `chain`: follow the table from a start for some hops and answer with the last node. The state
  carries one token, the node that is looked up. The search names only the shelf, so the state is
  needed to choose among the three documents. The peak context is exactly 23 tokens for any number
  of hops.
- `lookup`: answer with the values of several keys, one search per key. The state carries the pairs
  found so far; a pair that was not written there is lost.

A turn is `<think> ... </think><search> shelf </search>` or `... <answer> nodes </answer>`; each
word is one token of a vocabulary of 54. An observation is a hint (search again, or answer), the
shelf, and the documents. A search after the hint to answer, and a turn that cannot be read, end
the episode with reward 0.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mem1_kernels.agent.environment import Step, observation_ids
from mem1_kernels.agent.tags import ParsedTurn, TokenTags
from mem1_kernels.retention import Segment

SHELVES = 3
PLACES = 3
NODES = SHELVES * PLACES

PAD, EOS, CHAIN, LOOKUP, ASK, MORE, LAST = range(7)
TAGS = TokenTags(state=(7, 8), actions={"search": (9, 10), "answer": (11, 12)}, info=(13, 14))
FIRST_NODE = 15
FIRST_SHELF = FIRST_NODE + NODES
FIRST_DOCUMENT = FIRST_SHELF + SHELVES
VOCABULARY = FIRST_DOCUMENT + PLACES * NODES
CHAIN_PEAK = 23

_NAMES = ["<pad>", "<eos>", "chain", "lookup", "?", "more", "last", "<think>", "</think>"]
_NAMES += ["<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>"]
_NAMES += [f"n{node}" for node in range(NODES)] + [f"shelf{shelf}" for shelf in range(SHELVES)]
_NAMES += [f"{place}:n{node}" for place in range(PLACES) for node in range(NODES)]


def show(ids: Sequence[int]) -> str:
    """Token ids as words, for reading.

    >>> show([CHAIN, FIRST_NODE + 3, FIRST_SHELF + 1, FIRST_DOCUMENT + NODES + 2])
    'chain n3 shelf1 1:n2'
    """
    return " ".join(_NAMES[token] for token in ids)


def shelf_of(node: int) -> int:
    """The shelf, as a token, that holds the document of a node token.

    >>> show([shelf_of(FIRST_NODE + 4)])
    'shelf1'
    """
    if not FIRST_NODE <= node < FIRST_SHELF:
        raise ValueError(f"node: expected {FIRST_NODE}..{FIRST_SHELF - 1}, got {node}")
    return FIRST_SHELF + (node - FIRST_NODE) // PLACES


def document_of(node: int, value: int) -> int:
    """The document, as a token, that gives a node token its value (a node token).

    >>> show([document_of(FIRST_NODE + 4, FIRST_NODE + 8)])
    '1:n8'
    """
    return FIRST_DOCUMENT + (node - FIRST_NODE) % PLACES * NODES + value - FIRST_NODE


def value_in(documents: Sequence[int], node: int) -> int:
    """The value of a node in the documents of its shelf, as a node token.

    >>> show([value_in([FIRST_DOCUMENT + NODES + 8, FIRST_DOCUMENT + 2], FIRST_NODE + 4)])
    'n8'
    """
    place = (node - FIRST_NODE) % PLACES
    for document in documents:
        there, value = divmod(document - FIRST_DOCUMENT, NODES)
        if there == place:
            return FIRST_NODE + value
    raise ValueError(f"documents: expected one for {show([node])}, got {show(documents)}")


@dataclass(frozen=True)
class TableTask:
    """One episode's table and question.

    Args:
        table: for each of the nine nodes, its value, as node tokens.
        keys: chain: the start; lookup: the keys. As node tokens.
        searches: how many searches may be done: the hops, or the number of keys.
        answer: the node tokens to answer with.
        seed: for the order of the documents.
    """

    kind: ClassVar[int]

    table: tuple[int, ...]
    keys: tuple[int, ...]
    searches: int
    answer: tuple[int, ...]
    seed: int

    def value(self, node: int) -> int:
        """The table's value for a node token."""
        return self.table[node - FIRST_NODE]


@dataclass(frozen=True)
class ChainTask(TableTask):
    """Which node is a number of hops away from the start?"""

    kind: ClassVar[int] = CHAIN

    @classmethod
    def sample(cls, hops: int, rng: random.Random) -> ChainTask:
        """A table that is one cycle through all nodes, and a start.

        >>> task = ChainTask.sample(2, random.Random(0))
        >>> task.answer == (task.value(task.value(task.keys[0])),)
        True
        """
        if hops < 1:
            raise ValueError(f"hops: expected at least 1, got {hops}")
        cycle = rng.sample(range(FIRST_NODE, FIRST_SHELF), NODES)
        following = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
        table = tuple(following[node] for node in range(FIRST_NODE, FIRST_SHELF))
        return cls(table, (cycle[0],), hops, (cycle[hops % NODES],), rng.getrandbits(32))


@dataclass(frozen=True)
class LookupTask(TableTask):
    """Which values does the table have for these keys?"""

    kind: ClassVar[int] = LOOKUP

    @classmethod
    def sample(cls, keys: int, rng: random.Random) -> LookupTask:
        """A table of random values, and different keys.

        >>> LookupTask.sample(9, random.Random(0)).searches
        9
        """
        if not 1 <= keys <= NODES:
            raise ValueError(f"keys: expected 1..{NODES}, got {keys}")
        nodes = range(FIRST_NODE, FIRST_SHELF)
        table = tuple(rng.choices(nodes, k=NODES))
        chosen = tuple(rng.sample(nodes, keys))
        answer = tuple(table[key - FIRST_NODE] for key in chosen)
        return cls(table, chosen, keys, answer, rng.getrandbits(32))


class TableEnvironment:
    """The environment of both tasks.

    The reward is the share of right tokens in an answer of the right length, else 0; `scores`
    holds "em", one number per objective.

    >>> environment = TableEnvironment()
    >>> task = ChainTask.sample(1, random.Random(0))
    >>> show(environment.reset(task))
    '<eos> chain n6 ?'
    >>> turn = TAGS.parse([7, task.keys[0], 8, 9, shelf_of(task.keys[0]), 10])
    >>> show(environment.step(turn).observation)
    'last shelf2 1:n6 0:n8 2:n0'
    >>> environment.step(TAGS.parse([7, *task.answer, 8, 11, *task.answer, 12])).reward
    1.0
    """

    tags = TAGS

    def __init__(self) -> None:
        self._task: TableTask | None = None
        self._searches = 0
        self._rng = random.Random()

    def reset(self, task: TableTask) -> list[int]:
        """Begins an episode: the name of the task, the start or the keys, and a question mark.

        Raises:
            TypeError: a task of another kind.
        """
        if not isinstance(task, TableTask):
            raise TypeError(
                f"task: expected a ChainTask or a LookupTask, got {type(task).__name__}"
            )
        self._task = task
        self._searches = 0
        self._rng = random.Random(task.seed)
        return [EOS, task.kind, *task.keys, ASK]

    def step(self, turn: ParsedTurn) -> Step:
        """Returns the documents of a shelf, or scores the answer.

        Raises:
            RuntimeError: no episode has begun.
        """
        task = self._task
        if task is None:
            raise RuntimeError("step: expected reset(task) first")
        if isinstance(turn.payload, str):
            raise TypeError("turn: expected token ids, got text")
        payload = turn.payload
        if turn.kind == "answer":
            right = [float(said == true) for said, true in zip(payload, task.answer, strict=False)]
            em = right if len(payload) == len(task.answer) else [0.0] * len(task.answer)
            return Step([], sum(em) / len(em), True, {"em": em})
        asked = len(payload) == 1 and FIRST_SHELF <= payload[0] < FIRST_DOCUMENT
        if turn.kind != "search" or not asked or self._searches == task.searches:
            return Step([], 0.0, True, {"em": [0.0] * len(task.answer)})
        self._searches += 1
        first = FIRST_NODE + PLACES * (payload[0] - FIRST_SHELF)
        nodes = self._rng.sample(range(first, first + PLACES), PLACES)
        documents = [document_of(node, task.value(node)) for node in nodes]
        return Step([LAST if self._searches == task.searches else MORE, *payload, *documents])


class Teacher:
    """Plays a task without errors or, with `keep < 1`, with wrong nodes in its state.

    When it writes the node that it has just looked up into its state, it writes the right one with
    probability `keep` and another one otherwise, and continues from the node it wrote.

    Args:
        keep: 1 for traces without errors; with 0.6, PPO has something to gain.
        rng: for the wrong nodes.
    """

    def __init__(self, keep: float = 1.0, rng: random.Random | None = None) -> None:
        if not 0.0 <= keep <= 1.0:
            raise ValueError(f"keep: expected 0..1, got {keep}")
        self.keep = keep
        self.rng = rng or random.Random(0)

    def play(self, task: TableTask) -> tuple[list[Segment], float]:
        """One episode: its segments, with ids, and its reward. Turns count from 1, prompt 0.

        >>> segments, reward = Teacher().play(ChainTask.sample(1, random.Random(0)))
        >>> [show(segment.ids) for segment in segments[:3]]
        ['<eos> chain n6 ?', '<think> n6 </think>', '<search> shelf2 </search>']
        >>> reward
        1.0
        """
        environment = TableEnvironment()
        segments = [Segment("prompt", environment.reset(task))]
        chain = isinstance(task, ChainTask)
        memory: list[int] = [task.keys[0]] if chain else []
        observation: list[int] = []
        for number in range(1, task.searches + 2):
            if observation:
                if chain:
                    memory = [self._remember(value_in(observation[2:], memory[0]))]
                else:
                    key = task.keys[number - 2]
                    memory += [key, self._remember(value_in(observation[2:], key))]
            if observation and observation[0] == LAST:
                kind, payload = "answer", memory if chain else memory[1::2]
            else:
                kind, payload = "search", [shelf_of(memory[0] if chain else task.keys[number - 1])]
            opening, closing = TAGS.actions[kind]
            state = [TAGS.state[0], *memory, TAGS.state[1]]
            action = [opening, *payload, closing]
            segments += [Segment("state", state, number), Segment("action", action, number)]
            step = environment.step(TAGS.parse(state + action))
            if step.done:
                return segments, step.reward
            assert not isinstance(step.observation, str)
            observation = step.observation
            segments.append(Segment("info", observation_ids(observation, TAGS), number))
        raise AssertionError("the teacher answers in its last turn")

    def _remember(self, node: int) -> int:
        if self.rng.random() < self.keep:
            return node
        return self.rng.choice([other for other in range(FIRST_NODE, FIRST_SHELF) if other != node])
