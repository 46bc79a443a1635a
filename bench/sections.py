"""What each benchmark shows to a reader: text, pictures, lines of the table, and its trend."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import names, plots
from bench.record import Report
from mem1_kernels._plot import size_unit

Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the one table.

    Args:
        case: what was measured, in words.
        ours: the figure, with its unit.
        time: median (p20 to p80), with the unit; empty where no time was taken.
        peer: the fastest of the others in the same run, or what ours is compared with.
        over_ours: its time over ours.
    """

    case: str
    ours: str
    time: str = ""
    peer: str = ""
    over_ours: float | None = None


@dataclass(frozen=True)
class Picture:
    """A picture in words, and how to draw it into a file."""

    caption: str
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Section:
    """One benchmark.

    Args:
        title: its heading.
        text: what is measured, what counts as work, against what; HTML.
        rows: those of a report that belong here; none where the report is another benchmark's.
        pictures: of the rows of one device and commit.
        lines: of the one table, of the same rows.
        trend: what the history shows of the same rows: heading -> line -> value.
        unit: of the trend.
        terms: words that the pictures use, and what they mean.
    """

    title: str
    text: str
    rows: Callable[[Report], list[Row]]
    pictures: Callable[[list[Row], str], list[Picture]]
    lines: Callable[[list[Row]], Iterator[Line]]
    trend: Callable[[list[Row]], dict[str, dict[str, float]]] | None = None
    unit: str = ""
    terms: Callable[[list[Row]], dict[str, str]] = lambda rows: {}


def milliseconds(timing: Row) -> str:
    """`Timing.row()` in words.

    >>> milliseconds({"median_ms": 35.4, "p20_ms": 34.8, "p80_ms": 44.41})
    '35.4 ms (34.8 to 44.4)'
    """
    factor, unit = (1e-3, "s") if timing["median_ms"] >= 1e4 else (1, "ms")
    middle, low, high = (figure(factor * timing[f"{n}_ms"]) for n in ("median", "p20", "p80"))
    return f"{middle} {unit} ({low} to {high})"


def figure(value: float) -> str:
    """Three digits, no exponent.

    >>> figure(0.41234), figure(35.44), figure(1342.3)
    ('0.412', '35.4', '1,342')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(ratio: float) -> str:
    """A ratio, to be read as `so many times as long`.

    >>> times(1.04), times(35.7)
    ('1.0x', '36x')
    """
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:,.0f}x"


def fastest(ratios: dict[str, float]) -> tuple[str, float | None]:
    """The one of the smallest time over ours, and that ratio; none of none."""
    name = min(ratios, key=ratios.__getitem__, default="")
    return name, ratios.get(name)


def _attention_rows(report: Report) -> list[Row]:
    return [row for row in report.rows if "implementation" in row]


SHAPE = ("batch", "heads", "kv_heads", "head_dim")


def _attention_pictures(rows: list[Row], device: str) -> list[Picture]:
    pictures = []
    rated = [row for row in rows if row.get("pass") in ("forward", "backward") and "tflops" in row]
    for tokens in sorted({row["tokens"] for row in rated}, reverse=True):
        for shape in dict.fromkeys(tuple(row[name] for name in SHAPE) for row in rated):
            chosen = [
                row
                for row in rated
                if row["tokens"] == tokens and tuple(row[name] for name in SHAPE) == shape
            ]
            if not chosen:
                continue
            batch, heads, kv_heads, head_dim = shape
            caption = (
                f"{tokens:,} tokens per row, batch {batch}, {heads} query heads over {kv_heads} "
                f"key-value heads, head_dim {head_dim}. Higher is faster."
            )
            pictures.append(
                Picture(
                    caption,
                    lambda path, chosen=chosen: plots.attention(chosen, path, device=device),
                )
            )
    return pictures


def _longest(rows: list[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """Our forward and backward rows at each layout's longest, with those of all by name."""
    key = ("pass", "dtype", "layout", "tokens", *SHAPE)
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "tflops" in row:
            cases.setdefault(tuple(row[name] for name in key), {})[row["implementation"]] = row
    order = [list(names.LAYOUTS), list(names.DTYPES), list(names.PASSES)]
    found = [(case["ours"], case) for case in cases.values() if "ours" in case]
    longest: dict[tuple, int] = {}
    for row, _ in found:
        group = tuple(row[name] for name in ("layout", "dtype", *SHAPE))
        longest[group] = max(longest.get(group, 0), row["tokens"])
    found.sort(
        key=lambda pair: [
            known.index(pair[0][name])
            for known, name in zip(order, ("layout", "dtype", "pass"), strict=True)
        ]
    )
    for row, case in found:
        group = tuple(row[name] for name in ("layout", "dtype", *SHAPE))
        if row["pass"] in ("forward", "backward") and row["tokens"] == longest[group]:
            yield row, case


