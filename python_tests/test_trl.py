"""TRL's GRPOTrainer on pruned rollouts: its loss and gradients are those under dense masks."""

from __future__ import annotations

import importlib
import json
from functools import partial

import pytest
import torch

pytest.importorskip("trl")

from agent_models import make_model, make_tokenizer
from transformers import Qwen2ForCausalLM
from trl import GRPOConfig

from mem1_kernels import visible
from mem1_kernels.audit.__main__ import main as audit
from mem1_kernels.hf import patch
from mem1_kernels.rollout import Generation, HFEngine
from mem1_kernels.rollout.trl import TrajectoryGRPOTrainer

SMALL = {"per_device_train_batch_size": 8, "num_generations": 4, "save_strategy": "no"}
SMALL |= {"bf16": False}  # TRL's default is True


class Watched(TrajectoryGRPOTrainer):
    """Keeps what the first step saw and computed."""

    def training_step(self, model, inputs, num_items_in_batch):
        parameters = dict(self.model.named_parameters())
        if hasattr(self, "gradients"):
            return super().training_step(model, inputs, num_items_in_batch)
        self.before = {name: p.detach().clone() for name, p in parameters.items()}
        self.loss = super().training_step(model, inputs, num_items_in_batch)
        self.gradients = {name: p.grad.clone() for name, p in parameters.items()}
        Watched.last = self
        return self.loss

    def _compute_loss(self, model, inputs):
        if not hasattr(self, "inputs"):
            self.inputs = inputs
            self.known = self._layouts[True]
        return super()._compute_loss(model, inputs)


