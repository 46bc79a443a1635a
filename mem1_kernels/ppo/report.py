"""What a run leaves to be read: metrics.jsonl, trackers, and the picture of its curves."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mem1_kernels._plot import size_unit
from mem1_kernels.ppo.config import Config

# Options that may change from a run to its continuation without a word.
FREE = {"out", "resume", "steps", "save_every", "keep_checkpoints", "trackers", "save_transcripts"}


class Stopwatch:
    """Seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def plot(history: Sequence[Mapping[str, Any]], path: Path, size: str = "size of the task") -> None:
    """Draws reward and context over the steps, and both over the sizes last evaluated.

    Args:
        history: the records of metrics.jsonl.
        path: where to; SVG if it ends in .svg, else PNG.
        size: what a size counts, such as hops; label of the lower x axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    evaluated = [record for record in history if "evaluation" in record]
    figure = Figure(figsize=(10, 3.6 * (2 if evaluated else 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if evaluated else 1, 2, squeeze=False)
    lengths = (
        ("total_tokens", "whole trajectory (mean)", "s--", "#8d949e"),
        ("peak_context", "peak context (largest of any)", "o-", "#3f72af"),
    )
    trained = [record for record in history if "reward" in record]
    steps = [record["step"] for record in trained]
    rewards = [record["reward"] for record in trained]
    axes[0, 0].plot(steps, rewards, "o-", color="#2a9d8f")
    axes[0, 0].set(xlabel="PPO step", ylabel="mean reward in training")
    if min((reward for reward in rewards if reward is not None), default=0) >= 0:
        axes[0, 0].set(ylim=(0, None))
    for name, label, style, colour in lengths:
        axes[0, 1].plot(steps, [r.get(name) for r in trained], style, color=colour, label=label)
    axes[0, 1].set(xlabel="PPO step", ylabel="tokens per episode, training", ylim=(0, None))
    axes[0, 1].legend(frameon=False)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if evaluated:
        shown = [(evaluated[0], "s--", "#8d949e"), (evaluated[-1], "o-", "#2a9d8f")]
        shown = shown[-len(evaluated) :]
        sizes = sorted({row["size"] for record, *_ in shown for row in record["evaluation"]})
        for record, style, colour in shown:
            table = record["evaluation"]
            places = [sizes.index(row["size"]) for row in table]
            label = f"after {record['step']} steps"
            rewards = [row["reward"] for row in table]
            axes[1, 0].plot(places, rewards, style, color=colour, label=label)
        axes[1, 0].set(ylabel="mean reward, evaluated", ylim=(0, 1.05))
        for name, label, style, colour in lengths:
            tokens = [row[name] for row in table]
            axes[1, 1].plot(places, tokens, style, color=colour, label=label)
        axes[1, 1].set(ylabel="tokens per episode, evaluated", ylim=(0, None))
        for axis in axes[1]:
            axis.set_xlabel(size)
            axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            axis.legend(frameon=False)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="svg" if path.suffix == ".svg" else "png")


class Log:
    """History, metrics.jsonl, trackers and plot; only the main process writes."""

    def __init__(self, config: Config, accelerator: Accelerator, first_step: int) -> None:
        self.accelerator = accelerator
        self.out = Path(config.out)
        # A World of the user's own counts what it likes.
        self.size = "size of the task" if config.environment else size_unit(config.task)
        self.history: list[dict[str, Any]] = []
        path = self.out / "metrics.jsonl"
        if first_step and path.exists():
            lines = path.read_text("utf-8").splitlines(keepends=True)
            # A run that was killed may have written half a line.
            whole = [json.loads(line) for line in lines if line.endswith("\n")]
            self.history = [record for record in whole if record["step"] < first_step]
        options = asdict(config)
        began = self.out / "config.json"
        if config.resume and began.exists():
            before = json.loads(began.read_text("utf-8"))
            now = json.loads(json.dumps(options))  # tuples as the lists that were read
            changed = {name for name in now if before.get(name) != now[name]} - FREE
            if changed and accelerator.is_main_process:
                warnings.warn(
                    f"resume: {', '.join(sorted(changed))} differ from what the run began with",
                    stacklevel=3,
                )
        accelerator.wait_for_everyone()  # all have read before one writes
        if accelerator.is_main_process:
            began.write_text(json.dumps(options, indent=1) + "\n", "utf-8")
            self.file = open(path, "w", encoding="utf-8")
            self.file.writelines(json.dumps(record) + "\n" for record in self.history)
        shown = {name: str(v) if isinstance(v, tuple) else v for name, v in options.items()}
        if config.trackers:
            accelerator.init_trackers("ppo", config=shown)

    def __call__(self, record: dict[str, Any]) -> None:
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.history.append(record)
        numbers = {n: v for n, v in record.items() if isinstance(v, (int, float)) and n != "step"}
        for row in record.get("evaluation", ()):
            numbers |= {f"eval_{row['size']}/{name}": value for name, value in row.items()}
        self.accelerator.log(numbers, step=record["step"])
        if self.accelerator.is_main_process:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Draws the curve and ends the files."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            if self.history:
                plot(self.history, self.out / "curve.png", self.size)
            self.file.close()
