"""The memory that a run needs, as `python -m mem1_kernels.ppo.memory` computes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mem1_kernels.ppo.config import Config, read_config
from mem1_kernels.ppo.memory import HELD, cache_slots, memory_budget, most, peak_context, table
from mem1_kernels.ppo.memory import main as print_memory
from mem1_kernels.rollout import Generation, HFEngine

Accelerator = pytest.importorskip("accelerate").Accelerator

ROOT = Path(__file__).parents[1]
CARD = 85.5e9  # bytes of an H100 of 80 GB


def test_the_memory_budget_of_the_recipe_is_the_one_it_states():
    from transformers import Qwen2Config

    shape = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    path = ROOT / "configs" / "qwen2.5-7b-4xh100.toml"
    config = read_config(path)
    budget = memory_budget(shape, config, processes=4)
    assert budget[HELD]["weights"] == 7_615_616_512  # a fourth of its parameters, 4 bytes each
    assert peak_context(config, prompt=300) == 300 + 500 + 520 + 500
    expected = table(budget)
    lines = [line[4:] for line in path.read_text("utf-8").splitlines() if line.startswith("#   ")]
    assert "\n".join(lines[-len(expected.splitlines()) :]) == expected
    # Counted on tensors without data, of one of four processes: 16.16 GB more than weights,
    # moments and reference in the backward pass of a row.
    assert 16.16e9 < most(budget) - sum(budget[HELD].values()) < 1.1 * 16.16e9
    assert most(budget) < 0.9 * CARD
    with_critic = memory_budget(shape, replace(config, critic="model"), processes=4)
    assert most(with_critic) > 0.9 * CARD
    no_checkpoints = replace(config, gradient_checkpointing=False)
    assert most(memory_budget(shape, no_checkpoints, processes=4)) > CARD


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 4}, {"critic": "model"}, {"lora_rank": 4, "dtype": "bfloat16"}]
)
def test_the_memory_budget_counts_what_a_run_holds(options):
    from mem1_kernels.ppo.learner import Learner

    config = Config(**options)
    module = Learner(config, Accelerator()).module
    budget = memory_budget(module.policy.config, config, processes=1, prompt=30)
    head = sum(p.numel() for p in module.value_head.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad) - head
    weights = sum(p.numel() * p.element_size() for p in module.parameters()) - 4 * head
    assert budget["optimizer step"]["gradients"] == 4 * trained
    assert budget[HELD]["weights"] == weights
    assert budget[HELD]["Adam's moments"] == 8 * trained


@pytest.mark.parametrize("prompt", [40, 300])
@pytest.mark.parametrize("retention", ["mem1", "keep_all", "keep_last(2)"])
def test_the_budget_counts_the_slots_that_a_rollout_takes(monkeypatch, prompt, retention):
    from mem1_kernels.ppo.config import retention_of
    from mem1_kernels.ppo.learner import make_policy
    from mem1_kernels.rollout import hf_engine

    caches = []

    class Watched(hf_engine.TrajectoryCache):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            caches.append(self)

    monkeypatch.setattr(hf_engine, "TrajectoryCache", Watched)
    config = Config(max_turns=4, max_new_tokens=20, max_info_tokens=170, retention=retention)
    generation = Generation(
        retention=retention_of(retention), max_turns=4, max_new_tokens=20, seed=0
    )
    rollouts = HFEngine(make_policy(config)).run(
        [[5] * prompt] * 2, lambda turns: [[20] * 170 for _ in turns], generation
    )
    peak = peak_context(config, prompt)
    assert [rollout.peak_context for rollout in rollouts] == [peak, peak]
    assert caches[0].capacity == cache_slots(peak, prompt)


def test_the_command_line_prints_the_memory_of_a_config(tmp_path, capsys):
    from mem1_kernels.ppo.learner import make_policy

    shape = make_policy(Config()).config
    shape.save_pretrained(tmp_path / "model")
    path = tmp_path / "run.toml"
    path.write_text(f"model = '{tmp_path / 'model'}'\nrollout_batch = 8\n")
    print_memory([str(path), "--processes=2", "--prompt=100"])
    budget = memory_budget(shape, read_config(path), processes=2, prompt=100)
    assert capsys.readouterr().out.strip() == table(budget)
