"""Credit per turn and per role against loops; weights in the losses; both in a run of PPO."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from ppo_runs import small
from test_ppo_functional import NAN, rand

from mem1_kernels import Segment, Trajectory, pack
from mem1_kernels.ppo import (
    gae,
    grpo_advantages,
    masked_mean,
    on_every_token,
    policy_loss,
    turn_gae,
    turn_relative_advantages,
    value_loss,
    whiten,
    whiten_within,
)
from mem1_kernels.ppo.batch import Batch
from mem1_kernels.ppo.config import Config
from mem1_kernels.ppo.episodes import read_transcripts, write_transcripts
from mem1_kernels.ppo.trainer import train
from python_tests.talking_processes import talk


def packed(seed: int):
    """Trajectories of turns of 0 to 4 generated tokens, with observations between, interleaved."""
    rng = random.Random(seed)
    rows = []
    for trajectory in range(rng.randint(2, 5)):
        own = []
        for turn in range(rng.randint(1, 6)):
            own += [(trajectory, turn, True)] * rng.randint(0 if turn else 1, 4)
            own += [(trajectory, turn, False)] * rng.randint(0, 3)
        rows.append(own)
    tokens = []
    while any(rows):  # each in order of time, but not contiguous
        own = rng.choice([row for row in rows if row])
        take = rng.randint(1, 3)
        tokens += own[:take]
        del own[:take]
    ids, turns, mask = (torch.tensor(values) for values in zip(*tokens, strict=True))
    return mask.bool(), turns, ids, seed


def slow_steps(mask, turns, ids):
    """{trajectory: {turn: its generated tokens}}, in order."""
    steps: dict[int, dict[int, list[int]]] = {}
    for at in mask.nonzero().flatten().tolist():
        steps.setdefault(int(ids[at]), {}).setdefault(int(turns[at]), []).append(at)
    return steps


@pytest.mark.parametrize("gamma_lam", [(1.0, 1.0), (0.9, 0.8), (0.5, 0.0), (0.0, 1.0)])
def test_turn_gae_equals_the_loop(gamma_lam):
    gamma, lam = gamma_lam
    for seed in range(30):
        mask, turns, ids, _ = packed(seed)
        rewards, values = rand(len(mask), seed=seed), rand(len(mask), seed=seed + 1)
        want = torch.zeros(2, len(mask), dtype=torch.float64)
        for own in slow_steps(mask, turns, ids).values():
            advantage = following = 0.0
            for tokens in reversed(own.values()):
                value = float(values[tokens[0]])
                delta = float(rewards[tokens].sum()) + gamma * following - value
                advantage, following = delta + gamma * lam * advantage, value
                for token in tokens:
                    want[0, token], want[1, token] = advantage, advantage + value
        poisoned = [x.masked_fill(~mask, NAN) for x in (rewards, values)]
        wild = (turns.masked_fill(~mask, -(10**9)), ids.masked_fill(~mask, 10**9))
        got = turn_gae(*poisoned, mask, *wild, gamma=gamma, lam=lam)
        torch.testing.assert_close(torch.stack(got), want, rtol=1e-12, atol=1e-12)


def test_turn_gae_of_turns_of_one_token_is_gae():
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]])
    rewards, values = rand(2, 4, seed=1), rand(2, 4, seed=2)
    turns = torch.arange(4).expand(2, 4)
    for mine, plain in zip(
        turn_gae(rewards, values, mask, turns, gamma=0.9, lam=0.7),
        gae(rewards, values, mask, gamma=0.9, lam=0.7),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("scale", [True, False])
def test_relative_advantages_of_turns_equal_the_loop(scale):
    for seed in range(30):
        mask, turns, ids, _ = packed(seed)
        rng = random.Random(seed)
        groups = torch.tensor([rng.randint(3, 4) for _ in range(5)])
        rewards = rand(len(mask), seed=seed)
        to_go: dict[tuple[int, int], dict[int, float]] = {}
        for trajectory, own in slow_steps(mask, turns, ids).items():
            total = 0.0
            for turn, tokens in reversed(own.items()):
                total = float(rewards[tokens].sum()) + 0.9 * total
                to_go.setdefault((int(groups[trajectory]), turn), {})[trajectory] = total
        want = torch.zeros(len(mask), dtype=torch.float64)
        for trajectory, own in slow_steps(mask, turns, ids).items():
            for turn, tokens in own.items():
                members = list(to_go[int(groups[trajectory]), turn].values())
                mean = sum(members) / len(members)
                centred = to_go[int(groups[trajectory]), turn][trajectory] - mean
                if len(members) == 1:
                    centred = 0.0
                elif scale:
                    squares = sum((m - mean) ** 2 for m in members)
                    centred /= math.sqrt(squares / (len(members) - 1)) + 1e-6
                want[tokens] = centred
        poisoned = rewards.masked_fill(~mask, NAN)
        got = turn_relative_advantages(poisoned, mask, turns, ids, groups, gamma=0.9, scale=scale)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_relative_advantages_of_one_turn_are_grpo():
    mask = torch.tensor([True, True, True, False, True, True])
    ids, scores = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, 0.0, 4.0])
    rewards = torch.tensor([1.0, 0.0, 0.0, 9.0, 4.0, 0.0])
    one = torch.zeros_like(ids)
    groups = torch.zeros(3, dtype=torch.int64)
    torch.testing.assert_close(
        turn_relative_advantages(rewards, mask, one, ids, groups),
        on_every_token(grpo_advantages(scores, groups), mask, ids),
    )


def test_whitening_within_equals_whitening_apart():
    for seed in range(20):
        mask, turns, ids, _ = packed(seed)
        x = rand(len(mask), seed=seed)
        for kinds in (turns, ids):
            want = torch.zeros_like(x)
            for kind in kinds[mask].unique():
                part = mask & (kinds == kind)
                want += whiten(x, part)
            got = whiten_within(x.masked_fill(~mask, NAN), mask, kinds.masked_fill(~mask, 99))
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert whiten_within(x.float(), mask, turns).dtype == torch.float32


def test_roles_and_turns_come_from_the_layout():
    turn = [Segment("state", 2, 1), Segment("action", 1, 1), Segment("info", 2, 1)]
    one = Trajectory([Segment("prompt", 1), *turn, Segment("state", 1, 2)])
    layout = pack([[one, one]])
    assert layout.turn.tolist() == [0, *([1] * 5 + [2]) * 2]
    assert layout.role.tolist() == [0, *[1, 1, 2, 3, 3, 1] * 2]
    x = torch.arange(layout.num_tokens).float()
    within = whiten_within(x, layout.loss_mask, layout.role)
    for role in (1, 2):
        part = within[layout.loss_mask & (layout.role == role)]
        assert abs(part.mean()) < 1e-6 and abs(part.std(correction=0) - 1) < 1e-6


ERRORS = [
    ({"turn_ids": torch.tensor([2, 1])}, ValueError, "turn_ids: expected turns that do not fall"),
    ({"turn_ids": torch.tensor([1.0, 2.0])}, TypeError, "turn_ids: expected int32 or int64"),
    ({"turn_ids": torch.tensor([1])}, ValueError, "turn_ids: expected the shape of mask"),
    ({"mask": torch.tensor([False, False])}, ValueError, "mask: expected at least one True"),
    ({"gamma": 1.5}, ValueError, r"gamma: expected a number in \[0, 1\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change, error, message):
    x, ids = torch.zeros(2), torch.tensor([0, 0])
    given = {"mask": torch.tensor([True, True]), "turn_ids": torch.tensor([1, 2]), **change}
    with pytest.raises(error, match=message):
        turn_gae(x, x, trajectory_ids=ids, **given)
    with pytest.raises(error, match=message):
        turn_relative_advantages(x, trajectory_ids=ids, group_ids=torch.tensor([0]), **given)
    if "mask" in change or "shape" in message or "int32" in message:
        with pytest.raises(error, match=message.replace("turn_ids", "ids")):
            whiten_within(x, given["mask"], given["turn_ids"])


def test_an_id_without_a_group():
    x, mask = torch.zeros(2), torch.tensor([True, True])
    ids = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="trajectory_ids: expected 0 to 1, as group_ids has 2"):
        turn_relative_advantages(x, mask, ids, ids, torch.tensor([0, 0]))
    with pytest.raises(TypeError, match="group_ids: expected int32 or int64"):
        turn_relative_advantages(x, mask, ids, ids, torch.tensor([0.0]))


def test_a_token_of_weight_two_counts_as_two():
    """Each loss with integer weights is the loss of the tokens written out that many times."""
    mask = torch.tensor([True, False, True, True, True])
    times = torch.tensor([2, 5, 1, 0, 3])
    a, b, c = (rand(5, seed=seed) for seed in (1, 2, 3))
    again = torch.arange(5).repeat_interleave(times * mask)
    full = torch.ones(len(again), dtype=torch.bool)
    weights = times.double().masked_fill(~mask, NAN)
    total = float(times[mask].sum())
    losses = {
        "policy": lambda a, b, c, m, w: policy_loss(a, b, c, m, denominator=total, weights=w),
        "value": lambda a, b, c, m, w: value_loss(a, b, c, m, denominator=total, weights=w),
        "plain": lambda a, b, c, m, w: value_loss(
            a, b, c, m, denominator=total, clip=None, weights=w
        ),
        "mean": lambda a, b, c, m, w: masked_mean(a, m, weights=w),
        "sum": lambda a, b, c, m, w: masked_mean(a, m, denominator=7, weights=w),
    }
    for name, loss in losses.items():
        x = a.clone().requires_grad_()
        got = loss(x, b, c, mask, weights)
        y = a.clone().requires_grad_()
        want = loss(y[again], b[again], c[again], full, None)
        torch.testing.assert_close(got, want, msg=name)
        got.backward()
        want.backward()
        torch.testing.assert_close(x.grad, y.grad, msg=name)
    with pytest.raises(ValueError, match="at least one True entry of weight above 0"):
        masked_mean(a, mask, weights=torch.zeros(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="weights: expected the shape of mask"):
        value_loss(a, b, c, mask, denominator=1, weights=weights[:2])


def label(segments):
    """Turn 1 is not trained, and actions count three times."""
    return [
        replace(
            s,
            trainable=False if s.turn == 1 else None,
            weight=3.0 if s.role == "action" else 1.0,
        )
        for s in segments
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"credit": "turn", "positions": "kept"},
        {"algorithm": "grpo", "group_size": 2, "positions": "reprefill"},
    ],
)
def test_a_run_with_labels(tmp_path, options):
    """Some episodes have one turn only: nothing of them is in the loss."""
    config = small(tmp_path, sizes=(3,), **options)
    seen = []

    def watched(segments):
        seen.append(label(segments))
        return seen[-1]

    run = train(config, world=replace(talk(config), label=watched))
    assert len(seen) == config.steps * config.episodes
    assert len(run.history) == config.steps
    plain = train(replace(config, out=str(tmp_path / "plain")), world=talk(config))
    assert run.history[0]["reward"] == plain.history[0]["reward"]  # the same episodes
    assert run.history[0]["policy_loss"] != plain.history[0]["policy_loss"]


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
@pytest.mark.parametrize("retention", ["mem1_kernels:memento", "clear_tool_results(30, keep=1)"])
def test_a_run_under_a_policy_that_others_use(tmp_path, retention, positions):
    """The trainer compares its log-probs with the sampled ones, and raises if they differ."""
    config = small(tmp_path, retention=retention, positions=positions, sizes=(3,), steps=1)

    def mark(ids):
        return "block" if len(ids) == 2 else "summary" if ids[-1] % 2 else None

    run = train(config, world=replace(talk(config), mark=mark))
    assert run.history[0]["dropped_per_turn"] > 0
    assert run.history[0]["log_prob_gap"] < 2e-5


def test_a_batch_holds_what_is_trained(tmp_path):
    from ppo_runs import played

    config = small(tmp_path, sizes=(2,))
    _, batch, _ = played(config)
    rollouts = [rollout.relabelled(label) for rollout in batch.rollouts]
    labelled = Batch.of(rollouts, batch.rewards.tolist(), batch.tasks, torch.device("cpu"))
    later = batch.turn > 1
    assert 0 < later.sum() < len(later)
    assert torch.equal(labelled.sampled, batch.sampled[later])
    assert torch.equal(labelled.turn, batch.turn[later])
    assert set(labelled.weights.tolist()) == {1.0, 3.0} and set(batch.weights.tolist()) == {1.0}
    read = [r.relabelled(lambda s: [replace(x, trainable=True) for x in s]) for r in batch.rollouts]
    with pytest.raises(ValueError, match="trainable: token 0 of episode 0 is in the loss, but"):
        Batch.of(read, batch.rewards.tolist(), batch.tasks, torch.device("cpu"))


def test_transcripts_keep_what_segments_say(tmp_path):
    import json
    from types import SimpleNamespace

    segments = (
        Segment("prompt", (5,)),
        Segment("state", (6,), 1, 1, trainable=False, name="block"),
        Segment("action", (7,), 1, weight=0.5),
        Segment("info", (8,), 1, trainable=True),
    )
    trajectory = SimpleNamespace(trajectory=SimpleNamespace(segments=segments))
    path = tmp_path / "t.jsonl"
    write_transcripts([SimpleNamespace(rollout=trajectory, reward=1.0)], path)
    written = json.loads(path.read_text())["segments"]
    assert written[0] == ["prompt", 0, [5], 0]
    assert written[1] == ["state", 1, [6], 1, {"trainable": False, "name": "block"}]
    (((read), reward),) = read_transcripts(str(path))
    assert reward == 1.0
    for mine, was in zip(read, segments, strict=True):
        assert replace(mine, tokens=was.tokens) == was
    path.write_text('{"segments": [["state", 1, [6], 0, {"wieght": 2}]], "reward": 1}')
    with pytest.raises(ValueError, match="expected an object of .*'weight'.*, got"):
        read_transcripts(str(path))


def test_the_config_takes_policies_with_arguments():
    config = Config(retention="clear_tool_results(90, keep=1, exclude=('search',))")
    assert config.retention.startswith("clear")
    Config(retention="strip_reasoning(1)")
    Config(retention="sub_agents")
