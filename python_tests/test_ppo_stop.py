"""Signals that end a run between two steps, with a checkpoint and the usual exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from ppo_runs import small

from mem1_kernels.ppo import stop
from mem1_kernels.ppo.checkpoint import checkpoints
from mem1_kernels.ppo.episodes import world_of
from mem1_kernels.ppo.stop import Stopped, StopSignals
from mem1_kernels.ppo.trainer import train
from mem1_kernels.rollout import HFEngine
from python_tests.talking_processes import talk

ROOT = Path(__file__).parents[1]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


# the signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_said(number, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals(Accelerator(), say=True) as signals:
        assert signals.received() == 0
        send(number)
        send(signal.SIGTERM)  # as launchers do
        assert signals.received() == number
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    said = capfd.readouterr().err.split("\n")
    assert said == ["", f"{number.name}: the run stops at the end of this step", ""]


def test_the_second_ctrl_c_stops_at_once(monkeypatch):
    with StopSignals(Accelerator(), say=False) as signals:
        send(signal.SIGINT)
        send(signal.SIGINT)  # a launcher's copy of the same press
        assert signals.received() == signal.SIGINT
        monkeypatch.setattr(stop, "ONE_PRESS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def own(number, frame):
    """A handler that the program had before."""


@pytest.mark.parametrize("handler", [signal.SIG_IGN, own], ids=["nohup", "own"])
def test_what_was_set_before_stays(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with StopSignals(Accelerator(), say=False) as signals:
            send(signal.SIGINT)
            assert signals.received() == 0
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_outside_of_the_main_thread_leaves_signals_alone():
    found = []

    def enter():
        with StopSignals(Accelerator(), say=False) as signals:
            found.append(signals.received())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [0]


def test_the_exit_code_is_that_of_the_signal():
    stopped = Stopped(signal.SIGTERM, "text")
    assert (stopped.code, str(stopped)) == (143, "SIGTERM: text")
    assert isinstance(stopped, SystemExit)
    assert Stopped(signal.SIGINT, "text").code == 130


# a run


def stops_in_step(number: int):
    """Makes the engine of a policy; in the step of this number Ctrl-C is pressed."""
    played = []

    def make_engine(policy):
        played.append(policy)
        if len(played) == number + 1:
            send(signal.SIGINT)
        return HFEngine(policy)

    return make_engine


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    config = small(tmp_path, steps=3, save_every=3, eval_every=2, eval_sizes=(1,), eval_episodes=4)
    whole = train(replace(config, out=str(tmp_path / "whole")), progress=False)
    expected = "^SIGINT: .*run: stopped after 2 steps; checkpoint-000002 is saved, and resume goes"
    with pytest.raises(Stopped, match=expected) as stopped:
        train(config, make_engine=stops_in_step(1), progress=False)
    assert stopped.value.code == 130
    out = tmp_path / "run"
    assert [step for step, _ in checkpoints(out)] == [0, 2]
    assert (out / "curve.png").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    run = train(replace(config, resume=True), progress=False)
    assert run.rewards == whole.rewards
    assert [r["step"] for r in run.history] == [r["step"] for r in whole.history]
    for a, b in zip(whole.policy.parameters(), run.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_checkpoints_nothing_is_saved(tmp_path):
    config = small(tmp_path)
    with pytest.raises(Stopped, match="stopped after 1 steps; nothing is saved"):
        train(config, world=talk(config), make_engine=stops_in_step(0), progress=False)
    assert checkpoints(tmp_path / "run") == []
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_signal_in_the_warm_start(tmp_path):
    config = small(tmp_path, sft_steps=10**6, save_every=1)
    world = world_of(config)
    drawn = []

    def demonstrate(task, rng):
        drawn.append(task)
        if len(drawn) == 20:
            send(signal.SIGTERM)
        return world.demonstrate(task, rng)

    with pytest.raises(Stopped, match="SIGTERM: .* stopped in the warm start; nothing is saved"):
        train(config, world=replace(world, demonstrate=demonstrate), progress=False)
    assert len(drawn) == 24  # the third step of eight was ended
    assert checkpoints(tmp_path / "run") == []


def test_a_signal_in_an_evaluation(tmp_path):
    config = small(tmp_path, save_every=5, eval_every=1, eval_sizes=(1, 2, 3), eval_episodes=2)
    world = talk(config)
    drawn = []

    def draw(size, rng):
        drawn.append(size)
        if drawn.count(2) == 3:  # the second evaluation
            send(signal.SIGTERM)
        return world.draw(size, rng)

    with pytest.raises(Stopped, match="stopped after 1 steps; checkpoint-000001 is saved"):
        train(config, world=replace(world, draw_eval=draw), progress=False)
    assert drawn[-1] == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert ["evaluation" in json.loads(line) for line in lines] == [True, False]


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path):
    config = small(tmp_path, steps=1)
    with pytest.raises(Stopped, match="stopped after the last step; all is saved"):
        train(config, world=talk(config), make_engine=stops_in_step(0), progress=False)
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()


def test_a_checkpoint_is_not_written_twice(tmp_path, monkeypatch):
    config = small(tmp_path, save_every=1)
    written = []
    monkeypatch.setattr(
        "mem1_kernels.ppo.trainer.save_checkpoint", lambda *args: written.append(args[2])
    )
    with pytest.raises(Stopped, match="checkpoint-000001 is saved"):
        train(config, world=talk(config), make_engine=stops_in_step(0), progress=False)
    assert written == [0, 1]


# the command line

OPTIONS = {
    "trackers": "",
    "sizes": 1,
    "steps": 10**6,
    "sft-steps": 2,
    "sft-batch": 4,
    "episodes": 8,
    "minibatch": 4,
    "rollout-batch": 4,
    "token-budget": 128,
    "max-new-tokens": 9,
    "save-every": 10**6,
    "keep-checkpoints": 1,
}


def started(launch: list[str], out: Path) -> subprocess.Popen:
    arguments = [f"--{name}={value}" for name, value in (OPTIONS | {"out": out}).items()]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *launch, "-m", "mem1_kernels.ppo", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def wait_for_a_step(process: subprocess.Popen, out: Path) -> int:
    """Waits until a run has logged a step; returns the id of its main process."""
    log, deadline = out / "metrics.jsonl", time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n")):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(re.match(r"process (\d+) ", (out / ".lock").read_text())[1])


def ended(process: subprocess.Popen) -> str:
    """What a run said on stderr once it has ended; one that does not end is told to."""
    try:
        return process.communicate(timeout=200)[1]
    except subprocess.TimeoutExpired:
        process.terminate()
        raise


def test_ctrl_c_ends_the_command_line_with_a_line(tmp_path):
    process = started([], tmp_path / "run")
    assert wait_for_a_step(process, tmp_path / "run") == process.pid
    process.send_signal(signal.SIGINT)
    said = ended(process)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert re.search(r"ppo, step 1/1000000: reward ", said)
    assert re.fullmatch(
        r"SIGINT: .*/run: stopped after \d+ steps; checkpoint-\d+ is saved, and .* from it",
        said.splitlines()[-1],
    )


def test_several_processes_stop_together_and_a_second_run_is_kept_out(tmp_path):
    """The launcher ends both with SIGTERM if one fails, so both have to say what they met."""
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--tee=3", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=127.0.0.1:0", f"--log-dir={tmp_path / 'logs'}"]
    out = tmp_path / "run"
    first = started(launch, out)
    try:
        main = wait_for_a_step(first, out)
        second = started([*launch[:-1], f"--log-dir={tmp_path / 'second'}"], out)
        refused = ended(second)
        assert second.returncode == 1
        logs = [path.read_text() for path in (tmp_path / "second").glob("**/stderr.log")]
        error = f"error: out: another run (process {main} on "
        assert sum(error in log for log in logs) >= 1, refused
        assert not any("Traceback" in log for log in logs)
        assert first.poll() is None
        os.kill(main, signal.SIGTERM)
        said = ended(first)
    finally:
        first.terminate()  # on an error: a launcher takes its processes with it
    files = (tmp_path / "logs").glob("**/stderr.log")
    logs = {path.parent.name: path.read_text() for path in files}
    assert re.search(r"\nSIGTERM: .* after \d+ steps; checkpoint-\d+ is saved", logs["0"]), said
    assert not any("Traceback" in log for log in logs.values())
    assert len(checkpoints(out)) == 1
