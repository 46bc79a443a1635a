"""The options of a run, from a TOML file and the command line."""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from mem1_kernels._secrets import public_address
from mem1_kernels._text import printable
from mem1_kernels.context_editing import clear_tool_results, strip_reasoning, sub_agents
from mem1_kernels.ppo.losses import KLKind
from mem1_kernels.retention import (
    Retention,
    Segment,
    fold,
    keep_all,
    keep_last,
    mem1,
    retained,
)
from mem1_kernels.trajectory import Positions

RETENTIONS = (
    "mem1, keep_all, keep_last(n), strip_reasoning(n), clear_tool_results(n), fold, sub_agents"
)
"""The policies that the option `retention` knows by name."""

# Largest and mean |log-prob of the rollout - log-prob of the trainer| that pass as rounding.
TOLERANCE = {"float32": (1e-3, 1e-4), "bfloat16": (2.0, 0.05)}


class Bound(NamedTuple):
    """What values an option may have: in words, and as a test."""

    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Bound:
    return Bound(f"at least {low}", lambda value: value >= low)


ANY = Bound("any value", lambda value: True)
POSITIVE = Bound("a positive number", lambda value: value > 0)
SHARE = Bound("a number in [0, 1]", lambda value: 0 <= value <= 1)
BETWEEN = Bound("a number between 0 and 1", lambda value: 0 < value < 1)
ZERO_OR_ABOVE_ONE = Bound("0 or a number above 1", lambda value: value == 0 or value > 1)
SEED = Bound("an integer from -2^63 to 2^64 - 1", lambda value: -(2**63) <= value < 2**64)
SIZES = Bound("whole numbers >= 1", lambda value: bool(value) and min(value) >= 1)


def _option(default: Any, text: str, bound: Bound = ANY) -> Any:
    return field(default=default, metadata={"help": text, "bound": bound})


