"""`python -m mem1_kernels.ppo` and `.memory`: what they say of input that does not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from agent_models import make_bytes_tokenizer
from ppo_runs import small

from mem1_kernels.ppo.__main__ import is_for_the_user, main
from mem1_kernels.ppo.config import Config
from mem1_kernels.ppo.learner import make_policy
from mem1_kernels.ppo.memory import main as print_memory
from mem1_kernels.ppo.trainer import train


def said(capsys, run, *arguments: str) -> tuple[int, str]:
    """The exit code of a command line, and the one line that it said on stderr."""
    with pytest.raises(SystemExit) as exited:
        run([str(argument) for argument in arguments])
    spoken = capsys.readouterr()
    assert spoken.out == ""
    (line,) = spoken.err.splitlines()
    return exited.value.code, line


TOML = {
    "c.toml: not a TOML file: Expected '=' after a key .* .at line 2, ": b"lr = 1.0\nsteps 3",
    "c.toml: not a TOML file: Cannot overwrite a value .at ": b"lr = 1.0\nlr = 2.0",
    "c.toml: not a TOML file: .*": b"lr = " + b"[" * 10**5,
    "c.toml, line 1: expected UTF-8, got b'.xff'": "lr = 1.0".encode("utf-16"),
    "c.toml, line 2: expected UTF-8, got b'.xe9'": "lr = 1.0\nout = 'é'".encode("latin-1"),
    "c.toml, line 2: no option is called 'learning_rate'": b"lr = 1.0\nlearning_rate = 1.0",
    "c.toml, line 2: no option is called 'ppo'": b"# ppo\n[ppo]\nlr = 1.0",
    "c.toml, line 3: steps: expected int, got '3'": b"\r\nlr = 1.0\r\nsteps = '3'\r\n",
    "c.toml, line 1: sizes: expected whole numbers >= 1, got .0,.": b"sizes = [0]",
    "c.toml, line 1: lr: expected a positive number, got -1.0": b"\xef\xbb\xbflr = -1.0",
    "c.toml, line 2: minibatch: expected a multiple of group_size 3": b"group_size=3\nminibatch=4\n"
    b"episodes=6",
}


@pytest.mark.parametrize("message", TOML)
def test_a_file_that_does_not_fit_is_named_with_its_line(tmp_path, capsys, message):
    path = tmp_path / "c.toml"
    path.write_bytes(TOML[message])
    for run, arguments in ((main, ["--config", path]), (print_memory, [path])):
        code, line = said(capsys, run, *arguments)
        assert code == 2
        assert re.search(rf"^python -m mem1_kernels.ppo\S*: error: /.*/{message}", line), line


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "none.toml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "file" / "c.toml", "Not a directory"),
    ):
        assert said(capsys, main, "--config", path) == (
            2,
            f"python -m mem1_kernels.ppo: error: --config: {path}: {reason}",
        )
        assert said(capsys, print_memory, path) == (
            2,
            f"python -m mem1_kernels.ppo.memory: error: config: {path}: {reason}",
        )


def test_the_command_line_is_not_taken_for_the_file(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text("steps = 3\nlr = 1.0")
    _, line = said(capsys, main, "--config", path, "--steps", "-1")
    assert line == "python -m mem1_kernels.ppo: error: steps: expected at least 0, got -1"
    path.write_text("steps = -3")
    _, line = said(capsys, main, "--config", path, "--lr", "1")
    assert line.endswith("c.toml, line 1: steps: expected at least 0, got -3")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders that are not the model that one may take them for."""
    folder = tmp_path_factory.mktemp("models")
    tiny = make_policy(Config())
    tiny.save_pretrained(folder / "no-tokenizer")
    make_bytes_tokenizer().save_pretrained(folder / "no-model")
    (folder / "empty").mkdir()
    for name, damage in (
        ("no-weights", lambda path: (path / "model.safetensors").unlink()),
        ("cut", lambda path: os.truncate(path / "model.safetensors", 1000)),
        ("no-json", lambda path: (path / "config.json").write_text("{")),
        ("unknown", lambda path: (path / "config.json").write_text('{"model_type": "mem2"}')),
        ("encoder", lambda path: (path / "config.json").write_text('{"model_type": "t5"}')),
    ):
        damage(Path(shutil.copytree(folder / "no-tokenizer", folder / name)))
    return folder


