#!/usr/bin/env bash
# PPO with a critic and a reference on 4 machines with 8 x H100 80 GB each. Start Ray on all of them
# (`ray start --head`, `ray start --address=...`), then this on the head. MODEL and ROLLOUT as in
# grpo_1x4_h100.sh. GAE runs across turns: what the policy did not write is skipped.
#   python examples/verl/make_data.py data/factbook
#   bash examples/verl/ppo_4x8_h100.sh [verl's own overrides]
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-7B}
ROLLOUT=${ROLLOUT:-mem1}
DATA=${DATA:-data/factbook}

case "$MODEL" in
  *14B*) ROWS=48 ;;
  *) ROWS=128 ;;
esac

exec python -m verl.trainer.main_ppo \
  +ray_kwargs.ray_init.address=auto \
  +ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR=mem1 \
  actor_rollout_ref.rollout.agent.default_agent_loop=mem1 \
  actor_rollout_ref.rollout.name="$ROLLOUT" \
  +actor_rollout_ref.rollout.custom.mem1.environment=factbook \
  +actor_rollout_ref.rollout.custom.mem1.max_turns=6 \
  +actor_rollout_ref.rollout.custom.mem1.max_new_tokens=256 \
  algorithm.adv_estimator=gae algorithm.gamma=1.0 algorithm.lam=1.0 \
  algorithm.use_kl_in_reward=True algorithm.kl_ctrl.kl_coef=0.001 \
  data.train_files="$DATA/train.parquet" data.val_files="$DATA/val.parquet" \
  data.train_batch_size=512 data.max_prompt_length=512 data.max_response_length=5632 \
  data.filter_overlong_prompts=False \
  actor_rollout_ref.model.path="$MODEL" critic.model.path="$MODEL" \
  actor_rollout_ref.actor.strategy=fsdp2 critic.strategy=fsdp2 \
  actor_rollout_ref.actor.ppo_mini_batch_size=256 critic.ppo_mini_batch_size=256 \
  actor_rollout_ref.actor.use_dynamic_bsz=True \
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=8192 \
  critic.ppo_max_token_len_per_gpu=8192 \
  actor_rollout_ref.actor.optim.lr=1e-6 critic.optim.lr=1e-5 \
  actor_rollout_ref.rollout.n=1 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
  actor_rollout_ref.rollout.max_num_seqs="$ROWS" \
  trainer.nnodes=4 trainer.n_gpus_per_node=8 \
  trainer.save_freq=20 trainer.test_freq=20 trainer.total_epochs=4 \
  "$@"
