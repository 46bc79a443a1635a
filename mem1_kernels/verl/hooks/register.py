"""Imported once: says to verl which classes there are, and puts checks into its trainer."""

from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplicaRegistry

from mem1_kernels.verl.hooks import engine, loop, trainer  # noqa: F401  (they register themselves)
from mem1_kernels.verl.hooks.replica import Mem1Replica

RolloutReplicaRegistry.register("mem1", lambda: Mem1Replica)
# There is no public call for this one.
base._ROLLOUT_REGISTRY["mem1", "async"] = "mem1_kernels.verl.hooks.replica.ServerAdapter"
trainer.install(PPOTrainer)
