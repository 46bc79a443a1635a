"""The pictures of the results, each drawn from the rows of a JSON file alone.

Every function draws into a file; its suffix (.png, .svg) says the format. A bar or a point is a
median, its whisker goes from p20 to p80.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import names
from bench.record import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

OURS, GREY = "#2a9d8f", "#9aa3ad"
PALETTE = [OURS, "#c8553d", GREY, "#e9a23b", "#5b6ee1", "#8a5a83", "#7a9e3b", "#444c56"]
MARKERS = "osD^vPX*"
SPREAD = "Medians, whiskers from p20 to p80"


def make_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | Path, note: str = "") -> None:
    """Writes the figure, with the note in small print below it."""
    from matplotlib import rc_context

    if note:
        figure.supxlabel(note, fontsize=8, color="#555")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    date = {"Date": None} if Path(path).suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": "bench"}):  # the same rows make the same file
        figure.savefig(path, dpi=150, metadata=date)


def ordered(values: Sequence[Any], known: Mapping[Any, str]) -> list[Any]:
    """The different values, those of `known` first and in its order."""
    found = list(dict.fromkeys(values))
    return [x for x in known if x in found] + [x for x in found if x not in known]


def rate_unit(highest: float) -> tuple[str, float]:
    """Unit of a rate given in TFLOP/s, and how many of it make one TFLOP/s."""
    return ("GFLOP/s", 1e3) if highest < 10 else ("TFLOP/s", 1.0)


def attention(
    rows: Sequence[Row], path: str | Path, *, tokens: int | None = None, device: str = ""
) -> None:
    """Rates on visible pairs: bars by layout, a panel for each of forward, backward and dtypes.

    Args:
        rows: of bench.attention, of one shape.
        tokens: of which length; default: the longest.
        device: where that was measured, in words.
    """
    rated = [row for row in rows if "tflops" in row and row["pass"] in ("forward", "backward")]
    tokens = tokens or max(row["tokens"] for row in rated)
    rated = [row for row in rated if row["tokens"] == tokens]
    passes = ordered([row["pass"] for row in rated], names.PASSES)
    dtypes = ordered([row["dtype"] for row in rated], names.DTYPES)
    layouts = ordered([row["layout"] for row in rated], names.LAYOUTS)
    ways = ordered([row["implementation"] for row in rated], names.IMPLEMENTATIONS)
    unit, factor = rate_unit(max(row["tflops"] for row in rated))
    colours = dict(zip(names.IMPLEMENTATIONS, PALETTE, strict=False))

    panel_width = max(4.2, 0.95 * len(layouts) + 0.5)
    figure = make_figure(panel_width * len(dtypes), 2.9 * len(passes) + 0.8)
    panels = figure.subplots(len(passes), len(dtypes), squeeze=False, sharey="row")
    bar = 0.84 / len(ways)
    for y, pass_name in enumerate(passes):
        for x, dtype in enumerate(dtypes):
            axes = panels[y][x]
            missing = []
            for place, way in enumerate(ways):
                found = {
                    row["layout"]: row
                    for row in rated
                    if (row["implementation"], row["pass"], row["dtype"]) == (way, pass_name, dtype)
                }
                if not found:
                    missing.append(names.IMPLEMENTATIONS.get(way, way))
                for spot, layout in enumerate(layouts):
                    if layout in found:
                        _rate_bar(
                            axes, spot - 0.42 + bar * (place + 0.5), bar, found[layout], factor,
                            colours.get(way, GREY),
                        )  # fmt: skip
            heading = f"{names.PASSES[pass_name]}, {names.DTYPES.get(dtype, dtype)}"
            if missing:
                heading += f"   (not available: {', '.join(missing)})"
            axes.set_title(heading, fontsize=10, loc="left", fontweight="bold")
            labels = [_wrapped(names.LAYOUTS.get(layout, layout)) for layout in layouts]
            axes.set_xticks(range(len(layouts)), labels, fontsize=8)
            axes.tick_params(axis="x", length=0)
            axes.grid(axis="y", alpha=0.3)
            axes.margins(y=0.1)
            if x == 0:
                axes.set_ylabel(f"{unit} on visible pairs")
            if y == len(passes) - 1:
                axes.set_xlabel("layout of the mask")
    from matplotlib.patches import Patch

    figure.legend(
        [Patch(color=colours.get(way, GREY)) for way in ways],
        [_credited(way) for way in ways],
        loc="outside upper center",
        ncols=len(ways),
        frameon=False,
        fontsize=9,
    )
    first = rated[0]
    shape = f"{tokens:,} tokens, {rows_in_words(first['batch'])}, {first['heads']} heads over "
    shape += f"{first['kv_heads']}, head_dim {first['head_dim']}"
    save(figure, path, ". ".join(filter(None, [shape, device, SPREAD])))


def _credited(way: str) -> str:
    name = names.IMPLEMENTATIONS.get(way, way)
    return f"{name} (sees more; all its pairs count)" if way.endswith("_causal") else name


def _wrapped(text: str) -> str:
    """On two or three short lines, for the label of a group of bars."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) > 11:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


