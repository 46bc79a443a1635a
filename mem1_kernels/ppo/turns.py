"""Credit per turn and per role: a turn as one step of GAE, turns compared within their group, and
advantages whitened apart for each role.

Layouts are those of `mem1_kernels.ppo.advantages`. `turn_ids` and roles come from
`Layout.turn` and `Layout.role`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem1_kernels.ppo.advantages import by_trajectory, gae
from mem1_kernels.ppo.masked import check_like_mask, live, wide

__all__ = ["turn_gae", "turn_relative_advantages", "whiten_within"]


def _check_ids(name: str, ids: Tensor, mask: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {ids.dtype}")
    if ids.shape != mask.shape:
        raise ValueError(
            f"{name}: expected the shape of mask {tuple(mask.shape)}, got {tuple(ids.shape)}"
        )


def _steps(
    mask: Tensor, trajectory_ids: Tensor | None, turn_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The turns of all trajectories as steps.

    Returns:
        Flat positions of the generated tokens and the step of each, `[generated]`; the trajectory
        and the turn of each step, `[steps]`.
    """
    _check_ids("turn_ids", turn_ids, mask)
    where, ids = by_trajectory(mask, trajectory_ids)
    turn = turn_ids.reshape(-1)[where].long()
    same = ids[1:] == ids[:-1]
    falls = same & (turn[1:] < turn[:-1])
    if bool(falls.any()):
        at = int(falls.nonzero()[0])
        raise ValueError(
            "turn_ids: expected turns that do not fall within a trajectory, got "
            f"{int(turn[at + 1])} after {int(turn[at])} in trajectory {int(ids[at])}"
        )
    first = torch.ones_like(where, dtype=torch.bool)
    first[1:] = ~same | (turn[1:] != turn[:-1])
    return where, first.cumsum(0) - 1, ids[first], turn[first]


def _spread(per_step: Tensor, where: Tensor, step: Tensor, like: Tensor) -> Tensor:
    zeros = like.new_zeros(like.numel(), dtype=wide(like.dtype))
    return zeros.index_copy(0, where, per_step.to(zeros.dtype)[step]).reshape(like.shape)


