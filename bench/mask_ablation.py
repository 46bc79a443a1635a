"""What a wrong mask in the trainer costs: `python -m bench.mask_ablation`.

Three PPO runs on the chain task from one checkpoint, whose warm start by a forgetful teacher was
exact. Rollouts are exact in all, on a pruned cache. Only the forward pass of the trainer differs:

- exact: a token sees what it saw when it was sampled;
- release: the mask that the released MEM1 trainer means to build (a state does not see the one
  before it, an observation sees only itself);
- as released: what that trainer really computes. Its mask of zeros and ones is *added* to the
  scores, which masks nothing: every token sees its whole trajectory, the future included.

Everything else is equal, and the old log-probs come from the same wrong pass, so no ratio shows
that anything is wrong; only the rollout's own log-probs do. The task is chosen to need the state,
so the damage is clear; it does not say how much a language model on real questions would lose.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.timing import environment
from mem1_kernels import BlockPlan, Layout, Segment, Trajectory, mem1_release, pack, visible
from mem1_kernels.hf import patch, unpatch
from mem1_kernels.ppo.config import read_config
from mem1_kernels.ppo.trainer import attend, train


def released_layout(layout: Layout) -> Layout:
    """The packed row under the released mask: each of its trajectories by `mem1_release`."""
    trajectories: list[list[Segment]] = []
    for span in layout.spans:
        if span.start == span.stop:
            continue
        document = int(layout.document[span.start])
        if document == len(trajectories):
            trajectories.append([])
        ids = layout.token_ids[span.start : span.stop].tolist()
        trajectories[document].append(Segment(span.role, ids, span.turn))
    return pack([Trajectory(segments, mem1_release) for segments in trajectories])


def attend_release(model: Any, layout: Layout, plan: BlockPlan) -> Tensor:
    """The released mask as it was meant."""
    meant = released_layout(layout)
    return attend(model, layout, BlockPlan.from_expiry(meant.expiry, meant.floor))


def attend_as_released(model: Any, layout: Layout, plan: BlockPlan) -> Tensor:
    """The released mask as it is applied: 0 or 1 added to the scores of the whole trajectory."""
    meant = released_layout(layout)
    together = layout.document[:, None] == layout.document[None, :]
    added = visible(meant.expiry, meant.floor).float().masked_fill(~together, -torch.inf)
    unpatch(model)
    try:
        return model.get_decoder()(
            input_ids=layout.token_ids[None],
            position_ids=layout.position_ids[None],
            attention_mask=added[None, None],
            use_cache=False,
        ).last_hidden_state[0]
    finally:
        patch(model)


MASKS = {"exact": attend, "release": attend_release, "as released": attend_as_released}
COLOURS = {"exact": "#2a9d8f", "release": "#e9a23b", "as released": "#c8553d"}


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Mean reward over the steps for each mask, and each seed's as a thin line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, runs in curves.items():
        for rewards in runs:
            axes.plot(rewards, color=COLOURS[name], linewidth=0.6, alpha=0.6)
        mean = torch.tensor(runs).mean(0).tolist()
        axes.plot(mean, color=COLOURS[name], linewidth=2, label=name)
    axes.set(xlabel="PPO step", ylabel="mean reward", ylim=(0, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="mask of the trainer", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/chain.toml")
    parser.add_argument("--steps", type=int, default=20, help="PPO steps a run [20]")
    parser.add_argument("--seeds", type=int, default=1, help="runs a mask [1]")
    parser.add_argument("--work", default="out/mask_ablation", help="folder for the runs")
    parser.add_argument("--out", default="bench/results/cpu", help="folder for JSON and plot")
    options = parser.parse_args()
    curves: dict[str, list[list[float]]] = {name: [] for name in MASKS}
    gaps: dict[str, list[float]] = {name: [] for name in MASKS}
    config = read_config(
        options.config,
        steps=options.steps,
        log_prob_tolerance=float("inf"),
        token_budget=512,  # the released pass is dense
        eval_every=0,
        trackers="",
    )
    for seed in range(options.seeds):
        start = Path(options.work) / f"start-{seed}"
        train(replace(config, seed=seed, out=str(start), steps=0, save_every=1))
        for name, forward in MASKS.items():
            out = start.with_name(f"{name.replace(' ', '_')}-{seed}")
            shutil.copytree(start, out)
            run = train(replace(config, seed=seed, out=str(out), resume=True), attend=forward)
            curves[name].append(run.rewards)
            gaps[name].append(run.history[0]["log_prob_gap_mean"])
            first, last = run.rewards[0], run.rewards[-1]
            print(f"{name:12} seed {seed}: reward {first:.3f} -> {last:.3f}", flush=True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": environment("cpu"),
        "config": options.config,
        "rewards": curves,
        "first_mean_log_prob_gap": gaps,
    }
    (out / "mask_ablation.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(curves, out / "mask_ablation.png")


if __name__ == "__main__":
    main()
