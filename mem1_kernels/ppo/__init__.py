"""The loss of a MEM1 agent: pure tensor functions, each beside its equation."""

from __future__ import annotations

from mem1_kernels.ppo.advantages import (
    gae,
    kl_penalised_rewards,
    on_every_token,
    on_last_token,
    reinforce_pp_advantages,
)
from mem1_kernels.ppo.groups import grpo_advantages, rloo_advantages
from mem1_kernels.ppo.logprobs import token_log_probs
from mem1_kernels.ppo.losses import (
    kl_estimate,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)
from mem1_kernels.ppo.masked import AllReduce, masked_mean, whiten
from mem1_kernels.ppo.metrics import approx_kl, clip_fraction, explained_variance, log_prob_gap
from mem1_kernels.ppo.turns import turn_gae, turn_relative_advantages, whiten_within

__all__ = [
    "AllReduce",
    "approx_kl",
    "clip_fraction",
    "explained_variance",
    "gae",
    "grpo_advantages",
    "kl_estimate",
    "kl_penalised_rewards",
    "log_prob_gap",
    "masked_mean",
    "on_every_token",
    "on_last_token",
    "policy_loss",
    "reinforce_pp_advantages",
    "rloo_advantages",
    "token_log_probs",
    "truncated_importance_weights",
    "turn_gae",
    "turn_relative_advantages",
    "value_loss",
    "whiten",
    "whiten_within",
]
