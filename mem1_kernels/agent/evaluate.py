"""The paper's table: `python -m mem1_kernels.agent.evaluate MODEL`.

For 2, 4, 8, 16 objectives: EM, F1, reward, peak tokens, dependency, compression and seconds of the
pruned cache, the full context and re-prefill, as a table, JSON and a plot. By default the questions
and the corpus are the World Factbook's; `--data` and `--corpus` bring others. `--task chain`
measures a model of the small token tasks, whose objectives are hops; `--task webshop` buys in a
procedural shop, or on a WebShop server (`--corpus http://host:3000`).

EM and F1 are sums over the objectives, by SQuAD's rule; every number is a mean over episodes, as
published. Tokens are counted by the model's tokenizer. Peak tokens leave the prompt out, as
published; `cache` includes it. Seconds are wall time per episode (with `--batch 1`, of one episode
at a time).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from mem1_kernels._plot import size_unit
from mem1_kernels._secrets import public_address
from mem1_kernels._text import valid_text
from mem1_kernels.agent._files import written_whole
from mem1_kernels.agent.agent import MemoryEfficientAgent, resolve_model
from mem1_kernels.agent.episodes import Result
from mem1_kernels.agent.metrics import (
    RELEASED_TURNS,
    compression,
    dependency,
    exact_match,
    f1,
    peak_tokens,
)
from mem1_kernels.agent.qa import QATask
from mem1_kernels.agent.tasks import TableTask
from mem1_kernels.agent.world import TASKS, World, make_world
from mem1_kernels.retention import Retention, keep_all, mem1
from mem1_kernels.rollout import EngineError, HFEngine


@dataclass(frozen=True)
class Mode:
    """A way to run the agent: an engine ("server" stands for its address) and a policy."""

    engine: str
    retention: Retention


MODES = {
    "pruned": Mode("pruned", mem1),
    "full": Mode("pruned", keep_all),
    "reprefill": Mode("reprefill", mem1),
    "server": Mode("server", mem1),
    "server-full": Mode("server", keep_all),
}


@dataclass(frozen=True)
class Measures:
    """One line of the table: means over episodes.

    Args:
        mode: a key of `MODES`; objectives, episodes: how many.
        em, f1: summed over an episode's objectives, by SQuAD's rule (`metrics.normalize`); None
            where the task has no such score.
        reward: of the environment: the share of objectives that match by the rule for rewards, or
            what WebShop pays.
        peak_tokens, dependency, compression: as published; None where no episode counts.
        peak_context: the most tokens held at once, the prompt included.
        turns: how many.
        seconds: wall time divided by the episodes run side by side.
        errors: how many episodes ended before their time.
    """

    mode: str
    objectives: int
    episodes: int
    em: float | None
    f1: float | None
    reward: float
    peak_tokens: float | None
    dependency: float | None
    compression: float | None
    peak_context: float
    turns: float
    seconds: float
    errors: int


def measure(
    results: Sequence[Result],
    *,
    mode: str,
    objectives: int,
    seconds: float,
    released: bool = False,
) -> Measures:
    """The means of some results.

    Args:
        results: of one mode and one number of objectives.
        seconds: of an episode.
        released: as in the released script: its normalization, a state counted twice, nothing
            after the tenth turn (an answer there scores 0), and peaks only of episodes that
            score. That script counts tokens by another model's tokenizer; this does not.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("results: expected at least one, got none")
    full = MODES[mode].retention is keep_all
    turns = [[turn.tokens for turn in result.turns] for result in results]
    has_em = any(isinstance(r.task, TableTask) or "em" in r.scores for r in results)
    scores = [_scores(result, released, has_em) for result in results]
    counted = [
        tokens
        for result, tokens, (em, _) in zip(results, turns, scores, strict=True)
        if tokens and not (released and not (result.reward if em is None else em))
    ]
    played = [tokens for tokens in turns if tokens]
    options = {"full_context": full, "released": released}
    return Measures(
        mode=mode,
        objectives=objectives,
        episodes=len(results),
        em=_mean([em for em, _ in scores]),
        f1=_mean([word for _, word in scores]),
        reward=statistics.fmean(result.reward for result in results),
        peak_tokens=_mean([peak_tokens(tokens, **options) for tokens in counted]),
        dependency=_mean([dependency(tokens, **options) for tokens in played]),
        compression=_mean([compression(tokens, **options) for tokens in played]),
        peak_context=statistics.fmean(result.peak_context for result in results),
        turns=statistics.fmean(len(tokens) for tokens in turns),
        seconds=seconds,
        errors=sum(bool(result.error) for result in results),
    )


