from __future__ import annotations

import threading

import pytest

from mem1_kernels.agent.environment import EnvironmentBatch, Step, ToolError, observation_ids
from mem1_kernels.agent.tags import MEM1, TokenTags

SEARCH = MEM1.parse("<think>?</think><search>x</search>")
ANSWER = MEM1.parse("<think>!</think><answer>x</answer>")


class Countdown:
    """Ends after `task` searches; a task may also be an error to raise or a thing to observe."""

    tags = MEM1

    def reset(self, task):
        self.task = task
        if isinstance(task, str) and task == "down":
            raise ToolError("no shop today")
        if task is None:
            raise ValueError("task: expected one")
        return f"task {task}"

    def step(self, turn):
        if isinstance(self.task, Exception):
            raise self.task
        if not isinstance(self.task, int):
            return self.task, 0.0, False
        self.task -= 1
        return Step(f"{self.task} left", 0.25, self.task == 0, {"left": self.task})


def test_episodes_end_when_they_end():
    batch = EnvironmentBatch(Countdown)
    assert batch.reset([1, 2, 2]) == ["task 1", "task 2", "task 2"]
    assert batch.tags is MEM1
    first = batch.step([SEARCH] * 3)
    assert [step.done for step in first] == [True, False, False]
    assert batch.active == [1, 2]
    second = batch.step([None, SEARCH, SEARCH])
    assert second[0] is None and second[1].observation == "0 left"
    assert batch.active == []
    assert [episode.reward for episode in batch.episodes] == [0.25, 0.5, 0.5]
    assert [episode.turns for episode in batch.episodes] == [1, 2, 2]
    assert batch.episodes[1].scores == {"left": 0}
    assert batch.reset([3]) == ["task 3"]
    assert batch.active == [0] and batch.episodes[0].reward == 0.0


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [ToolError("no answer"), KeyError("title"), OSError("gone")])
def test_a_failing_tool_ends_its_episode_and_not_the_run(workers, error, caplog):
    batch = EnvironmentBatch(Countdown, workers=workers)
    batch.reset([2, error, 2])
    steps = batch.step([SEARCH] * 3)
    assert steps[1] == Step("", 0.0, True)
    assert batch.active == [0, 2]
    assert batch.episodes[1].error == f"{type(error).__name__}: {error}"
    assert batch.episodes[0].error == ""
    assert "episode 1 ends" in caplog.text and "Traceback" in caplog.text
    assert [step.done for step in batch.step([SEARCH, None, SEARCH]) if step] == [True, True]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (("x", None, False), "ValueError: reward: expected a finite number, got None"),
        (("x", 0.0), "TypeError: step: expected a Step or 3 values, got 2"),
        (("x", "1", False), "ValueError: reward: expected a finite number, got '1'"),
        (("x", float("nan"), False), "ValueError: reward: expected a finite number, got nan"),
        (("x", 0.0, None), "TypeError: done: expected True or False, got None"),
        (Step("x", 0.0, True, [1.0]), "TypeError: scores: expected a mapping, got list"),
        (Step("x", 0.0, True, {"em": None}), "ValueError: scores: expected finite numbers as 'em'"),
        (([1, 2], 0.0, False), "TypeError: observation: expected str, got list"),
    ],
)
def test_a_step_that_makes_no_sense_ends_its_own_episode(answer, message):
    class Broken(Countdown):
        def step(self, turn):
            return answer if self.task == 1 else super().step(turn)

    batch = EnvironmentBatch(Broken)
    batch.reset([1, 3])
    batch.step([SEARCH, SEARCH])
    assert batch.episodes[0].error.startswith(message) and batch.episodes[0].reward == 0.0
    assert batch.active == [1]


@pytest.mark.parametrize("observation", [None, 3, ["a"], b"bytes"])
def test_an_observation_that_is_none_ends_the_episode(observation):
    class Broken(Countdown):
        def step(self, turn):
            return observation, 0.0, False

    batch = EnvironmentBatch(Broken)
    batch.reset([1])
    batch.step([SEARCH])
    assert "observation: expected str, got" in batch.episodes[0].error