@dataclass(frozen=True)
class Config:
    """Every option of a run; `python -m mem1_kernels.ppo --help` prints them.

    Raises:
        ValueError: an option of another type or out of its range, or two that do not go together.
    """

    # run
    out: str = _option(
        "out/ppo", "folder for the config, metrics.jsonl, curve.png, checkpoints, policy"
    )
    seed: int = _option(0, "of everything: weights, tasks, sampling, order", SEED)
    steps: int = _option(10, "PPO steps; each plays `episodes` episodes", at_least(0))
    save_every: int = _option(
        0, "steps between checkpoints, one after the warm start; 0: none", at_least(0)
    )
    keep_checkpoints: int = _option(2, "how many of the newest checkpoints stay", at_least(1))
    resume: bool = _option(False, "go on from the newest checkpoint in `out`, if there is one")
    trackers: str = _option("tensorboard", "trackers of accelerate, such as tensorboard,wandb")
    save_transcripts: bool = _option(False, "write each step's episodes into `out`/transcripts")
    # model
    model: str = _option("tiny", "Hugging Face id or path, or tiny: 2 layers, 64 wide, for ids")
    dtype: Literal["float32", "bfloat16"] = _option("float32", "of the loaded weights")
    bf16: bool = _option(False, "compute in bfloat16 over the weights (autocast)")
    lora_rank: int = _option(
        0, "train LoRA adapters of this rank on all linear layers; 0: all weights", at_least(0)
    )
    gradient_checkpointing: bool = _option(False, "recompute activations in the backward pass")
    # task
    task: str = _option("chain", "chain or lookup (token ids); factbook, qa or webshop (text)")
    environment: str = _option(
        "", "module:name of a World of yours, or of a function that makes one, in place of task"
    )
    sizes: tuple[int, ...] = _option(
        (2, 3, 4), "hops, keys or objectives; episodes draw evenly", SIZES
    )
    data: str = _option("", "qa: questions, .jsonl or .parquet")
    corpus: str = _option("", "qa: passages (.jsonl), or the http address of a retrieval server")
    topk: int = _option(3, "passages per search", at_least(1))
    max_info_tokens: int = _option(600, "an observation is cut to this many tokens", at_least(1))
    workers: int = _option(
        1, "environments that act at once, for tools that wait for a network", at_least(1)
    )
    # rollout
    positions: Positions = _option(
        "kept", "pruned cache (its gaps kept, or closed: compact), or the live text sent again"
    )
    retention: str = _option("mem1", RETENTIONS + ", or module:function")
    max_turns: int = _option(20, "turns after which an episode is over", at_least(1))
    max_new_tokens: int = _option(16, "tokens after which a turn is cut", at_least(1))
    temperature: float = _option(1.0, "of sampling, and so of the policy that is trained", POSITIVE)
    rollout_batch: int = _option(64, "episodes side by side on one process", at_least(1))
    # warm start
    sft_steps: int = _option(0, "steps of supervised warm start; 0: none", at_least(0))
    sft_batch: int = _option(64, "traces per step", at_least(1))
    sft_lr: float = _option(3e-3, "learning rate, falling linearly to a tenth", POSITIVE)
    sft_keep: float = _option(1.0, "chance that the teacher remembers; below 1 it forgets", SHARE)
    sft_jump: int = _option(
        0, "largest random jump of the positions behind the prompt", at_least(0)
    )
    transcripts: str = _option("", "learn from this JSONL file (save_transcripts) and no teacher")
    # PPO
    algorithm: Literal["ppo", "grpo", "rloo", "reinforce++"] = _option("ppo", "of the advantages")
    episodes: int = _option(256, "episodes per step, over all processes", at_least(1))
    group_size: int = _option(
        1, "episodes of the same task; at least 2 for grpo and rloo", at_least(1)
    )
    epochs: int = _option(2, "passes over a step's episodes", at_least(1))
    minibatch: int = _option(128, "episodes per optimizer step", at_least(1))
    token_budget: int = _option(
        4096, "tokens per packed row; a longer trajectory has its own", at_least(1)
    )
    lr: float = _option(3e-4, "learning rate of the policy (AdamW, no weight decay)", POSITIVE)
    warmup: int = _option(0, "steps over which the learning rates rise", at_least(0))
    max_grad_norm: float = _option(
        1.0, "clip of the policy's and of the critic's gradient norm", POSITIVE
    )
    clip: float = _option(0.2, "of the probability ratio", BETWEEN)
    dual_clip: float = _option(
        0.0, "bound on the loss at negative advantages, above 1; 0: none", ZERO_OR_ABOVE_ONE
    )
    entropy_coef: float = _option(0.0, "weight of the entropy bonus", at_least(0))
    kl_coef: float = _option(
        0.01, "weight of the KL to the policy after the warm start", at_least(0)
    )
    kl_in: Literal["loss", "reward"] = _option("loss", "where the KL is; reward: at every token")
    kl_kind: KLKind = _option("k3", "estimator of the KL")
    credit: Literal["token", "turn"] = _option(
        "token", "a step of ppo's GAE: a generated token, or all those of a turn"
    )
    gamma: float = _option(1.0, "discount per generated token, or turn (credit)", SHARE)
    lam: float = _option(1.0, "of GAE", SHARE)
    critic: Literal["head", "detached", "model"] = _option(
        "detached", "detached: a head that leaves the policy alone"
    )
    critic_lr: float = _option(1.5e-3, "learning rate of the critic", POSITIVE)
    value_clip: float = _option(0.5, "clip of the value's change; 0: none", at_least(0))
    importance_cap: float = _option(
        0.0, "truncated importance weights, trainer over engine; 0: none", at_least(0)
    )
    log_prob_tolerance: float = _option(
        0.0,
        "largest |rollout - trainer| log-prob that is not an error; 0: by dtype; inf: any",
        at_least(0),
    )
    # evaluation
    eval_every: int = _option(
        0, "steps between evaluations, one before and one after; 0: none", at_least(0)
    )
    eval_sizes: tuple[int, ...] = _option((2, 4, 8, 16, 32), "sizes that are evaluated", SIZES)
    eval_episodes: int = _option(64, "episodes per size", at_least(1))
    eval_temperature: float = _option(0.0, "of sampling in evaluations; 0: greedy", at_least(0))
    eval_data: str = _option("", "qa: questions for evaluation; `data` if empty")

    def __post_init__(self) -> None:
        for option in options():
            value = _read(option, getattr(self, option.name))
            object.__setattr__(self, option.name, value)
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
        if self.credit == "turn" and self.algorithm != "ppo":
            raise ValueError(
                f"credit: expected 'token' for {self.algorithm}, which has no critic, got 'turn'"
            )
        if self.kl_in == "loss" and self.kl_kind == "k1" and self.kl_coef:
            raise ValueError(
                "kl_kind: expected 'k2' or 'k3' in the loss, where the gradient of k1 is 0 in the "
                "mean, got 'k1'"
            )
        if self.sft_jump and self.positions != "kept":
            raise ValueError(
                f"sft_jump: expected 0 for {self.positions!r} positions, got {self.sft_jump}"
            )
        if self.transcripts and not self.sft_steps:
            raise ValueError("sft_steps: expected at least 1 to learn from transcripts, got 0")
        if self.task == "qa" and not self.environment and not (self.data and self.corpus):
            corpus = public_address(self.corpus)
            raise ValueError(
                f"data, corpus: expected both for task 'qa', got {self.data!r} and {corpus!r}"
            )
        speaks_ids = self.task in ("chain", "lookup") or self.environment
        if self.model == "tiny" and not speaks_ids:
            raise ValueError(
                f"model: expected one with a tokenizer for task {self.task!r}, "
                "got 'tiny', which knows token ids only"
            )
        retention_of(self.retention)


