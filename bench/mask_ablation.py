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
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bench import cli
from bench.names import WARM_STARTS
from bench.record import write_results
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
Curves = dict[str, dict[str, list[list[float]]]]
"""Warm start -> mask -> a figure of each seed's run, step by step."""


QUICK = {"steps": 2, "warm_starts": ["exact"]}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "mask_ablation", quick=QUICK, devices=(), rounds=None)
    add = parser.add_argument
    starts = list(WARM_STARTS)
    add("--config", default="configs/chain.toml", help="TOML file of the run")
    add("--steps", type=int, default=20, help="PPO steps per run")
    add("--seeds", type=int, default=1, help="runs per mask and warm start")
    add("--warm-starts", nargs="+", choices=starts, default=starts, help="what runs go on from")
    add("--work", metavar="FOLDER", help="new folder for the runs (default: a temporary one)")
    return parser


def main() -> None:
    parser = make_parser()
    options = cli.parse(parser, QUICK)
    if options.work and Path(options.work).exists():
        parser.error(f"--work: expected a folder that is not there yet, got {options.work}")
    with TemporaryDirectory() as folder:
        curves, gaps = run_all(options, Path(options.work or folder))
    write_results(options, "cpu", rewards=curves, mean_log_prob_gap=gaps)


def run_all(options: argparse.Namespace, work: Path) -> tuple[Curves, Curves]:
    """Rewards, and the mean gap between sampled and trained log-probs, of every run."""
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
            runs = work / f"{start}-{seed}"
            begin = replace(config, seed=seed, out=str(runs / "start"), steps=0, save_every=1)
            if start == "exact":
                train(begin)
            for name, forward in MASKS.items():
                if start == "own":
                    begin = replace(begin, out=str(runs / f"start {name}"))
                    train(begin, attend=forward)
                out = runs / name
                shutil.copytree(begin.out, out)
                resumed = replace(config, seed=seed, out=str(out), resume=True)
                run = train(resumed, attend=forward)
                curves[start][name].append(run.rewards)
                gaps[start][name].append([record["log_prob_gap_mean"] for record in run.history])
                first, last = run.rewards[0], run.rewards[-1]
                print(f"{start:6} {name:12} seed {seed}: {first:.3f} -> {last:.3f}", flush=True)
    return curves, gaps


if __name__ == "__main__":
    main()
