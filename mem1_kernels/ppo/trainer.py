"""PPO for MEM1 agents, from the task to the curve; read it from top to bottom.

One step: play episodes on a pruned cache, keeping the log-prob of every token as it was sampled;
pack them into rows of at most `token_budget` tokens, one plan per row; score them under the policy,
the reference and the critic; compare the trainer's log-probs with the sampled ones; estimate
advantages; update in minibatches. GRPO, RLOO and REINFORCE++ differ in the advantages only.

Under `accelerate launch` (DDP or FSDP2) every process plays its share of the episodes and then
holds all of them, which are a few megabytes of ids; the rows are dealt out, and every mean is over
the whole minibatch. So the figures do not depend on the number of processes. Nor do they depend on
what ran before: every random number of step n comes from (seed, n), so a checkpoint is the
weights, the optimizer and n.

What it stands on: `learner` (policy, critic, optimizer, sharding), `episodes` (tasks, play,
evaluation), `batch` (packed rows), `update` (passes over them), `warm_start`, `checkpoint`,
`report`, `files` (written whole, in a folder that one run has), `stop` (signals). Left out:
asynchronous rollouts, sending weights to a server, reward models, tensor and context parallelism,
FSDP1 and DeepSpeed.
"""

from __future__ import annotations

import gc
import random
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from mem1_kernels.agent.episodes import Result
from mem1_kernels.agent.world import World
from mem1_kernels.hf import unpatch
from mem1_kernels.ppo import (
    approx_kl,
    clip_fraction,
    explained_variance,
    gae,
    grpo_advantages,
    kl_estimate,
    kl_penalised_rewards,
    log_prob_gap,
    on_every_token,
    on_last_token,
    policy_loss,
    reinforce_pp_advantages,
    rloo_advantages,
    truncated_importance_weights,
    turn_gae,
    value_loss,
    whiten,
)
from mem1_kernels.ppo.batch import Batch, PackedRow
from mem1_kernels.ppo.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_policy,
)
from mem1_kernels.ppo.config import TOLERANCE, Config
from mem1_kernels.ppo.episodes import (
    MakeEngine,
    check_world,
    collect,
    draw_tasks,
    dropped_tokens,
    evaluate,
    generation_of,
    mean_scores,
    rollout_of,
    seed_of,
    with_scores,
    world_of,
    write_transcripts,
)
from mem1_kernels.ppo.files import claimed, from_main
from mem1_kernels.ppo.learner import Attend, Learner, attend
from mem1_kernels.ppo.report import Log, Progress, Stopwatch, make_accelerator
from mem1_kernels.ppo.stop import Stopped, StopSignals
from mem1_kernels.ppo.update import score_rows, train_on
from mem1_kernels.ppo.warm_start import warm_start
from mem1_kernels.retention import Retention


@dataclass
class Run:
    """What training leaves: the policy (unsharded), and what was logged, step by step."""

    policy: Any
    history: list[dict[str, Any]]

    @property
    def rewards(self) -> list[float]:
        """Mean reward of each step."""
        return [record["reward"] for record in self.history if "reward" in record]

    @property
    def evaluation(self) -> list[dict[str, float]]:
        """The newest evaluation, one row per size (see `evaluate`)."""
        found = [record["evaluation"] for record in self.history if "evaluation" in record]
        return found[-1] if found else []