def _rate_bar(axes: Axes, x: float, width: float, row: Row, factor: float, colour: str) -> None:
    """A rate with its spread and its number: a rate is work over time, so p80 is the lower end."""
    rate = factor * row["tflops"]
    low, high = (rate * row["median_ms"] / row[name] for name in ("p80_ms", "p20_ms"))
    # A run of few rounds can have its median at the edge of its spread, up to rounding.
    spread = [[max(rate - low, 0.0)], [max(high - rate, 0.0)]]
    axes.bar(x, rate, 0.92 * width, color=colour, yerr=spread, ecolor="#333", error_kw={"lw": 0.8})
    text = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    axes.text(x, high, text, ha="center", va="bottom", fontsize=6.5)


def times(
    groups: Mapping[str, Sequence[tuple[str, Mapping[str, Mapping[str, float]]]]],
    ways: Mapping[str, str],
    path: str | Path,
    title: str,
) -> None:
    """Times as points on a log axis: a line per case, a panel per group.

    Args:
        groups: heading -> (case in words, way -> `Timing.row()`) from top to bottom.
        ways: way -> its name; those that were not run are left out.
        title: label of the x axis.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    cases = sum(len(group) for group in groups.values())
    figure = make_figure(9.5, 0.36 * cases + 0.75 * len(groups) + 0.9)
    heights = [len(group) + 1.2 for group in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)
    run = [way for way in ways if any(way in t for group in groups.values() for _, t in group)]
    for axes, (heading, group) in zip(panels[:, 0], groups.items(), strict=True):
        for place, way in enumerate(run):
            points = [
                (spot + 0.62 * (place / max(1, len(run) - 1) - 0.5), timing[way])
                for spot, (_, timing) in enumerate(group)
                if way in timing
            ]
            if not points:
                continue
            at, found = zip(*points, strict=True)
            medians = [t["median_ms"] for t in found]
            spread = [
                [t["median_ms"] - t.get("p20_ms", t["median_ms"]) for t in found],
                [t.get("p80_ms", t["median_ms"]) - t["median_ms"] for t in found],
            ]
            axes.errorbar(
                medians, at, xerr=spread, fmt=MARKERS[place], color=PALETTE[place], markersize=5.5,
                elinewidth=1, zorder=20 - place, label=ways[way],
            )  # fmt: skip
        axes.set_yticks(range(len(group)), [case for case, _ in group], fontsize=8.5)
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.set_title(heading, fontsize=10, loc="left", fontweight="bold")
        for spot in range(0, len(group), 2):
            axes.axhspan(spot - 0.5, spot + 0.5, color="#f3f5f7", zorder=0)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=[1, 2, 5] if high < 50 * low else [1]))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", which="both", alpha=0.25)
    panels[-1][0].set_xlabel(title)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(4, len(run)), frameon=False,
        fontsize=9,
    )  # fmt: skip
    save(figure, path)


def prune(rows: Sequence[Row], path: str | Path) -> None:
    """Time of a prune against those of gathers and of a plain copy of as many bytes."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    several = len({row["model"] for row in rows}) > 1
    for row in rows:
        case = f"{rows_in_words(row['batch'])}, {row['survivors']:,} survive in each"
        case += f" ({row['moved_mb']:.3g} MB move)"
        heading = names.PRUNE_LAYOUTS[row["layout"]] + (
            f"; cache of {row['model']}" if several else ""
        )
        groups.setdefault(heading, []).append((case, row))
    times(groups, names.PRUNE_WAYS, path, "milliseconds per prune of all layers (log scale)")


def paged(rows: Sequence[Row], path: str | Path) -> None:
    """Time of a paged prune against a plain copy of what a dense one would move."""
    group = []
    for row in rows:
        case = (
            f"{rows_in_words(row['batch'])} of {row['tokens']:,} tokens, {row['dropped']:,} dropped"
        )
        case += f" ({row['pages_freed']} pages freed per row)"
        # Files from before its spread was kept have the median of the copy alone.
        copy = row.get("dense_moves") or {"median_ms": row["dense_moves_ms"]}
        group.append((case, {"paged": row["paged"], "dense_moves": copy}))
    times({"paged cache": group}, names.PAGED_WAYS, path, "milliseconds per prune (log scale)")


