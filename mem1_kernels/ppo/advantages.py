"""Who gets credit: rewards, GAE and REINFORCE++ over generated tokens.

Time is counted in generated tokens. The tokens of an observation stand between two turns of the
policy, but they are no actions: they get no reward, no value and no advantage, and the token after
them is the direct successor of the token before them.

Layouts: `[tokens]`, packed, with `trajectory_ids` telling the trajectories apart (without them it
is one trajectory); or `[rows, tokens]`, where without ids each row is one trajectory. The same id
means the same trajectory, which must not be spread over several rows. A trajectory's tokens are in
order of time, but need not be contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem1_kernels.ppo.losses import KLKind, kl_estimate
from mem1_kernels.ppo.masked import check_like_mask, check_scores, live, whiten, wide

__all__ = [
    "gae",
    "kl_penalised_rewards",
    "on_every_token",
    "on_last_token",
    "reinforce_pp_advantages",
]


def by_trajectory(mask: Tensor, trajectory_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flat positions of the generated tokens and their ids, both `[generated]`: trajectory after
    trajectory, each in order of time."""
    if mask.dim() not in (1, 2):
        raise ValueError(f"mask: expected [tokens] or [rows, tokens], got {tuple(mask.shape)}")
    where = mask.reshape(-1).nonzero().squeeze(-1)
    if len(where) == 0:
        raise ValueError("mask: expected at least one True entry, got none")
    row = where // mask.shape[-1]
    if trajectory_ids is None:
        return where, row
    if trajectory_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"trajectory_ids: expected int32 or int64, got {trajectory_ids.dtype}")
    if trajectory_ids.shape != mask.shape:
        raise ValueError(
            f"trajectory_ids: expected the shape of mask {tuple(mask.shape)}, "
            f"got {tuple(trajectory_ids.shape)}"
        )
    ids, order = trajectory_ids.reshape(-1)[where].long().sort(stable=True)
    where, row = where[order], row[order]
    split = (ids[1:] == ids[:-1]) & (row[1:] != row[:-1])
    if bool(split.any()):
        at = int(split.nonzero()[0])
        raise ValueError(
            "trajectory_ids: expected each id in one row only, "
            f"got id {int(ids[at])} in rows {int(row[at])} and {int(row[at + 1])}"
        )
    return where, ids


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    trajectory_ids: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns over the generated tokens of each trajectory.

        d_t = r_t + gamma V_{t+1} - V_t;  A_t = d_t + gamma lam A_{t+1};  R_t = A_t + V_t

    where t + 1 is the trajectory's next *generated* token, and V and A are 0 after its last one.
    The recursion is a scan by doubling, in fp64: log2(longest trajectory) vectorised steps.

    Args:
        rewards: `[tokens]` or `[rows, tokens]`, floating point. Read at generated tokens only: put
            the episode's reward on the last one (`on_last_token`).
        values: like `rewards`: the critic's, at each generated token before it is chosen.
        mask: like `rewards`, bool, True for generated tokens.
        trajectory_ids: like `rewards`, int32 or int64; read at generated tokens only.
        gamma, lam: in [0, 1]; gamma is the discount per generated token.

    Returns:
        (advantages, returns), each like `rewards`, fp32 (fp64 if `values` are), 0 where `mask`
        is False, without gradient.

    Raises:
        ValueError: shapes differ, the mask is empty, an id occurs in two rows, or `gamma` or `lam`
            is out of range.
        TypeError: a dtype is of the wrong kind.

    Source: Schulman et al., arXiv 1506.02438, eq. 16.

    >>> mask = torch.tensor([True, False, True])  # act, observe, act
    >>> rewards, values = torch.tensor([0.0, 9.0, 1.0]), torch.tensor([0.25, 9.0, 0.5])
    >>> gae(rewards, values, mask)
    (tensor([0.7500, 0.0000, 0.5000]), tensor([1., 0., 1.]))
    """
    check_like_mask(mask, rewards=rewards, values=values)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {number}")
    where, ids = by_trajectory(mask, trajectory_ids)
    value = values.reshape(-1)[where].double()
    advantage = rewards.reshape(-1)[where].double() - value
    advantage[:-1] += torch.where(ids[1:] == ids[:-1], gamma * value[1:], 0.0)
    # after the step with reach s, advantage[t] sums the deltas of t .. t + 2s - 1
    reach, decay = 1, gamma * lam
    longest = int(ids.unique_consecutive(return_counts=True)[1].max())
    while reach < longest and decay > 0:
        same = ids[reach:] == ids[:-reach]
        advantage[:-reach] += torch.where(same, decay * advantage[reach:], 0.0)
        reach, decay = 2 * reach, decay * decay
    zeros = values.new_zeros(values.numel(), dtype=wide(values.dtype))
    advantages, returns = (
        zeros.index_copy(0, where, x.to(zeros.dtype)).reshape(mask.shape)
        for x in (advantage, advantage + value)
    )
    return advantages, returns


@torch.no_grad()
def on_last_token(scores: Tensor, mask: Tensor, trajectory_ids: Tensor | None = None) -> Tensor:
    """Each trajectory's score on its last generated token, 0 elsewhere: a terminal reward.

    Args:
        scores: `[trajectories]`, floating point and finite; trajectory id `j` gets `scores[j]`.
        mask: `[tokens]` or `[rows, tokens]` bool, True for generated tokens.
        trajectory_ids: like `mask`, int32 or int64, in [0, trajectories) at generated tokens.

    Returns:
        like `mask`, fp32 (fp64 for fp64), without gradient.

    Raises:
        ValueError: shapes differ, a score is not finite, an id is out of range or in two rows, or a
            trajectory has no generated token to carry its score.
        TypeError: a dtype is of the wrong kind.

    Source: the outcome reward of MEM1, arXiv 2506.15841.

    >>> mask = torch.tensor([True, True, False, True, False])
    >>> ids = torch.tensor([0, 0, 0, 1, 1])
    >>> on_last_token(torch.tensor([0.5, 1.0]), mask, ids)
    tensor([0.0000, 0.5000, 0.0000, 1.0000, 0.0000])
    """
    where, ids = _checked_scores(scores, mask, trajectory_ids)
    last = torch.ones_like(ids, dtype=torch.bool)
    last[:-1] = ids[1:] != ids[:-1]
    rewards = scores.new_zeros(mask.numel(), dtype=wide(scores.dtype))
    return rewards.index_copy(0, where[last], scores.to(rewards.dtype)).reshape(mask.shape)


@torch.no_grad()
def on_every_token(scores: Tensor, mask: Tensor, trajectory_ids: Tensor | None = None) -> Tensor:
    """Each trajectory's score on all its generated tokens, 0 elsewhere: how GRPO's and RLOO's
    advantages reach the tokens.

    Args, Raises: as for `on_last_token`.

    Returns:
        like `mask`, fp32 (fp64 for fp64), without gradient.

    Source: arXiv 2402.03300, section 4.1.2.

    >>> mask = torch.tensor([True, True, False, True, False])
    >>> ids = torch.tensor([0, 0, 0, 1, 1])
    >>> on_every_token(torch.tensor([0.5, 1.0]), mask, ids)
    tensor([0.5000, 0.5000, 0.0000, 1.0000, 0.0000])
    """
    where, ids = _checked_scores(scores, mask, trajectory_ids)
    spread = scores.new_zeros(mask.numel(), dtype=wide(scores.dtype))
    return spread.index_copy(0, where, scores.to(spread.dtype)[ids]).reshape(mask.shape)


def _checked_scores(
    scores: Tensor, mask: Tensor, trajectory_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`by_trajectory`, with the ids being exactly the indices of `scores`."""
    check_scores(scores)
    check_like_mask(mask)
    where, ids = by_trajectory(mask, trajectory_ids)
    found = ids.unique_consecutive()
    expected = torch.arange(len(scores), device=ids.device)
    if not torch.equal(found, expected):
        stray = [int(i) for i in found if not 0 <= i < len(scores)]
        bare = [int(i) for i in expected[~torch.isin(expected, found)]]
        raise ValueError(
            f"scores: expected one for each trajectory with a generated token, got {len(scores)}; "
            f"ids without a score: {stray[:8]}; without a generated token: {bare[:8]}"
        )
    return where, ids


