"""What is trained: policy and critic, their optimizer, the reference, the copy that plays."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from mem1_kernels.agent.tasks import VOCABULARY
from mem1_kernels.hf import patch
from mem1_kernels.ppo.actor_critic import ActorCritic, Attend, attend
from mem1_kernels.ppo.config import Config, loading

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
        policy: Any = transformers.Qwen2ForCausalLM(shape)
        cast_weights(policy, getattr(torch, config.dtype))
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


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters, but not the buffers: RoPE's frequencies stay float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def check_accelerator(accelerator: Accelerator) -> None:
    """Raises ValueError for a set-up of accelerate that would not train exactly.

    Under FSDP2 it also sets the precision. With mixed_precision "bf16" accelerate rounds all that
    the module returns, log-probs and values too, to bfloat16, and adds up the processes' gradients
    in bfloat16. Here weights are gathered in bfloat16, as in a model of that dtype, the outputs
    stay as they are, and the gradients are added up in float32.
    """
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
    hook = getattr(accelerator.ddp_handler, "comm_hook", DDPCommunicationHookType.NO)
    if hook != DDPCommunicationHookType.NO:
        raise ValueError(f"comm_hook: expected none, as it rounds gradients, got {hook}")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(f"parallelism_config: expected data parallelism only, got {name}")
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    for name, why in (
        ("cpu_ram_efficient_loading", "every process loads the weights"),
        ("activation_checkpointing", "the option gradient_checkpointing does it"),
        ("ignored_modules", "their gradients would not be added up over processes"),
    ):
        if got := getattr(plugin, name, None):
            raise ValueError(f"fsdp_{name}: expected false or none ({why}), got {got!r}")
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise ValueError(
            "fsdp_auto_wrap_policy: expected TRANSFORMER_BASED_WRAP or NO_WRAP, got SIZE_BASED_WRAP"
        )
    low = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    given = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    if low and given == MixedPrecisionPolicy(low, low, low):  # what accelerate makes of "bf16"
        given = MixedPrecisionPolicy(low)
    for name, allowed in (
        ("param_dtype", (low, low or torch.float32)),
        ("reduce_dtype", (None, torch.float32)),
        ("output_dtype", (None, torch.float32)),
    ):
        if getattr(given, name) not in allowed:
            raise ValueError(
                f"mixed_precision_policy: expected {name} {allowed[1]} under mixed_precision "
                f"{accelerator.mixed_precision!r}, got {getattr(given, name)}"
            )
    # Inputs are not cast either: some models hand their layers rotations in float32.
    plugin.mixed_precision_policy = replace(
        given, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def check_units(module: ActorCritic, heads: Sequence[nn.Module]) -> None:
    """Raises ValueError if FSDP2 shards weights that `forward` reads outside their unit's pass.

    The log-probs are computed from the LM head's weights, which the root gathers for the whole
    pass; those of a unit are there only while that unit runs.

    Args:
        heads: the modules that hold the head's weights: the head, and an embedding tied to it.
    """
    called = set(module.policy.get_decoder().modules())
    if module.critic_model is not None:
        called |= set(module.critic_model.modules())
    for name, part in module.named_modules():
        if part is module or not isinstance(part, FSDPModule):
            continue
        inside: Any = part
        if inside not in called or any(one in heads for one in inside.modules()):
            raise ValueError(
                "fsdp_transformer_layer_cls_to_wrap: expected the model's layers, "
                f"got {type(part).__mro__[2].__name__} ({name}), whose weights are used outside it"
            )


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
        check_accelerator(accelerator)
        if config.bf16 and accelerator.mixed_precision != "bf16":
            raise ValueError(
                "bf16: expected an accelerator whose mixed_precision is 'bf16', "
                f"got {accelerator.mixed_precision!r}"
            )
        if config.dtype == "bfloat16" and not config.lora_rank:
            warnings.warn(
                "dtype: weights in bfloat16 lose updates below 1/256 of them; bf16=true computes "
                "in bfloat16 and keeps the weights in float32",
                stacklevel=2,
            )
        critic = config.critic if config.algorithm == "ppo" else "none"
        module = ActorCritic(make_policy(config), critic, config.temperature, attend)
        policy = [p for p in module.policy.parameters() if p.requires_grad]
        inside = {id(p) for p in policy}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in inside]
        trained = {p.dtype for p in (*policy, *rest)}
        if accelerator.is_fsdp2 and accelerator.mixed_precision == "no" and len(trained) > 1:
            raise ValueError(
                "dtype: expected 'float32' for all weights and a critic under FSDP2, which trains "
                f"weights of one dtype, got {config.dtype!r}; bf16=true computes in bfloat16"
            )
        head = module.policy.get_output_embeddings().weight
        heads = [m for m in module.modules() if any(p is head for p in m.parameters(False))]
        groups = [{"params": policy, "lr": config.lr}]
        groups += [{"params": rest, "lr": config.critic_lr}] if rest else []
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.config = config
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.module: ActorCritic = accelerator.unwrap_model(self.model)
        self.sharded = any(isinstance(m, FSDPModule) for m in self.module.modules())
        check_units(self.module, heads)
        reshard(self.module)
        self.trained = {n: p for n, p in self.module.policy.named_parameters() if p.requires_grad}
        self.reference: dict[str, Tensor] = {}
        if config.kl_coef:
            self.reference = {name: p.detach().clone() for name, p in self.trained.items()}
        self._player = self.module.policy
        if self.sharded:
            low = accelerator.mixed_precision == "bf16"
            computes = "bfloat16" if low else config.dtype
            copy = replace(config, dtype=computes, gradient_checkpointing=False)
            self._player = make_policy(copy).to(accelerator.device)
            if low:
                cast_weights(self._player, torch.bfloat16)  # adapters too, as FSDP2 gathers them

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