def attend(rows: Sequence[Row], path: str | Path) -> None:
    """Time of attention over one layer's ragged cache against padded SDPA."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for row in rows:
        new = row["new"]
        heading = "decode: one new token per row" if new == 1 else f"{new} new tokens per row"
        case = f"{row['model']}: {rows_in_words(row['batch'])}, longest {row['context']:,}"
        groups.setdefault(heading, []).append((case, row))
    times(groups, names.ATTEND_WAYS, path, "milliseconds per layer (log scale)")


def rows_in_words(batch: int) -> str:
    return "1 row" if batch == 1 else f"{batch} rows"


def rollout(rows: Sequence[Row], path: str | Path) -> None:
    """Peak tokens in the cache, speed, and time over the pruned cache's, by turns."""
    turns = list(dict.fromkeys(row["turns"] for row in rows))
    ways = ordered([row["way"] for row in rows], names.ROLLOUT_WAYS)
    found = {(row["turns"], row["way"]): row for row in rows}
    figure = make_figure(11, 3.9)
    panels = figure.subplots(1, 3)
    shown: list[tuple[str, str, Callable[[Row], float]]] = [
        ("most tokens that a row holds", "tokens", lambda row: row["peak_context"]),
        ("generated tokens per second, all rows", "tokens per second", lambda r: r["tokens_s"]),
        ("time over that of the pruned cache", "times as long", lambda row: row["over_pruned"]),
    ]
    bar = 0.84 / len(ways)
    for axes, (title, label, value) in zip(panels, shown, strict=True):
        for place, way in enumerate(ways):
            for spot, count in enumerate(turns):
                if (count, way) not in found:
                    continue
                number = value(found[count, way])
                x = spot - 0.42 + bar * (place + 0.5)
                name = names.ROLLOUT_WAYS.get(way, way) if spot == 0 else None
                axes.bar(x, number, 0.92 * bar, color=PALETTE[place], label=name)
                text = f"{number:,.0f}" if number >= 10 else f"{number:.1f}"
                axes.text(x, number, f" {text}", ha="center", va="bottom", fontsize=7, rotation=90)
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
        axes.set_ylabel(label)
        axes.set_xlabel("turns (rows side by side)")
        labels = [f"{count} ({found[count, ways[0]]['batch']})" for count in turns]
        axes.set_xticks(range(len(turns)), labels)
        axes.grid(axis="y", alpha=0.3)
        axes.margins(y=0.2)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(ways), frameon=False)
    save(figure, path)


