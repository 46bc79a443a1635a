"""Small runs of the trainer, for the tests of its rooms, and a disk that is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from mem1_kernels.ppo.batch import Batch
from mem1_kernels.ppo.config import Config
from mem1_kernels.ppo.episodes import collect, draw_tasks, generation_of, rollout_of
from mem1_kernels.ppo.learner import Learner
from mem1_kernels.ppo.warm_start import warm_start
from python_tests.talking_processes import talk


def small(tmp_path: Path, **options) -> Config:
    """A run of seconds: few episodes, short chains."""
    quick = {
        "out": str(tmp_path / "run"),
        "trackers": "",
        "sizes": (1, 2),
        "steps": 2,
        "sft_steps": 4,
        "sft_batch": 8,
        "max_new_tokens": 9,
        "episodes": 8,
        "minibatch": 4,
        "token_budget": 128,
    }
    return Config(**(quick | options))


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """A disk on which no file can grow beyond `room` bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def played(config: Config):
    """A learner, a played batch and its rows."""
    accelerator = Accelerator()
    world = talk(config)
    learner = Learner(config, accelerator)
    generation = generation_of(config)
    if config.sft_steps:
        warm_start(learner, world, generation.retention, False)
        learner.settle_reference()
    tasks = draw_tasks(config, world, 0)
    results = collect(
        config,
        accelerator,
        world,
        learner.player(),
        tasks,
        "test",
        generation,
        group_size=config.group_size,
    )
    rollouts = [rollout_of(result) for result in results]
    rewards = [result.reward for result in results]
    groups = [number // config.group_size for number in range(len(results))]
    batch = Batch.of(rollouts, rewards, groups, accelerator.device)
    rows = batch.rows(range(len(results)), config, generation.retention, accelerator.device)
    return learner, batch, rows
