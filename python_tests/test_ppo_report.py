"""What a run shows: its log, its picture, its progress; and what a resumed run finds of them."""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from ppo_runs import full_disk, small

from mem1_kernels.ppo import report
from mem1_kernels.ppo.report import Log, Progress, make_accelerator, read_history, warn_of_changes
from mem1_kernels.ppo.trainer import train
from python_tests.talking_processes import talk


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# metrics.jsonl and config.json


def test_what_is_recorded_of_a_run_shows_no_password(tmp_path):
    config = small(tmp_path, trackers="", corpus="http://me:hunter2@host/retrieve?key=hunter3")
    (tmp_path / "run").mkdir()
    with Log(config, Accelerator(), 0):
        text = (tmp_path / "run" / "config.json").read_text()
    assert "hunter" not in text and json.loads(text)["corpus"] == "http://host/retrieve"


def test_a_log_goes_on_from_the_step_that_is_resumed(tmp_path):
    config = small(tmp_path, trackers="")
    (tmp_path / "run").mkdir()
    with Log(config, Accelerator(), 0) as log:
        for step in range(3):
            log({"step": step, "reward": 0.5, "kl": float("nan")})
        row = {"size": 2, "reward": float("inf"), "total_tokens": 9, "peak_context": 5}
        log({"step": 3, "evaluation": [row]})
    path = tmp_path / "run" / "metrics.jsonl"
    assert lines(path) == log.history
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    with Log(replace(config, resume=True), Accelerator(), 2) as again:
        assert again.history == log.history[:2]
        again({"step": 2, "reward": 1.0})
    assert lines(path) == [*log.history[:2], {"step": 2, "reward": 1.0}]


@pytest.mark.parametrize("cut", [b"", b'{"step": 2, "rew', b'{"step": 2}'])
def test_the_last_line_may_be_cut(tmp_path, cut, recwarn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n\n{"step": 1}\r\n' + cut)
    whole = [{"step": 2}] if cut.endswith(b"}") else []
    assert read_history(path, True) == [{"step": 0}, {"step": 1}, *whole]
    assert not recwarn
    assert read_history(tmp_path / "none.jsonl", True) == []


def test_lines_that_are_no_records_are_named_and_kept_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [b'\xef\xbb\xbf{"step": 0}', b'{"step": 1}', b'{"step": 2}']
    bad = [b'{"step": 1, "rew', b"7", b"[]", b"{}", b'{"step": "1"}', b"\xff\xfe", b"[" * 10**5]
    path.write_bytes(b"\n".join([good[0], *bad, *good[1:], b""]))
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"metrics.jsonl: left out line 2, 3, 4, 5, 6, 7, 8, whic"):
        assert read_history(path, True) == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