@pytest.mark.parametrize(
    "name",
    ["no-model", "empty", "no-weights", "cut", "no-json", "unknown", "encoder", "none", "no/such"],
)
def test_a_model_that_cannot_be_loaded(models, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = name if "/" in name else str(models / name)
    out = tmp_path / "run"
    code, line = said(capsys, main, f"--out={out}", "--trackers=", f"--model={model}")
    assert code == 1
    assert line.startswith(
        f"python -m mem1_kernels.ppo: error: model: {model!r} cannot be loaded ("
    )


def test_a_model_without_a_tokenizer(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = str(models / "no-tokenizer")
    options = [f"--out={tmp_path / 'run'}", "--trackers=", "--task=webshop", "--sizes=1"]
    code, line = said(capsys, main, *options, f"--model={model}")
    assert code == 1
    assert f"error: model: {model!r} cannot be loaded (" in line


def test_memory_needs_a_model_that_can_be_loaded(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / "c.toml"
    for model, message in (
        ("tiny", "model: expected a Hugging Face id or a path, got 'tiny'"),
        (str(models / "no-json"), f"model: '{models / 'no-json'}' cannot be loaded ("),
    ):
        path.write_text(f"model = '{model}'")
        code, line = said(capsys, print_memory, path)
        assert code == 2
        assert f"error: {message}" in line
    with pytest.raises(SystemExit):
        print_memory([str(path), "--processes=0"])
    assert "argument --processes: expected at least 1, got 0" in capsys.readouterr().err


def test_a_task_that_does_not_fit(tmp_path, capsys):
    records = [{"question": f"Where is {n}?", "golden_answers": [str(n)]} for n in range(5)]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"id": "1", "contents": "a\nb"}))
    qa = [f"--data={tmp_path / 'qa.jsonl'}", f"--corpus={tmp_path / 'corpus.jsonl'}"]
    qa += ["--task=qa", "--model=x"]
    for arguments, message in (
        ([*qa, "--sizes", "2", "9"], "sizes: .*expected at least 9 questions, got 5"),
        ([*qa, "--sizes=2", "--eval-every=1"], "eval_sizes: .*at least 8 questions, got 5"),
        (["--task=lookup", "--sizes=16"], "sizes: keys: expected 1..9, got 16"),
        (["--task=chess", "--model=x"], "task: expected one of chain, .*, got 'chess'"),
        (["--data=x.jsonl"], "data: expected none for task 'chain', got 'x.jsonl'"),
        (["--trackers=tensorbord"], "trackers: expected some of .*, got 'tensorbord'"),
        (["--sft-steps=1", "--transcripts=none"], "transcripts: none: No such file or directory"),
    ):
        out = [f"--out={tmp_path / 'run'}", "--trackers="]
        code, line = said(capsys, main, *out, *arguments)
        assert code == 1
        assert re.search(f"^python -m mem1_kernels.ppo: error: .*{message}", line), line


def test_a_folder_that_does_not_fit(tmp_path, capsys):
    (tmp_path / "file").touch()
    code, line = said(capsys, main, f"--out={tmp_path / 'file'}", "--trackers=")
    assert (code, line.split(" error: ")[1]) == (
        1,
        f"out: {tmp_path / 'file'} cannot be written (File exists)",
    )
    config = small(tmp_path, save_every=1, steps=0)
    train(config, progress=False)
    code, line = said(capsys, main, f"--out={config.out}", "--trackers=")
    assert (code, line.split(" error: ")[1]) == (
        1,
        f"out: {config.out} holds checkpoints; set resume, or take another folder",
    )


def test_a_bug_keeps_its_traceback():
    for error in (
        ValueError("shapes differ"),
        ValueError("log-probs: rollout and trainer differ"),
        TypeError("unsupported operand"),
        ImportError("cannot import name 'x' from 'y'"),
        ValueError("mask: expected torch.bool"),
    ):
        assert not is_for_the_user(error)
    for error in (
        ValueError("sizes: expected"),
        ValueError("data, corpus: expected"),
        ImportError("lora_rank: peft is not installed"),
        ImportError("bm25s is not installed (`pip install mem1-kernels[agent]`)"),
        FileNotFoundError(2, "No such file or directory", "x"),
    ):
        assert is_for_the_user(error)


