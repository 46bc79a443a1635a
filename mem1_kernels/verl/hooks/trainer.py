"""Checks in verl's trainer: the config and the engines before the first step, and in every step
whether the actor's log-probs are those that were sampled."""

from __future__ import annotations

import functools
from typing import Any

import ray
import torch
import transfer_queue as tq

from mem1_kernels.hf import is_patched
from mem1_kernels.verl import plugin
from mem1_kernels.verl.figures import check_gap, episode_metrics, gap_metrics
from mem1_kernels.verl.hooks.engine import extra_fields
from mem1_kernels.verl.hooks.loop import EPISODES
from mem1_kernels.verl.refused import OPTIONS, VENDOR, asks_for_mem1, selected
from mem1_kernels.verl.settings import Settings

FIELDS = ["rollout_log_probs", "old_log_probs", "response_mask", "extra_fields"]


def install(trainer: type) -> None:
    """Wraps two methods of `PPOTrainer`; they do nothing more for configs that do not ask for
    mem1."""
    for name, wrap in (("_setup", _checked_setup), ("_compute_old_log_prob", _checked_log_prob)):
        setattr(trainer, name, wrap(getattr(trainer, name)))


def _checked_setup(setup: Any) -> Any:
    @functools.wraps(setup)
    def _setup(self: Any) -> None:
        plugin.check(self.config)
        setup(self)
        if asks_for_mem1(self.config):
            check_engines(self)

    return _setup


def _checked_log_prob(compute: Any) -> Any:
    @functools.wraps(compute)
    def _compute_old_log_prob(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = compute(self, batch, metrics)
        if asks_for_mem1(self.config):
            metrics.update(step_metrics(self.config, batch))
        return batch

    return _compute_old_log_prob


def step_metrics(config: Any, batch: Any) -> dict[str, float]:
    """The figures of a step's batch.

    Raises:
        ValueError: log-probs that differ by more than the tolerance.
        RuntimeError: no episode of the batch went well.
    """
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=FIELDS)
    real = [not tag.get("is_padding", False) for tag in batch.tags]
    fields = zip(extra_fields(data), real, strict=True)
    figures = [own[EPISODES] for own, keep in fields if keep]
    metrics = episode_metrics(figures)
    sampled, trained, mask = (torch.cat(list(data[name].unbind())) for name in FIELDS[:3])
    mask = mask.bool()
    gaps = gap_metrics(sampled[mask], trained[mask])
    options = selected(config, OPTIONS)
    settings = Settings.read(dict(options.items()))
    computed = selected(config, "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype")
    dtypes = [str(selected(config, "actor_rollout_ref.rollout.dtype")), str(computed or "bf16")]
    check_gap(gaps, *settings.tolerances(*dtypes))
    return metrics | gaps


def check_engines(trainer: Any) -> None:
    """Raises RuntimeError unless every engine of every worker is this plugin's and its model is
    patched."""
    groups = {"actor": trainer.actor_rollout_wg}
    if trainer.use_reference_policy and not trainer.ref_in_actor:
        groups["reference"] = trainer.ref_policy_wg
    if trainer.use_critic:
        groups["critic"] = trainer.critic_wg
    for role, group in groups.items():
        try:
            said = ray.get(
                [worker.__ray_call__.remote(describe_engines) for worker in group.workers]
            )
        except ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"{role}: its workers cannot import mem1_kernels") from error
        for rank, engines in enumerate(said):
            for name, mine, patched, failure in engines:
                if not (mine and patched):
                    why = failure or f"is {VENDOR}=mem1 in its environment?"
                    raise RuntimeError(
                        f"{role}: expected an engine of mem1_kernels on worker {rank}, got {name} "
                        f"({'patched' if patched else 'not patched'}): {why}"
                    )
        if not any(said):
            raise RuntimeError(f"{role}: its workers have no engine")


def describe_engines(worker: Any) -> list[tuple[str, bool, bool, str]]:
    """In a worker's process: (class, whether it is this plugin's, whether its model is patched, why
    the plugin was not loaded) of each of its engines."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    from mem1_kernels.verl.hooks.engine import _Planned

    found = []
    for engine in _engines(worker, FSDPEngine):
        failure = "" if plugin.failure is None else str(plugin.failure)
        mine, patched = isinstance(engine, _Planned), is_patched(engine.module)
        found.append((type(engine).__name__, mine, patched, failure))
    return found


def _engines(worker: Any, kind: type) -> list[Any]:
    """The engines of a worker of verl, or of the workers that share its process."""
    parts = list(getattr(worker, "worker_dict", {}).values())
    parts += [getattr(worker, name, None) for name in ("actor", "ref")]
    found = [engine for part in parts if part is not None for engine in _engines(part, kind)]
    own = getattr(worker, "engine", None)
    return found + ([own] if isinstance(own, kind) else [])