def _scores(result: Result, released: bool, has_em: bool) -> tuple[float | None, float | None]:
    """EM and F1, summed over the objectives; an episode that never answered has 0."""
    task = result.task
    # the released script does not look at an answer behind its last turn
    late = released and len(result.turns) > RELEASED_TURNS
    if isinstance(task, QATask):
        if task.golden_answers is None:
            return None, None
        answers = [""] * len(task.questions) if late else result.answers
        pairs = list(zip(answers, task.golden_answers, strict=True))
        rule = {"released": released, "squad": not released}
        em = sum(exact_match(said, gold, **rule) for said, gold in pairs)
        return em, sum(f1(said, gold, **rule) for said, gold in pairs)
    if not has_em:
        return None, None
    return (0.0 if late else float(sum(result.scores.get("em", [0.0])))), None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def evaluate(
    make_agent: Callable[[str], MemoryEfficientAgent],
    draw: Callable[[int], Sequence[Any]],
    *,
    modes: Sequence[str] = ("pruned", "full", "reprefill"),
    objectives: Sequence[int] = (2, 4, 8, 16),
    batch: int = 8,
    max_turns: int = 20,
    released: bool = False,
    report: Callable[[Measures], None] = lambda line: None,
) -> list[Measures]:
    """Runs every mode on the same tasks.

    Args:
        make_agent: the agent for a mode (a key of `MODES`).
        draw: the tasks for a number of objectives.
        batch: episodes side by side.
        max_turns: of an episode; at least one per objective and one for the answer.
        released: see `measure`.
        report: called with each line when it is complete.

    Raises:
        ValueError: an unknown mode, no objectives, or a batch of none.
    """
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {list(modes)}")
    if not objectives or min(objectives) < 1:
        raise ValueError(f"objectives: expected numbers from 1, got {list(objectives)}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    lines = []
    tasks = {count: list(draw(count)) for count in objectives}
    for mode in modes:
        agent = make_agent(mode)
        agent.run(tasks[objectives[0]][:1], max_turns=1)  # set-up is not timed
        for count in objectives:
            results: list[Result] = []
            generation = agent.generation
            started = time.perf_counter()
            for at in range(0, len(tasks[count]), batch):
                if generation.seed is not None:  # batches sample differently
                    agent.generation = replace(generation, seed=generation.seed + at)
                results += agent.run(
                    tasks[count][at : at + batch], max_turns=max(max_turns, count + 1)
                )
            seconds = (time.perf_counter() - started) / len(results)
            agent.generation = generation
            line = measure(results, mode=mode, objectives=count, seconds=seconds, released=released)
            lines.append(line)
            report(line)
    return lines


OBJECTIVES = {"chain": [2, 4, 8, 16, 32], "lookup": [2, 4, 8], "webshop": [1]}
COLUMNS = (
    ("objectives", "obj", 3, "{}"),
    ("mode", "mode", 11, "{}"),
    ("em", "EM", 6, "{:.3f}"),
    ("f1", "F1", 6, "{:.3f}"),
    ("reward", "reward", 6, "{:.3f}"),
    ("peak_tokens", "peak", 6, "{:.0f}"),
    ("dependency", "depend.", 8, "{:.2e}"),
    ("compression", "compr.", 6, "{:.3f}"),
    ("peak_context", "cache", 6, "{:.0f}"),
    ("turns", "turns", 5, "{:.1f}"),
    ("seconds", "seconds", 7, "{:.2f}"),
    ("errors", "errors", 6, "{}"),
)


def table(lines: Sequence[Measures]) -> str:
    """The lines as a table, by objectives and then in the order of the modes.

    >>> line = Measures("pruned", 2, 8, 0.7, None, 0.35, 640.0, 52000.0, 0.33, 920.0, 5.5, 1.25, 0)
    >>> print(table([line]))
    obj mode            EM     F1 reward   peak  depend. compr.  cache turns seconds errors
      2 pruned       0.700      -  0.350    640 5.20e+04  0.330    920   5.5    1.25      0
    """

    def cell(value: Any, heading: str, width: int, form: str) -> str:
        text = "-" if value is None else form.format(value)
        return text.ljust(width) if heading == "mode" else text.rjust(width)

    rows = [" ".join(cell(heading, heading, width, "{}") for _, heading, width, _ in COLUMNS)]
    for line in sorted(lines, key=lambda line: line.objectives):
        values = (cell(getattr(line, name), h, width, form) for name, h, width, form in COLUMNS)
        rows.append(" ".join(values))
    return "\n".join(rows)


def plot(lines: Sequence[Measures], path: str | Path, task: str = "qa") -> None:
    """Draws EM (or the reward), peak tokens, dependency and seconds, a curve per mode.

    Args:
        lines: of one task.
        path: where to; its suffix says the format.
        task: the task's name; it says what the sizes count (hops, keys or objectives).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counted = size_unit(task)
    summed = "" if counted == "hops" else f", summed over the {counted}"
    scored = any(line.em is not None for line in lines)
    panels = {
        **({"em": f"EM{summed}"} if scored else {"reward": "reward"}),
        "peak_tokens": "peak tokens, without the prompt",
        "dependency": "dependency (log scale)",
        "seconds": "seconds per episode",
    }
    words = {
        "pruned": "pruned cache",
        "full": "full context",
        "reprefill": "live text sent again (reprefill)",
        "server": "server",
        "server-full": "server, full context",
    }
    modes = list(dict.fromkeys(line.mode for line in lines))
    sizes = sorted({line.objectives for line in lines})
    # Beside each other, and dashed over solid: equal values do not hide each other.
    styles = [("o", "-", 3.0), ("s", "-", 1.6), ("^", "--", 1.6), ("D", "-.", 1.6), ("v", ":", 1.6)]
    figure = Figure(figsize=(9.5, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for place, mode in enumerate(modes):
            points = sorted(
                (sizes.index(line.objectives) + 0.1 * (place - (len(modes) - 1) / 2), value)
                for line in lines
                if line.mode == mode and (value := getattr(line, name)) is not None
            )
            if points:
                marker, dashes, width = styles[place]
                axes.plot(
                    *zip(*points, strict=True),
                    marker=marker,
                    linestyle=dashes,
                    linewidth=width,
                    label=words.get(mode, mode),
                )
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_xlabel(counted)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if name == "dependency":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mem1_kernels.agent.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, text: str, **options: Any) -> None:
        shown = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(flag, help=text + shown, **options)

    add("model", "a Hugging Face id, a path, mem1-7b, or the name that the server serves")
    add("--task", "task of the episodes", choices=TASKS, default="qa")
    add("--data", "qa: .jsonl, .parquet or factbook (default); webshop server: goals, as 0:500")
    add("--hops", "look-ups that a factbook question takes, 1 to 4", type=int, default=1)
    add(
        "--corpus",
        "qa: .jsonl, a retrieval server's address or factbook (default); webshop: a server's "
        "address (default: the procedural shop)",
    )
    add("--topk", "passages per search", type=int, default=3)
    add(
        "--objectives",
        "default: 2 4 8 16; chain: 2 4 8 16 32; lookup: 2 4 8; webshop: 1",
        type=int,
        nargs="+",
    )
    add("--modes", "which lines; default: all that --server allows", nargs="+", choices=list(MODES))
    add("--server", "address of an OpenAI-compatible server, such as http://host:8000/v1")
    add("--episodes", "episodes per line", type=int, default=16)
    add("--batch", "episodes side by side", type=int, default=8)
    add("--workers", "environments that act at once, for slow tools", type=int, default=1)
    add("--max-turns", "turns an episode may take", type=int, default=20)
    add("--max-new-tokens", "tokens a turn may write", type=int, default=512)
    add("--max-info-tokens", "tokens of an observation", type=int, default=600)
    add("--temperature", "of sampling; 0: greedy", type=float, default=0.0)
    add("--seed", "of the choice of tasks and of sampling", type=int, default=0)
    add("--released", "count and score as the released script does", action="store_true")
    add("--out", "folder for the JSON and the plot", type=Path, default=Path("evaluation"))
    options = parser.parse_args(arguments)
    if options.task == "qa":
        options.data = options.data or "factbook"
        options.corpus = options.corpus or "factbook"
    elif options.task == "webshop" and options.corpus:
        options.data = options.data or "0:500"  # the goals of the published test split
    options.data = options.data or ""
    options.corpus = options.corpus or ""
    return options


def _world(options: argparse.Namespace) -> World:
    """The world that the options name."""
    return make_world(
        options.task,
        sizes=(),
        data=options.data,
        corpus=options.corpus,
        topk=options.topk,
        hops=(options.hops,),
        seed=options.seed,
    )


def _drawer(world: World, options: argparse.Namespace) -> Callable[[int], Sequence[Any]]:
    """The tasks of a number of objectives: the first of the world's list, or drawn."""

    def draw(count: int) -> Sequence[Any]:
        try:
            if world.eval_tasks is not None:
                return world.eval_tasks(count)[: options.episodes]
            rng = random.Random(f"{options.seed}/{count}")
            return [world.draw(count, rng) for _ in range(options.episodes)]
        except ValueError as error:
            raise ValueError(f"objectives: {error}") from None

    return draw


@contextmanager
def _in_one_line(options: argparse.Namespace) -> Iterator[None]:
    """Ends the program with one line, which names the option, where a block raises."""
    try:
        yield
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        name = text.partition(":")[0]
        flag = "--" if name in vars(options) and name != "model" else ""
        raise SystemExit(text.replace(name, flag + name.replace("_", "-"), 1)) from None


def _check(options: argparse.Namespace, modes: Sequence[str]) -> None:
    """Raises for options that do not fit, and for a folder that nothing can be written to."""
    for name in ("episodes", "batch", "max_turns"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
    if any(MODES[mode].engine == "server" for mode in modes) and not options.server:
        raise ValueError("modes: server and server-full need --server")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("matplotlib is not installed (`pip install mem1-kernels[plot]`)")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        raise ValueError(f"out: expected a folder to write to ({error.strerror})") from None


def main(arguments: Sequence[str] | None = None) -> list[Measures]:
    """The command line. What is wrong with an option, a file or the model ends it with one line."""
    options = _parse(arguments)
    modes = options.modes or (
        ["server", "server-full"] if options.server else ["pruned", "full", "reprefill"]
    )
    objectives = options.objectives or OBJECTIVES.get(options.task, [2, 4, 8, 16])
    loaded: dict[str, Any] = {}

    def make_agent(name: str) -> MemoryEfficientAgent:
        mode = MODES[name]
        if mode.engine == "server":
            return MemoryEfficientAgent(
                options.model, engine=options.server, retention=mode.retention, **settings
            )
        if not loaded:
            engine = MemoryEfficientAgent(options.model, **settings).engine
            assert isinstance(engine, HFEngine)
            loaded.update(model=engine.model, tokenizer=engine.tokenizer)
        return MemoryEfficientAgent(
            engine=mode.engine, retention=mode.retention, **loaded, **settings
        )

    with _in_one_line(options):
        _check(options, modes)
        world = _world(options)
        draw = _drawer(world, options)
        for count in objectives:
            draw(count)
        settings: dict[str, Any] = {
            "environment": world.make,
            "max_new_tokens": options.max_new_tokens,
            "max_info_tokens": options.max_info_tokens,
            "temperature": options.temperature,
            "seed": options.seed,
            "workers": options.workers,
        }
        for mode in modes:
            assert make_agent(mode).engine

    path = options.out / "evaluation.json"
    said = vars(options) | {"out": str(options.out)}
    for name in ("corpus", "server"):
        said[name] = said[name] and public_address(said[name])
    lines: list[Measures] = []

    def report(line: Measures) -> None:
        """Prints the line, and keeps it: what was measured is not lost if a later line fails."""
        lines.append(line)
        print(table([line]).splitlines()[1], flush=True)
        record = {
            "options": said,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lines": [asdict(line) for line in lines],
        }
        with written_whole(path) as file:
            file.write(json.dumps(record, indent=2) + "\n")

    model = valid_text(resolve_model(options.model))
    print(f"{model}, {options.task}, {options.episodes} episodes per line")
    try:
        evaluate(
            make_agent,
            draw,
            modes=modes,
            objectives=objectives,
            batch=options.batch,
            max_turns=options.max_turns,
            released=options.released,
            report=report,
        )
    except EngineError as error:
        raise SystemExit(" ".join(str(error).split())) from None
    print("\n" + table(lines))
    plot(lines, options.out / "evaluation.png", options.task)
    print(valid_text(f"{path}, {options.out / 'evaluation.png'}"))
    return lines


if __name__ == "__main__":
    main()
