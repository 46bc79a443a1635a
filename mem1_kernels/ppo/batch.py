"""The batch of a step: its episodes in packed rows, and one number per generated token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.ppo.config import Config
from mem1_kernels.retention import Retention
from mem1_kernels.rollout import Rollout, collate
from mem1_kernels.trajectory import Layout


class PackedRow(NamedTuple):
    """A packed row on the device, its plan, and where its generated tokens lie in the batch."""

    layout: Layout
    plan: BlockPlan
    where: Tensor

    @staticmethod
    def of(layout: Layout, where: Tensor, device: torch.device) -> PackedRow:
        layout = layout.to(device)
        return PackedRow(layout, BlockPlan.of(layout), where.to(device))


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Deals items of the given sizes into bins of at most `budget`: first fit, largest first.

    An item that is larger than the budget has a bin of its own.

    >>> fill([5, 3, 9, 4], budget=8)
    [[2], [0, 1], [3]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        place = next((i for i, left in enumerate(room) if sizes[item] <= left), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(item)
        room[place] -= sizes[item]
    return bins


def share(
    accelerator: Accelerator, rows: Sequence[PackedRow]
) -> Iterator[tuple[PackedRow, bool, bool]]:
    """This process's rows as (row, whether it counts, whether it is the last).

    All processes get the same number of rows, as DDP and FSDP2 need; what fills up does not count.
    """
    count = accelerator.num_processes
    rounds = math.ceil(len(rows) / count)
    for number in range(rounds):
        at = number * count + accelerator.process_index
        yield rows[min(at, len(rows) - 1)], at < len(rows), number == rounds - 1


@dataclass
class Batch:
    """The episodes of a step, and one number for each of their generated tokens.

    Vectors are fp32 `[generated]` on the device, episode after episode, in order of time; but
    `trajectory` and `turn` are int64, `rewards` is `[episodes]`, and `tasks` the number of each
    episode's task. Generated tokens that are not in the loss (`Segment.trainable`) have no place.
    """

    rollouts: list[Rollout]
    tasks: list[int]
    rewards: Tensor
    starts: list[int]
    trajectory: Tensor
    turn: Tensor
    weights: Tensor
    sampled: Tensor
    log_probs: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @staticmethod
    def of(
        rollouts: Sequence[Rollout],
        rewards: Sequence[float],
        tasks: Sequence[int],
        device: torch.device,
    ) -> Batch:
        """A batch whose episodes are played and not yet scored.

        Raises:
            ValueError: a token is in the loss that the policy did not sample: it has no ratio.
        """
        for number, rollout in enumerate(rollouts):
            foreign = rollout.trajectory.loss_mask & ~rollout.sampled
            if bool(foreign.any()):
                raise ValueError(
                    f"trainable: token {int(foreign.nonzero()[0])} of episode {number} is in the "
                    "loss, but the policy did not sample it, so it has no probability ratio; "
                    "learn such tokens in the warm start"
                )
        masks = [rollout.trajectory.loss_mask for rollout in rollouts]
        sampled = torch.cat([r.log_probs[mask] for r, mask in zip(rollouts, masks, strict=True)])
        sampled = sampled.to(device)
        counts = torch.tensor([int(mask.sum()) for mask in masks])
        layouts = [rollout.trajectory for rollout in rollouts]
        turns = [layout.turn[mask] for layout, mask in zip(layouts, masks, strict=True)]
        weights = [weights_of(layout)[mask] for layout, mask in zip(layouts, masks, strict=True)]
        return Batch(
            rollouts=list(rollouts),
            tasks=list(tasks),
            rewards=torch.tensor(rewards, device=device),
            starts=(counts.cumsum(0) - counts).tolist(),
            trajectory=torch.arange(len(rollouts)).repeat_interleave(counts).to(device),
            turn=torch.cat(turns).to(device),
            weights=torch.cat(weights).to(device),
            sampled=sampled,
            **{
                name: torch.zeros_like(sampled)
                for name in ("log_probs", "reference", "values", "advantages", "returns")
            },
        )

    @property
    def mask(self) -> Tensor:
        """True everywhere: the vectors hold generated tokens only."""
        return torch.ones_like(self.sampled, dtype=torch.bool)

    @property
    def groups(self) -> dict[int, list[int]]:
        """The episodes of each task."""
        groups: dict[int, list[int]] = {}
        for number, task in enumerate(self.tasks):
            groups.setdefault(task, []).append(number)
        return groups

    def rows(
        self, chosen: Sequence[int], config: Config, retention: Retention, device: torch.device
    ) -> list[PackedRow]:
        """The chosen episodes in packed rows; episodes of one task share their prompt in a row.

        Raises:
            ValueError: positions or retention of the rollouts are not the trainer's.
        """
        check_pairing([self.rollouts[number] for number in chosen], retention)
        layouts = {number: self.rollouts[number].layout for number in chosen}
        groups: dict[int, list[list[int]]] = {}
        sizes: dict[int, list[int]] = {}
        for number in chosen:
            task = self.tasks[number]
            pieces, size = groups.setdefault(task, [[]]), sizes.setdefault(task, [0])
            prompt = layouts[number].spans[0].stop if pieces[-1] else 0
            if pieces[-1] and size[-1] + layouts[number].num_tokens - prompt > config.token_budget:
                pieces.append([])
                size.append(0)
                prompt = 0
            pieces[-1].append(number)
            size[-1] += layouts[number].num_tokens - prompt
        units = [piece for pieces in groups.values() for piece in pieces]
        counts = [count for size in sizes.values() for count in size]
        rows = []
        for members in fill(counts, config.token_budget):
            layout, _ = collate(
                [[self.rollouts[number] for number in units[m]] for m in members],
                positions=config.positions,
            )
            # For each token of a trajectory: how many generated tokens are before it in the batch.
            before = [
                self.starts[number] + self.rollouts[number].trajectory.loss_mask.cumsum(0) - 1
                for member in members
                for number in units[member]
            ]
            where = torch.cat(before)[layout.source][layout.loss_mask]
            rows.append(PackedRow.of(layout, where, device))
        return rows


def weights_of(layout: Layout) -> Tensor:
    """fp32 `[tokens]`: the layout's weights, 1 where it has none."""
    if layout.weights is None:
        return torch.ones(layout.num_tokens, device=layout.expiry.device)
    return layout.weights


def check_pairing(rollouts: Sequence[Rollout], retention: Retention) -> None:
    """Raises ValueError unless the trainer's mask is the one that the rollouts were pruned by."""
    for rollout in rollouts:
        used = rollout.trajectory.retention
        if used != retention:
            raise ValueError(
                f"rollouts: pruned by {getattr(used, '__name__', used)!r}, but the trainer masks "
                f"by {getattr(retention, '__name__', retention)!r}; that pairing is off-policy"
            )