def test_an_interrupt_is_no_tool_failure():
    class Interrupted(Countdown):
        def step(self, turn):
            raise KeyboardInterrupt

    batch = EnvironmentBatch(Interrupted)
    batch.reset([1])
    with pytest.raises(KeyboardInterrupt):
        batch.step([SEARCH])


def test_a_tool_that_fails_at_the_start_ends_the_episode_and_a_wrong_task_the_run():
    batch = EnvironmentBatch(Countdown)
    assert batch.reset([2, "down"]) == ["task 2", ""]
    assert batch.active == [0]
    assert batch.episodes[1].error == "ToolError: no shop today"
    with pytest.raises(ValueError, match="expected one"):
        batch.reset([None])


def test_steps_run_side_by_side():
    barrier = threading.Barrier(3, timeout=30)

    class Waits(Countdown):
        def step(self, turn):
            barrier.wait()
            return Step(f"{self.task}", 0.0, True)

    batch = EnvironmentBatch(Waits, workers=3)
    batch.reset([1, 2, 3])
    assert [step.observation for step in batch.step([SEARCH] * 3)] == ["1", "2", "3"]


def test_turns_must_fit_the_episodes():
    batch = EnvironmentBatch(Countdown)
    batch.reset([1, 2])
    with pytest.raises(ValueError, match="expected 2, got 1"):
        batch.step([SEARCH])
    with pytest.raises(ValueError, match=r"expected them at \[0, 1\], got them at \[1\]"):
        batch.step([None, SEARCH])
    batch.stop(0, "out of turns")
    assert batch.active == [1] and batch.episodes[0].error == "out of turns"
    with pytest.raises(ValueError, match="workers"):
        EnvironmentBatch(Countdown, workers=0)


class Letters:
    """A codec whose tokens are single letters."""

    opened = ""

    def __init__(self) -> None:
        self.longest = 0

    def encode(self, text):
        self.longest = max(self.longest, len(text))
        return [ord(letter) for letter in text]

    encode_trusted = encode

    def whole_characters(self, ids, text):
        return ids


def text(ids):
    return "".join(map(chr, ids))


def test_a_long_observation_loses_its_end_and_never_its_tags():
    whole = observation_ids("a" * 50, MEM1, codec=Letters(), turns_left=2)
    head = "\n\n<information>[HINT]You have 2 turns left.[/HINT]\n\n"
    assert text(whole) == head + "a" * 50 + "</information>\n\n"
    for cap in (len(whole), len(whole) - 1, len(whole) - 50):
        cut = text(observation_ids("a" * 50, MEM1, codec=Letters(), turns_left=2, max_tokens=cap))
        assert len(cut) == cap
        assert cut.startswith(head) and cut.endswith("</information>\n\n")
    with pytest.raises(ValueError, match=f"expected at least {len(whole) - 50} for the tags"):
        too_few = len(whole) - 51
        observation_ids("a", MEM1, codec=Letters(), turns_left=2, max_tokens=too_few)


def test_an_enormous_observation_is_not_read_to_its_end():
    codec = Letters()
    ids = observation_ids("é" * 50_000_000, MEM1, codec=codec, max_tokens=200)
    assert len(ids) == 200
    assert codec.longest <= 64 * 200


def test_an_empty_observation_is_a_pair_of_tags():
    assert text(observation_ids("", MEM1, codec=Letters())) == "\n\n<information></information>\n\n"
    assert text(observation_ids(" \n ", MEM1, codec=Letters(), max_tokens=40)).count("<") == 2


def test_ids_are_capped_too_and_need_no_tokenizer():
    tags = TokenTags(state=(1, 2), actions={"search": (3, 4)}, info=(7, 8))
    assert observation_ids([30, 31, 32], tags) == [7, 30, 31, 32, 8]
    assert observation_ids([30, 31, 32], tags, max_tokens=4) == [7, 30, 31, 8]
    with pytest.raises(TypeError, match="codec: expected a TextCodec"):
        observation_ids("x", MEM1)
