"""The options of a run: their help, their bounds, the file and the command line."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mem1_kernels.ppo.config import Config, parse_arguments, read_config

ROOT = Path(__file__).parents[1]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in fields(Config):
        assert f"--{option.name.replace('_', '-')}" in text
        assert option.metadata["help"].split("[")[0][:30] in text


def test_the_command_line_replaces_what_the_file_says(tmp_path):
    config = parse_arguments(
        ["--config", str(ROOT / "configs/chain.toml"), "--lr", "1", "--sizes", "5", "--bf16"]
    )
    assert (config.lr, config.sizes, config.bf16, config.sft_keep) == (1.0, (5,), True, 0.6)
    with pytest.raises(SystemExit):
        parse_arguments(["--steps", "-1"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_configs_are_read(path):
    assert isinstance(read_config(path), Config)


ERRORS = {
    "algorithm: expected one of": {"algorithm": "sarsa"},
    "steps: expected at least 0, got -1": {"steps": -1},
    "lr: expected a positive number, got 0": {"lr": 0.0},
    "kl_coef: expected at least 0, got nan": {"kl_coef": float("nan")},
    "rollout_batch: expected at least 1, got 0": {"rollout_batch": 0},
    "out: expected text without NUL, got 'a\\x00b'": {"out": "a\0b"},
    "clip: expected a number between 0 and 1, got 1.0": {"clip": 1.0},
    "dual_clip: expected 0 or a number above 1, got 1.0": {"dual_clip": 1.0},
    "dual_clip: expected 0 or a number above 1, got -2.0": {"dual_clip": -2.0},
    "gamma: expected a number in [0, 1], got 1.5": {"gamma": 1.5},
    "lam: expected a number in [0, 1], got -0.1": {"lam": -0.1},
    "sft_keep: expected a number in [0, 1], got nan": {"sft_keep": float("nan")},
    "sizes: expected whole numbers >= 1, got ()": {"sizes": ()},
    "eval_sizes: expected whole numbers >= 1, got (2, 0.5)": {"eval_sizes": (2, 0.5)},
    "group_size: expected at least 2 for grpo, got 1": {"algorithm": "grpo"},
    "minibatch: expected a multiple of group_size 3": {"group_size": 3, "episodes": 6},
    "kl_in: expected 'loss' for rloo": {
        "algorithm": "rloo",
        "group_size": 2,
        "kl_in": "reward",
    },
    "kl_kind: expected 'k2' or 'k3' in the loss": {"kl_kind": "k1"},
    "sft_jump: expected 0 for 'reprefill' positions, got 1": {
        "positions": "reprefill",
        "sft_jump": 1,
    },
    "sft_steps: expected at least 1 to learn": {"transcripts": "x.jsonl"},
    "data, corpus: expected both for task 'qa', got '' and 'x'": {"task": "qa", "corpus": "x"},
    "model: expected one with a tokenizer for task 'factbook', got 'tiny'": {"task": "factbook"},
    "fold, sub_agents or module:function, got 'keep_some'": {"retention": "keep_some"},
    "got 'keep_last(0)' (turns: expected at least 1": {"retention": "keep_last(0)"},
    "got 'strip_reasoning(1.5)' (keep: expected an": {"retention": "strip_reasoning(1.5)"},
    "got 'clear_tool_results()' (": {"retention": "clear_tool_results()"},
    "got 'keep_last(f())' (malformed": {"retention": "keep_last(f())"},
    "credit: expected 'token' for grpo": {
        "credit": "turn",
        "algorithm": "grpo",
        "group_size": 2,
    },
    "retention: 'no_such_module:f' cannot be imported": {"retention": "no_such_module:f"},
    "retention: 'mem1_kernels:none' cannot be imported": {"retention": "mem1_kernels:none"},
}


@pytest.mark.parametrize("message", ERRORS)
def test_option_errors(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Config(**ERRORS[message])


@pytest.mark.parametrize("name", [f.name for f in fields(Config) if f.type in ("int", "float")])
def test_every_number_has_a_range(name):
    if name == "seed":
        assert Config(seed=-1).seed == -1
        return
    for value in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}"):
            Config(**{name: value})


@pytest.mark.parametrize("path", ["a\0b.toml", "\ud83d.toml"])
def test_a_name_that_no_file_can_have(path):
    with pytest.raises(ValueError, match="config: no file can have the name"):
        read_config(path)


def test_the_terminal_is_not_steered(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--config", "\x1b[31m.toml"])
    assert "--config: \\x1b[31m.toml: No such file" in capsys.readouterr().err


def test_the_address_of_a_corpus_shows_no_password():
    for corpus in ("http://u:hunter2@h/x", "http:/u:hunter2@h/x"):
        with pytest.raises(ValueError, match="data, corpus: expected both") as caught:
            Config(task="qa", model="m", corpus=corpus)
        assert "hunt" not in str(caught.value)


def test_file_errors(tmp_path):
    path = tmp_path / "c.toml"
    for text, message in (
        ("learning_rate = 1.0", "no option is called 'learning_rate'"),
        ('steps = "3"', "steps: expected int, got '3'"),
        ("bf16 = 1", "bf16: expected bool, got 1"),
        ("steps = 1" + "0" * 5000, "c.toml: not a TOML file"),
        ("seed = 1" + "0" * 30, "seed: expected an integer from -2^63 to 2^64 - 1"),
        ("lr = 1" + "0" * 400, "lr: expected float, got 1000"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_config(path)
