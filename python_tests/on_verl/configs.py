"""verl's own config for runs on two logical devices, and the tiny model that they train."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas
import torch
from hydra import compose, initialize_config_module
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from mem1_kernels.agent import tasks

VENDOR = "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR=mem1"

BASE = """
trainer.device=cpu trainer.nnodes=1 trainer.n_gpus_per_node=2 trainer.logger=[file]
trainer.val_before_train=False trainer.total_training_steps=2 trainer.total_epochs=9
trainer.resume_mode=disable
data.train_batch_size=4 data.max_prompt_length=32 data.max_response_length=160
data.filter_overlong_prompts=False data.dataloader_num_workers=0
transfer_queue.backend.SimpleStorage.num_data_storage_units=1
actor_rollout_ref.model.enable_gradient_checkpointing=True
actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.actor.ppo_mini_batch_size=2
actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu=512
actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32
actor_rollout_ref.actor.optim.lr=1e-3
actor_rollout_ref.rollout.name=mem1 actor_rollout_ref.rollout.dtype=float32
actor_rollout_ref.rollout.n=4 actor_rollout_ref.rollout.tensor_model_parallel_size=1
actor_rollout_ref.rollout.max_num_seqs=16
actor_rollout_ref.rollout.agent.default_agent_loop=mem1
actor_rollout_ref.rollout.agent.num_workers=1
+actor_rollout_ref.rollout.custom.mem1.environment=worlds:talk
+actor_rollout_ref.rollout.custom.mem1.max_new_tokens=8
+actor_rollout_ref.rollout.custom.mem1.tolerance_max=1e-5
reward.num_workers=1
""".split()

GRPO = ["algorithm.adv_estimator=grpo"]

PPO = """
algorithm.adv_estimator=gae actor_rollout_ref.actor.use_kl_loss=True
actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
+actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32
actor_rollout_ref.ref.fsdp_config.model_dtype=fp32
critic.strategy=fsdp2 critic.model.enable_gradient_checkpointing=True
critic.ppo_max_token_len_per_gpu=512 +critic.fsdp.mixed_precision.param_dtype=fp32
critic.fsdp.use_torch_compile=False critic.optim.lr=1e-3
""".split()

TREE = ["+actor_rollout_ref.rollout.custom.mem1.positions=reprefill"]


def make_config(folder: Path, *overrides: str) -> Any:
    """verl's config with these overrides, for the model and the data in `folder`."""
    paths = [
        f"actor_rollout_ref.model.path={folder}",
        f"critic.model.path={folder}",
        f"data.train_files={folder}/rows.parquet",
        f"data.val_files={folder}/rows.parquet",
        f"trainer.default_local_dir={folder}/checkpoints",
    ]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*BASE, VENDOR, *paths, *overrides])


def make_model(folder: Path) -> None:
    """A tiny Qwen2 with wide random weights, a tokenizer of 54 words, and rows of data."""
    vocabulary = {name: number for number, name in enumerate(tasks._NAMES)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="?"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tasks.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=tasks.PAD,
        eos_token_id=tasks.EOS,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    chance = random.Random(0)
    rows = [
        {
            "data_source": "talk",
            "prompt": [{"role": "user", "content": "chain ?"}],
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": number, "size": chance.choice([2, 3, 4]), "seed": number},
        }
        for number in range(64)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "rows.parquet")
