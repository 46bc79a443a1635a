"""Forward and backward passes over packed rows: score them, or take one optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor

from mem1_kernels.ppo.batch import PackedRow, share
from mem1_kernels.ppo.learner import Learner
from mem1_kernels.ppo.report import Stopwatch

LossOf = Callable[[PackedRow, Tensor, Tensor, "Tensor | None"], tuple[Tensor, dict[str, Tensor]]]
"""(row, log-probs, entropies, values) -> the row's part of the loss and of each logged figure."""


@torch.no_grad()
def score_rows(
    learner: Learner, rows: Sequence[PackedRow], like: Tensor, watch: Stopwatch
) -> tuple[Tensor, Tensor]:
    """Log-probs and values of a batch's generated tokens, on every process."""
    learner.model.eval()
    found = torch.zeros(2, len(like), device=like.device)
    for row, counts, _ in share(learner.accelerator, rows):
        with watch("forward"):
            log_probs, _, values = learner.model(row.layout, row.plan)
        if counts:
            found[0, row.where] = log_probs.float()
            if values is not None:
                found[1, row.where] = values
    found = cast(Tensor, learner.accelerator.reduce(found, "sum"))
    return found[0], found[1]


def train_on(
    learner: Learner, rows: Sequence[PackedRow], loss_of: LossOf, watch: Stopwatch
) -> dict[str, float]:
    """One optimizer step over `rows`, whose losses add up. Returns the figures and the norms."""
    learner.model.train()
    accelerator = learner.accelerator
    totals: dict[str, Tensor] = {}
    for row, counts, last in share(accelerator, rows):
        # Under FSDP2 gradients that are not reduced at once would be held whole.
        together = last or learner.sharded
        with nullcontext() if together else accelerator.no_sync(learner.model):
            with watch("forward"):
                loss, figures = loss_of(row, *learner.model(row.layout, row.plan))
            with watch("backward"):
                # DDP and FSDP2 average gradients over processes; the parts are to be added.
                accelerator.backward(loss * (accelerator.num_processes * counts))
        for name, value in (figures | {"loss": loss}).items():
            totals[name] = totals.get(name, torch.zeros_like(loss)) + value.detach() * counts
    with watch("backward"):
        norms = learner.clip_gradients()
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    sums = cast(Tensor, accelerator.reduce(torch.stack(list(totals.values())), "sum"))
    names = [*totals, "grad_norm", "critic_grad_norm"]
    return dict(zip(names, [*sums.tolist(), *norms], strict=False))