# from the command line to the curve, with parts of one's own

PARTS = """
from dataclasses import replace
from mem1_kernels.agent.world import World, make_world

chain = make_world("chain", sizes=[1])

def make():
    return replace(chain, depth=lambda turn: turn.number % 2)

def drop_infos(segments):
    infos = [i for i, segment in enumerate(segments) if segment.role == "info"]
    following = dict(zip(infos, infos[1:]))
    return [following.get(i, len(segments)) for i in range(len(segments))]

def too_short(segments):
    return [len(segments)]

def takes_one(argument):
    return chain

def makes_none():
    return None

class Untagged:
    pass

untagged = replace(chain, make=Untagged)
number = 7
"""
BROKEN = "import json\nx = = 1\n"
MISSING = "import no_such_package\n"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A current directory with modules of one's own, as `python -m` finds them."""
    for name, text in (("parts", PARTS), ("broken", BROKEN), ("missing", MISSING)):
        (tmp_path / f"my_{name}.py").write_text(text)
        sys.modules.pop(f"my_{name}", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


A_WORLD = "environment: expected a World, or a function that makes one, as 'my_parts:"
WRONG_PARTS = {
    "environment=my_parts": "environment: expected module:name, got 'my_parts'",
    "environment=:make": "environment: expected module:name, got ':make'",
    "environment=..parts:make": "environment: expected module:name, got '..parts:make'",
    "environment=my_none:x": "environment: 'my_none:x' cannot be imported (ModuleNotFoundError: No "
    "module named 'my_none')",
    "environment=my_missing:x": "cannot be imported (ModuleNotFoundError: No module named 'no_such",
    "environment=my_broken:x": "cannot be imported (SyntaxError: invalid syntax (my_broken",
    "environment=my_parts:maker": "environment: 'my_parts:maker' cannot be imported: no 'maker' in",
    "environment=my_parts:number": f"{A_WORLD}number', got int",
    "environment=my_parts:makes_none": f"{A_WORLD}makes_none', got NoneType",
    "environment=my_parts:takes_one": f"{A_WORLD}takes_one', got one that needs arguments (missing",
    "environment=my_parts:untagged": "environment: expected World.make to make environments whose "
    "tags have stops, got Untagged",
    "retention=my_parts:too_short": "retention: 'my_parts:too_short' is no retention policy "
    "(too_short: expected 7 expires, got 1)",
    "retention=my_parts:number": "retention: 'my_parts:number' is no retention policy (retention: ",
    "retention=mem1_kernels.retention:keep_last": "keep_last' is no retention policy (turns: expec",
    "retention=fold": "retention: fold drops a branch when it returns, but this world opens none",
    "retention=sub_agents": "retention: sub_agents drops a branch when it returns, but this world",
    "retention=mem1_kernels:memento": "retention: memento drops blocks inside a turn, but this "
    "world marks none: expected World.mark, got None",
    "retention=clear_tool_results(9, exclude=('a',))": "('a',)) excludes tools by name, but this "
    "world names none: expected World.info_name, got None",
}


@pytest.mark.parametrize("option", WRONG_PARTS)
def test_parts_that_do_not_fit(here, capsys, option):
    code, line = said(capsys, main, "--trackers=", "--out=run", f"--{option}")
    assert code == (2 if "no retention policy" in line else 1)
    assert WRONG_PARTS[option] in line


QUICK = {
    "trackers": "",
    "out": "run",
    "steps": 2,
    "sft-steps": 2,
    "sft-batch": 4,
    "episodes": 8,
    "minibatch": 4,
    "rollout-batch": 4,
    "token-budget": 128,
    "max-new-tokens": 9,
    "sizes": 2,
}


@pytest.mark.parametrize("retention", ["fold", "my_parts:drop_infos"])
def test_parts_of_ones_own_train(here, capsys, retention):
    options = QUICK | {"environment": "my_parts:make", "retention": retention}
    main([f"--{name}={value}" for name, value in options.items()])
    lines = (here / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["log_prob_gap"] < 1e-3 for line in lines] == [True, True]
    assert capsys.readouterr().out.endswith("run: metrics.jsonl, curve.png, policy/\n")
