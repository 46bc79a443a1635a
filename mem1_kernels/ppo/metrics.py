"""What an update reports: explained variance, clip fraction, KL and the rollout-trainer gap."""

from __future__ import annotations

import torch
from torch import Tensor

from mem1_kernels.ppo.losses import check_clip, kl_estimate, ratio_to
from mem1_kernels.ppo.masked import check_like_mask, live, masked_mean, moments

__all__ = ["approx_kl", "clip_fraction", "explained_variance", "log_prob_gap"]


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the returns' variance the critic explains: 1 all, 0 none, below 0 worse than a
    constant.

        1 - Var[R - V] / Var[R]

    Args:
        values, returns: `[...]`, floating point.
        mask: `[...]` bool, True for generated tokens.

    Returns:
        0-d fp64 tensor; NaN if all returns are equal, as then there is nothing to explain.

    Raises:
        ValueError: shapes differ, or the mask is empty.
        TypeError: `mask` is not bool, or another argument is not floating point.

    Source: the statistic `explained_variance` of OpenAI baselines.

    >>> returns = torch.tensor([0.0, 2.0, 4.0])
    >>> round(float(explained_variance(returns * 0.5, returns, torch.ones(3, dtype=torch.bool))), 6)
    0.75
    """
    check_like_mask(mask, values=values, returns=returns)
    _, unexplained = moments(returns.double() - values.double(), mask)
    _, variance = moments(returns, mask)
    return torch.where(variance > 0, 1 - unexplained / variance, torch.nan)


@torch.no_grad()
def clip_fraction(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    denominator: float | None = None,
) -> Tensor:
    """Share of the generated tokens that the clip of `policy_loss` leaves without gradient:
    the ratio is above 1 + clip with a positive advantage, or below 1 - clip with a negative one.

    Args:
        log_probs, old_log_probs, advantages: `[...]`, floating point.
        mask: `[...]` bool, True for generated tokens.
        clip: in (0, 1).
        denominator: as in `masked_mean`.

    Returns:
        0-d tensor in [0, 1].

    Raises:
        ValueError: shapes differ, `clip` is out of range, or the mask is empty and
            `denominator` is None.
        TypeError: `mask` is not bool, or another tensor is not floating point.

    Source: the derivative of eq. 7 of arXiv 1707.06347.

    >>> new, old = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.25]).log()
    >>> clip_fraction(new, old, torch.tensor([1.0, -1.0]), torch.ones(2, dtype=torch.bool))
    tensor(0.5000)
    """
    check_like_mask(mask, log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    check_clip(clip)
    ratio = ratio_to(log_probs, old_log_probs, mask)
    up, down = (advantages > 0) & (ratio > 1 + clip), (advantages < 0) & (ratio < 1 - clip)
    return masked_mean((up | down).to(ratio.dtype), mask, denominator=denominator)


@torch.no_grad()
def approx_kl(
    log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, *, denominator: float | None = None
) -> Tensor:
    """How far the update has moved: mean k3 estimate of KL(pi_old || pi), tokens being pi_old's.

        1/N sum_i (r_i - 1 - log r_i), r_i = pi(i) / pi_old(i)

    Args:
        log_probs, old_log_probs: `[...]`, floating point.
        mask: `[...]` bool, True for generated tokens.
        denominator: as in `masked_mean`.

    Returns:
        0-d tensor >= 0, in nats per token.

    Raises:
        ValueError: shapes differ, or the mask is empty and `denominator` is None.
        TypeError: `mask` is not bool, or another tensor is not floating point.

    Source: Schulman, "Approximating KL Divergence", 2020.

    >>> approx_kl(torch.tensor([0.5]), torch.zeros(1), torch.tensor([True]))
    tensor(0.1487)
    """
    estimate = kl_estimate(old_log_probs, log_probs, mask, kind="k3")
    return masked_mean(estimate, mask, denominator=denominator)


@torch.no_grad()
def log_prob_gap(a: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and mean |a - b| over the generated tokens: rollout against trainer.

    Args:
        a, b: `[...]`, floating point log-probs of the same tokens.
        mask: `[...]` bool, True for generated tokens.

    Returns:
        (largest, mean), 0-d tensors in nats; NaN if a generated token's log-prob is NaN.

    Raises:
        ValueError: shapes differ, or the mask is empty.
        TypeError: `mask` is not bool, or another tensor is not floating point.

    Source: none needed.

    >>> log_prob_gap(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), torch.ones(2).bool())
    (tensor(0.5000), tensor(0.2500))
    """
    check_like_mask(mask, a=a, b=b)
    gap = (live(a, mask) - live(b, mask)).abs()
    mean = masked_mean(gap, mask)
    return gap.amax(), mean