def _attention_lines(rows: list[Row]) -> Iterator[Line]:
    for row, case in _longest(rows):
        unit, factor = plots.rate_unit(row["tflops"])
        peer, ratio = fastest(
            {name: other["over_ours"] for name, other in case.items() if name != "ours"}
        )
        yield Line(
            f"{names.LAYOUTS[row['layout']]}; {row['tokens']:,} tokens, {row['pass']}, "
            f"{names.DTYPES[row['dtype']]}",
            f"{factor * row['tflops']:.0f} {unit}",
            milliseconds(row),
            names.IMPLEMENTATIONS.get(peer, peer),
            ratio,
        )


def _attention_trend(rows: list[Row]) -> dict[str, dict[str, float]]:
    panels: dict[str, dict[str, float]] = {}
    for row, _ in _longest(rows):
        heading = f"{row['pass']}, {names.DTYPES[row['dtype']]}"
        line = f"{names.LAYOUTS[row['layout']]}, {row['tokens']:,} tokens"
        panels.setdefault(heading, {})[line] = 1e3 * row["tflops"]
    return panels


def _layouts(rows: list[Row]) -> dict[str, str]:
    used = {row["layout"] for row in rows}
    return {names.LAYOUTS[x]: names.LAYOUT_MEANING[x] for x in names.LAYOUTS if x in used}


def _models(rows: list[Row]) -> dict[str, str]:
    return {name: names.MODELS[name] for name in dict.fromkeys(row["model"] for row in rows)}


def _part(part: str) -> Callable[[Report], list[Row]]:
    return lambda report: [row for row in report.rows if row.get("part") == part]


def _peers(row: Row, ours: str, ways: Sequence[str]) -> tuple[str, float | None]:
    return fastest({way: row[f"{way}_over_ours"] for way in ways if f"{way}_over_ours" in row})


