"""What is trained: policy and critic, their optimizer, the reference, the copy that plays."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mem1_kernels.agent.tasks import VOCABULARY
from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.hf import is_patched, patch, unpatch
from mem1_kernels.ppo.config import Config, loading
from mem1_kernels.ppo.logprobs import token_log_probs
from mem1_kernels.trajectory import Layout

UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def make_policy(config: Config) -> Any:
    """The causal LM that is trained, patched, with LoRA adapters if asked for.

    Raises:
        ImportError: adapters are asked for, but peft is not installed.
        ValueError: the model cannot be loaded.
    """
    import transformers

    torch.manual_seed(config.seed)
    if config.model == "tiny":
        shape = transformers.Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.05,
            tie_word_embeddings=False,
        )
        policy: Any = transformers.Qwen2ForCausalLM(shape).to(getattr(torch, config.dtype))
    else:
        with loading("model", config.model):
            policy = transformers.AutoModelForCausalLM.from_pretrained(
                config.model, dtype=getattr(torch, config.dtype)
            )
    if config.lora_rank:
        try:
            import peft
        except ImportError as error:
            raise ImportError(
                "lora_rank: peft is not installed (`pip install mem1-kernels[lora]`)"
            ) from error
        adapters = peft.LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear"
        )
        policy = peft.get_peft_model(policy, adapters)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return patch(policy)


Attend = Callable[[Any, Layout, BlockPlan], Tensor]
"""(model, layout, plan) -> last hidden states `[tokens, width]`, each token seeing what the
layout says. There is one right implementation, `attend`; `bench/mask_ablation.py` has wrong ones.
"""


def attend(model: Any, layout: Layout, plan: BlockPlan) -> Tensor:
    """One masked forward pass over a packed row."""
    assert layout.token_ids is not None
    return model.get_decoder()(
        input_ids=layout.token_ids[None],
        position_ids=layout.position_ids[None],
        plan=plan,
        use_cache=False,
    ).last_hidden_state[0]


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one wrapper (DDP, FSDP2) serves both.

    Args:
        policy: a patched causal LM.
        critic: "head" reads the policy's hidden states, "detached" does so without training them,
            "model" is a second decoder with a head, "none" gives no values.
        temperature: of the distribution that the log-probs are of.
    """

    def __init__(
        self, policy: Any, critic: str, temperature: float = 1.0, attend: Attend = attend
    ) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.attend = attend
        self.detach = critic == "detached"
        self.critic_model = None
        if critic == "model":
            self.critic_model = patch(deepcopy(unpatch(policy).get_decoder()))
            patch(policy)
        width = policy.config.get_text_config().hidden_size
        self.value_head = None if critic == "none" else nn.Linear(width, 1)
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._no_split_modules = policy._no_split_modules  # what FSDP2 wraps, layer by layer
        head = policy.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(f"policy: expected a plain linear LM head, got {type(head).__name__}")

    def forward(self, layout: Layout, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies of a row's generated tokens, and the values before them.

        Each is fp32 `[generated]`, in packed order; values are None without a critic.
        """
        assert is_patched(self.policy), "an unpatched model would drop the plan without a word"
        assert layout.token_ids is not None
        before = layout.predecessor[layout.loss_mask]
        hidden = self.attend(self.policy, layout, plan)[before]
        head = self.policy.get_output_embeddings()
        text_config = self.policy.config.get_text_config()
        log_probs, entropy = token_log_probs(
            hidden,
            head.weight,
            layout.token_ids[layout.loss_mask],
            bias=head.bias,
            temperature=self.temperature,
            softcap=getattr(text_config, "final_logit_softcapping", None),
            return_entropy=True,
        )
        if self.value_head is None:
            return log_probs, entropy, None
        if self.critic_model is not None:
            hidden = self.attend(self.critic_model, layout, plan)[before]
        elif self.detach:
            hidden = hidden.detach()
        weight, bias = self.value_head.weight.float(), self.value_head.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            values = nn.functional.linear(hidden.float(), weight, bias)[:, 0]
        return log_probs, entropy, values


def reshard(model: nn.Module) -> None:
    """Frees the parameters that FSDP2 gathered for the last pass; does nothing without FSDP2."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def exchange(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Exchanges two sets of values in place, one tensor at a time."""
    for name, parameter in parameters.items():
        held = parameter.clone()
        parameter.copy_(others[name])
        others[name].copy_(held)


class Learner:
    """The model as it is trained: wrapped, with its optimizer, its reference and its player.

    The reference is a copy of what is trained (all weights, or the adapters), exchanged with it
    while it scores: no second model. The player is the causal LM that plays episodes. It is the
    policy itself; where FSDP2 shards the policy, it is an unsharded copy, updated before it plays.
    """

    def __init__(self, config: Config, accelerator: Accelerator, attend: Attend = attend) -> None:
        if accelerator.distributed_type in UNSUPPORTED and not accelerator.is_fsdp2:
            raise ValueError(
                "accelerator: expected one process, DDP or FSDP2 (--fsdp_version 2), "
                f"got {accelerator.distributed_type}"
            )
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"mixed_precision: expected 'no' or 'bf16', got {accelerator.mixed_precision!r}"
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps: expected 1, since `minibatch` and `token_budget` say "
                f"what is accumulated, got {accelerator.gradient_accumulation_steps}"
            )
        if config.dtype == "bfloat16" and not config.lora_rank:
            warnings.warn(
                "dtype: weights in bfloat16 lose updates below 1/256 of them; bf16=true computes "
                "in bfloat16 and keeps the weights in float32",
                stacklevel=2,
            )
        critic = config.critic if config.algorithm == "ppo" else "none"
        module = ActorCritic(make_policy(config), critic, config.temperature, attend)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # the rollout has none, and its log-probs are those of the update
        policy = [p for p in module.policy.parameters() if p.requires_grad]
        inside = {id(p) for p in policy}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in inside]
        groups = [{"params": policy, "lr": config.lr}]
        groups += [{"params": rest, "lr": config.critic_lr}] if rest else []
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.config = config
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.module: ActorCritic = accelerator.unwrap_model(self.model)
        self.sharded = any(isinstance(m, FSDPModule) for m in self.module.modules())
        reshard(self.module)
        self.trained = {n: p for n, p in self.module.policy.named_parameters() if p.requires_grad}
        self.reference: dict[str, Tensor] = {}
        if config.kl_coef:
            self.reference = {name: p.detach().clone() for name, p in self.trained.items()}
        self._player = self.module.policy
        if self.sharded:
            computes = "bfloat16" if accelerator.mixed_precision == "bf16" else config.dtype
            copy = replace(config, dtype=computes, gradient_checkpointing=False)
            self._player = make_policy(copy).to(accelerator.device)

    def learning_rates(self, *rates: float) -> None:
        """Sets the policy's and the critic's learning rates."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate

    @torch.no_grad()
    def settle_reference(self) -> None:
        """Makes the policy, as it is now, the reference."""
        reshard(self.module)
        for name, values in self.reference.items():
            values.copy_(self.trained[name])

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The policy is the reference for the length of a `with` block."""
        reshard(self.module)
        exchange(self.trained, self.reference)
        try:
            yield
        finally:
            reshard(self.module)
            exchange(self.trained, self.reference)

    @torch.no_grad()
    def player(self) -> Any:
        """The causal LM that plays, with the policy's current weights."""
        if self.sharded:
            reshard(self.module)
            copies = dict(self._player.named_parameters())
            for name, parameter in self.module.policy.named_parameters():
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                copies[name].copy_(whole)
        return self._player

    def clip_gradients(self) -> list[float]:
        """Clips the gradients; returns the norm of the policy's and of the critic's."""
        norms = []
        for group in self.optimizer.param_groups:
            norm = self.accelerator.clip_grad_norm_(group["params"], self.config.max_grad_norm)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        if not all(map(math.isfinite, norms)):
            raise FloatingPointError(f"gradient norm: expected finite numbers, got {norms}")
        return norms