@pytest.mark.parametrize("text", [b"", b'{"seed": 0,', b"[]", b"\xff\xfe", b"[" * 10**5])
def test_a_config_that_cannot_be_read_costs_a_warning(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.warns(UserWarning, match="config.json: cannot be read .* which options changed"):
        warn_of_changes(path, {"seed": 0})


def test_a_config_is_compared_whatever_wrote_it(tmp_path, recwarn):
    path = tmp_path / "config.json"
    options = asdict(small(tmp_path))
    path.write_text(json.dumps(options), "utf-8-sig")
    warn_of_changes(path, options)
    warn_of_changes(tmp_path / "none.json", options)
    assert not recwarn
    with pytest.warns(UserWarning, match="resume: gamma, sizes differ from what the run began"):
        warn_of_changes(path, options | {"sizes": (7,), "gamma": 0.5})


def test_a_resumed_run_goes_on_from_a_damaged_log(tmp_path):
    config = small(tmp_path, steps=2, save_every=1)
    first = train(config, world=talk(config), progress=False)
    out = tmp_path / "run"
    (out / "config.json").write_text("")
    with open(out / "metrics.jsonl", "r+") as file:
        file.write("\n{")  # over the beginning of the first line
    with pytest.warns(UserWarning, match="metrics.jsonl: left out line 2"):
        run = train(replace(config, resume=True, steps=3), world=talk(config), progress=False)
    assert [record["step"] for record in run.history] == [1, 2]
    assert run.history[0] == first.history[1]
    assert lines(out / "metrics.jsonl") == run.history
    assert json.loads((out / "config.json").read_text())["steps"] == 3


# a full disk


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_full_disk_costs_no_history(tmp_path, name, monkeypatch):
    config = small(tmp_path)
    (tmp_path / "run").mkdir()
    with Log(config, Accelerator(), 0) as log:
        for step in range(20):
            log({"step": step, "reward": 0.5})
    path = tmp_path / "run" / name
    before = path.read_bytes()
    room = 0 if name == "config.json" else 3000
    assert len((tmp_path / "run" / "config.json").read_bytes()) < 3000
    monkeypatch.setattr(report, "read_history", lambda path, warn: log.history * 100)
    with pytest.raises(OSError, match=f"'.*{name}'"), full_disk(room):
        Log(replace(config, resume=True), Accelerator(), 100)
    assert path.read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.part"))


def test_a_full_disk_names_the_log_and_leaves_what_is_in_it(tmp_path):
    (tmp_path / "run").mkdir()
    message = "File too large: '.*metrics.jsonl'"
    with pytest.raises(OSError, match=message), full_disk(3000):
        with Log(small(tmp_path), Accelerator(), 0) as log:
            for step in range(1000):
                log({"step": step})
    left = read_history(tmp_path / "run" / "metrics.jsonl", True)
    assert left == log.history[: len(left)]
    assert 50 < len(left) == len(log.history) - 1


@pytest.mark.parametrize("name", ["transcripts/000001.jsonl", "curve.png", "policy"])
def test_a_full_disk_leaves_the_older_file(tmp_path, name, monkeypatch):
    config = small(tmp_path, steps=2, save_every=1, save_transcripts=True)
    train(config, world=talk(config), progress=False)
    out = tmp_path / "run"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def on_a_full_disk(module: str, function: str):
        whole = getattr(sys.modules[module], function)

        def write(*args):
            if function != "write_transcripts" or args[1].name == "000001.jsonl":
                with full_disk(600):
                    return whole(*args)
            return whole(*args)

        monkeypatch.setattr(sys.modules[module], function, write)

    where = {"curve.png": ("mem1_kernels.ppo.report", "plot")}
    where["policy"] = ("mem1_kernels.ppo.trainer", "save_policy")
    on_a_full_disk(*where.get(name, ("mem1_kernels.ppo.trainer", "write_transcripts")))
    for path in out.glob("checkpoint-*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with pytest.raises(OSError, match=name):
        train(replace(config, save_every=0), world=talk(config), progress=False)
    for path in [out / name, *(out / name).rglob("*")]:
        assert path.is_dir() or path.read_bytes() == before[path]
    assert not list(out.rglob(".*.part"))


# the picture


def test_the_picture_is_drawn_on_the_way(tmp_path, monkeypatch):
    drawn = []

    def plot(history, path, size):
        assert (tmp_path / "run" / "curve.png").exists() == bool(drawn)
        drawn.append(len(history))
        path.write_text("picture")

    monkeypatch.setattr(report, "plot", plot)
    (tmp_path / "run").mkdir()
    with Log(small(tmp_path), Accelerator(), 0) as log:
        log({"step": 0, "reward": 1.0})
        assert drawn == []  # not as often as that
        log({"step": 1, "evaluation": []})
        log({"step": 1, "reward": 1.0})
        assert drawn == [2]
        monkeypatch.setattr(report, "REDRAW_SECONDS", -1.0)
        log({"step": 2, "reward": 1.0})
        assert drawn == [2, 4]
        log.draw()
    assert drawn == [2, 4, 4]


def test_a_picture_of_numbers_that_are_not_finite(tmp_path):
    (tmp_path / "run").mkdir()
    with Log(small(tmp_path), Accelerator(), 0) as log:
        for reward in (0.5, float("nan"), -1.0):
            log({"step": 0, "reward": reward, "total_tokens": 9.0, "peak_context": 5})
        log.draw()
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_missed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config = small(tmp_path, sft_steps=0)

    def make_engine(policy):
        raise AssertionError

    with pytest.raises(ImportError, match=r"matplotlib is not installed .*mem1-kernels\[ppo\]"):
        train(config, make_engine=make_engine, progress=False)


# trackers


def test_trackers_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="trackers: expected some of .*tensorboard.*, got 'tenso"):
        make_accelerator(small(tmp_path, trackers="tensorbord"))
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.warns(UserWarning, match="trackers: nothing is sent to tensorboard: not installed"):
        make_accelerator(small(tmp_path, trackers=" tensorboard ,"))


# progress


def test_off_a_terminal_there_is_a_line_per_step(tmp_path, capsys):
    config = small(tmp_path, sft_steps=20, eval_every=1, eval_sizes=(1, 2), eval_episodes=2)
    train(config, world=talk(config))
    said = capsys.readouterr()
    assert said.out == ""
    shown = [line for line in said.err.splitlines() if line.startswith(("warm", "ppo", "eval"))]
    assert len([line for line in shown if line.startswith("warm start, step ")]) == 10
    number = r"-?\d+\.\d+"
    expected = [
        rf"evaluation after 0 steps: reward at size 1 {number}, size 2 {number}",
        rf"ppo, step 1/2: reward {number}, context \d+/\d+, gap \de-\d+, {number} s",
        rf"evaluation after 1 steps: reward at size 1 {number}, size 2 {number}",
        rf"ppo, step 2/2: reward {number}, context \d+/\d+, gap \de-\d+, {number} s",
        rf"evaluation after 2 steps: reward at size 1 {number}, size 2 {number}",
    ]
    for line, pattern in zip(shown[10:], expected, strict=True):
        assert re.fullmatch(pattern, line), line


def test_silence(tmp_path, capfd):
    config = small(tmp_path, steps=1, eval_every=1, eval_sizes=(1,), eval_episodes=2)
    train(config, world=talk(config), progress=False)
    assert capfd.readouterr() == ("", "")


@contextmanager
def terminal(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        yield


def test_on_a_terminal_there_is_a_bar(capsys, monkeypatch):
    with terminal(monkeypatch):
        steps = Progress(range(3), "ppo")
        for step in steps:
            steps.figures(reward=f"{step}.0")
            steps.line("not seen")
    said = capsys.readouterr().err
    assert "ppo: 100%" in said
    assert "reward=2.0" in said
    assert "\n" not in said.rstrip()
    assert "not seen" not in said


def test_few_lines_where_steps_are_many(capsys):
    steps = Progress(range(5, 1000), "warm start", lines=10)
    for step in steps:
        steps.figures(loss=str(step))
    said = capsys.readouterr().err.splitlines()
    assert 10 <= len(said) <= 12
    assert said[-1].startswith("warm start, step 1000/1000: loss 999, ")
    steps = Progress(range(2), "warm start", shown=False)
    for _ in steps:
        steps.figures(loss="1")
        steps.line("text")
    assert capsys.readouterr().err == ""
