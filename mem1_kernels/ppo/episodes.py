"""The episodes of a run: which tasks are drawn, how they are played, what they come to."""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from mem1_kernels._text import printable
from mem1_kernels.agent.agent import MemoryEfficientAgent
from mem1_kernels.agent.episodes import Result
from mem1_kernels.agent.world import TOKEN_TASKS, World, make_world
from mem1_kernels.context_editing import memento, sub_agents
from mem1_kernels.ppo.config import Config, load_object, loading, retention_of
from mem1_kernels.ppo.files import replaced
from mem1_kernels.retention import Retention, Segment, fold
from mem1_kernels.rollout import Engine, Generation, HFEngine, Rollout
from mem1_kernels.trajectory import Trajectory

logger = logging.getLogger(__name__)

MakeEngine = Callable[[Any], Engine]
"""policy -> the engine that plays a batch of episodes; called once per batch."""


def seed_of(config: Config, label: str, number: int) -> int:
    """A seed for one part of the run."""
    return zlib.crc32(f"{config.seed}/{label}/{number}".encode())


def generation_of(config: Config) -> Generation:
    """What the config's options say of generation."""
    return Generation(
        retention=retention_of(config.retention),
        max_turns=config.max_turns,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
    )


def world_of(config: Config) -> World:
    """The world that `config.environment` or `config.task` names.

    Raises:
        ValueError: an environment that cannot be imported or is not a World; and as `make_world`.
    """
    if config.environment:
        world = _imported_world(config.environment)
        speaks_ids = isinstance(world.make().tags.stops[0], int)
    else:
        world = make_world(
            config.task,
            sizes=config.sizes,
            eval_sizes=config.eval_sizes if config.eval_every else (),
            data=config.data,
            eval_data=config.eval_data,
            corpus=config.corpus,
            topk=config.topk,
            teacher_keep=config.sft_keep,
            seed=config.seed,
        )
        speaks_ids = config.task in TOKEN_TASKS
    if speaks_ids or world.tokenizer is not None:
        return world
    if config.model == "tiny":
        raise ValueError(
            f"model: expected one with a tokenizer for the text of {config.environment!r}, "
            "got 'tiny', which knows token ids only"
        )
    from transformers import AutoTokenizer

    with loading("model", config.model):
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        if not tokenizer.encode("text", add_special_tokens=False):
            raise ValueError("its tokenizer has no vocabulary")
    return replace(world, tokenizer=tokenizer)


def _imported_world(name: str) -> World:
    """The World that the option `environment` names.

    Raises:
        ValueError: it cannot be imported, or is neither a World nor a function that makes one.
    """
    found = load_object("environment", name)
    expected = f"environment: expected a World, or a function that makes one, as {name!r}"
    if callable(found) and not isinstance(found, World):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise ValueError(f"{expected}, got one that needs arguments ({error})") from None
        found = found()
    if not isinstance(found, World):
        raise ValueError(f"{expected}, got {type(found).__name__}")
    environment = found.make()
    if not getattr(getattr(environment, "tags", None), "stops", None):
        raise ValueError(
            "environment: expected World.make to make environments whose tags have stops, got "
            f"{type(environment).__name__}"
        )
    return found


def check_world(world: World, retention: Retention) -> None:
    """Raises ValueError if the world does not tell the policy what it goes by, so that the policy
    would drop less than it says."""
    branches, blocks = retention in (fold, sub_agents), retention is memento
    for needed, name, reason in (
        (branches, "depth", "drops a branch when it returns, but this world opens none"),
        (blocks, "mark", "drops blocks inside a turn, but this world marks none"),
        (
            bool(getattr(retention, "exclude", ())),
            "info_name",
            "excludes tools by name, but this world names none",
        ),
    ):
        if needed and getattr(world, name) is None:
            said = getattr(retention, "__name__", repr(retention))
            raise ValueError(f"retention: {said} {reason}: expected World.{name}, got None")


def draw_tasks(config: Config, world: World, step: int) -> list[Any]:
    """The tasks of one step, one per group of episodes."""
    rng = random.Random(f"{config.seed}/tasks/{step}")
    count = config.episodes // config.group_size
    return [world.draw(rng.choice(config.sizes), rng) for _ in range(count)]