class Option(NamedTuple):
    """An option of `Config`: its type is str, int, float, bool or tuple (of integers)."""

    name: str
    kind: type
    choices: tuple[str, ...]
    default: Any
    help: str
    bound: Bound


def options() -> list[Option]:
    """Every option of `Config`."""
    found = []
    hints = get_type_hints(Config)
    for item in fields(Config):
        hint = hints[item.name]
        choices = get_args(hint) if getattr(hint, "__origin__", None) is Literal else ()
        kind = str if choices else getattr(hint, "__origin__", hint)
        text, bound = item.metadata["help"], item.metadata["bound"]
        found.append(Option(item.name, kind, choices, item.default, text, bound))
    return found


def _read(option: Option, value: Any) -> Any:
    """The value of an option, as its type.

    Raises:
        ValueError: another type, another choice, or out of its range.
    """
    name, kind = option.name, option.kind
    if kind is tuple and isinstance(value, (list, tuple)):
        value = tuple(value)
        fits = all(type(item) is int for item in value)
    elif kind is float and type(value) is int:
        fits = abs(value) < 2**1000  # larger ones are not even a float
        value = float(value) if fits else value
    else:
        fits = type(value) is kind
    if option.choices:
        if value not in option.choices:
            raise ValueError(f"{name}: expected one of {option.choices}, got {value!r}")
    elif not fits:
        expected = option.bound.text if kind is tuple else kind.__name__
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    elif kind is str and "\0" in value:
        raise ValueError(f"{name}: expected text without NUL, got {value!r}")
    elif not option.bound.holds(value) or (kind is float and math.isnan(value)):
        raise ValueError(f"{name}: expected {option.bound.text}, got {value}")
    return value


def load_object(option: str, name: str) -> Any:
    """What `module:name` stands for; `option` is named in errors.

    Raises:
        ValueError: another form, a module that cannot be imported, a name that is not in it.

    >>> load_object("retention", "mem1_kernels.retention:keep_all").__name__
    'keep_all'
    """
    module, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
        raise ValueError(f"{option}: expected module:name, got {name!r}")
    try:
        found: Any = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise ValueError(
            f"{option}: {name!r} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{option}: {name!r} cannot be imported: no {part!r} in {found!r}")
        found = getattr(found, part)
    return found


