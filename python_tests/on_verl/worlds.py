"""Environments for policies that cannot write yet, named by the tests' configs."""

from __future__ import annotations

import random
import zlib
from typing import Any

from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.tasks import ChainTask, TableEnvironment
from mem1_kernels.agent.world import World
from mem1_kernels.verl import episode


class Talk(TableEnvironment):
    """Talks for one to four turns whatever it is told; the reward is a checksum of all turns."""

    def reset(self, task: Any) -> list[int]:
        self.left, self.chance, self.told = 1 + task.seed % 4, random.Random(task.seed), []
        return super().reset(task)

    def step(self, turn: Any) -> Step:
        self.left -= 1
        self.told.append(turn)
        if not self.left:
            return Step([], zlib.crc32(repr(self.told).encode()) % 101 / 100, True)
        return Step(self.chance.choices(range(15, 50), k=self.chance.randint(1, 9)))


class Breaks(Talk):
    """Ends before its time: in its first turn for even seeds, else in its second."""

    def step(self, turn: Any) -> Step:
        if len(self.told) == self.seed % 2:
            raise RuntimeError("the tool is broken")
        return super().step(turn)

    def reset(self, task: Any) -> list[int]:
        self.seed = task.seed
        return super().reset(task)


talk = World(ChainTask.sample, Talk)


def sometimes_breaks() -> World:
    """One episode in four ends before its time."""
    chance = random.Random(3)
    return World(ChainTask.sample, lambda: Breaks() if chance.random() < 0.25 else Talk())


def always_breaks() -> World:
    """Nothing ever begins."""

    class Never(Talk):
        def reset(self, task: Any) -> list[int]:
            raise RuntimeError("no shop today")

    return World(ChainTask.sample, Never)


def causal() -> World:
    """The control, in the process of the agent loop: every sample brings verl's own mask along."""
    episode.encode_runs = lambda layout: [(layout.num_tokens, layout.num_tokens, 0, -1)]
    return talk
