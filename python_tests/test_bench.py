"""The benchmarks run, count their work and keep their results; no test looks at a time."""

from __future__ import annotations

import json
import sys

import pytest

from bench import attention, kv_cache, rollout
from bench.timing import Timing

COMMANDS = {
    "attention": (
        attention,
        "--tokens 300 --layouts qa tree --dtypes float32 --heads 2 --kv-heads 1 --head-dim 16 "
        "--peers sdpa_dense sdpa_causal",
    ),
    "kv_cache": (
        kv_cache,
        "--models qwen2.5-7b --batch 1 --survivors 60 --context 64 --new-tokens 1 8 --seconds 0",
    ),
    "rollout": (rollout, "--turns 2 --batch 1 --layers 1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_small_run_keeps_its_results(name, tmp_path, monkeypatch, capsys):
    module, options = COMMANDS[name]
    out = tmp_path / "results" / "small.json"
    arguments = [name, *options.split(), "--rounds", "1", "--out", str(out)]
    if name == "attention":
        arguments += ["--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    report = json.loads(out.read_text())
    assert report["environment"]["versions"]["torch"] and report["environment"]["commit"]
    rows = report["rows"]
    assert len(rows) == {"attention": 20, "kv_cache": 7, "rollout": 4}[name]
    assert len(capsys.readouterr().out.splitlines()) >= len(rows)
    if name == "attention":
        assert (tmp_path / "plot.png").stat().st_size > 1000
        pairs = {r["implementation"]: r["pairs"] for r in rows if r.get("pairs")}
        assert pairs["ours"] == pairs["sdpa_dense"] < pairs["sdpa_causal"] == 300 * 301 // 2
    if name == "rollout":
        assert {row["peak_context"] for row in rows} == {912}


def test_ratios_are_taken_round_by_round():
    """One slow round of the machine does not move the ratio."""
    mine, theirs = Timing([2.0, 20.0, 2.0]), Timing([1.0, 10.0, 1.0])
    assert mine.over(theirs) == 2.0
    assert (mine.median, mine.quantile(0.2), mine.quantile(0.8)) == (2.0, 2.0, 20.0)