@contextmanager
def loading(option: str, name: str) -> Iterator[None]:
    """While a model or a tokenizer is loaded by its name: what fails raises in one line.

    Raises:
        ValueError: it cannot be loaded; names the option.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, LookupError, ImportError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{option}: {name!r} cannot be loaded ({reason})") from error


def retention_of(name: str) -> Retention:
    """The policy that an option names.

    >>> retention_of("keep_last(2)").__name__
    'keep_last(2)'
    >>> retention_of("clear_tool_results(2000, keep=2)")
    clear_tool_results(2000, keep=2)
    """
    named = {"mem1": mem1, "keep_all": keep_all, "fold": fold, "sub_agents": sub_agents}
    if name in named:
        return named[name]
    made: dict[str, Callable[..., Retention]] = {
        "keep_last": keep_last,
        "strip_reasoning": strip_reasoning,
        "clear_tool_results": clear_tool_results,
    }
    try:
        call: Any = ast.parse(name.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        call = None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in made:
        try:
            arguments = [ast.literal_eval(argument) for argument in call.args]
            options = {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}
            return made[call.func.id](*arguments, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"retention: expected a policy, got {name!r} ({error})") from error
    if ":" in name:
        return _checked(load_object("retention", name), name)
    raise ValueError(f"retention: expected {RETENTIONS} or module:function, got {name!r}")


def _checked(retention: Any, name: str) -> Retention:
    """A policy that was imported, once it has answered for two turns."""
    turns = [Segment(role, [0, 1], turn) for turn in (1, 2) for role in ("state", "action", "info")]
    try:
        retained([Segment("prompt", [0]), *turns], retention)
    except (TypeError, ValueError) as error:
        raise ValueError(f"retention: {name!r} is no retention policy ({error})") from error
    return retention


def read_config(path: str | Path, **overrides: Any) -> Config:
    """A config from a TOML file of options, and options that replace some of them.

    Raises:
        OSError: the file cannot be read.
        ValueError: a file that is not TOML, an option that does not exist; and as `Config`. The
            message names the file and the line, but for the options in `overrides`.

    >>> read_config("configs/chain.toml", steps=3).steps
    3
    """
    try:
        data = Path(path).read_bytes()
    except ValueError:  # a NUL, or a lone surrogate
        raise ValueError(f"config: no file can have the name {str(path)!r}") from None
    try:
        text = data.decode("utf-8-sig")
        values = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = data[error.start : error.start + 1]
        raise ValueError(f"{path}, line {line}: expected UTF-8, got {got!r}") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    known = {option.name for option in options()}
    for name in values.keys() | overrides.keys():
        if name not in known:
            place = f"{_place(path, text, name)}: " if name in values else ""
            raise ValueError(f"{place}no option is called {name!r}")
    try:
        return Config(**values | overrides)
    except ValueError as error:
        name = str(error).partition(":")[0].partition(",")[0]
        if name in overrides or name not in values:
            raise
        raise ValueError(f"{_place(path, text, name)}: {error}") from None


def _place(path: str | Path, text: str, name: str) -> str:
    """The file, and the line in which it sets an option."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"""\s*\[*["']?{re.escape(name)}["']?\s*[=.\]]""", line):
            return f"{path}, line {number}"
    return str(path)


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
    for option in options():
        default = option.default
        shown = " ".join(map(str, default)) if option.kind is tuple else default
        words = f"{', '.join(option.choices)}: " if option.choices else ""
        text = f"{words}{option.help} [{shown}]".replace("%", "%%")
        flag = "--" + option.name.replace("_", "-")
        if option.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif option.kind is tuple:
            parser.add_argument(flag, type=int, nargs="+", metavar="N", help=text)
        else:
            metavar = option.kind.__name__.upper()
            parser.add_argument(flag, type=option.kind, metavar=metavar, help=text)
    values = vars(parser.parse_args(arguments))
    path = values.pop("config", None)
    try:
        return Config(**values) if path is None else read_config(path, **values)
    except OSError as error:
        shown = printable(path)
        parser.exit(2, f"{parser.prog}: error: --config: {shown}: {error.strerror}\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
