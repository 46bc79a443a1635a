#!/usr/bin/env bash
# GRPO on one machine with 4 x H100 80 GB. MODEL=Qwen/Qwen2.5-7B (default) or Qwen/Qwen2.5-14B;
# ROLLOUT=mem1 (KV pruned in place; default) or vllm (the live text sent again every turn).
#   python examples/verl/make_data.py data/factbook
#   bash examples/verl/grpo_1x4_h100.sh [verl's own overrides]
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-7B}
ROLLOUT=${ROLLOUT:-mem1}
DATA=${DATA:-data/factbook}

case "$MODEL" in
  *14B*) OFFLOAD=True TOKENS=4096 LENGTH=3584 ROWS=64 ;;
  *) OFFLOAD=False TOKENS=8192 LENGTH=5632 ROWS=128 ;;
esac

exec python -m verl.trainer.main_ppo \
  +ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR=mem1 \
  actor_rollout_ref.rollout.agent.default_agent_loop=mem1 \
  actor_rollout_ref.rollout.name="$ROLLOUT" \
  +actor_rollout_ref.rollout.custom.mem1.environment=factbook \
  +actor_rollout_ref.rollout.custom.mem1.max_turns=6 \
  +actor_rollout_ref.rollout.custom.mem1.max_new_tokens=256 \
  algorithm.adv_estimator=grpo \
  data.train_files="$DATA/train.parquet" data.val_files="$DATA/val.parquet" \
  data.train_batch_size=128 data.max_prompt_length=512 data.max_response_length="$LENGTH" \
  data.filter_overlong_prompts=False \
  actor_rollout_ref.model.path="$MODEL" \
  actor_rollout_ref.actor.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$TOKENS" \
  actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.fsdp_config.param_offload="$OFFLOAD" \
  actor_rollout_ref.actor.fsdp_config.optimizer_offload="$OFFLOAD" \
  actor_rollout_ref.rollout.n=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.max_num_seqs="$ROWS" \
  trainer.nnodes=1 trainer.n_gpus_per_node=4 \
  trainer.save_freq=20 trainer.test_freq=20 trainer.total_epochs=1 \
  "$@"
