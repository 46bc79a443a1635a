"""What a wrong mask in the trainer costs: `python -m bench.mask_ablation`.

PPO on the chain task behind a warm start by a forgetful teacher. Rollouts are exact in all runs, on
a pruned cache. Only the forward pass of the trainer differs:

- exact: a token sees what it saw when it was sampled;
- release: the mask that the released MEM1 trainer means to build (a state does not see the one
  before it, an observation sees only itself);
- as released: what that trainer really computes. Its mask of zeros and ones is *added* to the
  scores, which masks nothing: every token sees its whole trajectory, the future included.

Everything else is equal, and the old log-probs come from the same wrong pass, so no ratio shows
that anything is wrong; only the rollout's own log-probs do. Once all runs go on from one warm start
that was exact, so that PPO alone is under the mask; and once the warm start is under it too, as
where one trainer does both. The task is chosen to need the state, so the damage is clear; it does
not say how much a language model on real questions would lose.
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
from mem1_kernels.ppo.learner import attend
from mem1_kernels.ppo.trainer import train


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
    return attend(model, layout, BlockPlan.of(meant))


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


Curves = dict[str, dict[str, list[list[float]]]]
"""Warm start -> mask -> a figure of each seed's run, step by step."""

WARM_STARTS = {"exact": "exact warm start, PPO under the mask", "own": "both under the mask"}


def plot(curves: Curves, path: Path) -> None:
    """Mean reward over the steps for each mask, and each seed's as a thin line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (start, masks) in zip(panels, curves.items(), strict=True):
        for name, runs in masks.items():
            for rewards in runs:
                axes.plot(rewards, color=COLOURS[name], linewidth=0.6, alpha=0.6)
            mean = torch.tensor(runs).mean(0).tolist()
            axes.plot(mean, color=COLOURS[name], linewidth=2, label=name)
        axes.set(title=WARM_STARTS[start], xlabel="PPO step", ylim=(0, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean reward")
    panels[0].legend(title="mask of the trainer", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/chain.toml")
    parser.add_argument("--steps", type=int, default=20, help="PPO steps a run [20]")
    parser.add_argument("--seeds", type=int, default=1, help="runs a mask and warm start [1]")
    parser.add_argument("--warm-starts", nargs="+", choices=WARM_STARTS, default=[*WARM_STARTS])
    parser.add_argument("--work", default="out/mask_ablation", help="folder for the runs")
    parser.add_argument("--out", default="bench/results/cpu", help="folder for JSON and plot")
    options = parser.parse_args()
    curves: Curves = {start: {name: [] for name in MASKS} for start in options.warm_starts}
    gaps: Curves = {start: {name: [] for name in MASKS} for start in options.warm_starts}
    config = read_config(
        options.config,
        steps=options.steps,
        log_prob_tolerance=float("inf"),
        token_budget=512,  # the released pass is dense
        eval_every=0,
        trackers="",
    )
    for start in options.warm_starts:
        for seed in range(options.seeds):
            work = Path(options.work) / f"{start}-{seed}"
            begin = replace(config, seed=seed, out=str(work / "start"), steps=0, save_every=1)
            if start == "exact":
                train(begin)
            for name, forward in MASKS.items():
                if start == "own":
                    begin = replace(begin, out=str(work / f"start {name}"))
                    train(begin, attend=forward)
                out = work / name
                shutil.copytree(begin.out, out)
                resumed = replace(config, seed=seed, out=str(out), resume=True)
                run = train(resumed, attend=forward)
                curves[start][name].append(run.rewards)
                gaps[start][name].append([record["log_prob_gap_mean"] for record in run.history])
                first, last = run.rewards[0], run.rewards[-1]
                print(f"{start:6} {name:12} seed {seed}: {first:.3f} -> {last:.3f}", flush=True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "environment": environment("cpu"),
        "config": options.config,
        "rewards": curves,
        "mean_log_prob_gap": gaps,
    }
    (out / "mask_ablation.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(curves, out / "mask_ablation.png")


if __name__ == "__main__":
    main()
