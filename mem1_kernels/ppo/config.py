"""The options of a run, from a TOML file and the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from mem1_kernels.retention import Retention, keep_all, keep_last, mem1

# Largest and mean |log-prob of the rollout - log-prob of the trainer| that pass as rounding.
TOLERANCE = {"float32": (1e-3, 1e-4), "bfloat16": (2.0, 0.05)}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


_TYPES = {"str": str, "int": int, "float": float, "bool": bool, "tuple[int, ...]": tuple}


@dataclass(frozen=True)
class Config:
    """Every option of a run; `python -m mem1_kernels.ppo --help` prints them.

    Raises:
        ValueError: an option out of its range, or two that do not go together.
    """

    # run
    out: str = _option(
        "out/ppo", "folder for the config, metrics.jsonl, curve.png, checkpoints, policy"
    )
    seed: int = _option(0, "of everything: weights, tasks, sampling, order")
    steps: int = _option(10, "PPO steps; each plays `episodes` episodes")
    save_every: int = _option(0, "steps between checkpoints, one after the warm start; 0: none")
    keep_checkpoints: int = _option(2, "how many of the newest checkpoints stay")
    resume: bool = _option(False, "go on from the newest checkpoint in `out`, if there is one")
    trackers: str = _option("tensorboard", "trackers of accelerate, such as tensorboard,wandb")
    save_transcripts: bool = _option(False, "write each step's episodes into `out`/transcripts")
    # model
    model: str = _option("tiny", "Hugging Face id or path, or tiny: 2 layers, 64 wide, for ids")
    dtype: str = _option("float32", "of the loaded weights: float32 or bfloat16")
    bf16: bool = _option(False, "compute in bfloat16 over the weights (autocast)")
    lora_rank: int = _option(0, "train LoRA adapters of this rank on all linear layers; 0: all")
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass")
    # task
    task: str = _option("chain", "chain or lookup (token ids), factbook or qa (text)")
    sizes: tuple[int, ...] = _option((2, 3, 4), "hops, keys or objectives; episodes draw evenly")
    data: str = _option("", "qa: questions, .jsonl or .parquet")
    corpus: str = _option("", "qa: passages (.jsonl), or the http address of a retrieval server")
    topk: int = _option(3, "passages a search")
    max_info_tokens: int = _option(600, "an observation is cut to this many tokens")
    workers: int = _option(1, "environments that act at once, for tools that wait for a network")
    # rollout
    positions: str = _option("kept", "kept: pruned cache; reprefill: the live text sent again")
    retention: str = _option("mem1", "mem1, keep_all or keep_last(n)")
    max_turns: int = _option(20, "turns after which an episode is over")
    max_new_tokens: int = _option(16, "tokens after which a turn is cut")
    temperature: float = _option(1.0, "of sampling, and so of the policy that is trained")
    rollout_batch: int = _option(64, "episodes side by side on one process")
    # warm start
    sft_steps: int = _option(0, "steps of supervised warm start; 0: none")
    sft_batch: int = _option(64, "traces a step")
    sft_lr: float = _option(3e-3, "learning rate, falling linearly to a tenth")
    sft_keep: float = _option(1.0, "chance that the teacher remembers; below 1 it forgets")
    sft_jump: int = _option(0, "largest random jump of the positions behind the prompt")
    transcripts: str = _option("", "learn from this JSONL file (save_transcripts) and no teacher")
    # PPO
    algorithm: str = _option("ppo", "ppo, grpo, rloo or reinforce++")
    episodes: int = _option(256, "episodes a step, over all processes")
    group_size: int = _option(1, "episodes of the same task; at least 2 for grpo and rloo")
    epochs: int = _option(2, "passes over a step's episodes")
    minibatch: int = _option(128, "episodes an optimizer step")
    token_budget: int = _option(4096, "tokens a packed row; a longer trajectory has its own")
    lr: float = _option(3e-4, "learning rate of the policy (AdamW, no weight decay)")
    warmup: int = _option(0, "steps over which the learning rates rise")
    max_grad_norm: float = _option(1.0, "clip of the policy's and of the critic's gradient norm")
    clip: float = _option(0.2, "of the probability ratio")
    dual_clip: float = _option(0.0, "bound on the loss at negative advantages, above 1; 0: none")
    entropy_coef: float = _option(0.0, "weight of the entropy bonus")
    kl_coef: float = _option(0.01, "weight of the KL to the policy after the warm start")
    kl_in: str = _option("loss", "loss, or reward: a penalty at every token")
    kl_kind: str = _option("k3", "estimator: k1, k2 or k3")
    gamma: float = _option(1.0, "discount a generated token")
    lam: float = _option(1.0, "of GAE")
    critic: str = _option("detached", "head, detached (head that leaves the policy alone) or model")
    critic_lr: float = _option(1.5e-3, "learning rate of the critic")
    value_clip: float = _option(0.5, "clip of the value's change; 0: none")
    importance_cap: float = _option(0.0, "truncated importance weights, trainer over engine; 0: no")
    log_prob_tolerance: float = _option(
        0.0, "largest |rollout - trainer| log-prob that is no error; 0: by dtype; inf: any"
    )
    # evaluation
    eval_every: int = _option(0, "steps between evaluations, one before and one after; 0: none")
    eval_sizes: tuple[int, ...] = _option((2, 4, 8, 16, 32), "sizes that are evaluated")
    eval_episodes: int = _option(64, "episodes a size")
    eval_temperature: float = _option(0.0, "of sampling in evaluations; 0: greedy")
    eval_data: str = _option("", "qa: questions for evaluation; `data` if empty")

    def __post_init__(self) -> None:
        choices = {
            "dtype": tuple(TOLERANCE),
            "task": ("chain", "lookup", "factbook", "qa"),
            "positions": ("kept", "reprefill"),
            "algorithm": ("ppo", "grpo", "rloo", "reinforce++"),
            "kl_in": ("loss", "reward"),
            "kl_kind": ("k1", "k2", "k3"),
            "critic": ("head", "detached", "model"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        counts = "episodes group_size epochs minibatch token_budget rollout_batch sft_batch topk"
        counts += " max_turns max_new_tokens max_info_tokens workers keep_checkpoints eval_episodes"
        or_none = "steps sft_steps sft_jump lora_rank warmup save_every eval_every kl_coef"
        or_none += " entropy_coef value_clip importance_cap log_prob_tolerance eval_temperature"
        least = dict.fromkeys(counts.split(), 1) | dict.fromkeys(or_none.split(), 0)
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("lr", "critic_lr", "sft_lr", "max_grad_norm", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("gamma", "lam", "sft_keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if not 0 < self.clip < 1:
            raise ValueError(f"clip: expected a number between 0 and 1, got {self.clip}")
        if self.dual_clip and not self.dual_clip > 1:
            raise ValueError(f"dual_clip: expected 0 or a number above 1, got {self.dual_clip}")
        for name in ("sizes", "eval_sizes"):
            sizes = getattr(self, name)
            if not sizes or not all(type(size) is int and size >= 1 for size in sizes):
                raise ValueError(f"{name}: expected whole numbers >= 1, got {sizes}")
        if self.algorithm in ("grpo", "rloo") and self.group_size < 2:
            raise ValueError(
                f"group_size: expected at least 2 for {self.algorithm}, got {self.group_size}"
            )
        for name in ("episodes", "minibatch"):
            if getattr(self, name) % self.group_size:
                raise ValueError(
                    f"{name}: expected a multiple of group_size {self.group_size}, "
                    f"got {getattr(self, name)}"
                )
        if self.kl_in == "reward" and self.algorithm in ("grpo", "rloo"):
            raise ValueError(
                f"kl_in: expected 'loss' for {self.algorithm}, which scores whole episodes, "
                "got 'reward'"
            )
        if self.kl_in == "loss" and self.kl_kind == "k1" and self.kl_coef:
            raise ValueError(
                "kl_kind: expected 'k2' or 'k3' in the loss, where the gradient of k1 is 0 in the "
                "mean, got 'k1'"
            )
        if self.sft_jump and self.positions == "reprefill":
            raise ValueError(
                f"sft_jump: expected 0 for compact (re-prefilled) positions, got {self.sft_jump}"
            )
        if self.transcripts and not self.sft_steps:
            raise ValueError("sft_steps: expected at least 1 to learn from transcripts, got 0")
        if self.task == "qa" and not (self.data and self.corpus):
            raise ValueError(
                f"data, corpus: expected both for task 'qa', got {self.data!r} and {self.corpus!r}"
            )
        if self.model == "tiny" and self.task not in ("chain", "lookup"):
            raise ValueError(
                f"model: expected one with a tokenizer for task {self.task!r}, "
                "got 'tiny', which knows token ids only"
            )
        retention_of(self.retention)


def retention_of(name: str) -> Retention:
    """The policy that an option names.

    >>> retention_of("keep_last(2)").__name__
    'keep_last(2)'
    """
    named = {"mem1": mem1, "keep_all": keep_all}
    if name in named:
        return named[name]
    number = re.fullmatch(r"keep_last\(([1-9]\d*)\)", name)
    if number is None:
        raise ValueError(f"retention: expected 'mem1', 'keep_all' or 'keep_last(n)', got {name!r}")
    return keep_last(int(number.group(1)))


def read_config(path: str | Path, **overrides: Any) -> Config:
    """A config from a TOML file of options, and options that replace some of them.

    Raises:
        ValueError: an option that does not exist, or a value of another type; and as `Config`.

    >>> read_config("configs/chain.toml", steps=3).steps
    3
    """
    with open(path, "rb") as file:
        values = tomllib.load(file) | overrides
    kinds = {option.name: _TYPES[str(option.type)] for option in fields(Config)}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{path}: no option is called {name!r}")
        if kinds[name] is tuple and isinstance(value, (list, tuple)):
            values[name] = tuple(value)
        elif kinds[name] is float and type(value) is int:
            values[name] = float(value)
        elif type(value) is not kinds[name]:
            raise ValueError(f"{name}: expected {kinds[name].__name__}, got {value!r}")
    return Config(**values)


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """The config that a command line asks for: `--config file.toml`, then single options."""
    parser = argparse.ArgumentParser(
        "python -m mem1_kernels.ppo",
        usage="%(prog)s [--config FILE] [--option value ...]",
        description="Train a MEM1 agent with PPO, GRPO, RLOO or REINFORCE++. Also: accelerate "
        "launch -m mem1_kernels.ppo ... for several processes.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of the options below")
    for option in fields(Config):
        assert option.default is not MISSING
        kind = _TYPES[str(option.type)]
        shown = " ".join(map(str, option.default)) if kind is tuple else option.default
        text = f"{option.metadata['help']} [{shown}]".replace("%", "%%")
        flag = "--" + option.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif kind is tuple:
            parser.add_argument(flag, type=int, nargs="+", metavar="N", help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
    values = vars(parser.parse_args(arguments))
    path = values.pop("config", None)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return Config(**values) if path is None else read_config(path, **values)
    except (ValueError, OSError) as error:
        parser.error(str(error))
