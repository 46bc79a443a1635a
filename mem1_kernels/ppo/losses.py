"""Clipped policy and value losses, KL estimates and importance weights.

Every loss is a sum over the generated tokens divided by an explicit `denominator`, so that the
micro-batches of one optimizer step add up to the loss of the undivided batch (see `masked_mean`,
which also turns per-token entropies and KL estimates into terms of the loss). Log-probs are in
nats. Old log-probs, advantages, returns, old values and weights are constants: no gradient flows
into them.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mem1_kernels.ppo.masked import check_denominator, check_like_mask, live

__all__ = ["kl_estimate", "policy_loss", "truncated_importance_weights", "value_loss"]

KLKind: TypeAlias = Literal["k1", "k2", "k3"]
"""The estimators of `kl_estimate`."""

# exp(20) is 5e8: beyond it a ratio says only that something is broken, and its gradient would
# overflow before the clip could discard it
_MAX_LOG_RATIO = 20.0


def ratio_to(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """pi / pi_old at generated tokens, 1 elsewhere."""
    difference = live(log_probs, mask) - live(old_log_probs.detach(), mask)
    return difference.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    denominator: float,
    clip: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """PPO's clipped surrogate, to be minimised.

        1/N sum_i w_i max(-r_i A_i, -clamp(r_i, 1 - clip, 1 + clip) A_i)

    with r_i = pi(i) / pi_old(i). With `dual_clip` = c, a token with A_i < 0 costs at most -c A_i,
    so that one whose probability has grown a lot cannot rule the step. A log-ratio is cut off at
    +-20, and has no gradient there.

    Args:
        log_probs: `[...]`, floating point, of the current policy; takes the gradient.
        old_log_probs: `[...]`, floating point, of the policy that the update started from.
        advantages: `[...]`, floating point.
        mask: `[...]` bool, True for generated tokens.
        denominator: N > 0, the generated tokens of the whole optimizer step (with `Layout.weights`,
            the sum of their weights).
        clip: in (0, 1).
        dual_clip: c > 1, or None.
        weights: `[...]`, floating point >= 0, one factor per token, such as `Layout.weights`,
            `truncated_importance_weights` or their product; None: 1.

    Returns:
        0-d tensor, fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes differ, or `denominator`, `clip` or `dual_clip` is out of range.
        TypeError: `mask` is not bool, or another tensor is not floating point.

    Source: Schulman et al., arXiv 1707.06347, eq. 7; dual clip: Ye et al., arXiv 1912.09729.

    >>> new, old = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.25, 0.3, 0.8]).log()
    >>> advantages = torch.tensor([1.0, 1.0, float("nan")])
    >>> policy_loss(new, old, advantages, torch.tensor([True, True, False]), denominator=2)
    tensor(-1.1000)
    """
    check_like_mask(
        mask,
        log_probs=log_probs,
        old_log_probs=old_log_probs,
        advantages=advantages,
        weights=weights,
    )
    check_clip(clip)
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip: expected a number above 1, got {dual_clip}")
    ratio = ratio_to(log_probs, old_log_probs, mask)
    advantage = live(advantages.detach(), mask)
    loss = torch.maximum(-ratio * advantage, -ratio.clamp(1 - clip, 1 + clip) * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    if weights is not None:
        loss = loss * live(weights.detach(), mask)
    return loss.sum() / check_denominator(denominator)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    denominator: float,
    clip: float | None = 0.5,
    weights: Tensor | None = None,
) -> Tensor:
    """Squared error of the critic, the larger of the plain one and the one of the clipped value.

        1/(2N) sum_i w_i max((V_i - R_i)^2, (V_old_i + clamp(V_i - V_old_i, -clip, clip) - R_i)^2)

    Args:
        values: `[...]`, floating point, of the current critic; takes the gradient.
        old_values: `[...]`, floating point, of the critic that made the advantages.
        returns: `[...]`, floating point.
        mask: `[...]` bool, True for generated tokens.
        denominator: N > 0, the generated tokens of the whole optimizer step (with `Layout.weights`,
            the sum of their weights).
        clip: > 0, in units of the value; None: no clipping.
        weights: `[...]`, floating point >= 0, one factor per token; None: 1.

    Returns:
        0-d tensor, fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes differ, or `denominator` or `clip` is not positive.
        TypeError: `mask` is not bool, or another tensor is not floating point.

    Source: OpenAI baselines, `ppo2`; the clip of 0.5 is MEM1's.

    >>> one = torch.ones(1)
    >>> value_loss(2 * one, 0 * one, 2 * one, one.bool(), denominator=1)  # clipped to 0.5
    tensor(1.1250)
    """
    check_like_mask(mask, values=values, old_values=old_values, returns=returns, weights=weights)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: expected a positive number or None, got {clip}")
    value, old, target = (live(x, mask) for x in (values, old_values.detach(), returns.detach()))
    error = (value - target).square()
    if clip is not None:
        clipped = old + (value - old).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - target).square())
    if weights is not None:
        error = error * live(weights.detach(), mask)
    return 0.5 * error.sum() / check_denominator(denominator)


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    *,
    kind: KLKind = "k3",
) -> Tensor:
    """Per-token estimate of KL(pi || ref) from one sample of pi.

        d = log pi - log ref:  k1 = d;  k2 = d^2 / 2;  k3 = exp(-d) - 1 + d

    k1 is unbiased and may be negative; k3 is unbiased, never negative and varies less; k2 is
    biased, but its *gradient* is an unbiased estimate of the KL's, which k1's (zero on average)
    and k3's are not. In k3, d is cut off at -20, and has no gradient there.

    Args:
        log_probs: `[...]`, floating point, of pi, which the tokens were sampled from.
        ref_log_probs: `[...]`, floating point, of the reference.
        mask: `[...]` bool, True for generated tokens.
        kind: the estimator.

    Returns:
        `[...]`, fp32 (fp64 for fp64), 0 where `mask` is False. Gradients reach both inputs.

    Raises:
        ValueError: shapes differ, or `kind` is unknown.
        TypeError: `mask` is not bool, or another tensor is not floating point.

    Source: Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html

    >>> d = torch.tensor([0.5, -0.5])
    >>> kl_estimate(d, torch.zeros(2), torch.ones(2, dtype=torch.bool), kind="k3")
    tensor([0.1065, 0.1487])
    """
    check_like_mask(mask, log_probs=log_probs, ref_log_probs=ref_log_probs)
    d = live(log_probs, mask) - live(ref_log_probs, mask)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        d = d.clamp(min=-_MAX_LOG_RATIO)
        return (-d).expm1() + d
    raise ValueError(f"kind: expected 'k1', 'k2' or 'k3', got {kind!r}")


@torch.no_grad()
def truncated_importance_weights(
    old_log_probs: Tensor, behaviour_log_probs: Tensor, mask: Tensor, *, cap: float = 2.0
) -> Tensor:
    """Weights for tokens that another engine sampled, with slightly other log-probs than ours.

        w_i = min(pi_old(i) / mu(i), cap)

    Args:
        old_log_probs: `[...]`, floating point, of the trainer's policy before the update.
        behaviour_log_probs: `[...]`, floating point, of the engine at sampling.
        mask: `[...]` bool, True for generated tokens.
        cap: > 0.

    Returns:
        `[...]`, fp32 (fp64 for fp64), 0 where `mask` is False, without gradient.

    Raises:
        ValueError: shapes differ, or `cap` is not positive.
        TypeError: `mask` is not bool, or another tensor is not floating point.

    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    2025; Ionides, "Truncated Importance Sampling", 2008.

    >>> old, behaviour = torch.tensor([0.2, 0.9, 0.5]).log(), torch.tensor([0.4, 0.1, 0.5]).log()
    >>> truncated_importance_weights(old, behaviour, torch.tensor([True, True, False]))
    tensor([0.5000, 2.0000, 0.0000])
    """
    check_like_mask(mask, old_log_probs=old_log_probs, behaviour_log_probs=behaviour_log_probs)
    if not cap > 0:
        raise ValueError(f"cap: expected a positive number, got {cap}")
    return live(ratio_to(old_log_probs, behaviour_log_probs, mask).clamp(max=cap), mask)


def check_clip(clip: float) -> None:
    """Raise unless `clip` is in (0, 1)."""
    if not 0 < clip < 1:
        raise ValueError(f"clip: expected a number between 0 and 1, got {clip}")
