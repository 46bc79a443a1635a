"""The tables of both READMEs and the pictures, from the results that are kept in bench/results.

    python -m bench.report              # prints the tables
    python -m bench.report --write      # puts them into README.md and bench/results/README.md
    python -m bench.report --pictures   # draws the .png files beside the results

A test compares the tables with the results.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from bench import cli, names, plots, sections
from bench.record import RESULTS, ROOT, Report

LAYOUTS = ("qa", "turns500", "tree", "causal")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def times(ratio: float | None) -> str:
    """A ratio, to be read as `so many times as long`; empty where there is none."""
    return "" if ratio is None else sections.times(ratio)


def measured_on(report: dict[str, Any]) -> str:
    return f"{Report('', report).device}, torch {report['environment']['versions']['torch']}"


def attention() -> str:
    return _attention_table(load("cpu/attention.json"))


def attention_amx() -> str:
    return _attention_table(load("cpu-amx/attention.json"))


def _attention_table(report: dict[str, Any]) -> str:
    rows = []
    for layout in LAYOUTS:
        for name in ("forward", "backward"):
            row = [names.LAYOUTS[layout], name]
            for dtype in ("float32", "bfloat16"):
                found = {
                    r["implementation"]: r
                    for r in report["rows"]
                    if (r["layout"], r["tokens"], r["dtype"]) == (layout, 8192, dtype)
                    and r.get("pass") == name
                }
                row.append(f"{1e3 * found['ours']['tflops']:.0f}")
                for peer in ("sdpa_dense", "sdpa_causal", "flex"):
                    row.append(times(found.get(peer, {}).get("over_ours")))
            rows.append(row)
    of = ["GFLOP/s", "dense mask", "causal", "Flex"]
    header = ["layout", "pass", *(f"fp32 {x}" for x in of), *(f"bf16 {x}" for x in of)]
    return f"({measured_on(report)})\n\n{markdown(header, rows)}"


def rollout() -> str:
    reports = [load("cpu/rollout.json"), load("cpu/rollout_100.json")]
    rows = []
    for report in reports:
        for turns in dict.fromkeys(r["turns"] for r in report["rows"]):
            found = {r["way"]: r for r in report["rows"] if r["turns"] == turns}
            pruned, full = found["pruned"], found["full"]
            rows.append(
                [
                    f"{turns}",
                    f"{pruned['batch']} x {pruned['total']:,}",
                    f"{pruned['peak_context']:,}",
                    f"{full['peak_context']:,}",
                    f"{pruned['peak_mb']:.1f}",
                    f"{full['peak_mb']:.1f}",
                    f"{pruned['tokens_s']:.0f}",
                    *(
                        times(found.get(way, {}).get("over_pruned"))
                        for way in ("reprefill", "full", "hf full")
                    ),
                ]
            )
    header = ["turns", "rows x tokens", "peak tokens per row", "full context: peak tokens"]
    header += ["cache MB", "full context: cache MB", "tokens/s", "text sent again"]
    header += ["full context", "full context in transformers"]
    return f"({measured_on(reports[0])})\n\n{markdown(header, rows)}"


def trees() -> str:
    report = load("cpu-amx/trees.json")
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for r in report["rows"]:
        if "pass" in r:
            cases.setdefault((r["layout"], r["pass"]), {})[r["way"]] = r
    rows = []
    for (layout, name), found in cases.items():
        ours, packed = found["ours"], found["packed"]
        rows.append(
            [
                f"{names.TREES[layout]}",
                names.TREE_PASSES[name],
                f"{ours['tokens']:,} of {packed['tokens']:,}",
                f"{packed['tokens'] / ours['tokens']:.1f}x",
                f"{ours['seconds']:.2f}",
                *(
                    times(found.get(way, {}).get("over_ours"))
                    for way in ("packed", "apart", "dense", "flex")
                ),
            ]
        )
    header = ["layout", "pass", "tokens computed", "saved", "s", "nothing shared"]
    header += ["SDPA row by row", "dense mask", "Flex"]
    return f"({measured_on(report)})\n\n{markdown(header, rows)}"


def prune() -> str:
    report = load("cpu/kv_cache.json")
    rows = [
        [
            r["layout"],
            f"{r['batch']}",
            f"{r['survivors']:,}",
            f"{r['moved_mb']:.1f}",
            f"{r['prune_ms']:.2f}",
            f"{100 * r['of_copy']:.0f} %",
            *(times(r[f"{peer}_over_ours"]) for peer in ("index_select", "gather", "cat")),
        ]
        for r in report["rows"]
        if r["part"] == "prune"
    ]
    header = ["layout", "batch", "survivors a row", "MB moved", "ms", "of memcpy's rate"]
    header += ["index_select", "gather", "cat"]
    return f"({measured_on(report)})\n\n{markdown(header, rows)}"


def ablation() -> str:
    report = load("cpu/mask_ablation.json")
    rows = []
    for mask, title in names.MASKS.items():
        row = [title]
        for start in ("exact", "own"):
            runs = report["rewards"][start][mask]
            last = [run[-1] for run in runs]
            row += [f"{statistics.mean(run[0] for run in runs):.2f}"]
            row += [f"{statistics.mean(last):.2f} ({min(last):.2f} to {max(last):.2f})"]
        rows.append(row)
    header = ["mask of the trainer", "exact warm start", "after PPO"]
    return markdown([*header, "warm start under it too", "after PPO"], rows)


def sm90() -> str:
    versions = ("3.6.0", "3.9.0")
    reports = [load(f"sm90/triton-{version}.json")["rows"] for version in versions]
    rows = []
    for old, new in zip(*reports, strict=True):
        if old["dtype"] == "bf16" and old["head_dim"] in (64, 128, 256) and old["hgmma"]:
            rows.append(
                [
                    names.TRITON_PASSES[old["pass"]],
                    f"{old['head_dim']}",
                    f"{old['block_m']} x {old['block_n']}",
                    f"{old['num_warps']}, {old['num_stages']}",
                    f"{old['registers']}, {new['registers']}",
                    f"{old['shared'] / 1024:.0f}",
                    f"{old['stack'] + new['stack']}",
                ]
            )
    header = ["pass", "head_dim", "queries x keys", "warps, stages"]
    header += [f"registers (triton {', '.join(versions)})", "shared KB", "bytes spilled"]
    return markdown(header, rows)


def hops() -> str:
    report = load("cpu/chain/evaluation.json")
    found = {(line["mode"], line["objectives"]): line for line in report["lines"]}
    rows = []
    for count in sorted({objectives for _, objectives in found}):
        row = [f"{count}"]
        for mode in ("pruned", "full", "reprefill"):
            line = found[mode, count]
            row += [f"{line['em']:.2f}", f"{line['peak_context']:.0f}"]
        rows.append(row)
    header = ["hops", "right", "peak tokens"]
    header += ["full context: right", "peak tokens"]
    return markdown([*header, "text sent again: right", "peak tokens"], rows)


FILES = {
    ROOT / "README.md": (attention, attention_amx, trees, rollout, hops, ablation),
    RESULTS / "README.md": (prune, sm90),
}


def filled(text: str, tables: Iterable[Callable[[], str]]) -> str:
    """The text with every table between its marks as the results have it now."""
    for table in tables:
        name = table.__name__
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        inside = f"{marks[0]}\n\n{table()}\n\n{marks[1]}"
        text, count = re.subn(pattern, lambda found, inside=inside: inside, text, flags=re.DOTALL)
        assert count == 1, f"expected the marks of {name} once, got them {count} times"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--write", action="store_true", help="put the tables into both READMEs")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures")
    options = parser.parse_args()
    if options.pictures:
        print(*(path.relative_to(ROOT) for path in plots.draw_all(RESULTS)), sep="\n")
        return
    for path, tables in FILES.items():
        if options.write:
            path.write_text(filled(path.read_text(), tables))
        else:
            for table in tables:
                print(f"{table.__name__}\n\n{table()}\n")


if __name__ == "__main__":
    main()
