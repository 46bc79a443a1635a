"""Advantages without a critic, from the trajectories that were sampled for the same task."""

from __future__ import annotations

import torch
from torch import Tensor

from mem1_kernels.ppo.masked import check_scores, wide

__all__ = ["grpo_advantages", "rloo_advantages"]


def _groups(scores: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 scores less their group's mean, each one's group (counted from 0), the groups' sizes."""
    check_scores(scores)
    if group_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group_ids: expected int32 or int64, got {group_ids.dtype}")
    if group_ids.shape != scores.shape:
        raise ValueError(
            f"group_ids: expected the shape of scores {tuple(scores.shape)}, "
            f"got {tuple(group_ids.shape)}"
        )
    names, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    if bool((sizes < 2).any()):
        raise ValueError(
            "group_ids: expected at least two trajectories in each group, "
            f"got one in group {int(names[sizes < 2][0])}"
        )
    sums = torch.zeros(len(sizes), dtype=torch.float64, device=scores.device)
    means = sums.index_add(0, group, scores.double()) / sizes
    return scores.double() - means[group], group, sizes


@torch.no_grad()
def grpo_advantages(
    scores: Tensor, group_ids: Tensor, *, scale: bool = True, eps: float = 1e-6
) -> Tensor:
    """Scores relative to their group: the trajectories sampled for the same task.

        A_i = (s_i - mean_g) / (std_g + eps), std_g with |g| - 1 in the denominator

    Args:
        scores: `[trajectories]`, floating point and finite.
        group_ids: `[trajectories]`, int32 or int64: equal for the same task.
        scale: False: do not divide by the standard deviation (Dr. GRPO).
        eps: keeps a group of equal scores at 0.

    Returns:
        `[trajectories]`, fp32 (fp64 for fp64), without gradient; `on_every_token` brings
        them to the tokens.

    Raises:
        ValueError: shapes differ, a score is not finite (it would make its whole group NaN), or a
            group has only one member.
        TypeError: a dtype is of the wrong kind.

    Source: Shao et al., arXiv 2402.03300, section 4.1.2; `scale=False`: arXiv 2503.20783.

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 3.0, 3.0]), torch.tensor([5, 5, 7, 7]))
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    centred, group, sizes = _groups(scores, group_ids)
    if scale:
        squares = torch.zeros(len(sizes), dtype=centred.dtype, device=centred.device)
        squares = squares.index_add(0, group, centred.square())
        centred = centred / ((squares / (sizes - 1)).sqrt() + eps)[group]
    return centred.to(wide(scores.dtype))


@torch.no_grad()
def rloo_advantages(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Scores minus the mean of the *other* members of their group.

        A_i = s_i - sum_{j in g, j != i} s_j / (|g| - 1) = (s_i - mean_g) |g| / (|g| - 1)

    Args, Returns, Raises: as for `grpo_advantages`.

    Source: Ahmadian et al., arXiv 2402.14740; Kool et al., 2019.

    >>> rloo_advantages(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0, 0]))
    tensor([ 0.0000, -1.5000,  1.5000])
    """
    centred, group, sizes = _groups(scores, group_ids)
    return (centred * (sizes.double() / (sizes - 1))[group]).to(wide(scores.dtype))
