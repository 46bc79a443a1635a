"""What a run shows: metrics.jsonl, trackers, the picture of its curves, progress as it goes."""

from __future__ import annotations

import importlib.util
import json
import math
import operator
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from tqdm import tqdm

from mem1_kernels._plot import size_unit
from mem1_kernels._secrets import public_address
from mem1_kernels.ppo.config import Config
from mem1_kernels.ppo.files import from_main, named, replaced

# Options that may change from a run to its continuation without a word.
FREE = {"out", "resume", "steps", "save_every", "keep_checkpoints", "trackers", "save_transcripts"}

# The picture is drawn anew while the run goes on, but no more often than this.
REDRAW_SECONDS = 30.0


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


def make_accelerator(config: Config) -> Accelerator:
    """What accelerate makes of its environment, with the trackers that are asked for.

    Raises:
        ValueError: a tracker that accelerate does not know.
    """
    names = [name.strip() for name in config.trackers.split(",") if name.strip()]
    unknown = [name for name in names if name not in LoggerType.list()]
    if unknown:
        raise ValueError(
            f"trackers: expected some of {', '.join(LoggerType.list())}, got {unknown[0]!r}"
        )
    accelerator = Accelerator(
        mixed_precision="bf16" if config.bf16 else None,
        log_with=names or None,
        project_dir=config.out,
    )
    missing = set(names) - {"all", *map(str, accelerator.log_with)}
    if missing and accelerator.is_main_process:
        warnings.warn(
            f"trackers: nothing is sent to {', '.join(sorted(missing))}: not installed",
            stacklevel=3,
        )
    return accelerator


class Progress:
    """Steps as a bar on a terminal, elsewhere as plain lines on stderr.

    Args:
        steps: the numbers of the steps; iterate to go through them.
        name: of what is done.
        shown: False: nothing is shown at all.
        lines: elsewhere than on a terminal, at most this many lines. Default: one per step.
    """

    def __init__(
        self, steps: range, name: str, shown: bool = True, lines: int | None = None
    ) -> None:
        self.steps, self.name = steps, name
        self.bar = tqdm(steps, name, disable=None if shown else True)
        self.plain = shown and self.bar.disable  # tqdm found no terminal
        self.every = max(1, len(steps) // lines) if lines else 1
        self.step, self.told = steps.start, time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        for step in self.bar:
            self.step = step
            yield step

    def figures(self, **figures: str) -> None:
        """What came of the step."""
        self.bar.set_postfix(figures)
        done = self.step + 1
        if done % self.every == 0 or done == self.steps.stop:
            now = time.perf_counter()
            text = ", ".join(f"{name} {value}" for name, value in figures.items())
            self.line(
                f"{self.name}, step {done}/{self.steps.stop}: {text}, {now - self.told:.1f} s"
            )
            self.told = now

    def line(self, text: str) -> None:
        """A line that only those see who have no bar."""
        if self.plain:
            print(text, file=sys.stderr, flush=True)


class Log:
    """History, metrics.jsonl, trackers and the picture; only the main process writes.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def __init__(self, config: Config, accelerator: Accelerator, first_step: int) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError("matplotlib is not installed (`pip install mem1-kernels[ppo]`)")
        self.accelerator = accelerator
        self.out = Path(config.out)
        # A World of the user's own counts what it likes.
        self.size = "size of the task" if config.environment else size_unit(config.task)
        self.path = self.out / "metrics.jsonl"
        self.drawn = time.perf_counter()
        is_main = accelerator.is_main_process
        self.history = read_history(self.path, is_main) if first_step else []
        self.history = [record for record in self.history if record["step"] < first_step]
        # The address may hold a password, and trackers send the options to other servers.
        options = asdict(config) | {"corpus": public_address(config.corpus)}
        from_main(is_main, lambda: self._begin(options))
        shown = {name: str(v) if isinstance(v, tuple) else v for name, v in options.items()}
        if config.trackers:
            accelerator.init_trackers("ppo", config=shown)

    def _begin(self, options: dict[str, Any]) -> None:
        """Writes config.json, and metrics.jsonl as far as it goes."""
        began = self.out / "config.json"
        if options["resume"]:
            warn_of_changes(began, options)
        with replaced(began) as path:
            path.write_text(json.dumps(options, indent=1) + "\n", "utf-8")
        with replaced(self.path) as path, open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.history)
        self.file = open(self.path, "a", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            with named(self.path):  # closing tries once more what could not be written
                self.file.close()

    def __call__(self, record: dict[str, Any]) -> None:
        record = _finite(record)
        self.history.append(record)
        numbers = {n: v for n, v in record.items() if isinstance(v, (int, float)) and n != "step"}
        for row in record.get("evaluation", ()):
            numbers |= {f"eval_{row['size']}/{name}": value for name, value in row.items()}
        self.accelerator.log(numbers, step=record["step"])
        if self.accelerator.is_main_process:
            with named(self.path):
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
        if "evaluation" in record or time.perf_counter() - self.drawn > REDRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Draws curve.png anew."""
        self.drawn = time.perf_counter()
        if self.accelerator.is_main_process and self.history:
            with replaced(self.out / "curve.png") as path:
                plot(self.history, path, self.size)


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_history(path: Path, warn: bool) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, none if there is no such file.

    The last line may be cut, by whatever ended the run. Other lines that cannot be read are left
    out with a warning, and the file as it was is kept as metrics.jsonl.damaged.
    """
    if not path.exists():
        return []
    history: list[dict[str, Any]] = []
    damaged = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8-sig")) if line.strip() else None
            if record is not None:
                history.append(record | {"step": operator.index(record["step"])})
        except (KeyError, TypeError, ValueError, RecursionError):
            if number < len(lines):
                damaged.append(number)
    if damaged and warn:
        copy = path.with_name(f"{path.name}.damaged")
        shutil.copy(path, copy)
        warnings.warn(
            f"{path}: left out line {', '.join(map(str, damaged))}, which hold no record of a "
            f"step; the file as it was is {copy.name}",
            stacklevel=2,
        )
    return history


def warn_of_changes(path: Path, options: dict[str, Any]) -> None:
    """Warns of options that are not those in the config.json of the run that is continued."""
    try:
        before = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(before, dict):
            raise ValueError(f"expected an object of options, got {type(before).__name__}")
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"{path}: cannot be read ({error}), so it is not known which options changed",
            stacklevel=2,
        )
        return
    now = json.loads(json.dumps(options))  # tuples as the lists that were read
    changed = {name for name in now if before.get(name) != now[name]} - FREE
    if changed:
        warnings.warn(
            f"resume: {', '.join(sorted(changed))} differ from what the run began with",
            stacklevel=2,
        )