def reinforce_pp_advantages(
    rewards: Tensor,
    mask: Tensor,
    trajectory_ids: Tensor | None = None,
    *,
    gamma: float = 1.0,
) -> Tensor:
    """Discounted reward-to-go of each generated token, whitened over the whole batch; no critic.

        G_t = sum_{k >= t} gamma^(k - t) r_k;  A_t = (G_t - mean) / std

    Args:
        rewards: `[tokens]` or `[rows, tokens]`, floating point: the terminal reward and, at every
            generated token, the KL penalty (`kl_penalised_rewards`).
        mask: like `rewards`, bool, True for generated tokens.
        trajectory_ids: like `rewards`, int32 or int64.
        gamma: in [0, 1].

    Returns:
        like `rewards`, fp32 (fp64 for fp64), 0 where `mask` is False, without gradient.

    Raises:
        ValueError, TypeError: as for `gae`.

    Source: Hu et al., arXiv 2501.03262.

    >>> mask, ids = torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 1, 1])
    >>> reinforce_pp_advantages(torch.tensor([0.0, 1.0, 0.0, 0.0]), mask, ids)
    tensor([ 1.,  1., -1., -1.])
    """
    _, reward_to_go = gae(rewards, torch.zeros_like(rewards), mask, trajectory_ids, gamma=gamma)
    return whiten(reward_to_go, mask)


@torch.no_grad()
def kl_penalised_rewards(
    rewards: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    *,
    coef: float,
    kind: KLKind = "k1",
) -> Tensor:
    """Rewards minus a KL penalty at every generated token.

        r'_t = r_t - coef k(log pi_t, log ref_t)

    Args:
        rewards, log_probs, ref_log_probs: `[...]`, floating point.
        mask: `[...]` bool, True for generated tokens.
        coef: at least 0 (MEM1: 0.001).
        kind: the estimator, see `kl_estimate`.

    Returns:
        `[...]`, fp32 (fp64 for fp64), 0 where `mask` is False, without gradient.

    Raises:
        ValueError: shapes differ, `coef` is negative, or `kind` is unknown.
        TypeError: `mask` is not bool, or another tensor is not floating point.

    Source: Ouyang et al., arXiv 2203.02155, eq. 2.

    >>> zero, mask = torch.zeros(2), torch.tensor([True, False])
    >>> kl_penalised_rewards(zero + 1, zero + 0.5, zero, mask, coef=0.1)
    tensor([0.9500, 0.0000])
    """
    check_like_mask(mask, rewards=rewards)
    if not coef >= 0:
        raise ValueError(f"coef: expected a number >= 0, got {coef}")
    return live(rewards, mask) - coef * kl_estimate(log_probs, ref_log_probs, mask, kind=kind)