def train(
    config: Config,
    *,
    world: World | None = None,
    attend: Attend = attend,
    make_engine: MakeEngine | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Run:
    """Warm start, then PPO; writes into `config.out`.

    Args:
        config: the options of the run.
        world: the task to learn. Default: what `config.task` names.
        attend: another forward pass, for experiments with wrong masks.
        make_engine: policy -> the engine that plays the steps' episodes, called once per batch of
            them; it is the place to send weights to a server. Set `positions` to its form,
            `log_prob_tolerance` to what its arithmetic is off by and `importance_cap`, which
            corrects for that. Default: the policy itself plays, in this process.
        accelerator: one that is set up already. Default: made from the environment.
        progress: show progress, on the main process: bars on a terminal, elsewhere a line per
            step on stderr. `context` is the most tokens that a context held and the mean of whole
            trajectories, `gap` the largest difference between the log-probs of rollout and trainer.

    Returns:
        The policy, unpatched, unsharded and on every process, and the history: one record per step
        and one per evaluation, as in metrics.jsonl; after a resume those from before it too.

    SIGTERM and Ctrl-C are waited for while it runs: the step that goes on is ended, a checkpoint is
    written if `save_every` is set, and all processes of the launch raise `Stopped`. A second Ctrl-C
    raises KeyboardInterrupt at once.

    Raises:
        ValueError: options or files that do not fit; log-probs of rollout and trainer that differ.
        OSError: a file that cannot be read or written.
        Stopped: a signal ended the run early; a SystemExit with the usual code.
        ImportError: an option needs a package that is not installed.
        RuntimeError: most of a step's episodes failed.
        FloatingPointError: a gradient that is not finite.
    """
    accelerator = accelerator or make_accelerator(config)
    is_main = accelerator.is_main_process
    progress = progress and is_main
    out = Path(config.out)
    with claimed(out, is_main), ExitStack() as stack:
        saved = newest_checkpoint(out, accelerator, config.resume)
        world = world or world_of(config)
        retention = generation_of(config).retention
        check_world(world, retention)
        learner = Learner(config, accelerator, attend)
        first_step, in_checkpoint = 0, -1
        if saved:
            first_step, path = saved
            in_checkpoint = first_step
            load_checkpoint(learner, first_step, path)
        log = stack.enter_context(Log(config, accelerator, first_step))
        signals = stack.enter_context(StopSignals(accelerator, progress))

        def save(step: int) -> None:
            nonlocal in_checkpoint
            if in_checkpoint != step:
                save_checkpoint(learner, out, step)
                in_checkpoint = step

        def may_stop(step: int | None) -> None:
            """Ends the run if a signal asked for it. `step` comes next; None: the warm start's."""
            if not (number := signals.received()):
                return
            where = "in the warm start" if step is None else f"after {step} steps"
            left = "nothing is saved"
            if config.save_every and step is not None:
                save(step)
                left = f"checkpoint-{step:06d} is saved, and resume goes on from it"
            log.draw()
            raise Stopped(number, f"{out}: stopped {where}; {left}")

        def evaluation(step: int) -> None:
            player, table = learner.player(), []
            for size in config.eval_sizes:
                table += evaluate(
                    config, player, world=world, accelerator=accelerator, sizes=[size]
                )
                may_stop(step)
            log({"step": step, "evaluation": table})
            rewards = ", ".join(f"size {row['size']} {row['reward']:.3f}" for row in table)
            steps.line(f"evaluation after {step} steps: reward at {rewards}")

        if not saved:
            if config.sft_steps:
                warm_start(learner, world, retention, progress, lambda: may_stop(None))
            learner.settle_reference()
            if config.save_every:
                save(0)
        steps = Progress(range(first_step, config.steps), config.algorithm, progress)
        for step in steps:
            may_stop(step)
            if config.eval_every and step % config.eval_every == 0:
                evaluation(step)
            record, results = run_step(learner, world, retention, step, make_engine)
            log(record)
            steps.figures(
                reward=f"{record['reward']:.3f}",
                context=f"{record['peak_context']}/{record['total_tokens']:.0f}",
                gap=f"{record['log_prob_gap']:.0e}",
            )
            if config.save_transcripts and is_main:
                write_transcripts(results, out / "transcripts" / f"{step:06d}.jsonl")
            if config.save_every and (step + 1) % config.save_every == 0:
                save(step + 1)
        if config.eval_every:
            evaluation(config.steps)

        policy = unpatch(learner.player())
        from_main(is_main, lambda: save_policy(policy, world.tokenizer, out / "policy"))
        log.draw()
        if number := signals.received():
            raise Stopped(number, f"{out}: stopped after the last step; all is saved")
    return Run(policy, log.history)


def run_step(
    learner: Learner, world: World, retention: Retention, step: int, make_engine: MakeEngine | None
) -> tuple[dict[str, Any], list[Result]]:
    """One PPO step: play, score, compare, estimate, update. Returns its record and its episodes."""
    config, accelerator = learner.config, learner.accelerator
    device = accelerator.device
    torch.manual_seed(seed_of(config, "step", step))
    started = time.perf_counter()
    watch = Stopwatch(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    with watch("rollout"):
        played = collect(
            config,
            accelerator,
            world,
            learner.player(),
            draw_tasks(config, world, step),
            f"play/{step}",
            generation_of(config),
            group_size=config.group_size,
            make_engine=make_engine,
        )
    # What a broken tool ended is no fault of the policy: it goes, and what is compared with it.
    tasks = [number // config.group_size for number in range(len(played))]
    broken = {task for task, result in zip(tasks, played, strict=True) if result.failed}
    kept = [(task, r) for task, r in zip(tasks, played, strict=True) if task not in broken]
    if not kept:
        raise RuntimeError(f"step {step}: a tool failed in every group of episodes")
    results = [result for _, result in kept]
    rollouts = [rollout_of(result) for result in results]
    if world.label is not None:
        rollouts = [rollout.relabelled(world.label) for rollout in rollouts]
    batch = Batch.of(rollouts, [r.reward for r in results], [task for task, _ in kept], device)

    rows = batch.rows(range(len(results)), config, retention, device)
    batch.log_probs, batch.values = score_rows(learner, rows, batch.sampled, watch)
    dtype = "bfloat16" if accelerator.mixed_precision == "bf16" else config.dtype
    largest, mean = check_agreement(batch, config, dtype)
    if config.kl_coef:
        with learner.as_reference():
            batch.reference, _ = score_rows(learner, rows, batch.sampled, watch)
    figures = estimate_advantages(batch, config)
    warming = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    learner.learning_rates(config.lr * warming, config.critic_lr * warming)
    figures |= update(learner, batch, retention, step, watch)

    turns = [turn for rollout in rollouts for turn in rollout.turns]
    tokens = sum(result.total_tokens for result in results)
    seconds = time.perf_counter() - started
    record: dict[str, Any] = {
        "step": step,
        "reward": float(batch.rewards.mean()),
        "reward_std": float(batch.rewards.std(correction=0)),
        **figures,
        "log_prob_gap": largest,
        "log_prob_gap_mean": mean,
        "peak_context": max(result.peak_context for result in results),
        "total_tokens": tokens / len(results),
        "turns": len(turns) / len(results),
        "dropped_per_turn": sum(map(dropped_tokens, rollouts)) / len(turns),
        "cut_turns": sum(not turn.closed for turn in turns) / len(turns),
        "failed": sum(result.failed for result in played),
        "rows": len(rows),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        **{f"seconds_{name}": value for name, value in watch.seconds.items()},
    }
    if config.kl_coef:
        kl = kl_estimate(batch.log_probs, batch.reference, batch.mask, kind="k3")
        record["kl"] = float(kl.mean())
    if device.type == "cuda":
        record["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return with_scores(record, mean_scores(results)), results


def check_agreement(batch: Batch, config: Config, dtype: str) -> tuple[float, float]:
    """(largest, mean) |rollout - trainer| log-prob; raises if that is more than rounding.

    Raises:
        ValueError: it is more than `log_prob_tolerance`, or than what the dtype brings with it.
    """
    largest, mean = (float(x) for x in log_prob_gap(batch.sampled, batch.log_probs, batch.mask))
    allowed, allowed_mean = TOLERANCE[dtype]
    if config.log_prob_tolerance:
        allowed = allowed_mean = config.log_prob_tolerance
    if not (largest <= allowed and mean <= allowed_mean):
        raise ValueError(
            f"log-probs: rollout and trainer differ by up to {largest:.3g} (mean {mean:.3g}), "
            f"expected at most {allowed:.3g} (mean {allowed_mean:.3g}): they do not compute the "
            "same function, so training would be off-policy"
        )
    return largest, mean


def estimate_advantages(batch: Batch, config: Config) -> dict[str, float]:
    """Fills `advantages` and `returns` as `config.algorithm` says."""
    # An episode none of whose tokens is in the loss counts in its group's mean only.
    mask, (trained, ids) = batch.mask, batch.trajectory.unique(return_inverse=True)
    if config.algorithm in ("grpo", "rloo"):
        task = torch.tensor(batch.tasks, device=ids.device)
        relative = grpo_advantages if config.algorithm == "grpo" else rloo_advantages
        batch.advantages = on_every_token(relative(batch.rewards, task)[trained], mask, ids)
        return {}
    rewards = on_last_token(batch.rewards[trained], mask, ids)
    if config.kl_coef and config.kl_in == "reward":
        rewards = kl_penalised_rewards(
            rewards,
            batch.log_probs,
            batch.reference,
            mask,
            coef=config.kl_coef,
            kind=config.kl_kind,
        )
    if config.algorithm == "reinforce++":
        batch.advantages = reinforce_pp_advantages(rewards, mask, ids, gamma=config.gamma)
        return {}
    if config.credit == "turn":
        advantages, batch.returns = turn_gae(
            rewards, batch.values, mask, batch.turn, ids, gamma=config.gamma, lam=config.lam
        )
    else:
        advantages, batch.returns = gae(
            rewards, batch.values, mask, ids, gamma=config.gamma, lam=config.lam
        )
    batch.advantages = whiten(advantages, mask)
    return {"explained_variance": float(explained_variance(batch.values, batch.returns, mask))}


def update(
    learner: Learner, batch: Batch, retention: Retention, step: int, watch: Stopwatch
) -> dict[str, float]:
    """All epochs and minibatches of one step; returns the means of what they report."""
    config, device = learner.config, learner.accelerator.device
    weights = batch.weights
    if config.importance_cap:
        weights = weights * truncated_importance_weights(
            batch.log_probs, batch.sampled, batch.mask, cap=config.importance_cap
        )
    groups = batch.groups
    reports = []
    for epoch in range(config.epochs):
        order = list(groups)
        random.Random(f"{config.seed}/order/{step}/{epoch}").shuffle(order)
        at_once = config.minibatch // config.group_size
        for begin in range(0, len(order), at_once):
            chosen = [number for task in order[begin : begin + at_once] for number in groups[task]]
            rows = batch.rows(chosen, config, retention, device)
            count = sum(len(row.where) for row in rows)
            total = sum(float(batch.weights[row.where].sum(dtype=torch.float64)) for row in rows)
            if total == 0:
                continue  # nothing of these episodes is in the loss

            def loss_of(
                row: PackedRow,
                log_probs: Tensor,
                entropy: Tensor,
                values: Tensor | None,
                count: int = count,
                total: float = total,
            ) -> tuple[Tensor, dict[str, Tensor]]:
                return ppo_loss(
                    config, batch, weights, (count, total), row, log_probs, entropy, values
                )

            reports.append(train_on(learner, rows, loss_of, watch))
    if not reports:
        raise ValueError("weights: expected one above 0 in a step's episodes, got none")
    return {name: sum(r[name] for r in reports) / len(reports) for name in reports[0]}


def ppo_loss(
    config: Config,
    batch: Batch,
    weights: Tensor,
    counts: tuple[int, float],
    row: PackedRow,
    log_probs: Tensor,
    entropy: Tensor,
    values: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One row's part of the minibatch's loss, and of the figures that are logged.

    Args:
        weights: of the batch's tokens in the policy's loss: their own, times truncated importance
            weights if there are any.
        counts: the generated tokens in the minibatch, over all its rows, and their weights' sum.
        log_probs, entropy, values: of the row's generated tokens, under the policy now.
    """
    old, advantages = batch.log_probs[row.where], batch.advantages[row.where]
    own = batch.weights[row.where]
    count, total = counts
    mask = torch.ones_like(old, dtype=torch.bool)
    figures = {
        "policy_loss": policy_loss(
            log_probs,
            old,
            advantages,
            mask,
            denominator=total,
            clip=config.clip,
            dual_clip=config.dual_clip or None,
            weights=weights[row.where],
        ),
        "entropy": (own * entropy).sum() / total,
    }
    loss = figures["policy_loss"] - config.entropy_coef * figures["entropy"]
    if config.kl_coef and config.kl_in == "loss":
        reference = batch.reference[row.where]
        distance = kl_estimate(log_probs, reference, mask, kind=config.kl_kind)
        loss = loss + config.kl_coef * (own * distance).sum() / total
    if values is not None:
        figures["value_loss"] = value_loss(
            values,
            batch.values[row.where],
            batch.returns[row.where],
            mask,
            denominator=total,
            clip=config.value_clip or None,
            weights=own,
        )
        loss = loss + figures["value_loss"]
    clipped = clip_fraction(log_probs, old, advantages, mask, clip=config.clip, denominator=count)
    moved = approx_kl(log_probs, old, mask, denominator=count)
    return loss, figures | {"clip_fraction": clipped, "approx_kl": moved}


def end_processes() -> None:
    """Ends the process group of a launch, if there is one, once `train` has returned."""
    gc.collect()  # a DDP wrapper that outlives its process group can hang in gloo
    PartialState().destroy_process_group()
