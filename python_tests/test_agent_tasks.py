from __future__ import annotations

import random
import statistics

import pytest

from mem1_kernels import Trajectory, keep_all
from mem1_kernels.agent.environment import EnvironmentBatch
from mem1_kernels.agent.tags import MEM1
from mem1_kernels.agent.tasks import (
    ASK,
    CHAIN,
    CHAIN_PEAK,
    EOS,
    FIRST_NODE,
    FIRST_SHELF,
    LAST,
    MORE,
    NODES,
    TAGS,
    VOCABULARY,
    ChainTask,
    LookupTask,
    TableEnvironment,
    Teacher,
    document_of,
    shelf_of,
    show,
    value_in,
)


def turn(kind, payload, state=()):
    opening, closing = TAGS.actions[kind]
    return TAGS.parse([TAGS.state[0], *state, TAGS.state[1], opening, *payload, closing])


def test_a_chain_by_hand():
    nodes = range(FIRST_NODE, FIRST_SHELF)
    table = tuple(FIRST_NODE + (2 * n + 1) % NODES for n in range(NODES))
    # n3 -> n7 -> n6 -> n4
    task = ChainTask(table, (nodes[3],), 2, (nodes[6],), seed=0)
    environment = TableEnvironment()
    assert environment.reset(task) == [EOS, CHAIN, nodes[3], ASK]
    first = environment.step(turn("search", [shelf_of(nodes[3])]))
    assert first.observation[:2] == [MORE, FIRST_SHELF + 1]
    assert {show([token]) for token in first.observation[2:]} == {"0:n7", "1:n0", "2:n2"}
    assert not first.done and first.reward == 0.0
    second = environment.step(turn("search", [shelf_of(nodes[7])]))
    assert second.observation[0] == LAST
    assert value_in(second.observation[2:], nodes[7]) == nodes[6]
    end = environment.step(turn("answer", [nodes[6]]))
    assert (end.reward, end.done, end.observation) == (1.0, True, [])


def test_the_context_peaks_at_23_tokens_whatever_the_hops():
    rng = random.Random(0)
    full = []
    for hops in (1, 2, 3, 5, 8, 16, 32):
        segments, reward = Teacher().play(ChainTask.sample(hops, rng))
        trajectory = Trajectory(segments)
        assert trajectory.peak_context == CHAIN_PEAK == 23
        assert reward == 1.0
        full.append(Trajectory(segments, keep_all).peak_context)
    assert full == sorted(full) and full[-1] > 400


@pytest.mark.parametrize("sample", [ChainTask.sample, LookupTask.sample])
def test_clean_traces_are_right_and_can_be_replayed(sample):
    rng = random.Random(1)
    for size in range(1, 10):
        task = sample(size, rng)
        segments, reward = Teacher().play(task)
        assert reward == 1.0
        roles = [segment.role for segment in segments]
        assert roles == ["prompt", *["state", "action", "info"] * size, "state", "action"]
        assert [s.turn for s in segments[1:]] == [n for n in range(1, size + 1) for _ in "sai"] + [
            size + 1
        ] * 2
        assert all(0 <= token < VOCABULARY for s in segments for token in s.ids)
        # the environment says the same again to the same turns
        environment = TableEnvironment()
        assert tuple(environment.reset(task)) == segments[0].ids
        for place in range(1, len(segments), 3):
            step = environment.step(TAGS.parse([*segments[place].ids, *segments[place + 1].ids]))
            if not step.done:
                expected = (TAGS.info[0], *step.observation, TAGS.info[1])
                assert segments[place + 2].ids == expected
        assert step.reward == 1.0


def test_the_state_carries_one_token_or_the_pairs():
    rng = random.Random(2)
    segments, _ = Teacher().play(ChainTask.sample(5, rng))
    assert {s.num_tokens for s in segments if s.role == "state"} == {3}
    task = LookupTask.sample(4, rng)
    segments, _ = Teacher().play(task)
    states = [s.ids[1:-1] for s in segments if s.role == "state"]
    pairs = [token for key in task.keys for token in (key, task.value(key))]
    assert states == [tuple(pairs[: 2 * n]) for n in range(5)]


def test_without_the_state_nobody_knows_which_document_was_meant():
    """The same prompt-free context with another node in mind asks for another value."""
    rng = random.Random(3)
    ambiguous = 0
    for _ in range(50):
        segments, _ = Teacher().play(ChainTask.sample(2, rng))
        info = segments[3].ids
        ambiguous += len({value_in(info[3:-1], FIRST_NODE + place) for place in range(3)}) == 3
    assert ambiguous == 50


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_the_forgetful_teacher_forgets_as_often_as_told(hops):
    rng = random.Random(hops)
    teacher = Teacher(0.6, rng)
    rewards = [teacher.play(ChainTask.sample(hops, rng))[1] for _ in range(2000)]
    # all kept, or a wrong node that leads back by chance (1 in 8 at most, once forgotten)
    low, high = 0.6**hops, 0.6**hops + (1 - 0.6**hops) / 8
    assert low - 0.04 < statistics.mean(rewards) < high + 0.04


