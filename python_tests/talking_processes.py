"""For test_ppo_trainer.py: an environment for policies that cannot write yet, and training in it in
several processes: `torchrun ... -m python_tests.talking_processes options`, under DDP and under
FSDP2, each time stopped after two steps and resumed.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.tasks import TableEnvironment
from mem1_kernels.agent.world import World
from mem1_kernels.ppo.config import Config, parse_arguments
from mem1_kernels.ppo.episodes import world_of
from mem1_kernels.ppo.learner import ActorCritic
from mem1_kernels.ppo.trainer import end_processes, train


class Talk(TableEnvironment):
    """Talks for one to four turns whatever it is told; the reward is a checksum of all turns."""

    def reset(self, task):
        self.left, self.chance, self.told = 1 + task.seed % 4, random.Random(task.seed), []
        return super().reset(task)

    def step(self, turn):
        self.left -= 1
        self.told.append(turn)
        if not self.left:
            reward = zlib.crc32(repr(self.told).encode()) % 101 / 100
            return Step([], reward, True, {"em": [float(turn.closed)]})
        return Step(self.chance.choices(range(14, 40), k=self.chance.randint(1, 9)))


def talk(config: Config) -> World:
    """The config's world, but that its environments talk."""
    return replace(world_of(config), make=Talk)


class ShardedAccelerator(Accelerator):
    """FSDP2 on the CPU, where accelerate does not offer it: each decoder layer, then the rest."""

    def prepare(self, module: ActorCritic, optimizer: torch.optim.Optimizer):
        mesh = init_device_mesh("cpu", (self.num_processes,))
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        for layer in module.policy.get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        sharded = dict(module.named_parameters())
        for group, group_names in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [sharded[name] for name in group_names]
        return module, super().prepare(optimizer)


if __name__ == "__main__":
    whole = parse_arguments()
    for kind in (Accelerator, ShardedAccelerator):
        config = replace(whole, out=f"{whole.out}/{kind.__name__}")
        for part in (replace(config, steps=2), replace(config, resume=True)):
            train(part, world=talk(part), accelerator=kind(), progress=False)
    end_processes()
