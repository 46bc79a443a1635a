"""For test_ppo_trainer.py: an environment for policies that cannot write yet, and training in it in
several processes: `accelerate launch ... -m python_tests.talking_processes cases.json`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import weakref
import zlib
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mem1_kernels import Segment, Trajectory, pack
from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.tasks import TableEnvironment
from mem1_kernels.agent.world import World
from mem1_kernels.ppo.actor_critic import ActorCritic
from mem1_kernels.ppo.batch import PackedRow
from mem1_kernels.ppo.config import Config
from mem1_kernels.ppo.episodes import world_of
from mem1_kernels.ppo.learner import Learner, reshard
from mem1_kernels.ppo.memory import HELD, memory_budget
from mem1_kernels.ppo.report import Stopwatch
from mem1_kernels.ppo.trainer import end_processes, train
from mem1_kernels.ppo.update import score_rows, train_on


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
    """accelerate with FSDP2 on the CPU, for which it takes FSDP as DDP.

    All that is ours is to say FSDP to its state, with the plugin that the environment describes;
    what follows is accelerate's own wrapping.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        plugin = FullyShardedDataParallelPlugin()
        if self.mixed_precision != "no":
            plugin.set_mixed_precision(self.mixed_precision)
        self.state.fsdp_plugin = plugin
        self.state.distributed_type = DistributedType.FSDP


def make_accelerator(kind: str, precision: str) -> Accelerator:
    """A fresh one, "DDP" or "FSDP2", whatever there was before in this process."""
    AcceleratorState._reset_state()
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=120))
    make = {"DDP": Accelerator, "FSDP2": ShardedAccelerator}[kind]
    return make(mixed_precision=precision, kwargs_handlers=[patience])


def run_case(kind: str, options: dict[str, Any]) -> None:
    """Trains; with checkpoints every k steps it stops after k and goes on from there."""
    config = Config(**options)
    parts = [config]
    if config.save_every:
        parts = [replace(config, steps=config.save_every), replace(config, resume=True)]
    for part in parts:
        accelerator = make_accelerator(kind, "bf16" if config.bf16 else "no")
        train(part, world=talk(part), accelerator=accelerator, progress=False)


def is_bfloat16(x: torch.Tensor) -> bool:
    return torch.equal(x, x.bfloat16().float())


