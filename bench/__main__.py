"""Runs the benchmarks, prints one table and writes one HTML page.

    python -m bench --quick              # a smoke run of all: a few minutes
    python -m bench                      # the full runs: much longer
    python -m bench --only attention rollout
    python -m bench --report             # runs nothing: the page of bench/results
    python -m bench --report out/bench   # the page of another folder of result files

Each benchmark is a process of its own, `python -m bench.<name>`, with its default options, and
writes <out>/<name>.json. `python -m bench.<name> --help` tells its options and how it counts work.
The page is <out>/index.html. It needs no network; it shows what was measured, and the history of
the results that are committed below bench/results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from bench import cli
from bench.history import committed
from bench.page import blocks, text_table, write_page
from bench.record import RESULTS, ROOT, read_folder

BENCHMARKS = {
    "attention": "masked attention against dense masks, causal kernels and FlexAttention",
    "plan": "making the plan of a mask",
    "kv_cache": "pruning a KV cache, and attention over it",
    "rollout": "whole rollouts: pruned cache, text sent again, full context",
    "trees": "histories that branch: one prefix tree against its rows run apart",
    "sm90_table": "what the Triton kernels compile to for the H100; runs without a GPU",
    "mask_ablation": "PPO under wrong masks; slow, so it runs only if named by --only",
}
WITHOUT_DEVICE = ("sm90_table", "mask_ablation")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=cli.Help
    )
    add = parser.add_argument
    usual = [name for name in BENCHMARKS if name != "mask_ablation"]
    told = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    add("--only", nargs="+", choices=list(BENCHMARKS), default=usual, help=f"which. {told}")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    add("--quick", action="store_true", help="smoke runs: few shapes and rounds")
    add("--out", metavar="FOLDER", default="out/bench", help="folder for the JSON and index.html")
    add(
        "--report", metavar="FOLDER", nargs="?", const=RESULTS, type=Path,
        help="run nothing; make the page of the JSON below this folder (default: bench/results)",
    )  # fmt: skip
    return parser


def missing(name: str) -> str:
    """Why a benchmark cannot run here; empty if it can."""
    if name != "sm90_table":
        return ""
    found = find_spec("triton")
    if found is None or found.origin is None:
        return "triton is not installed"
    tool = Path(found.origin).parent / "backends/nvidia/bin/cuobjdump"
    return "" if tool.exists() else f"triton comes without {tool.name}"


def command(name: str, options: argparse.Namespace) -> list[str]:
    """The command line of one benchmark."""
    parts = [sys.executable, "-m", f"bench.{name}", "--out", str(Path(options.out).resolve())]
    parts += ["--quick"] if options.quick else []
    return parts + ([] if name in WITHOUT_DEVICE else ["--device", options.device])


def run(name: str, options: argparse.Namespace) -> bool:
    """Runs one benchmark; whether it succeeded."""
    print(f"== {name}: {BENCHMARKS[name]}", flush=True)
    started = time.perf_counter()
    code = subprocess.run(command(name, options), cwd=ROOT).returncode
    print(f"== {name}: exit {code}, {time.perf_counter() - started:.0f} s\n", flush=True)
    return code == 0


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a benchmark failed."""
    options = make_parser().parse_args(arguments)
    out = Path(options.out)
    failed = []
    if options.report is None:
        for name in options.only:
            if why := missing(name):
                print(f"== {name}: skipped, {why}\n", flush=True)
            elif not run(name, options):
                failed.append(name)
    folder = options.report or out
    reports = read_folder(folder) if folder.is_dir() else []
    if not reports:
        raise SystemExit(f"no result files (*.json) below {folder}")
    found = blocks(reports)
    shown = {report.name for block in found for report in block.reports}
    if other := [f"{report.name}.json" for report in reports if report.name not in shown]:
        print(f"not results of a benchmark: {', '.join(other)}")
    print(text_table(found))
    page = out / "index.html"
    write_page(found, committed(), page)
    print(f"\npage: {page}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