def _plan_lines(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        peer, ratio = _peers(row, "ours", list(names.PLAN_WAYS))
        yield Line(
            f"{names.LAYOUTS[row['layout']]}; {row['tokens']:,} tokens",
            f"{row['tiles']:,} tiles listed, {row['list_mb']:.3g} MB",
            milliseconds(row["ours"]),
            names.PLAN_WAYS.get(peer, peer),
            ratio,
        )


def _prune_lines(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        peer, ratio = _peers(row, "prune", ("index_select", "gather", "cat"))
        batch = plots.rows_in_words(row["batch"])
        yield Line(
            f"{names.PRUNE_LAYOUTS[row['layout']]}; {row['model']}, {batch}, "
            f"{row['survivors']:,} survive each",
            f"{row['gb_s']:.1f} GB/s, {100 * row['of_copy']:.0f} % of a copy's",
            milliseconds(row["prune"]),
            names.PRUNE_WAYS.get(peer, peer),
            ratio,
        )


def _prune_trend(rows: list[Row]) -> dict[str, dict[str, float]]:
    panels: dict[str, dict[str, float]] = {}
    for row in rows:
        line = f"{plots.rows_in_words(row['batch'])}, {row['survivors']:,} survive"
        panels.setdefault(names.PRUNE_LAYOUTS[row["layout"]], {})[line] = 100 * row["of_copy"]
    return panels


def _paged_lines(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        batch = plots.rows_in_words(row["batch"])
        yield Line(
            f"{row['model']}, {batch} of {row['tokens']:,}, {row['dropped']:,} dropped each",
            f"{row['batch'] * row['pages_freed']:,} pages freed",
            milliseconds(row["paged"]),
            names.PAGED_WAYS["dense_moves"],
            row["dense_moves_ms"] / row["paged_ms"],
        )


def _attend_lines(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        peer, ratio = _peers(row, "attend", list(names.ATTEND_WAYS)[1:])
        batch = plots.rows_in_words(row["batch"])
        rate = f"{row['gb_s']:.1f} GB/s"
        if row["new"] > 1:
            unit, factor = plots.rate_unit(row["tflop_s"])
            rate = f"{factor * row['tflop_s']:.0f} {unit}"
        yield Line(
            f"{row['model']}, {batch}, longest {row['context']:,}, {row['new']} new each",
            rate,
            milliseconds(row["attend"]),
            names.ATTEND_WAYS.get(peer, peer),
            ratio,
        )


def _attend_trend(rows: list[Row]) -> dict[str, dict[str, float]]:
    panels: dict[str, dict[str, float]] = {}
    for row in rows:
        heading = f"{row['new']} new token{'s' if row['new'] > 1 else ''} per row"
        line = f"{plots.rows_in_words(row['batch'])}, longest {row['context']:,}"
        panels.setdefault(heading, {})[line] = row["sdpa_over_ours"]
    return panels


def _rollout_lines(rows: list[Row]) -> Iterator[Line]:
    for turns in sorted({row["turns"] for row in rows}):
        found = {row["way"]: row for row in rows if row["turns"] == turns}
        pruned = found["pruned"]
        peer, ratio = fastest({w: row["over_pruned"] for w, row in found.items() if w != "pruned"})
        batch = plots.rows_in_words(pruned["batch"])
        named = names.ROLLOUT_WAYS.get(peer, peer)
        if peer != "full" and "full" in found:
            named += f" (full context: {times(found['full']['over_pruned'])})"
        yield Line(
            f"{turns} turns, {batch} of {pruned['total']:,} tokens",
            f"{pruned['tokens_s']:.0f} tokens/s, holds {pruned['peak_context']:,} per row",
            milliseconds(pruned["time"]),
            named,
            ratio,
        )


def _rollout_trend(rows: list[Row]) -> dict[str, dict[str, float]]:
    pruned = [row for row in rows if row["way"] == "pruned"]
    line = "{turns} turns, {batch} at a time"
    return {"pruned cache": {line.format(**row): row["tokens_s"] for row in pruned}}


def _tree_cases(rows: list[Row]) -> Iterator[dict[str, Row]]:
    """The rows of each layout and pass by way, where ours ran."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if "pass" in row:
            cases.setdefault((row["layout"], row["pass"]), {})[row["way"]] = row
    yield from cases.values()


def _tree_lines(rows: list[Row]) -> Iterator[Line]:
    for case in _tree_cases(rows):
        ours = case["ours"]
        peer, ratio = fastest({w: r["over_ours"] for w, r in case.items() if w != "ours"})
        apart = case.get("packed", case.get("apart", ours))["tokens"]
        yield Line(
            f"{names.TREES[ours['layout']]}: {names.TREE_PASSES[ours['pass']]}",
            f"{ours['tokens']:,} tokens instead of {apart:,}",
            milliseconds(ours),
            names.TREE_WAYS.get(peer, peer),
            ratio,
        )


def _tree_trend(rows: list[Row]) -> dict[str, dict[str, float]]:
    panels: dict[str, dict[str, float]] = {}
    for case in _tree_cases(rows):
        if "apart" in case:
            heading = names.TREE_PASSES[case["ours"]["pass"]]
            line = names.TREES[case["ours"]["layout"]]
            panels.setdefault(heading, {})[line] = case["apart"]["over_ours"]
    return panels


def _pack_lines(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        yield Line(
            row["layout"],
            f"{row['source_tokens']:,} tokens, {row['tokens']:,} in the tree",
            milliseconds(row),
        )


def _sm90_rows(report: Report) -> list[Row]:
    if "capability" not in report.content:
        return []
    return [{"triton": report.content["triton"], **row} for row in report.rows]


def _sm90_lines(rows: list[Row]) -> Iterator[Line]:
    for version in dict.fromkeys(row["triton"] for row in rows):
        found = [row for row in rows if row["triton"] == version]
        most = max(row["registers"] for row in found)
        spilled = sum(row["stack"] for row in found)
        yield Line(
            f"Triton {version}: {len(found)} attention kernels",
            f"{spilled} bytes spilled, at most {most} registers",
        )


def _ablation_rows(report: Report) -> list[Row]:
    return [
        {"warm_start": start, "mask": mask, "seed": seed, "rewards": rewards}
        for start, masks in report.content.get("rewards", {}).items()
        for mask, runs in masks.items()
        for seed, rewards in enumerate(runs)
    ]


def _curves(rows: list[Row]) -> dict[str, dict[str, list[list[float]]]]:
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for row in rows:
        runs = curves.setdefault(row["warm_start"], {}).setdefault(row["mask"], [])
        runs.append(row["rewards"])
    return curves


def _ablation_lines(rows: list[Row]) -> Iterator[Line]:
    for start, masks in _curves(rows).items():
        for mask, runs in masks.items():
            first, last = (statistics.fmean(run[at] for run in runs) for at in (0, -1))
            yield Line(
                f"{names.WARM_STARTS[start]}: {names.MASKS[mask]}",
                f"reward {first:.2f}, at step {len(runs[0])} {last:.2f} ({len(runs)} seeds)",
            )


def _evaluation_rows(report: Report) -> list[Row]:
    task = report.content.get("options", {}).get("task")
    return [{"task": task, **line} for line in report.content.get("lines", [])]


def _evaluation_pictures(rows: list[Row], device: str) -> list[Picture]:
    pictures = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines = [
            {k: v for k, v in row.items() if k != "task"} for row in rows if row["task"] == task
        ]
        content = {"options": {"task": task}, "lines": lines}
        caption = f"Task {task}, {lines[0]['episodes']} episodes per point."
        pictures.append(
            Picture(caption, lambda path, content=content: plots.evaluation(content, path))
        )
    return pictures


def _evaluation_lines(rows: list[Row]) -> Iterator[Line]:
    found = {(row["task"], row["objectives"], row["mode"]): row for row in rows}
    for (task, size, mode), row in found.items():
        if mode != "pruned":
            continue
        full = found.get((task, size, "full"))
        yield Line(
            f"{task}: {size} {size_unit(task)}",
            _scored(row),
            f"{1e3 * row['seconds']:.3g} ms per episode",
            f"full context ({_scored(full)})" if full else "",
            full["seconds"] / row["seconds"] if full else None,
        )


def _scored(row: Row) -> str:
    score = f"reward {row['reward']:.2f}" if row["em"] is None else f"EM {row['em']:.2f}"
    return f"{score}, holds {row['peak_context']:.0f} tokens"


def _one(caption: str, draw: Callable[[list[Row], Path], None]) -> Callable[..., list[Picture]]:
    return lambda rows, device: [Picture(caption, lambda path: draw(rows, path))]


SECTIONS = [
    Section(
        "Attention",
        "One layer of masked attention, forward and backward, the plan of the mask made "
        "beforehand. The work is counted in visible pairs of a query and a key: forward 4 x pairs "
        "x heads x head_dim FLOP (two matrix products), backward 10 x (five). <b>SDPA, dense "
        "mask</b> and <b>FlexAttention</b> compute the same function. <b>Causal</b> kernels "
        "compute another one, which sees more; all the pairs that they see count as their work. "
        "FlexAttention has no backward on the CPU.",
        _attention_rows,
        _attention_pictures,
        _attention_lines,
        _attention_trend,
        "GFLOP/s, ours",
        _layouts,
    ),
    Section(
        "Making the plan",
        "The tiles that a mask makes partial and full, by query and by key, once per batch. The "
        "work is the tokens read and the tiles listed.",
        _part("plan"),
        lambda rows, device: [],
        _plan_lines,
        terms=_layouts,
    ),
    Section(
        "Pruning the KV cache",
        "At a state boundary, the surviving tokens of all layers move into the holes that dropped "
        "tokens leave: keys and values, in place, one call. The work is the moved bytes, read and "
        "written: 2 x moves x rows x bytes per token. The peers gather the survivors into new "
        "tensors, layer by layer. A plain copy of as many bytes is what the memory can do.",
        _part("prune"),
        _one("Time of one prune of all layers. Further left is faster.", plots.prune),
        _prune_lines,
        _prune_trend,
        "% of a plain copy's rate",
        _models,
    ),
    Section(
        "Pruning a paged KV cache",
        "The same in a cache of pages of 16 tokens, as vLLM and FlashInfer have: whole pages go "
        "back, and few tokens move. Beside it is a plain copy of the bytes that a dense prune "
        "would move; the ratio is that of the two medians.",
        _part("paged"),
        _one("Time of one prune of all layers. Further left is faster.", plots.paged),
        _paged_lines,
        terms=_models,
    ),
    Section(
        "Attention over the KV cache",
        "One layer's attention of new tokens over ragged rows, whose lengths go from a quarter of "
        "the longest to the longest. The work of a decode step is the keys and values read once "
        "(GB/s); of longer pieces 4 x head_dim x heads x visible pairs FLOP.",
        _part("attend"),
        _one("Time of one layer. Further left is faster.", plots.attend),
        _attend_lines,
        _attend_trend,
        "time of padded SDPA over ours",
        _models,
    ),
    Section(
        "Rollouts",
        "A small Qwen2 with random weights writes 56 tokens per turn (state 40, action 16) and "
        "then reads 500; the prompt has 300. The work is the generated tokens; prefills are in the "
        "time. The pruned cache is compared with sending the live text again each turn, and with "
        "dropping nothing.",
        lambda report: [row for row in report.rows if "turns" in row],
        _one(
            "In the first and the last picture lower is better, in the middle higher.",
            plots.rollout,
        ),
        _rollout_lines,
        _rollout_trend,
        "generated tokens per second",
    ),
    Section(
        "Histories that branch",
        "A small Qwen2 computes the log-probs of the tokens in the loss, and their gradients. Rows "
        "that begin alike are one prefix tree: what they share is computed once. <b>Nothing "
        "shared</b> is the same kernels over the rows behind each other. Masks and plans are made "
        "beforehand. FlexAttention has no backward on the CPU.",
        _part("tree"),
        _one("Time of all rows. Further left is faster.", plots.trees),
        _tree_lines,
        _tree_trend,
        "time of SDPA row by row over ours",
    ),
    Section(
        "Laying out a tree",
        "Seconds of <code>pack_tree</code>, on the host, for a million tokens of several rows.",
        _part("pack"),
        lambda rows, device: [],
        _pack_lines,
    ),
    Section(
        "What the GPU kernels compile to",
        "Registers and spilled bytes, read from the machine code for the H100 (sm_90). Nothing "
        "runs, and no time is taken.",
        _sm90_rows,
        _one(
            "Registers per thread. A kernel that needs more than 255 spills; the table says it.",
            plots.registers,
        ),
        _sm90_lines,
    ),
    Section(
        "What a wrong mask costs",
        "PPO on the chain task. Rollouts are exact in all runs; only the trainer's forward pass "
        "has another mask. <b>As meant</b>: a state does not see the one before it, an observation "
        "sees itself only. <b>As applied</b>: zeros and ones are added to the scores, which masks "
        "nothing. The task is artificial and needs the state.",
        _ablation_rows,
        _one(
            "Mean reward over PPO steps. Higher is better.",
            lambda rows, path: plots.mask_ablation(_curves(rows), path),
        ),
        _ablation_lines,
    ),
    Section(
        "An agent, evaluated",
        "A trained policy plays with a pruned cache, with full context, and with its live text "
        "sent again each turn. EM is the share of right answers (summed where an episode has "
        "several). Dependency adds up (context + length / 2) x length over the generated "
        "segments, as published.",
        _evaluation_rows,
        _evaluation_pictures,
        _evaluation_lines,
    ),
]
