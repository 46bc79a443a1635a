"""Packed rows and the passes over them: what they hold, what they refuse."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from ppo_runs import played, small

from mem1_kernels import keep_all, keep_last, mem1
from mem1_kernels.ppo.batch import fill
from mem1_kernels.ppo.learner import attend
from mem1_kernels.ppo.report import Stopwatch
from mem1_kernels.ppo.update import score_rows
from mem1_kernels.rollout import score


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_rows_hold_every_generated_token_once_and_score_it_as_alone(
    tmp_path, positions, group_size
):
    config = small(tmp_path, positions=positions, group_size=group_size, token_budget=150)
    learner, batch, rows = played(config)
    where = torch.cat([row.where for row in rows])
    assert torch.equal(where.sort().values, torch.arange(len(batch.sampled)))
    log_probs, _ = score_rows(learner, rows, batch.sampled, Stopwatch(where.device))
    alone = [
        score(learner.module.policy, e.layout).detach()[e.layout.loss_mask] for e in batch.rollouts
    ]
    assert (log_probs - torch.cat(alone)).abs().max() < 2e-5
    assert (log_probs - batch.sampled).abs().max() < 2e-5
    assert len(rows) > 1
    longest = max(e.layout.num_tokens for e in batch.rollouts)
    assert all(row.layout.num_tokens <= max(150, longest) for row in rows)
    for row in rows:
        numbers = batch.trajectory[row.where].unique_consecutive().tolist()
        assert len(numbers) == len(set(numbers)) == int(row.layout.document.max()) + 1


def test_a_group_shares_its_prompt_in_a_row(tmp_path):
    config = small(tmp_path, group_size=4, token_budget=4096)
    _, batch, (row,) = played(config)
    whole = sum(e.trajectory.num_tokens for e in batch.rollouts)
    prompt = batch.rollouts[0].trajectory.spans[0].stop
    assert row.layout.num_tokens == whole - 2 * 3 * prompt  # two tasks, four episodes each


def test_the_wrong_pairing_is_refused(tmp_path):
    config = small(tmp_path)
    learner, batch, _ = played(config)
    device = batch.sampled.device
    with pytest.raises(ValueError, match="their positions are 'kept', the trainer's 'reprefill'"):
        batch.rows([0], replace(config, positions="reprefill"), mem1, device)
    for wrong in (keep_all, keep_last(2)):
        with pytest.raises(ValueError, match=f"pruned by 'mem1', but .* by '{wrong.__name__[:9]}"):
            batch.rows([0], config, wrong, device)


def test_fill_keeps_to_its_budget():
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.randint(1, 20) for _ in range(rng.randint(1, 30))]
        bins = fill(sizes, 16)
        assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
        for members in bins:
            assert len(members) == 1 or sum(sizes[item] for item in members) <= 16
        assert sum(sum(sizes[i] for i in members) <= 8 for members in bins) <= 1


def test_the_masks_of_the_ablation(tmp_path):
    from bench.mask_ablation import attend_as_released, attend_release, released_layout
    from mem1_kernels import Trajectory, mem1_release, pack, visible

    config = small(tmp_path, token_budget=4096)
    learner, batch, (row,) = played(config)
    policy, layout = learner.module.policy, row.layout
    meant = released_layout(layout)
    order = batch.trajectory[row.where].unique_consecutive().tolist()
    direct = pack([Trajectory(batch.rollouts[n].trajectory.segments, mem1_release) for n in order])
    assert torch.equal(visible(meant.expiry, meant.floor), visible(direct.expiry, direct.floor))

    with torch.no_grad():
        hidden = {f.__name__: f(policy, layout, row.plan) for f in (attend, attend_release)}
        released = attend_as_released(policy, layout, row.plan)
        assert torch.equal(attend(policy, layout, row.plan), hidden["attend"])  # patched again
        assert (hidden["attend"] - hidden["attend_release"]).abs().max() > 0.01
        assert (hidden["attend_release"] - released).abs().max() > 0.01
        last = int((layout.document == 0).nonzero().max())
        layout.token_ids[last] = (layout.token_ids[last] + 1) % 50
        changed = (attend_as_released(policy, layout, row.plan) - released).abs().amax(1)
        assert (changed[layout.document == 0] > 0).all()  # the future is seen
        assert (changed[layout.document > 0] == 0).all()  # other trajectories are not
