"""Sums over the generated tokens of a batch: mean, variance, whitening.

A packed trajectory mixes generated tokens with prompt and observation (info) tokens, for which no
quantity of the loss exists. So every function of this package takes a boolean mask, True where a
token was generated, and what lies under False may be anything, NaN included: it is replaced by
zero before the first operation, because a product with zero would let NaN through, forward or
backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["AllReduce", "masked_mean", "whiten"]

AllReduce = Callable[[Tensor], "Tensor | None"]
"""Sums a tensor over processes, in place or by returning the sum: `torch.distributed.all_reduce`
or `lambda x: accelerator.reduce(x, "sum")`."""


def check_like_mask(mask: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless `mask` is boolean and every given float tensor has its shape and device."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name}: expected the shape of mask {tuple(mask.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != mask.device:
            raise ValueError(
                f"{name}: expected the device of mask {mask.device}, got {tensor.device}"
            )


def live(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in fp32 (fp64 stays fp64), zero and without gradient where `mask` is False."""
    return x.to(wide(x.dtype)).masked_fill(~mask, 0.0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that results are computed and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_scores(scores: Tensor) -> None:
    """Raise unless `scores` is a non-empty float vector of finite numbers, one per trajectory."""
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating point tensor, got {scores.dtype}")
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"scores: expected [trajectories], got {tuple(scores.shape)}")
    finite = scores.isfinite()
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise ValueError(
            f"scores: expected finite numbers, got {float(scores[first])} for trajectory {first}"
        )


def masked_mean(
    x: Tensor, mask: Tensor, *, denominator: float | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sum over the generated tokens, divided by an explicit count.

        1/N sum_{i in mask} w_i x_i

    With gradient accumulation, N is the number of generated tokens in the *whole* optimizer step,
    not in the micro-batch; then the micro-batches' results add up to the value of the undivided
    batch however it is cut. Where gradients are averaged over processes (DDP, FSDP), N is the
    count over all processes divided by the number of processes.

    Args:
        x: `[...]`, floating point; computed in fp32 (fp64 stays fp64).
        mask: `[...]` bool, True for generated tokens.
        denominator: N > 0. None: the number of True entries in `mask`, or the sum of their weights.
        weights: `[...]`, floating point >= 0, of each token (`Layout.weights`); no gradient flows
            into them. None: 1.

    Returns:
        0-d tensor. With an explicit denominator an empty mask gives 0 with zero gradients.

    Raises:
        ValueError: shapes differ; the mask is empty, or its weights are all 0, and `denominator` is
            None; `denominator` is not positive and finite.
        TypeError: `mask` is not bool, or `x` or `weights` is not floating point.

    Source: the token-level mean of DAPO (arXiv 2503.14476, eq. 8), with the count made explicit.

    >>> entropy = torch.tensor([1.0, float("nan"), 3.0])
    >>> generated = torch.tensor([True, False, True])
    >>> masked_mean(entropy, generated)
    tensor(2.)
    >>> masked_mean(entropy, generated, denominator=8)
    tensor(0.5000)
    >>> masked_mean(entropy, generated, weights=torch.tensor([3.0, 1.0, 1.0]))
    tensor(1.5000)
    """
    check_like_mask(mask, x=x, weights=weights)
    factor = None if weights is None else live(weights.detach(), mask)
    if denominator is None:
        denominator = float(mask.sum() if factor is None else factor.sum(dtype=torch.float64))
        if denominator == 0:
            expected = "True entry" if factor is None else "True entry of weight above 0"
            raise ValueError(f"mask: expected at least one {expected}, got none")
    values = live(x, mask)
    total = (values if factor is None else values * factor).sum()
    return total / check_denominator(denominator)


def check_denominator(denominator: float) -> float:
    """The denominator as a float; raise unless it is positive and finite."""
    value = float(denominator)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"denominator: expected a positive finite number, got {denominator}")
    return value


def moments(x: Tensor, mask: Tensor, all_reduce: AllReduce | None = None) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the mask, in fp64, over all processes; two passes."""

    def total(t: Tensor) -> Tensor:
        reduced = None if all_reduce is None else all_reduce(t)
        return t if reduced is None else reduced

    x = live(x, mask).double()
    count, first = total(torch.stack([mask.sum().double(), x.sum()])).unbind()
    if float(count) == 0:
        raise ValueError("mask: expected at least one True entry (over all processes), got none")
    mean = first / count
    squares = live(x - mean, mask).square().sum()
    return mean, total(squares) / count


@torch.no_grad()
def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    all_reduce: AllReduce | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Give the generated tokens mean 0 and standard deviation 1.

        y_i = (x_i - mean) / sqrt(variance + eps), both over the mask, the population's variance

    Args:
        x: `[...]`, floating point.
        mask: `[...]` bool, True for generated tokens.
        shift_mean: False keeps the mean: `y = (x - mean) / std + mean` (for rewards).
        all_reduce: sums a tensor over processes, so that all of them whiten by the same figures;
            every process must call. None: this process only.
        eps: added to the variance.

    Returns:
        `[...]`, fp32 (fp64 for fp64), 0 where `mask` is False, without gradient.

    Raises:
        ValueError: shapes differ, or the mask is empty in all processes.
        TypeError: `mask` is not bool, or `x` is not floating point.

    Source: Andrychowicz et al., arXiv 2006.05990, choice C67.

    >>> x = torch.tensor([1.0, float("inf"), 3.0])
    >>> whiten(x, torch.tensor([True, False, True]))
    tensor([-1.,  0.,  1.])
    """
    check_like_mask(mask, x=x)
    mean, variance = moments(x, mask, all_reduce)
    y = (x.double() - mean) * torch.rsqrt(variance + eps)
    return live((y if shift_mean else y + mean).to(wide(x.dtype)), mask)