def trees(rows: Sequence[Row], path: str | Path) -> None:
    """Time of a tree against those of its rows apart and of other masks, by pass and layout."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for pass_name, heading in names.TREE_PASSES.items():
        by_layout: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row.get("pass") == pass_name:
                by_layout.setdefault(row["layout"], {})[row["way"]] = row
        for layout in ordered(list(by_layout), names.TREES):
            found = by_layout[layout]
            case = f"{names.TREES.get(layout, layout)} ({found['ours']['tokens']:,} tokens)"
            groups.setdefault(heading, []).append((case, found))
    times(groups, names.TREE_WAYS, path, "milliseconds (log scale)")


def registers(rows: Sequence[Row], path: str | Path) -> None:
    """Registers per thread of the attention kernels by head_dim, a panel per dtype."""
    rows = [row for row in rows if row["pass"] in names.TRITON_PASSES]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    head_dims = sorted({row["head_dim"] for row in rows})
    passes = [name for name in names.TRITON_PASSES if name in {row["pass"] for row in rows}]
    figure = make_figure(11, 3.4)
    panels = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    bar = 0.84 / len(passes)
    for axes, dtype in zip(panels, dtypes, strict=True):
        for place, name in enumerate(passes):
            most = [
                max(
                    (r["registers"] for r in rows
                     if (r["pass"], r["dtype"], r["head_dim"]) == (name, dtype, head_dim)),
                    default=0,
                )
                for head_dim in head_dims
            ]  # fmt: skip
            at = [spot - 0.42 + bar * (place + 0.5) for spot in range(len(head_dims))]
            axes.bar(at, most, 0.92 * bar, color=PALETTE[place], label=names.TRITON_PASSES[name])
        axes.axhline(255, color="#333", linewidth=0.8, linestyle="--")
        axes.set_title(dtype, fontsize=10, loc="left", fontweight="bold")
        axes.set_xticks(range(len(head_dims)), [str(head_dim) for head_dim in head_dims])
        axes.set_xlabel("head_dim")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("registers per thread (255: limit)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(passes), frameon=False)
    save(figure, path)


def mask_ablation(curves: Mapping[str, Mapping[str, list[list[float]]]], path: str | Path) -> None:
    """Mean reward over the PPO steps for each mask, and each seed's as a thin line.

    Args:
        curves: warm start -> mask -> the rewards of each seed's run, step by step.
    """
    from matplotlib.ticker import MaxNLocator

    figure = make_figure(5 * len(curves), 4.1)
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    styles = dict(zip(names.MASKS, ("-", "--", "-."), strict=True))
    colours = dict(zip(names.MASKS, (OURS, "#e9a23b", "#c8553d"), strict=True))
    seeds = 0
    for axes, (start, masks) in zip(panels, curves.items(), strict=True):
        for mask, runs in masks.items():
            seeds = len(runs)
            for rewards in runs:
                axes.plot(rewards, color=colours[mask], linewidth=0.6, alpha=0.6)
            mean = [statistics.fmean(step) for step in zip(*runs, strict=True)]
            style = {"color": colours[mask], "linewidth": 2.2, "linestyle": styles[mask]}
            axes.plot(mean, label=names.MASKS[mask], **style)
        axes.set_title(names.WARM_STARTS[start], fontsize=10, loc="left", fontweight="bold")
        axes.set(xlabel="PPO step", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"mean reward (thick: mean of {seeds} seeds)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False,
        title="mask of the trainer",
    )  # fmt: skip
    save(figure, path)


def evaluation(content: Mapping[str, Any], path: str | Path) -> None:
    """The picture of mem1_kernels.agent.evaluate, from the JSON that it wrote."""
    from mem1_kernels.agent.evaluate import Measures, plot

    # Files from before the reward was kept have none; where there is an EM it is not drawn.
    lines = [Measures(**{"reward": None, **line}) for line in content["lines"]]
    plot(lines, path, task=content["options"]["task"])


def history(
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    runs: Sequence[str],
    label: str,
    path: str | Path,
) -> None:
    """A figure over the runs of one benchmark on one device.

    Args:
        panels: heading -> line -> its value in each run, None where that run has none.
        runs: the runs in words (date and commit), oldest first.
        label: of the y axis.
    """
    columns = 2
    lines = -(-len(panels) // columns)
    named = list(dict.fromkeys(name for shown in panels.values() for name in shown))
    figure = make_figure(4.2 * columns + 2.4, 2.6 * lines + 0.3)
    grid = figure.subplots(lines, columns, squeeze=False)
    drawn = {}
    for axes, (heading, shown) in zip(grid.flat, panels.items(), strict=False):
        for name, values in shown.items():
            points = [(x, value) for x, value in enumerate(values) if value is not None]
            place = named.index(name)
            (drawn[name],) = axes.plot(
                *zip(*points, strict=True),
                marker=MARKERS[place % len(MARKERS)],
                color=PALETTE[place % len(PALETTE)],
                linestyle=("-", "--")[place % 2],
            )
        axes.set_title(heading, fontsize=10, loc="left", fontweight="bold")
        axes.set_xticks(range(len(runs)), runs, fontsize=8)
        axes.set_xlim(-0.3, len(runs) - 0.7)
        axes.set_ylim(
            0, 1.08 * max(v for values in shown.values() for v in values if v is not None)
        )
        axes.set_ylabel(label, fontsize=9)
        axes.set_xlabel("run: date, commit", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.legend(
        [drawn[name] for name in named], named, loc="outside right upper", frameon=False, fontsize=8
    )
    save(figure, path)


def draw_all(results: Path) -> list[Path]:
    """Draws the pictures that lie beside the results, and returns their paths."""
    from mem1_kernels.ppo.report import plot as curve

    def load(name: str) -> Any:
        return json.loads((results / name).read_text())

    steps = (results / "cpu/chain/metrics.jsonl").read_text().splitlines()
    report = Report("cpu/attention", load("cpu/attention.json"))
    attention(report.rows, results / "cpu/attention.png", device=report.device)
    mask_ablation(load("cpu/mask_ablation.json")["rewards"], results / "cpu/mask_ablation.png")
    evaluation(load("cpu/chain/evaluation.json"), results / "cpu/chain/evaluation.png")
    curve([json.loads(step) for step in steps], results / "cpu/chain/curve.png", size="hops")
    drawn = ("attention", "mask_ablation", "chain/evaluation", "chain/curve")
    return [results / "cpu" / f"{name}.png" for name in drawn]
