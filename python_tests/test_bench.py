"""The benchmarks run, count their work, keep and show their results; no test looks at a time."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

import bench.__main__ as all_of_them
from bench import (
    attention,
    cli,
    history,
    kv_cache,
    mask_ablation,
    names,
    plots,
    report,
    rollout,
    trees,
)
from bench.page import blocks, text_table, write_page
from bench.record import RESULTS, ROOT, Report, read_folder, write_results
from bench.timing import Timing

COMMANDS = {
    "attention": (
        attention,
        "--tokens 300 --layouts qa tree --dtypes float32 --heads 2 --kv-heads 1 --head-dim 16 "
        "--peers sdpa_dense sdpa_causal --rounds 1",
    ),
    "kv_cache": (
        kv_cache,
        "--models qwen2.5-7b --batch 1 --survivors 60 --context 64 --new-tokens 1 8 --seconds 0 "
        "--rounds 1",
    ),
    "rollout": (rollout, "--turns 2 --batch 1 --layers 1 --rounds 1"),
    "trees": (
        trees,
        "--layouts small --ways packed apart dense --layers 1 --rounds 1 --dense-limit 2000",
    ),
}


def run(module, name, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *options.split()])
    module.main()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_small_run_keeps_its_results_and_makes_a_page(name, tmp_path, monkeypatch, capsys):
    module, options = COMMANDS[name]
    out = tmp_path / "results"
    run(module, name, f"{options} --out {out} --name small", monkeypatch)
    content = json.loads((out / "small.json").read_text())
    said = content["environment"]
    assert said["versions"]["torch"] and said["commit"] and said["date"] and said["device"]
    assert content["options"]["rounds"] == 1 and "out" not in content["options"]
    rows = content["rows"]
    assert len(rows) == {"attention": 20, "kv_cache": 7, "rollout": 4, "trees": 10}[name]
    assert len(capsys.readouterr().out.splitlines()) >= len(rows)
    if name == "attention":
        pairs = {r["implementation"]: r["pairs"] for r in rows if r.get("pairs")}
        assert pairs["ours"] == pairs["sdpa_dense"] < pairs["sdpa_causal"] == 300 * 301 // 2
    if name == "rollout":
        assert {row["peak_context"] for row in rows} == {912}
    if name == "trees":
        found = [row for row in rows if row["part"] == "tree"]
        # All ways compute the same; what is shared is computed once.
        assert max(row["mean_log_prob"] for row in found) - found[0]["mean_log_prob"] < 1e-5
        assert min(row["mean_log_prob"] for row in found) - found[0]["mean_log_prob"] > -1e-5
        tokens = {row["way"]: row["tokens"] for row in found}
        assert tokens["apart"] == tokens["packed"] == 3 * 660
        assert tokens["ours"] == tokens["dense"] == 660 + 480 + 320
        monkeypatch.setattr(report, "load", lambda name: content)
        assert "| 1,460 of 1,980 | 1.4x |" in report.trees()

    monkeypatch.setattr(all_of_them, "committed", list)  # no history of other runs
    assert all_of_them.main(["--report", str(out), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    pictures = {"attention": 1, "kv_cache": 3, "rollout": 1, "trees": 1}[name]
    assert page.count("data:image/svg+xml;base64,") == pictures
    assert f"commit</dt><dd>{said['commit']}, {said['date'][:10]}</dd>" in page


def test_one_command_runs_them_all_but_the_slow_one(tmp_path, monkeypatch, capsys):
    out, ran = tmp_path / "out", []

    def pretend(name, options):
        ran.append(name)
        (out / "cpu").mkdir(parents=True, exist_ok=True)
        (out / "cpu" / "rollout.json").write_text((RESULTS / "cpu/rollout.json").read_text())
        return name != "rollout"

    monkeypatch.setattr(all_of_them, "run", pretend)
    monkeypatch.setattr(all_of_them, "committed", list)
    monkeypatch.setattr(all_of_them, "missing", lambda name: "no compiler" * (name == "sm90_table"))
    assert all_of_them.main(["--quick", "--out", str(out)]) == 1  # one failed, the others ran
    assert ran == ["attention", "plan", "kv_cache", "rollout", "trees"]
    printed = capsys.readouterr().out
    assert "sm90_table: skipped, no compiler" in printed and "failed: rollout" in printed
    assert "16 turns, 4 rows of 8,696 tokens" in printed and (out / "index.html").exists()


def test_the_commands_of_all_parse(tmp_path):
    options = all_of_them.make_parser().parse_args(["--quick", "--out", str(tmp_path)])
    for name, parser in parsers().items():
        if name != "bench.__main__":
            command = all_of_them.command(name.removeprefix("bench."), options)
            assert command[1:3] == ["-m", name]
            parsed = parser.parse_args(command[3:])
            assert parsed.quick and parsed.out == str(tmp_path)


@pytest.mark.parametrize("code", [0, 2])
def test_a_benchmark_that_fails_is_told_by_its_exit_code(code, monkeypatch, capsys):
    shell = SimpleNamespace(run=lambda command, cwd: SimpleNamespace(returncode=code))
    monkeypatch.setattr(all_of_them, "subprocess", shell)
    options = argparse.Namespace(out="out", quick=False, device="cpu")
    assert all_of_them.run("rollout", options) == (code == 0)
    assert f"rollout: exit {code}" in capsys.readouterr().out


def test_the_sm90_table_is_left_out_without_its_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(all_of_them, "find_spec", lambda name: None)
    assert all_of_them.missing("sm90_table") == "triton is not installed"
    assert all_of_them.missing("attention") == ""


def parsers():
    pytest.importorskip("triton")
    sm90_table = importlib.import_module("bench.sm90_table")
    modules = (attention, kv_cache, rollout, trees, sm90_table, mask_ablation, all_of_them)
    return {module.__name__: module.make_parser() for module in modules}


def test_every_option_has_help_and_a_default():
    for name, parser in parsers().items():
        formatter = cli.Help(prog=name)
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            said = formatter._get_help_string(action)
            assert action.help and re.search(r"default: \S", said), (name, action.option_strings)
            assert "None" not in said and "False" not in said, (name, said)
        parser.format_help()  # no stray % in a help text


def test_out_is_a_folder_everywhere():
    for name, parser in parsers().items():
        (out,) = (a for a in parser._actions if "--out" in a.option_strings)
        assert out.metavar == "FOLDER" and "folder" in out.help, name


def test_nothing_is_kept_unless_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, options = COMMANDS["rollout"]
    run(module, "rollout", options, monkeypatch)
    assert not list(tmp_path.iterdir())


def test_quick_changes_defaults_and_not_what_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["attention", "--quick", "--tokens", "512"])
    options = cli.parse(attention.make_parser(), attention.QUICK)
    assert options.tokens == [512] and options.rounds == attention.QUICK["rounds"]


def test_the_ablation_runs_and_keeps_its_curves(tmp_path, monkeypatch):
    """One step per mask on a model that is hardly trained."""
    monkeypatch.chdir(ROOT)
    config = tmp_path / "small.toml"
    small = {"sft_steps = 1000": "sft_steps = 2", "rollout_batch = 256": "rollout_batch = 16"}
    written = (ROOT / "configs" / "chain.toml").read_text()
    for line, smaller in small.items():
        assert line in written
        written = written.replace(line, smaller)
    config.write_text(written)
    out = tmp_path / "out"
    options = f"--quick --steps 1 --config {config} --out {out} --work {tmp_path / 'work'}"
    run(mask_ablation, "mask_ablation", options, monkeypatch)
    content = json.loads((out / "mask_ablation.json").read_text())
    assert set(content["rewards"]["exact"]) == set(names.MASKS)
    gaps = {mask: runs[0][0] for mask, runs in content["mean_log_prob_gap"]["exact"].items()}
    # Episodes of so untrained a model end before the mask `release` makes a difference.
    assert gaps["exact"] < 1e-4 < gaps["as released"]
    (block,) = blocks(read_folder(out))
    assert [line.ours.split(", ")[1][:9] for line in block.lines] == ["at step 1"] * 3
    with pytest.raises(SystemExit):  # the folder of the runs is not written over
        run(mask_ablation, "mask_ablation", options, monkeypatch)


def test_what_gpu_check_runs_parses(monkeypatch):
    """Every `-m bench.NAME` of the script, with its options, is a command line of today."""
    script = (ROOT / "bench" / "gpu_check.sh").read_text().replace("\\\n", " ")
    commands = re.findall(r'"\$PYTHON" -m bench\.(\w+) (.*)', script)
    assert [name for name, _ in commands] == [
        "attention", "attention", "kv_cache", "kv_cache", "rollout",
    ]  # fmt: skip
    written = set()
    for name, options in commands:
        module = importlib.import_module(f"bench.{name}")
        parsed = module.make_parser().parse_args(shlex.split(options))
        assert parsed.device == "cuda" and parsed.out == "$OUT"
        written.add(parsed.name)
    assert len(written) == 5  # no result writes over another
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu_check.sh"], check=True)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_of_the_kept_results(tmp_path):
    """It needs no network, says what was measured where, and has a picture per benchmark."""
    shown = read_folder(RESULTS)
    found = blocks(shown)
    assert {r.name for block in found for r in block.reports} == {r.name for r in shown}
    # The same results once more, as if they had been measured at another commit.
    older = [
        Report(r.name, {**r.content, "environment": {**r.environment, "commit": "0123abc"}}, 1.0)
        for r in shown
        if r.environment
    ]
    path = tmp_path / "page" / "index.html"
    write_page(found, older, path)
    page = Page(path.read_text())
    assert not page.open
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    targets = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert links == targets
    images = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    for start in ("8,192 tokens per row", "Time of one prune", "Mean reward", "Task chain"):
        assert any(alt.startswith(start) for alt in images), start
    histories = ("Attention", "Pruning the KV cache", "Attention over the KV cache", "Rollouts")
    for title in histories:
        assert any(re.match(f"{title}: .* over 2 runs", alt) for alt in images), title
    text = " ".join(page.text)
    for said in ("AMD EPYC, 2 threads", "torch 2.13.0+cpu", "7174f97", "290 GFLOP/s", "hops"):
        assert said in text, said
    assert "not recorded in this file" in text  # older files have no options


def test_the_table_has_a_line_per_case():
    found = blocks(read_folder(RESULTS))
    lines = text_table(found).splitlines()
    assert len(lines) == 1 + len(found) + sum(len(block.lines) for block in found)
    of_each_cpu = [x for x in lines if "MEM1-QA" in x and "forward, fp32" in x]
    assert len(of_each_cpu) == 2
    (line,) = (x for x in of_each_cpu if "290 GFLOP/s" in x)
    assert line.split("  ")[0] == "MEM1-QA: turns of 556; 8,192 tokens, forward, fp32"
    assert "FlexAttention" in line and line.endswith("3.6x")


def test_names_are_those_of_the_benchmarks():
    assert set(names.LAYOUTS) == set(attention.LAYOUTS) == set(names.LAYOUT_MEANING)
    assert set(names.IMPLEMENTATIONS) == {"ours", *attention.PEERS["cpu"], *attention.PEERS["cuda"]}
    assert set(names.MASKS) == set(mask_ablation.MASKS)
    assert set(names.TREES) == set(trees.LAYOUTS) and set(names.TREE_WAYS) == set(trees.MASKS)
    for name, said in names.MODELS.items():
        shape = kv_cache.MODELS[name]
        assert said == (
            f"{shape.layers} layers, {shape.kv_heads} key-value heads "
            f"({kv_cache.QUERY_HEADS[name]} query heads), head_dim {shape.head_dim}"
        )


def test_a_json_that_is_no_result_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(all_of_them, "committed", list)
    (tmp_path / "rollout.json").write_text((RESULTS / "cpu/rollout.json").read_text())
    (tmp_path / "other.json").write_text('{"lines": []}')
    all_of_them.main(["--report", str(tmp_path), "--out", str(tmp_path)])
    assert "not results of a benchmark: other.json" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no result files"):
        all_of_them.main(["--report", str(tmp_path / "none"), "--out", str(tmp_path)])


def test_history_reads_every_committed_version(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=x", "-c", "user.email=x@x")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, text=True)

    def commit(content):
        path = tmp_path / "bench" / "results" / "cpu" / "rollout.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        git("add", "-A")
        git("commit", "-q", "-m", "results")

    def content(commit, date, rows):
        said = {"device": "X", "threads": 2, "commit": commit, "date": date}
        return {"environment": said, "rows": rows}

    git("init", "-q")
    commit(content("bbb", "2026-02-02T00:00:00+02:00", [1]))
    commit(content("bbb", "2026-02-02T00:00:00+02:00", [2]))  # the same run, worded anew
    commit(content("aaa", "2026-02-01T23:00:00+00:00", [3]))  # 23:00 UTC: after bbb
    found = history.committed(tmp_path)
    assert [report.rows for report in found] == [[1], [2], [3]]
    ordered = history.runs(found)
    assert [report.commit for report in ordered] == ["bbb", "aaa"]
    assert ordered[0].rows == [2]
    assert ordered[0].name == "cpu/rollout" and ordered[0].device == "X, 2 threads"
    assert history.committed(tmp_path / "bench" / "nowhere") == []  # no repository, no history


def test_results_without_git_have_no_commit_and_still_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.record.COMMIT", None)
    kept = json.loads((RESULTS / "cpu/rollout.json").read_text())["rows"]
    options = argparse.Namespace(out=str(tmp_path), name="rollout", quick=True)
    write_results(options, "cpu", rows=kept)
    found = blocks(read_folder(tmp_path))
    write_page(found, [], tmp_path / "index.html")
    page = (tmp_path / "index.html").read_text()
    assert "commit not recorded, 2" in page and "a smoke run, not a measurement" in page


def test_the_pictures_of_the_results_are_drawn(tmp_path):
    for path in RESULTS.rglob("*.json*"):
        copy = tmp_path / path.relative_to(RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    drawn = {path.relative_to(tmp_path) for path in plots.draw_all(tmp_path)}
    assert drawn == {path.relative_to(RESULTS) for path in RESULTS.rglob("*.png")}
    for path in drawn:
        assert (tmp_path / path).stat().st_size > 10_000


def svg_text(draw, tmp_path):
    """The words of a picture."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(tmp_path / "picture.svg")
    return re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "picture.svg").read_text())