def check_precision(options: dict[str, Any]) -> None:
    """FSDP2 in bf16 is the whole model in bfloat16, but for what comes out and for the sums.

    The same rows go through an unsharded copy whose weights are in bfloat16: log-probs and values
    must be equal and not rounded to bfloat16, gradients the float32 mean over the processes.
    """
    config = Config(**options, bf16=True)
    learner = Learner(config, make_accelerator("FSDP2", "bf16"))
    rng = random.Random(0)
    rows, total = [], 0
    for _ in range(learner.accelerator.num_processes):
        lengths = [3, 7, 5, 9, 4, 6, 8]
        roles = ["prompt", "state", "action", "info", "state", "action", "info"]
        segments = [
            Segment(role, rng.choices(range(4, 40), k=length), max(0, (place - 1) // 3))
            for place, (role, length) in enumerate(zip(roles, lengths, strict=True))
        ]
        layout = pack([Trajectory(segments)])
        count = int(layout.loss_mask.sum())
        rows.append(PackedRow.of(layout, torch.arange(total, total + count), torch.device("cpu")))
        total += count

    def loss_of(row, log_probs, entropy, values):
        return (0.1 * entropy - log_probs + (values - 1).square()).sum() / total, {}

    watch, like = Stopwatch(torch.device("cpu")), torch.zeros(total)
    for _ in range(2):  # so that the value head, which begins at 0, has something to say
        train_on(learner, rows, loss_of, watch)
    log_probs, values = score_rows(learner, rows, like, watch)

    copy = ActorCritic(learner.player(), config.critic).train()
    weights = dict(learner.module.named_parameters())
    for name, parameter in copy.named_parameters():
        parameter.data = weights[name].full_tensor().detach().bfloat16()
    expected = torch.zeros(2, total)
    for row in rows:
        found = copy(row.layout, row.plan)
        expected[:, row.where] = torch.stack([found[0].detach(), found[2].detach()])
    assert torch.equal(log_probs, expected[0]), (log_probs - expected[0]).abs().max()
    assert torch.equal(values, expected[1]), (values - expected[1]).abs().max()
    assert not is_bfloat16(log_probs) and not is_bfloat16(values)

    row = rows[learner.accelerator.process_index]
    learner.model.train()
    outputs = learner.model(row.layout, row.plan)
    assert all(output.dtype == torch.float32 and not is_bfloat16(output) for output in outputs)
    learner.accelerator.backward(loss_of(row, *outputs)[0])
    means = {name: torch.zeros(p.shape) for name, p in copy.named_parameters()}
    for row in rows:
        loss_of(row, *copy(row.layout, row.plan))[0].backward()
        for name, parameter in copy.named_parameters():
            if parameter.requires_grad:
                means[name] += parameter.grad.float() / len(rows)
        copy.zero_grad()
    gradients = {n: p.grad.full_tensor() for n, p in weights.items() if p.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, means[name], rtol=1e-5, atol=1e-7)
    assert not all(map(is_bfloat16, gradients.values()))


def check_refused(options: dict[str, Any], wrap: str, said: str) -> None:
    """FSDP2 that makes units of the layers called `wrap` is refused with these words."""
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = wrap
    try:
        Learner(Config(**options), make_accelerator("FSDP2", "no"))
    except ValueError as error:
        assert said in str(error), error
    else:
        raise AssertionError(f"{wrap} was not refused")
    finally:
        del os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"]


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once, of what is made while it is on."""

    def __init__(self, held: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.held = {storage_of(tensor)._cdata for tensor in held}
        self.seen: dict[int, Any] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = storage_of(tensor)
                self.seen.setdefault(storage._cdata, weakref.ref(storage))
        alive = {key: ref() for key, ref in self.seen.items()}
        self.seen = {key: self.seen[key] for key, storage in alive.items() if storage is not None}
        made = (storage for key, storage in alive.items() if storage and key not in self.held)
        self.most = max(self.most, sum(storage.nbytes() for storage in made))
        return out


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage()


def check_memory(options: dict[str, Any]) -> None:
    """An optimizer step needs no more than `memory_budget` says, and not much less."""
    config = Config(**options)
    learner = Learner(config, make_accelerator("FSDP2", "no"))
    segments = [Segment("prompt", [5] * 8), Segment("state", [7] * (config.token_budget - 8))]
    layout = pack([Trajectory(segments)])
    where = torch.arange(int(layout.loss_mask.sum()))
    rows = [PackedRow.of(layout, where, torch.device("cpu"))] * learner.accelerator.num_processes

    def loss_of(row, log_probs, entropy, values):
        return (log_probs.mean() + entropy.mean() + values.mean()), {}

    watch = Stopwatch(torch.device("cpu"))
    train_on(learner, rows, loss_of, watch)
    reshard(learner.module)
    held = [*learner.module.parameters(), *learner.reference.values()]
    held += [t for state in learner.optimizer.state.values() for t in state.values()]
    with LiveBytes(held) as live:
        train_on(learner, rows, loss_of, watch)
    shape = learner.module.policy.config
    budget = memory_budget(shape, config, processes=learner.accelerator.num_processes)
    expected = max(
        sum(budget[phase].values()) for phase in budget if phase not in (HELD, "rollout")
    )
    assert 0.6 * expected < live.most <= expected, (live.most, budget)


if __name__ == "__main__":
    for case in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        kind = case.pop("kind")
        if kind == "precision":
            check_precision(**case)
        elif kind == "memory":
            check_memory(**case)
        elif kind == "refused":
            check_refused(**case)
        else:
            run_case(kind, **case)
    end_processes()