@torch.no_grad()
def turn_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    turn_ids: Tensor,
    trajectory_ids: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns with a turn as one step: all its tokens get the turn's.

        d_k = r_k + gamma V_{k+1} - V_k;  A_k = d_k + gamma lam A_{k+1};  R_k = A_k + V_k

    where r_k is the sum of the rewards of turn k's generated tokens, V_k the value at the first of
    them, and V and A are 0 after the last turn.

    Args:
        rewards, values, mask, trajectory_ids: as for `gae`.
        turn_ids: like `rewards`, int32 or int64: rising within a trajectory; read at generated
            tokens only.
        gamma, lam: in [0, 1]; gamma is the discount per turn.

    Returns:
        (advantages, returns), each like `rewards`, fp32 (fp64 if `values` are), 0 where `mask`
        is False, without gradient.

    Raises:
        ValueError: as for `gae`, or turns that fall within a trajectory.
        TypeError: a dtype is of the wrong kind.

    Source: Li et al., Turn-PPO, arXiv 2512.17008; GAE: Schulman et al., arXiv 1506.02438, eq. 16.

    >>> mask = torch.tensor([True, True, False, True])
    >>> rewards, values = torch.tensor([0.0, 0.0, 9.0, 1.0]), torch.tensor([0.25, 8.0, 9.0, 0.5])
    >>> turn_gae(rewards, values, mask, torch.tensor([1, 1, 1, 2]))
    (tensor([0.7500, 0.7500, 0.0000, 0.5000]), tensor([1., 1., 0., 1.]))
    """
    check_like_mask(mask, rewards=rewards, values=values)
    where, step, trajectory, _ = _steps(mask, trajectory_ids, turn_ids)
    steps = len(trajectory)
    reward = torch.zeros(steps, dtype=torch.float64, device=mask.device)
    reward.index_add_(0, step, rewards.reshape(-1)[where].double())
    first = torch.ones_like(step, dtype=torch.bool)
    first[1:] = step[1:] != step[:-1]
    value = values.reshape(-1)[where[first]].double()
    every = torch.ones(steps, dtype=torch.bool, device=mask.device)
    advantages, returns = gae(reward, value, every, trajectory, gamma=gamma, lam=lam)
    return _spread(advantages, where, step, values), _spread(returns, where, step, values)


@torch.no_grad()
def turn_relative_advantages(
    rewards: Tensor,
    mask: Tensor,
    turn_ids: Tensor,
    trajectory_ids: Tensor,
    group_ids: Tensor,
    *,
    gamma: float = 1.0,
    scale: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    """Each turn's reward-to-go relative to the same turn of the other trajectories of its group.

        G_ik = sum_{j >= k} gamma^(j - k) r_ij;  A_ik = (G_ik - mean_k) / (std_k + eps)

    over the group's trajectories that have a turn k, where r_ij is the sum of the rewards of turn
    j's generated tokens. A turn that only one of them has gets 0.

    Args:
        rewards: `[tokens]` or `[rows, tokens]`, floating point; read at generated tokens only.
        mask: like `rewards`, bool, True for generated tokens.
        turn_ids: like `rewards`, int32 or int64: rising within a trajectory, and counted alike in
            all of a group; j - k counts the turns in which something was generated.
        trajectory_ids: like `rewards`, int32 or int64, in [0, trajectories).
        group_ids: `[trajectories]`, int32 or int64: equal for the same task.
        gamma: in [0, 1], the discount per turn.
        scale: False: do not divide by the standard deviation.
        eps: keeps turns of equal rewards at 0.

    Returns:
        like `rewards`, fp32 (fp64 for fp64), 0 where `mask` is False, without gradient.

    Raises:
        ValueError: shapes differ, the mask is empty, turns that fall, an id without a group, or
            `gamma` is out of range.
        TypeError: a dtype is of the wrong kind.

    Source: turn-level rewards in GRPO: Zeng et al., arXiv 2505.11821.

    >>> mask, turns = torch.ones(4, dtype=torch.bool), torch.tensor([1, 2, 1, 2])
    >>> rewards = torch.tensor([0.0, 1.0, 1.0, 1.0])
    >>> ids, groups = torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7])
    >>> turn_relative_advantages(rewards, mask, turns, ids, groups)
    tensor([-0.7071,  0.0000,  0.7071,  0.0000])
    """
    check_like_mask(mask, rewards=rewards)
    if group_ids.dtype not in (torch.int32, torch.int64) or group_ids.dim() != 1:
        raise TypeError(
            f"group_ids: expected int32 or int64 [trajectories], got {group_ids.dtype} "
            f"{list(group_ids.shape)}"
        )
    where, step, trajectory, turn = _steps(mask, trajectory_ids, turn_ids)
    if not 0 <= int(trajectory.min()) <= int(trajectory.max()) < len(group_ids):
        raise ValueError(
            f"trajectory_ids: expected 0 to {len(group_ids) - 1}, as group_ids has "
            f"{len(group_ids)}, got {int(trajectory.min())} to {int(trajectory.max())}"
        )
    reward = torch.zeros(len(trajectory), dtype=torch.float64, device=mask.device)
    reward.index_add_(0, step, rewards.reshape(-1)[where].double())
    every = torch.ones_like(trajectory, dtype=torch.bool)
    _, to_go = gae(reward, torch.zeros_like(reward), every, trajectory, gamma=gamma)
    pairs = torch.stack([group_ids.to(trajectory.device)[trajectory].long(), turn], 1)
    _, unit, size = pairs.unique(dim=0, return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(size), dtype=torch.float64, device=mask.device)
    centred = to_go - (zeros.index_add(0, unit, to_go) / size)[unit]
    centred = centred.masked_fill(size[unit] == 1, 0.0)
    if scale:
        squares = zeros.index_add(0, unit, centred.square())
        centred = centred / ((squares / (size - 1).clamp(min=1)).sqrt() + eps)[unit]
    return _spread(centred, where, step, rewards)


@torch.no_grad()
def whiten_within(x: Tensor, mask: Tensor, ids: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Gives the generated tokens of each id mean 0 and standard deviation 1, apart.

        y_i = (x_i - mean_g) / sqrt(variance_g + eps), over the mask within id g

    With `ids=layout.role`, states and actions each have their own scale, so that long states do not
    set that of short actions; with `ids=layout.turn`, each turn does.

    Args:
        x: `[...]`, floating point.
        mask: `[...]` bool, True for generated tokens.
        ids: `[...]`, int32 or int64; read at generated tokens only.
        eps: added to the variance.

    Returns:
        `[...]`, fp32 (fp64 for fp64), 0 where `mask` is False, without gradient. An id with one
        token gives 0.

    Raises:
        ValueError: shapes differ, or the mask is empty.
        TypeError: a dtype is of the wrong kind.

    Source: as for `whiten`, Andrychowicz et al., arXiv 2006.05990, choice C67, within each id.

    >>> x, mask = torch.tensor([1.0, 3.0, 10.0, 30.0]), torch.ones(4, dtype=torch.bool)
    >>> whiten_within(x, mask, torch.tensor([1, 1, 2, 2]))
    tensor([-1.,  1., -1.,  1.])
    """
    check_like_mask(mask, x=x)
    _check_ids("ids", ids, mask)
    if not bool(mask.any()):
        raise ValueError("mask: expected at least one True entry, got none")
    _, group, size = ids[mask].unique(return_inverse=True, return_counts=True)
    values = live(x, mask)[mask].double()
    zeros = torch.zeros(len(size), dtype=torch.float64, device=x.device)
    centred = values - (zeros.index_add(0, group, values) / size)[group]
    variance = zeros.index_add(0, group, centred.square()) / size
    whitened = centred * torch.rsqrt(variance + eps)[group]
    result = torch.zeros_like(x, dtype=wide(x.dtype))
    result[mask] = whitened.to(result.dtype)
    return result