def test_the_attention_picture_says_what_it_shows(tmp_path):
    pytest.importorskip("matplotlib")
    rows = report.load("cpu/attention.json")["rows"]
    words = svg_text(lambda path: plots.attention(rows, path, device="this machine"), tmp_path)
    text = " ".join(words)
    for said in (
        "GFLOP/s on visible pairs", "layout of the mask", "forward, fp32", "forward, bf16",
        "FlexAttention", "SDPA, dense mask", "8,192 tokens", "head_dim 64", "this machine",
    ):  # fmt: skip
        assert said in text, said
    assert "backward, bf16" in text and "not available: FlexAttention" in text
    (ours,) = (
        row["tflops"]
        for row in rows
        if (row["layout"], row["tokens"], row["dtype"]) == ("qa", 8192, "float32")
        and (row["implementation"], row.get("pass")) == ("ours", "forward")
    )
    assert f"{1e3 * ours:.0f}" in words


def test_rates_of_a_gpu_are_in_tflops():
    assert plots.rate_unit(0.6) == ("GFLOP/s", 1e3) and plots.rate_unit(400.0) == ("TFLOP/s", 1.0)


@pytest.mark.parametrize(
    ("task", "unit"), [("chain", "hops"), ("lookup", "keys"), ("qa", "objectives")]
)
def test_the_evaluation_picture_names_what_the_sizes_count(task, unit, tmp_path):
    pytest.importorskip("matplotlib")
    content = report.load("cpu/chain/evaluation.json")
    content["options"]["task"] = task
    words = svg_text(lambda path: plots.evaluation(content, path), tmp_path)
    assert words.count(unit) == 4
    assert not {"hops", "keys", "objectives"} - {unit} & set(words)
    summed = [word for word in words if word.startswith("EM")]
    assert summed == ["EM" if task == "chain" else f"EM, summed over the {unit}"]


