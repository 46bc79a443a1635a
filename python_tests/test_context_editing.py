"""The policies that people run, against slow simulations of a conversation; what they refuse."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

import pytest
import torch

from mem1_kernels import (
    Segment,
    Trajectory,
    clear_tool_results,
    fold,
    memento,
    strip_reasoning,
    sub_agents,
    unroll,
)
from mem1_kernels.retention import retained


def conversation(seed: int) -> list[Segment]:
    """Turns of a state, an action and an info each, with names, depths and empty segments."""
    rng = random.Random(seed)
    segments, depth = [Segment("prompt", rng.randint(1, 9))], 0
    for turn in range(1, rng.randint(2, 12)):
        for _ in range(rng.choice([0, 0, 1, 3])):
            name = rng.choice(["block", "block", "summary", ""])
            segments.append(Segment("state", rng.randint(0, 6), turn, depth, name=name))
        segments.append(Segment("state", rng.randint(0, 6), turn, depth))
        segments.append(Segment("action", rng.randint(1, 4), turn, depth))
        depth = max(0, depth + rng.choice([-1, 0, 0, 1]))
        name = rng.choice(["", "search", "pin", "rollback"])
        segments.append(Segment("info", rng.randint(0, 12), turn, depth, name=name))
    return segments


POLICIES = {
    "strip": strip_reasoning(),
    "strip 1": strip_reasoning(1),
    "strip 3": strip_reasoning(3),
    "clear": clear_tool_results(20, keep=2),
    "clear all": clear_tool_results(0, keep=0),
    "clear but": clear_tool_results(15, keep=1, exclude=("pin",), at_least=8, placeholder=(5, 6)),
    "sub-agents": sub_agents,
    "memento": memento,
}


def slow_strip(segments, keep):
    """Turn by turn: once a turn has been written, the states older than its last `keep` go."""
    expires = [len(segments)] * len(segments)
    written = sorted({s.turn for s in segments if s.role in ("state", "action")})
    for place, turn in enumerate(written):
        end = 1 + max(
            i for i, s in enumerate(segments) if s.turn == turn and s.role in ("state", "action")
        )
        stays = set(written[max(place + 1 - keep, 0) : place + 1])
        for i, s in enumerate(segments[:end]):
            if s.role == "state" and s.turn not in stays:
                expires[i] = min(expires[i], end)
    return expires


def slow_clear(segments, trigger, keep, exclude=(), at_least=0):
    """A request per turn: count the live context, and clear from its front."""
    gone: dict[int, int] = {}
    seen = set()
    for i, s in enumerate(segments):
        if s.role not in ("state", "action") or s.turn in seen:
            continue
        seen.add(s.turn)
        live = [j for j in range(i) if j not in gone]
        results = [
            j
            for j in live
            if segments[j].role == "info"
            and segments[j].num_tokens
            and segments[j].name not in exclude
        ]
        old = results[:-keep] if keep else results
        size = sum(segments[j].num_tokens for j in live)
        if size > trigger and sum(segments[j].num_tokens for j in old) >= at_least:
            gone |= dict.fromkeys(old, i)
    return [gone.get(i, len(segments)) for i in range(len(segments))]


def slow_sub_agents(segments):
    """A stack of what is in the context: a return pops its branch, a rollback its call too."""
    expires = [len(segments)] * len(segments)
    stack: list[int] = []
    for i, s in enumerate(segments):
        returned = False
        while stack and segments[stack[-1]].depth > s.depth:
            expires[stack.pop()] = i
            returned = True
        if returned and s.role == "info" and s.name == "rollback":
            # What is on top now was there when the branch opened: its turn, if it wrote something.
            call = segments[stack[-1]]
            while stack and segments[stack[-1]].role in ("state", "action"):
                top = segments[stack[-1]]
                if (top.turn, top.depth) != (call.turn, call.depth):
                    break
                expires[stack.pop()] = i
        stack.append(i)
    return expires


def slow_memento(segments):
    expires = [len(segments)] * len(segments)
    for i, s in enumerate(segments):
        if s.name == "block":
            later = [j for j in range(i + 1, len(segments)) if segments[j].name == "summary"]
            expires[i] = later[0] + 1 if later else len(segments)
    return expires


SLOW = {
    "strip": lambda s: slow_strip(s, 0),
    "strip 1": lambda s: slow_strip(s, 1),
    "strip 3": lambda s: slow_strip(s, 3),
    "clear": lambda s: slow_clear(s, 20, 2),
    "clear all": lambda s: slow_clear(s, 0, 0),
    "clear but": lambda s: slow_clear(s, 15, 1, ("pin",), 8),
    "sub-agents": slow_sub_agents,
    "memento": slow_memento,
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_drops_what_its_slow_version_drops(name):
    dropped = 0
    for seed in range(200):
        segments = conversation(seed)
        expires, floors = retained(segments, POLICIES[name])
        assert floors is None
        assert expires == SLOW[name](segments), segments
        dropped += sum(end < len(segments) for end in expires)
    assert dropped > 100


@pytest.mark.parametrize("name", POLICIES)
def test_a_drop_stays_the_same_as_segments_are_added(name):
    """What a rollout needs: it asks with the segments so far and an empty one to come."""
    for seed in range(40):
        segments = conversation(seed)
        whole, _ = retained(segments, POLICIES[name])
        for count in range(1, len(segments)):
            upcoming = segments[count]
            if upcoming.role in ("state", "action"):
                upcoming = replace(upcoming, role="state", tokens=0, name="")
            part, _ = retained([*segments[:count], upcoming], POLICIES[name])
            for index in range(count):
                assert (part[index] <= count) == (whole[index] <= count)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_pickled_and_equal(name):
    policy = POLICIES[name]
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy
    assert policy.__name__


def test_other_arguments_make_other_policies():
    assert strip_reasoning(1) != strip_reasoning(2)
    assert clear_tool_results(9) != clear_tool_results(9, placeholder=[3])
    made = clear_tool_results(9, 2, exclude=["pin"], at_least=4, placeholder=[3])
    said = "clear_tool_results(9, keep=2, exclude=('pin',), at_least=4, placeholder=(3,))"
    assert repr(made) == made.__name__ == said
    assert eval(said) == made


def test_without_a_rollback_sub_agents_fold():
    for seed in range(50):
        segments = [replace(s, name="") for s in conversation(seed)]
        assert sub_agents(segments) == fold(segments)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: strip_reasoning(-1), ValueError, "keep: expected 0 or more, got -1"),
        (lambda: strip_reasoning(True), TypeError, "keep: expected an integer, got True"),
        (lambda: clear_tool_results("9"), TypeError, "trigger: expected an integer, got '9'"),
        (lambda: clear_tool_results(9, -1), ValueError, "keep: expected 0 or more, got -1"),
        (lambda: clear_tool_results(9, at_least=-1), ValueError, "at_least: expected 0 or more"),
        (lambda: clear_tool_results(9, exclude="pin"), TypeError, "exclude: expected a sequence"),
        (lambda: clear_tool_results(9, exclude=[3]), TypeError, "exclude: expected a sequence"),
        (lambda: clear_tool_results(9, placeholder=[-3]), ValueError, r"placeholder\[0\]: expect"),
        (lambda: clear_tool_results(9, placeholder=["x"]), TypeError, r"placeholder\[0\]: expect"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_placeholders_stand_for_what_was_cleared():
    """Branch by branch, the text that an engine sends again, by hand."""
    policy = clear_tool_results(8, keep=1, placeholder=(90, 91))
    segments = [Segment("prompt", [1, 2])]
    for turn in (1, 2, 3):
        segments.append(Segment("action", [10 * turn], turn))
        segments.append(Segment("info", [10 * turn + i for i in (1, 2, 3)], turn))
    segments.append(Segment("action", [40], 4))
    layout = unroll(Trajectory(segments, policy))
    # Turns 1 and 2 begin with at most 8 tokens. Before turn 3 the first result goes, then another.
    sent = [
        [1, 2, 10, 11, 12, 13, 20],
        [1, 2, 10, 90, 91, 20, 21, 22, 23, 30],
        [1, 2, 10, 90, 91, 20, 90, 91, 30, 31, 32, 33, 40],
    ]
    for end in (10, 20, 30, 40):
        at = int((layout.token_ids == end).logical_and(layout.loss_mask).nonzero()[0])
        seen = [k for k in range(at + 1) if int(layout.expiry[k]) > at]
        text = layout.token_ids[seen].tolist()
        assert any(text == row[: len(text)] for row in sent), text
        assert layout.position_ids[seen].tolist() == list(range(len(seen)))
    assert layout.loss_mask.sum() == 4
    stands_in = (layout.token_ids == 90) | (layout.token_ids == 91)
    assert not layout.loss_mask[stands_in].any()
    # A placeholder comes from the segment that it stands for.
    trajectory = Trajectory(segments, policy)
    assert set(trajectory.token_ids[layout.source[stands_in]].tolist()) == {11, 21}
    assert torch.equal(layout.turn[stands_in], trajectory.turn[layout.source[stands_in]])


def test_placeholders_of_counted_tokens():
    policy = clear_tool_results(4, keep=0, placeholder=(9,))
    turn = [Segment("action", 1, 1), Segment("info", 5, 1), Segment("action", 1, 2)]
    layout = unroll(Trajectory([Segment("prompt", 2), *turn], policy))
    assert layout.token_ids is None
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert [span.role for span in layout.spans] == ["prompt", "action", "info", "action"]
