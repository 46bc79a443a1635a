"""The memory that a run needs, as `python -m mem1_kernels.ppo.memory` computes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mem1_kernels.ppo.config import Config, read_config
from mem1_kernels.ppo.memory import main as print_memory
from mem1_kernels.ppo.memory import memory_budget, table

Accelerator = pytest.importorskip("accelerate").Accelerator

ROOT = Path(__file__).parents[1]


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
    budget = memory_budget(shape, config, processes=4, peak_context=2048)
    assert budget["weights"] == 7_615_616_512  # a fourth of its parameters, four bytes each
    stated = [line[4:] for line in path.read_text().splitlines() if line.startswith("#   ")]
    assert "\n".join(stated[-11:]) == table(budget)
    assert sum(budget.values()) < 0.9 * 85.5e9
    with_critic = memory_budget(
        shape, replace(config, critic="model"), processes=4, peak_context=2048
    )
    assert sum(with_critic.values()) > 85.5e9


def test_the_memory_budget_counts_what_a_run_holds(tmp_path):
    config = Config(lora_rank=4)
    from mem1_kernels.ppo.learner import Learner

    learner = Learner(config, Accelerator())
    policy = learner.module.policy
    budget = memory_budget(policy.config, config, processes=1, peak_context=30)
    trained = sum(parameter.numel() for parameter in learner.trained.values())
    assert budget["gradients"] == 4 * trained
    assert budget["weights"] == 4 * sum(parameter.numel() for parameter in policy.parameters())


def test_the_command_line_prints_the_memory_of_a_config(tmp_path, capsys):
    from mem1_kernels.ppo.learner import make_policy

    shape = make_policy(Config()).config
    shape.save_pretrained(tmp_path / "model")
    path = tmp_path / "run.toml"
    path.write_text(f"model = '{tmp_path / 'model'}'\nrollout_batch = 8\n")
    print_memory([str(path), "--processes=2", "--peak-context=100"])
    budget = memory_budget(shape, read_config(path), processes=2, peak_context=100)
    assert capsys.readouterr().out.strip() == table(budget)
