"""verl's workers in this process, without Ray: what the engines compute for a batch of samples."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker, TrainingWorkerConfig
from worlds import Talk

from configs import PPO, make_config
from mem1_kernels import BlockPlan
from mem1_kernels.agent.tasks import ChainTask
from mem1_kernels.hf import patched
from mem1_kernels.rollout import Generation, HFEngine, collate, score
from mem1_kernels.trajectory import Trajectory
from mem1_kernels.verl.hooks import engine, trainer
from mem1_kernels.verl.layout import encode_runs

ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "RAY_LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@pytest.fixture(scope="module")
def config(folder: Path) -> Iterator[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(ALONE, MASTER_PORT=str(free.getsockname()[1]))
    alone = ["trainer.n_gpus_per_node=1", "actor_rollout_ref.actor.use_kl_loss=False"]
    made = make_config(folder, *PPO, *alone)
    OmegaConf.resolve(made)
    yield made
    torch.distributed.destroy_process_group()
    for name in ALONE:  # Ray's workers would inherit them
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def worker(config: Any) -> Any:
    made = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor_rollout")
    made.init_model()
    return made


@pytest.fixture(scope="module")
def critic(config: Any, worker: Any) -> Any:
    options = omega_conf_to_dataclass(config.critic)
    options.engine.infer_max_token_len_per_gpu = 512
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type="value_model",
            model_config=options.model,
            engine_config=options.engine,
            optimizer_config=options.optim,
            checkpoint_config=options.checkpoint,
        )
    )
    made.reset()
    return made


def roll_out(folder: Path, positions: Any) -> tuple[Any, list[Any]]:
    """A model, and rollouts of four prompts, twice each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tasks = [ChainTask.sample(2, random.Random(seed // 2)) for seed in range(8)]
    environments = [Talk() for _ in tasks]
    prompts = [one.reset(task) for one, task in zip(environments, tasks, strict=True)]

    def respond(turns: Any) -> list[Any]:
        steps = [environments[turn.row].step(turn.token_ids) for turn in turns]
        return [None if step.done else step.observation for step in steps]

    generation = Generation(max_new_tokens=8, seed=0)
    return model, HFEngine(model, positions=positions).run(prompts, respond, generation)


def sample_of(rollout: Any) -> dict[str, Any]:
    """A sample as verl's agent loop worker makes it of an episode."""
    layout = rollout.layout
    cut = rollout.trajectory.spans[0].stop
    log_probs = rollout.log_probs[layout.source].masked_fill(~layout.loss_mask, 0)[cut:]
    mask = layout.loss_mask[cut:].long()
    return {
        "prompts": layout.token_ids[:cut],
        "responses": layout.token_ids[cut:],
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": layout.token_ids,
        "position_ids": torch.arange(layout.num_tokens),
        "rollout_log_probs": log_probs,
        "old_log_probs": log_probs,
        "advantages": torch.randn(len(mask), generator=torch.Generator().manual_seed(len(mask))),
        "multi_modal_inputs": {},
        "extra_fields": {"mem1": encode_runs(layout)},
    }


def fill_in(source: dict[str, Any]) -> dict[str, Any]:
    """What verl appends to a batch that cannot be divided."""
    ones, zero = torch.ones(128, dtype=torch.int64), torch.zeros(1)
    return {
        **source,
        "prompts": ones[:127],
        "responses": ones[:1],
        "response_mask": zero.long(),
        "loss_mask": zero.long(),
        "input_ids": ones,
        "position_ids": torch.arange(128),
        "rollout_log_probs": zero,
        "old_log_probs": zero,
        "advantages": zero,
    }


def batch_of(samples: list[dict[str, Any]], **options: Any) -> Any:
    batch = list_of_dict_to_tensordict(samples)
    # Prompts of one length came as a plain tensor; verl's own are always nested.
    batch["prompts"] = torch.nested.as_nested_tensor(
        [sample["prompts"] for sample in samples], layout=torch.jagged
    )
    lengths = [len(sample["input_ids"]) for sample in samples]
    tu.assign_non_tensor(batch, temperature=1.0, global_token_num=lengths, **options)
    return batch


def infer(worker: Any, samples: list[dict[str, Any]], name: str) -> list[torch.Tensor]:
    """What a worker computes at the responses of the samples."""
    options = {"calculate_entropy": False, "compute_loss": False}
    output = worker.infer_batch(batch_of(samples, **options))
    output = output.get() if hasattr(output, "get") and not hasattr(output, "keys") else output
    return [
        values[len(sample["prompts"]) - 1 : -1]
        for values, sample in zip(output[name].unbind(), samples, strict=True)
    ]


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_log_probs_are_those_of_the_rollout(folder: Path, worker: Any, positions: Any) -> None:
    """With groups behind shared prompts, and a fill-in sample among them."""
    _, rollouts = roll_out(folder, positions)
    samples = [sample_of(rollout) for rollout in rollouts]
    samples.insert(3, fill_in(samples[0]))
    seen = []
    for sample, got in zip(samples, infer(worker.actor, samples, "log_probs"), strict=True):
        mask = sample["response_mask"].bool()
        seen.append(int(mask.sum()))
        torch.testing.assert_close(got[mask], sample["rollout_log_probs"][mask], atol=1e-5, rtol=0)
    assert min(seen) == 0 and max(seen) > 8


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_values_are_under_the_plan(folder: Path, critic: Any, positions: Any) -> None:
    """Against one pass per trajectory of a model with the critic's weights."""
    _, rollouts = roll_out(folder, positions)
    samples = [sample_of(rollout) for rollout in rollouts]
    shape = AutoConfig.from_pretrained(folder, num_labels=1)
    model = AutoModelForTokenClassification.from_config(shape).eval()
    weights = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in critic.engine.module.state_dict().items()
    }
    model.load_state_dict(weights)
    for rollout, got in zip(rollouts, infer(critic, samples, "values"), strict=True):
        layout, cut = rollout.layout, rollout.trajectory.spans[0].stop
        with torch.no_grad(), patched(model):
            values = model(
                layout.token_ids[None],
                position_ids=layout.position_ids[None],
                plan=BlockPlan.of(layout),
            ).logits[0, :, 0]
        mask = layout.loss_mask[cut:]
        expected = values[layout.predecessor[cut:]][mask]
        torch.testing.assert_close(got[mask], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_gradients_do_not_depend_on_who_shares(
    folder: Path, worker: Any, positions: Any, monkeypatch: Any
) -> None:
    """One update with prompts shared, and with each its own: the same norm of the gradient."""
    _, rollouts = roll_out(folder, positions)
    samples = [sample_of(rollout) for rollout in rollouts]
    pack, norms, shared = engine.pack_samples, [], []
    worker.actor.engine.lr_scheduler.base_lrs = [0.0]  # the model stays as it is
    for group in worker.actor.engine.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
    for share in (True, False):

        def packed(samples: Any, prompts: Any, share: bool = True, wanted: bool = share) -> Any:
            result = pack(samples, prompts, share=share and wanted)
            shared.append(result.shared)
            return result

        monkeypatch.setattr(engine, "pack_samples", packed)
        options = {"global_batch_size": 8, "mini_batch_size": 8, "epochs": 1, "seed": 1}
        batch = batch_of(samples, calculate_entropy=False, **options)
        tu.assign_non_tensor(batch, dataloader_kwargs={"shuffle": False})
        output = worker.actor.train_mini_batch(batch)
        output = output.get() if hasattr(output, "get") and not hasattr(output, "keys") else output
        norms.append(tu.get(output, "metrics")["grad_norm"][0])
    assert max(shared) > 0 == shared[-1]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_a_sample_without_a_layout(folder: Path, worker: Any) -> None:
    _, rollouts = roll_out(folder, "kept")
    good, sample = sample_of(rollouts[0]), sample_of(rollouts[2])
    for fields, message in (
        ({}, "expected 'mem1' in every sample"),
        ({"mem1": [(3, 3, 0, -1)]}, r"expected a layout of \d+ tokens, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            infer(worker.actor, [good, {**sample, "extra_fields": fields}], "log_probs")


@pytest.mark.parametrize(
    ("option", "value"), [("use_remove_padding", False), ("use_fused_kernels", True)]
)
def test_what_drops_the_plan(folder: Path, worker: Any, option: str, value: bool) -> None:
    """Once more in the worker, whatever came past the config."""
    _, rollouts = roll_out(folder, "kept")
    samples = [sample_of(rollout) for rollout in rollouts]
    batch = batch_of(samples, compute_loss=False, calculate_entropy=False)
    tu.assign_non_tensor(batch, **{option: value})
    with pytest.raises(ValueError, match=f"{option}: expected {not value}"):
        worker.actor.infer_batch(batch)


def test_engines_are_told_apart(worker: Any, config: Any, monkeypatch: Any) -> None:
    """What the driver asks every worker before the first step."""
    ((name, mine, is_patched, failure),) = trainer.describe_engines(worker)
    assert (name, mine, is_patched, failure) == ("Mem1EngineWithLMHead", True, True, "")
    EngineRegistry.register("language_model", "fsdp2", "cpu")(FSDPEngineWithLMHead)
    try:
        monkeypatch.setenv("VERL_ENGINE_VENDOR", "none")
        config.actor_rollout_ref.model.override_config = {"attn_implementation": "sdpa"}
        stock = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor_rollout")
        stock.init_model()
    finally:
        del EngineRegistry._engines["language_model"]["fsdp2"]["cpu"]
    ((name, mine, is_patched, _),) = trainer.describe_engines(stock)
    assert (name, mine, is_patched) == ("FSDPEngineWithLMHead", False, False)

    monkeypatch.setattr(trainer.ray, "get", lambda answers: answers)

    def group(*workers: Any) -> Any:
        calls = [lambda ask, worker=worker: ask(worker) for worker in workers]
        handles = [SimpleNamespace(__ray_call__=SimpleNamespace(remote=call)) for call in calls]
        return SimpleNamespace(workers=handles)

    run = SimpleNamespace(actor_rollout_wg=group(worker), use_reference_policy=False)
    run.use_critic, run.critic_wg = False, group(worker, stock)
    trainer.check_engines(run)
    run.use_critic = True
    with pytest.raises(RuntimeError, match="critic: expected an engine .* on worker 1"):
        trainer.check_engines(run)
    run.critic_wg = group(object())
    with pytest.raises(RuntimeError, match="critic: its workers have no engine"):
        trainer.check_engines(run)


def test_a_trajectory_is_scored_alike_by_the_package(folder: Path) -> None:
    """The samples above are what the package itself would train on."""
    model, rollouts = roll_out(folder, "kept")
    layout, sampled = collate(rollouts)
    with torch.no_grad():
        assert (score(model, layout) - sampled).abs().max() < 1e-5
    assert isinstance(rollouts[0].layout, Trajectory)
