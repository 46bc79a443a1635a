"""The supervised warm start: policy and critic learn from traces before PPO begins."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from mem1_kernels.agent.world import World
from mem1_kernels.ppo.advantages import gae, on_last_token
from mem1_kernels.ppo.batch import PackedRow, fill, weights_of
from mem1_kernels.ppo.episodes import read_transcripts
from mem1_kernels.ppo.learner import Learner
from mem1_kernels.ppo.losses import value_loss
from mem1_kernels.ppo.masked import masked_mean
from mem1_kernels.ppo.report import Progress, Stopwatch
from mem1_kernels.ppo.update import train_on
from mem1_kernels.retention import Retention, Segment
from mem1_kernels.trajectory import Layout, Trajectory, compacted, pack
from mem1_kernels.tree import unroll


def warm_start(
    learner: Learner,
    world: World,
    retention: Retention,
    progress: bool,
    may_stop: Callable[[], None] = lambda: None,
) -> float:
    """Learns from traces and returns the last loss.

    The policy learns what the traces generate, the critic the reward that they got. A jump of the
    positions behind the prompt lets it see distances that only longer horizons have.

    Args:
        may_stop: called before each step; it may raise to end the run.

    Raises:
        ValueError: neither a teacher nor transcripts, or a line that is not a transcript.
    """
    config, accelerator = learner.config, learner.accelerator
    traces = read_transcripts(config.transcripts) if config.transcripts else []
    if not traces and world.demonstrate is None:
        raise ValueError("transcripts: this task has no teacher; expected a file of traces")
    _check_ids(traces, learner.module.policy.get_input_embeddings().num_embeddings)
    watch = Stopwatch(accelerator.device)
    steps = Progress(range(config.sft_steps), "warm start", progress, lines=10)
    figures = {"loss": math.nan}
    for step in steps:
        may_stop()
        rng = random.Random(f"{config.seed}/sft/{step}")
        layouts: list[Layout] = []
        rewards: list[float] = []
        for _ in range(config.sft_batch):
            if traces:
                segments, reward = rng.choice(traces)
            else:
                assert world.demonstrate is not None
                segments, reward = world.demonstrate(world.draw(rng.choice(config.sizes), rng), rng)
            trajectory = Trajectory(segments, retention)
            jump = rng.randint(0, config.sft_jump)
            if config.positions == "reprefill":
                layouts.append(unroll(trajectory))
            elif config.positions == "compact":
                layouts.append(compacted(trajectory))
            else:
                behind = trajectory.position_ids >= trajectory.spans[0].stop
                shifted = trajectory.position_ids + jump * behind
                layouts.append(trajectory.replaced(position_ids=shifted))
            rewards.append(reward)
        rows, returns = _pack(layouts, rewards, learner)
        weights = [weights_of(row.layout)[row.layout.loss_mask] for row in rows]
        total = sum(float(weight.sum(dtype=torch.float64)) for weight in weights)

        def loss_of(
            row: PackedRow,
            log_probs: Tensor,
            entropy: Tensor,
            values: Tensor | None,
            total: float = total,
            returns: Tensor = returns,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            weight = weights_of(row.layout)[row.layout.loss_mask]
            mask = torch.ones_like(log_probs, dtype=torch.bool)
            loss = -masked_mean(log_probs, mask, denominator=total, weights=weight)
            if values is None:
                return loss, {}
            target = returns[row.where]
            error = value_loss(
                values, values, target, mask, denominator=total, clip=None, weights=weight
            )
            return loss + error, {"value_loss": error}

        falling = 1 - 0.9 * step / max(config.sft_steps - 1, 1)
        learner.learning_rates(config.sft_lr * falling, config.critic_lr)
        figures = train_on(learner, rows, loss_of, watch)
        steps.figures(loss=f"{figures['loss']:.4f}")
    learner.optimizer.optimizer.state.clear()
    return figures["loss"]


def _check_ids(traces: list[tuple[list[Segment], float]], known: int) -> None:
    """Raises ValueError for ids that the model has no embedding of."""
    for segments, _ in traces:
        largest = max((max(segment.ids or (0,)) for segment in segments), default=0)
        if largest >= known:
            raise ValueError(f"transcripts: expected ids below {known}, the model's, got {largest}")


def _pack(
    layouts: list[Layout], rewards: list[float], learner: Learner
) -> tuple[list[PackedRow], Tensor]:
    """The traces in packed rows, and the return at each of their generated tokens."""
    config, device = learner.config, learner.accelerator.device
    rows: list[PackedRow] = []
    returns: list[Tensor] = []
    begin = 0
    for members in fill([layout.num_tokens for layout in layouts], config.token_budget):
        layout = pack([layouts[member] for member in members])
        document = layout.document[layout.loss_mask]
        mask = torch.ones_like(document, dtype=torch.bool)
        reward = torch.tensor([rewards[member] for member in members])
        earned = on_last_token(reward, mask, document)
        values = torch.zeros_like(earned)
        returns.append(gae(earned, values, mask, document, gamma=config.gamma)[1])
        rows.append(PackedRow.of(layout, torch.arange(begin, begin + len(document)), device))
        begin += len(document)
    return rows, torch.cat(returns).to(device)