def test_the_forgetful_teacher_writes_well_formed_turns():
    rng = random.Random(4)
    for keep in (0.0, 0.5):
        teacher = Teacher(keep, rng)
        for sample in (ChainTask.sample, LookupTask.sample):
            segments, _ = teacher.play(sample(4, rng))
            assert Trajectory(segments).loss_mask.sum() == sum(
                s.num_tokens for s in segments if s.role in ("state", "action")
            )
    segments, reward = Teacher(0.0, rng).play(LookupTask.sample(3, rng))
    assert reward == 0.0


def test_lookup_scores_each_objective():
    rng = random.Random(5)
    task = LookupTask.sample(3, rng)
    wrong = [FIRST_NODE + (value - FIRST_NODE + 1) % NODES for value in task.answer]
    for said, em in [
        (task.answer, [1, 1, 1]),
        ((task.answer[0], wrong[1], task.answer[2]), [1, 0, 1]),
        (wrong, [0, 0, 0]),
        (task.answer[:2], [0, 0, 0]),
        ((*task.answer, task.answer[0]), [0, 0, 0]),
        ((), [0, 0, 0]),
    ]:
        environment = TableEnvironment()
        environment.reset(task)
        step = environment.step(turn("answer", said))
        assert step.done and step.scores == {"em": em}
        assert step.reward == sum(em) / 3


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [TAGS.state[0]] * 50,
        [TAGS.state[0], TAGS.state[1], 9, 10],  # an empty search
        [TAGS.state[0], TAGS.state[1], 9, FIRST_NODE, 10],  # no shelf
        [TAGS.state[0], TAGS.state[1], 9, FIRST_SHELF, FIRST_SHELF, 10],
        [TAGS.state[0], TAGS.state[1], 9, VOCABULARY - 1, 10],
        [TAGS.state[0], TAGS.state[1], 11, 0, 12, TAGS.info[0], 15],
    ],
)
def test_a_turn_that_makes_no_sense_ends_with_nothing(ids):
    environment = TableEnvironment()
    environment.reset(ChainTask.sample(2, random.Random(0)))
    step = environment.step(TAGS.parse(ids))
    assert (step.reward, step.done, step.scores) == (0.0, True, {"em": [0.0]})


def test_documents_come_in_random_order():
    rng = random.Random(7)
    orders = set()
    for _ in range(60):
        environment = TableEnvironment()
        environment.reset(ChainTask.sample(1, rng))
        documents = environment.step(turn("search", [FIRST_SHELF])).observation[2:]
        orders.add(tuple(show([document])[0] for document in documents))
    assert len(orders) == 6


def test_searching_on_after_the_hint_to_answer_ends_with_nothing():
    task = ChainTask.sample(1, random.Random(0))
    environment = TableEnvironment()
    environment.reset(task)
    assert not environment.step(turn("search", [FIRST_SHELF])).done
    assert environment.step(turn("search", [FIRST_SHELF])) == ([], 0.0, True, {"em": [0.0]})


def test_tasks_follow_their_seed():
    assert ChainTask.sample(3, random.Random(1)) == ChainTask.sample(3, random.Random(1))
    assert ChainTask.sample(3, random.Random(1)) != ChainTask.sample(3, random.Random(2))
    tables = {ChainTask.sample(3, random.Random(seed)).table for seed in range(20)}
    assert len(tables) == 20
    for seed in range(20):
        task = ChainTask.sample(8, random.Random(seed))
        node, met = task.keys[0], set()
        for _ in range(NODES):
            met.add(node)
            node = task.value(node)
        assert len(met) == NODES, "one cycle through all nodes"


def test_a_batch_of_both_tasks():
    rng = random.Random(6)
    tasks = [ChainTask.sample(1, rng), LookupTask.sample(2, rng)]
    batch = EnvironmentBatch(TableEnvironment)
    prompts = batch.reset(tasks)
    assert [len(prompt) for prompt in prompts] == [4, 5]
    steps = batch.step([turn("search", [shelf_of(task.keys[0])]) for task in tasks])
    assert [step.observation[0] for step in steps] == [LAST, MORE]
    batch.step([turn("answer", task.answer) for task in tasks])
    assert [episode.reward for episode in batch.episodes] == [1.0, 1.0]


def test_wrong_use_is_refused():
    rng = random.Random(0)
    for call, message in [
        (lambda: ChainTask.sample(0, rng), "hops"),
        (lambda: LookupTask.sample(0, rng), "keys"),
        (lambda: LookupTask.sample(NODES + 1, rng), "keys"),
        (lambda: Teacher(1.5), "keep"),
        (lambda: shelf_of(3), "node"),
        (lambda: value_in([document_of(FIRST_NODE, FIRST_NODE)], FIRST_NODE + 1), "documents"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="reset"):
        TableEnvironment().step(turn("answer", []))
    environment = TableEnvironment()
    environment.reset(ChainTask.sample(1, rng))
    with pytest.raises(TypeError, match="task: expected a ChainTask or a LookupTask, got str"):
        TableEnvironment().reset("chain")
    with pytest.raises(TypeError, match="token ids"):
        environment.step(MEM1.parse("<think>a</think><answer>b</answer>"))