def collect(
    config: Config,
    accelerator: Accelerator,
    world: World,
    player: Any,
    tasks: Sequence[Any],
    label: str,
    generation: Generation,
    *,
    group_size: int = 1,
    make_engine: MakeEngine | None = None,
) -> list[Result]:
    """Plays every task `group_size` times over all processes; all of them return all results.

    The results of task k are those from `k * group_size` on. Batches of `rollout_batch` episodes
    have a seed of their own, made from `label` and their number, so that it does not matter which
    process plays them. Over several processes the results come without their turns and prompts.

    Args:
        player: the causal LM that plays.
        make_engine: player -> engine. Default: the player itself, in this process.

    Raises:
        RuntimeError: half of the episodes failed.
        ValueError: the retention policy goes by what the world does not say, such as depth.
    """
    check_world(world, generation.retention)
    generation = replace(generation, depth=world.depth, mark=world.mark, info_name=world.info_name)
    numbers = [number for number in range(len(tasks)) for _ in range(group_size)]
    batches = [
        numbers[at : at + config.rollout_batch]
        for at in range(0, len(numbers), config.rollout_batch)
    ]
    played: dict[int, list[Result]] = {}
    for place in range(accelerator.process_index, len(batches), accelerator.num_processes):
        if make_engine is None:
            engine: Engine = HFEngine(player, world.tokenizer, positions=config.positions)
        else:
            engine = make_engine(player)
        agent = MemoryEfficientAgent(
            None,
            engine=engine,
            environment=world.make,
            generation=replace(generation, seed=seed_of(config, label, place)),
            max_info_tokens=config.max_info_tokens,
            workers=config.workers,
            progress=False,
        )
        with accelerator.autocast():
            played[place] = agent.run([tasks[number] for number in batches[place]])
        for result in played[place]:
            if result.failed:
                logger.warning("an episode of %s failed: %s", label, printable(result.error))
    if accelerator.num_processes > 1:
        played = gather_results(played, generation.retention)
    everyone = [
        replace(result, task=tasks[number])
        for place, batch in enumerate(batches)
        for number, result in zip(batch, played[place], strict=True)
    ]
    failed = sum(result.failed for result in everyone)
    if failed * 2 >= len(everyone):
        raise RuntimeError(f"{failed} of {len(everyone)} episodes failed; the log says why")
    return everyone


def gather_results(
    played: dict[int, list[Result]], retention: Retention
) -> dict[int, list[Result]]:
    """Every process's results. What may not travel stays behind: the task, which all processes
    have, the retention policy, perhaps a closure, and what is there for reading only."""

    def bare(result: Result) -> Result:
        rollout = result.rollout
        if rollout is not None:
            segments: Any = rollout.trajectory.segments
            rollout = replace(rollout, trajectory=segments)
        return replace(result, task=None, prompt=[], turns=[], rollout=rollout)

    def whole(result: Result) -> Result:
        rollout = result.rollout
        if rollout is not None:
            segments: Any = rollout.trajectory
            rollout = replace(rollout, trajectory=Trajectory(segments, retention))
        return replace(result, rollout=rollout)

    sent = [(place, [bare(result) for result in batch]) for place, batch in played.items()]
    return {place: [whole(result) for result in batch] for place, batch in gather_object(sent)}


def rollout_of(result: Result) -> Rollout:
    """The rollout of an episode that has begun."""
    assert result.rollout is not None
    return result.rollout


def dropped_tokens(rollout: Rollout) -> int:
    """How many tokens left the context before the end."""
    trajectory = rollout.trajectory
    return int((trajectory.expiry < trajectory.num_tokens).sum())


def mean_scores(results: Sequence[Result]) -> dict[str, float]:
    """Means by name; an episode that was cut before it was scored counts as 0.

    A score with one number per objective counts as their sum; beside it, `name_k` is the mean of
    objective k over the episodes that were scored on it.
    """
    total: dict[str, float] = {}
    single: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.scores.items():
            parts = [value] if isinstance(value, (int, float)) else list(value)
            total[name] = total.get(name, 0.0) + float(sum(parts))
            for number, one in enumerate(parts if len(parts) > 1 else (), 1):
                single.setdefault(f"{name}_{number}", []).append(float(one))
    means = {name: value / len(results) for name, value in total.items()}
    return means | {name: sum(ones) / len(ones) for name, ones in single.items()}


def with_scores(record: dict[str, Any], scores: Mapping[str, float]) -> dict[str, Any]:
    """The record with an environment's scores in it, whose names must be others."""
    taken = sorted(record.keys() & scores.keys())
    if taken:
        raise ValueError(f"scores: expected names of their own, got {taken}")
    return record | dict(scores)


