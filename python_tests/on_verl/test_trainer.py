"""verl's own trainer on two FSDP2 processes over gloo, with Ray: GRPO and PPO, kept and tree."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import PlacementGroup
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo

from configs import GRPO, PPO, TREE, make_config

ULYSSES = """
actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2
actor_rollout_ref.ref.fsdp_config.ulysses_sequence_parallel_size=2
critic.fsdp.ulysses_sequence_parallel_size=2
""".split()
LORA = ["actor_rollout_ref.model.lora_rank=4", "actor_rollout_ref.model.target_modules=all-linear"]
WORLD = "actor_rollout_ref.rollout.custom.mem1.environment="


def train(cluster: Path, folder: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of each step that the trainer logged.

    Raises:
        RuntimeError: what the trainer raised, as text: its frames would keep its workers alive.
    """
    config = make_config(
        folder, "trainer.project_name=test", f"trainer.experiment_name={name}", *overrides
    )
    failure = ""
    try:
        run_ppo(config, TaskRunnerV1)
    except ray.exceptions.RayTaskError as error:
        failure = str(error)
    finally:
        give_back_devices()
    if failure:
        raise RuntimeError(failure)
    lines = (cluster / "test" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def give_back_devices() -> None:
    """verl leaves its placement groups to the end of Ray."""
    for number, group in ray.util.placement_group_table().items():
        if group["state"] != "REMOVED":
            identity = ray.PlacementGroupID(bytes.fromhex(number))
            ray.util.remove_placement_group(PlacementGroup(identity))
    deadline = time.monotonic() + 60
    while ray.available_resources().get("GPU") != 2:
        assert time.monotonic() < deadline, "the devices are not free again"
        time.sleep(0.2)


def check(steps: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, float]]:
    """The steps are these, their log-probs were those of the rollout, and they learned."""
    assert [step["step"] for step in steps] == numbers
    metrics = [step["data"] for step in steps]
    for figures in metrics:
        assert 0 < figures["mem1/log_prob_gap_mean"] <= figures["mem1/log_prob_gap_max"] <= 1e-5
        assert figures["mem1/peak_context_max"] < figures["prompt_length/max"] + 60
        assert figures["actor/grad_norm"] > 0
    return metrics


def test_grpo_on_kept_rollouts(cluster: Path, folder: Path) -> None:
    """One episode in four ends before its time: counted, trained on as far as it went. Validation
    comes behind the second step."""
    validation = ["trainer.test_freq=2", "data.val_max_samples=4"]
    steps = train(cluster, folder, "grpo", *GRPO, *validation, f"{WORLD}worlds:sometimes_breaks")
    metrics = check(steps, [1, 2])
    assert any(name.startswith("val-core/talk/reward") for name in metrics[1])
    assert all(figures["num_turns/max"] > 1 for figures in metrics)
    assert any(0 < figures["mem1/failed_episodes"] < 16 for figures in metrics)


def test_grpo_on_trees_with_lora(cluster: Path, folder: Path) -> None:
    """The replica gets the adapter's weights: step 2 would be off otherwise."""
    check(train(cluster, folder, "lora", *GRPO, *TREE, *LORA), [1, 2])


def test_ppo_on_kept_rollouts_with_shared_rows(cluster: Path, folder: Path) -> None:
    """Actor, reference and critic under Ulysses: both processes hold a part of each row."""
    once = "actor_rollout_ref.actor.ppo_mini_batch_size=4"  # one update a step
    metrics = check(train(cluster, folder, "ulysses", *PPO, *ULYSSES, once), [1, 2])
    assert all(figures["critic/grad_norm"] > 0 for figures in metrics)
    # The first update's actor is the reference, so their log-probs differ by rounding.
    assert abs(metrics[0]["actor/kl_loss"]) < 1e-9 < metrics[1]["actor/kl_loss"]


def test_ppo_on_trees_goes_on_from_a_checkpoint(cluster: Path, folder: Path) -> None:
    """Two steps and a third after a restart: other steps' weights would show in its log-probs."""
    where = f"trainer.default_local_dir={folder}/resumed"
    options = [*PPO, *TREE, where, "trainer.save_freq=2"]
    metrics = check(train(cluster, folder, "first", *options), [1, 2])
    assert all(figures["critic/grad_norm"] > 0 for figures in metrics)
    saved = folder / "resumed/global_step_2/actor/model_world_size_2_rank_0.pt"
    before = torch.load(saved, weights_only=False)
    more = ["trainer.resume_mode=auto", "trainer.total_training_steps=3", "trainer.save_freq=3"]
    check(train(cluster, folder, "second", *options, *more), [3])
    after = torch.load(str(saved).replace("global_step_2", "global_step_3"), weights_only=False)
    moved = [
        float((after[name].to_local() - value.to_local()).abs().max())
        for name, value in before.items()
    ]
    assert 0 < max(moved) < 5e-3  # from where it was: one step of Adam at 1e-3 an update


def test_the_control_fails(cluster: Path, folder: Path) -> None:
    """The same rollouts under verl's own causal mask."""
    with pytest.raises(RuntimeError, match="log-probs of rollout and actor differ by up to"):
        train(cluster, folder, "control", *GRPO, f"{WORLD}worlds:causal")
