"""The figures of a step, and when training must not go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

GAP_MAX = "mem1/log_prob_gap_max"
GAP_MEAN = "mem1/log_prob_gap_mean"


def gap_metrics(sampled: Tensor, trained: Tensor) -> dict[str, float]:
    """The largest and the mean |log-prob of the rollout - log-prob of the actor|.

    Args:
        sampled, trained: `[tokens]`, of what the policy wrote.

    >>> import torch
    >>> gap_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]))
    {'mem1/log_prob_gap_max': 0.5, 'mem1/log_prob_gap_mean': 0.25}
    """
    gap = (sampled.double() - trained.double()).abs()
    if not len(gap):
        return {GAP_MAX: 0.0, GAP_MEAN: 0.0}
    return {GAP_MAX: float(gap.max()), GAP_MEAN: float(gap.mean())}


def check_gap(gaps: Mapping[str, float], largest: float, mean: float) -> None:
    """Raises ValueError unless the gaps pass as rounding.

    >>> check_gap({"mem1/log_prob_gap_max": 9.0, "mem1/log_prob_gap_mean": 2.0}, 1e-3, 1e-4)
    Traceback (most recent call last):
    ...
    ValueError: log-probs of rollout and actor differ by up to 9 (mean 2), expected at most 0.001 \
(mean 0.0001): the two do not see the same tokens, or compute in other dtypes \
(tolerance_max, tolerance_mean)
    """
    worst, average = gaps[GAP_MAX], gaps[GAP_MEAN]
    if not (worst <= largest and average <= mean):  # a NaN fails too
        raise ValueError(
            f"log-probs of rollout and actor differ by up to {worst:.3g} (mean {average:.3g}), "
            f"expected at most {largest:.3g} (mean {mean:.3g}): the two do not see the same "
            "tokens, or compute in other dtypes (tolerance_max, tolerance_mean)"
        )


def episode_metrics(figures: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a step's episodes came to.

    Args:
        figures: of each episode: turns, peak_context, tokens, failed, error, and its scores.

    Returns:
        By name; each score is the mean over the episodes that have it.

    Raises:
        RuntimeError: none of them went well: then it is the environment or the rollout.
    """
    failed = [one for one in figures if one["failed"]]
    if figures and len(failed) == len(figures):
        raise RuntimeError(f"every episode of this step failed; the first: {failed[0]['error']}")
    if not figures:
        return {}
    scores: dict[str, list[float]] = {}
    for one in figures:
        for name, score in one["scores"].items():
            scores.setdefault(name, []).append(score)
    return {
        "mem1/failed_episodes": float(len(failed)),
        "mem1/turns_mean": fmean(one["turns"] for one in figures),
        "mem1/peak_context_max": float(max(one["peak_context"] for one in figures)),
        "mem1/tokens_mean": fmean(one["tokens"] for one in figures),
        **{f"mem1/{name}_mean": fmean(values) for name, values in scores.items()},
    }