def test_no_curve_of_the_evaluation_hides_another(tmp_path, monkeypatch):
    """Equal values: the points lie beside each other, and each curve has dashes of its own."""
    matplotlib = pytest.importorskip("matplotlib")
    from mem1_kernels.agent.evaluate import MODES, Measures, plot

    lines = [
        Measures(mode, size, 1, 1.0, None, 1.0, 5.0, 5.0, 1.0, 5.0, 1.0, 1.0, 0)
        for mode in MODES
        for size in (2, 4)
    ]
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *a, **k: (figures.append(self), save(self, *a, **k)),
    )
    plot(lines, tmp_path / "evaluation.png", "chain")
    for axes in figures[0].axes:
        curves = axes.get_lines()
        assert len(curves) == len(MODES)
        assert len({tuple(curve.get_xdata()) for curve in curves}) == len(MODES)
        looks = {(c.get_linestyle(), c.get_linewidth(), c.get_marker()) for c in curves}
        assert len(looks) == len(MODES)


def test_the_ablation_picture_has_the_names_of_the_readme(tmp_path):
    pytest.importorskip("matplotlib")
    curves = report.load("cpu/mask_ablation.json")["rewards"]
    words = svg_text(lambda path: plots.mask_ablation(curves, path), tmp_path)
    readme = (ROOT / "README.md").read_text()
    for name in names.MASKS.values():
        assert name in words and f"| {name} |" in readme
    assert "PPO step" in words


def test_the_training_curve_names_what_the_sizes_count(tmp_path):
    pytest.importorskip("matplotlib")
    from mem1_kernels.ppo.report import plot

    kept = (RESULTS / "cpu/chain/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in kept]
    words = svg_text(lambda path: plot(records, path, "hops"), tmp_path)
    assert words.count("hops") == 2 and words.count("PPO step") == 2
    # One evaluation only, and none at all.
    plot([r for r in records if "evaluation" in r][:1], tmp_path / "one.png")
    plot([r for r in records if "evaluation" not in r], tmp_path / "none.png")


def test_ratios_are_taken_round_by_round():
    """One slow round of the machine does not move the ratio."""
    mine, theirs = Timing([2.0, 20.0, 2.0]), Timing([1.0, 10.0, 1.0])
    assert mine.over(theirs) == 2.0
    assert (mine.median, mine.quantile(0.2), mine.quantile(0.8)) == (2.0, 2.0, 20.0)