def dense(trainer, dtype):
    """Sampled and computed log-probs of the first batch, and the gradients of its loss.

    Row by row under a mask of tokens x tokens, in transformers' eager attention.
    """
    model = Qwen2ForCausalLM(trainer.model.config)
    model.set_attn_implementation("eager")
    model.get_input_embeddings().padding_idx = None  # TRL told the config its padding later
    model.load_state_dict(trainer.before, strict=False)
    model.to(dtype)
    inputs = trainer.inputs
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1).bool()
    generated = inputs["tool_mask"].bool() & inputs["completion_mask"].bool()
    loss, log_probs = 0.0, []
    for row, own, advantage in zip(ids, real, inputs["advantages"], strict=True):
        layout = trainer.known[tuple(row[own].tolist())]
        hidden = ~visible(layout.expiry)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        logits = model(
            layout.token_ids[None],
            position_ids=layout.position_ids[None],
            attention_mask=mask[None, None],
            use_cache=False,
        ).logits[0]
        tokens = layout.loss_mask.nonzero().flatten()
        rows = logits.log_softmax(1)[layout.predecessor[tokens]]
        log_probs.append(rows.gather(1, layout.token_ids[tokens, None])[:, 0])
        loss = loss - advantage * (log_probs[-1] - log_probs[-1].detach()).exp().sum()
    (loss / generated.sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach() / generated.sum(), torch.cat(log_probs).detach(), found


def four_turns(positions, prompts, trainer):
    """Rollouts that drop tokens, by an untrained model; what counts as good is arbitrary."""
    engine = HFEngine(trainer.model, positions=positions)
    generation = Generation(max_turns=4, max_new_tokens=3, seed=0)
    starts = [[7, 8, 20 + int(prompt) % 9] for prompt in prompts]
    rollouts = engine.run(starts, lambda turns: [[30, 31] for _ in turns], generation)
    return trainer.take(rollouts, score=[float(row % 3) for row in range(len(rollouts))])


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
def test_loss_and_gradients_are_those_under_dense_masks(positions, monkeypatch):
    example = importlib.import_module("examples.grpo_trl")
    monkeypatch.setattr(example, "roll_out", partial(four_turns, positions))
    history = example.main(1, 0, Watched, **SMALL, loss_type="bnpo", max_grad_norm=0.0)
    assert history[0]["grad_norm"] > 0
    trainer = Watched.last
    assert all((layout.expiry < layout.num_tokens).any() for layout in trainer.known.values())
    want_loss, exact, want = dense(trainer, torch.float64)
    _, _, plain = dense(trainer, torch.float32)
    assert float(trainer.loss) == pytest.approx(float(want_loss), abs=1e-5)
    # By norm: through a whole model, where the one largest error falls is chance.
    for name, gradient in trainer.gradients.items():
        assert (gradient - want[name]).norm() <= 2 * (plain[name] - want[name]).norm(), name
    # What was sampled is what the dense masks give.
    ids = torch.cat([trainer.inputs["prompt_ids"], trainer.inputs["completion_ids"]], 1)
    assert len(ids) == 8 and len(exact) == int(
        (trainer.inputs["tool_mask"] * trainer.inputs["completion_mask"]).sum()
    )


def test_trl_logs_ids_that_the_auditor_reads(tmp_path, monkeypatch, capsys):
    example = importlib.import_module("examples.grpo_trl")
    columns = ("prompt_ids", "logprobs", "env_mask")

    class Logging(Watched):
        def take(self, rollouts, **more):
            made = super().take(rollouts, **more)
            self.logged = {name: made[name] for name in (*columns, "completion_ids")}
            # Extra results reach the reward functions, under names of their own.
            return {**made, **{f"rollout_{name}": made[name] for name in columns}}

    def reward(completion_ids, log_extra, score, **others):
        log_extra("completion_ids", completion_ids)
        for name in columns:
            log_extra(name, others[f"rollout_{name}"])
        return score

    monkeypatch.setattr(example, "reward", reward)
    monkeypatch.setattr(example, "roll_out", partial(four_turns, "kept"))
    example.main(1, 0, Logging, **SMALL, output_dir=str(tmp_path), log_completions=True)
    (table,) = (tmp_path / "completions").glob("*.parquet")
    trainer = Watched.last
    model = Qwen2ForCausalLM(trainer.model.config)
    model.load_state_dict(trainer.before, strict=False)
    model.save_pretrained(tmp_path / "policy")
    capsys.readouterr()
    audit([str(tmp_path / "policy"), str(table), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["source"] == "TRL's completions" and found["rows"] == 8
    assert found["loss_tokens"] == sum(map(sum, trainer.logged["env_mask"]))
    # What was dropped is not in the table, but the log-probs tell that something was.
    assert found["causal"]["tokens"] == found["loss_tokens"]
    assert found["causal"]["largest"] > 1e-3


@pytest.fixture
def trainer(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    arguments = GRPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=2,
        num_generations=2,
    )  # fmt: skip
    rows = [{"prompt": "?"}] * 2
    model = patch(make_model(len(tokenizer)))
    return TrajectoryGRPOTrainer(
        model, lambda completions, **_: [0.0], arguments, train_dataset=_dataset(rows),
        processing_class=tokenizer, rollout_func=lambda prompts, trainer: {},
    )  # fmt: skip


def _dataset(rows):
    return importlib.import_module("datasets").Dataset.from_list(rows)


def test_what_the_trainer_cannot_honour_raises(trainer):
    engine = HFEngine(trainer.model)
    generation = Generation(max_turns=2, max_new_tokens=3, seed=0)
    rollouts = engine.run([[5, 6], [7, 8]], lambda turns: [[9]] * len(turns), generation)
    made = trainer.take(rollouts, score=[1.0, 2.0])
    assert made["prompt_ids"] == [[5, 6], [7, 8]] and made["score"] == [1.0, 2.0]
    assert [len(x) for x in made["completion_ids"]] == [len(x) for x in made["logprobs"]]
    with pytest.raises(ValueError, match="score: expected 2 values, got 1"):
        trainer.take(rollouts, score=[1.0])
    rows = torch.tensor([[1, 2, 3]])
    score = trainer._get_per_token_logps_and_entropies
    with pytest.raises(ValueError, match="rollout_func: expected rows that take"):
        score(trainer.model, rows, torch.ones_like(rows), 2)
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0"):
        score(trainer.model, rows, torch.ones_like(rows), 2, compute_aux_loss=True)
    with pytest.raises(ValueError, match="pixel_values: images are not supported"):
        score(trainer.model, rows, torch.ones_like(rows), 2, pixel_values=rows)


def test_a_model_that_is_not_patched_raises(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    arguments = GRPOConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, per_device_train_batch_size=2,
        num_generations=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="model: expected a patched one"):
        TrajectoryGRPOTrainer(
            make_model(len(tokenizer)), lambda completions, **_: [0.0], arguments,
            train_dataset=_dataset([{"prompt": "?"}] * 2), processing_class=tokenizer,
        )  # fmt: skip