def evaluate(
    config: Config,
    player: Any,
    *,
    world: World | None = None,
    accelerator: Accelerator | None = None,
    sizes: Sequence[int] | None = None,
    retention: Retention | None = None,
) -> list[dict[str, float]]:
    """Plays `config.eval_episodes` episodes of each size.

    Args:
        player: a causal LM.
        sizes: default: `config.eval_sizes`.
        retention: default: the config's; `keep_all` shows the agent under full context.

    Returns:
        For each size: size, failed (episodes that a broken tool ended; nothing else counts them),
        reward, peak_context (the most tokens that any context held), total_tokens and turns (means
        per episode), seconds, and the mean scores.

    Raises:
        RuntimeError: a tool failed in every episode of a size.
        ValueError: a score whose name the table has already.
    """
    world = world or world_of(config)
    accelerator = accelerator or Accelerator(mixed_precision="bf16" if config.bf16 else None)
    generation = replace(generation_of(config), temperature=config.eval_temperature)
    if retention is not None:
        generation = replace(generation, retention=retention)
    table = []
    for size in sizes or config.eval_sizes:
        rng = random.Random(f"{config.seed}/eval/{size}")
        draw = world.draw_eval or world.draw
        started = time.perf_counter()
        results = collect(
            config,
            accelerator,
            world,
            player,
            [draw(size, rng) for _ in range(config.eval_episodes)],
            f"eval/{size}",
            replace(generation, max_turns=max(config.max_turns, size + 1)),
        )
        whole = [result for result in results if not result.failed]
        if not whole:
            raise RuntimeError(f"evaluation, size {size}: a tool failed in every episode")
        row = {
            "size": size,
            "failed": len(results) - len(whole),
            "reward": sum(result.reward for result in whole) / len(whole),
            "peak_context": max(result.peak_context for result in whole),
            "total_tokens": sum(result.total_tokens for result in whole) / len(whole),
            "turns": sum(len(rollout_of(result).turns) for result in whole) / len(whole),
            "seconds": time.perf_counter() - started,
        }
        table.append(with_scores(row, mean_scores(whole)))
    return table


def read_transcripts(path: str) -> list[tuple[list[Segment], float]]:
    """Traces from a JSONL file, one `{"segments": [[role, turn, ids, depth, more], ...],
    "reward": r}` per line. Without a depth it is 0; `more` is an object with what of `trainable`,
    `weight` and `name` (see `Segment`) is not the default. Blank lines are left out.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a line that is not a transcript, or a file without any.
    """
    traces = []
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise type(error)(f"transcripts: {path}: {error.strerror}") from None
    except ValueError:  # a NUL, or a lone surrogate
        raise ValueError(f"transcripts: no file can have the name {path!r:.200}") from None
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            traces.append(_read_trace(json.loads(line.decode("utf-8-sig"))))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            said: object = f"no {error}" if isinstance(error, KeyError) else error
            if isinstance(error, json.JSONDecodeError):  # which counts lines of its own
                said = f"{error.msg} at column {error.colno}"
            raise ValueError(
                f"transcripts: {path}, line {number}: no transcript ({said})"
            ) from error
    if not traces:
        raise ValueError(f"transcripts: expected at least one in {path}, got none")
    return traces


def _read_trace(record: Any) -> tuple[list[Segment], float]:
    segments = [_read_segment(*item) for item in record["segments"]]
    reward = float(record["reward"])
    if not math.isfinite(reward):
        raise ValueError(f"reward: expected a finite number, got {reward}")
    if not any(segment.in_loss and segment.num_tokens for segment in segments):
        raise ValueError("segments: expected tokens of a state or an action, got none")
    return segments, reward


_MORE = {"trainable": None, "weight": 1.0, "name": ""}


def _read_segment(
    role: str, turn: int, ids: Any, depth: int = 0, more: Mapping[str, Any] | None = None
) -> Segment:
    more = {} if more is None else more
    if not isinstance(more, Mapping) or (set(more) - set(_MORE)):
        raise ValueError(f"segments: expected an object of {sorted(_MORE)}, got {more!r}")
    return Segment(role, ids, turn, depth, **more)


def _write_segment(segment: Segment) -> list[Any]:
    values = {name: getattr(segment, name) for name in _MORE}
    more = {name: value for name, value in values.items() if value != _MORE[name]}
    return [segment.role, segment.turn, segment.ids, segment.depth, *([more] if more else [])]


def write_transcripts(results: Sequence[Result], path: Path) -> None:
    """Writes what `read_transcripts` reads, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as part, open(part, "w", encoding="utf-8") as file:
        for result in results:
            segments = rollout_of(result).trajectory.segments
            record = {"segments": [_write_segment(segment) for segment in segments]}
            file.write(json.dumps(record | {"reward": result.reward}) + "\n")
