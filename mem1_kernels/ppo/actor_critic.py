"""The module that is trained: a causal LM and its critic, log-probs and values from hidden states.

The log-probs come from the LM head's weights, without the model's own logits (see `logprobs`). So
what else the model does to its logits is found first, by `logit_transform`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.hf import is_patched, patch, unpatch
from mem1_kernels.ppo.logprobs import token_log_probs
from mem1_kernels.retention import Segment
from mem1_kernels.trajectory import Layout, Trajectory

Attend = Callable[[Any, Layout, BlockPlan], Tensor]
"""(model, layout, plan) -> last hidden states `[tokens, width]`, each token seeing what the
layout says. There is one right implementation, `attend`; `bench/mask_ablation.py` has wrong ones.
"""


def attend(model: Any, layout: Layout, plan: BlockPlan) -> Tensor:
    """One masked forward pass over a packed row."""
    return model.get_decoder()(**_inputs(layout, plan)).last_hidden_state[0]


def _inputs(layout: Layout, plan: BlockPlan) -> dict[str, Any]:
    assert layout.token_ids is not None
    return {
        "input_ids": layout.token_ids[None],
        "position_ids": layout.position_ids[None],
        "plan": plan,
        "use_cache": False,
    }


class LogitTransform(NamedTuple):
    """logits = cap(scale * (W h + b)), where cap(x) = softcap * tanh(x / softcap), or x if None."""

    scale: float
    softcap: float | None


@torch.no_grad()
def logit_transform(policy: Any) -> LogitTransform:
    """How a model's logits come out of its head's weights and of the hidden states of `attend`.

    Granite divides logits by `logits_scaling`, HyperCLOVA X multiplies them by it, Cohere has a
    `logit_scale`, Gemma a cap, and MiniCPM3 scales the hidden states. So this reads no config: in
    one forward pass it replaces the head's output by chosen numbers, and looks at the logits.

    Args:
        policy: a patched causal LM without dropout, or a PEFT model around one.

    Raises:
        ValueError: the head is not a plain linear layer, the model makes its logits in a way that
            the two numbers do not describe, or it computes something else in training.

    >>> import transformers
    >>> shape = transformers.GraniteConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1, logits_scaling=8.0)
    >>> logit_transform(patch(transformers.GraniteForCausalLM(shape)))
    LogitTransform(scale=0.125, softcap=None)
    """
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    name = type(base).__name__
    head, decoder = policy.get_output_embeddings(), policy.get_decoder()
    if type(head) is not nn.Linear:
        raise ValueError(
            f"policy: expected a plain linear LM head, got {type(head).__name__} in {name}"
        )
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(
            f"policy: expected layers and final norm from get_decoder() of {name}, "
            f"got {type(decoder).__name__}"
        )
    tokens, vocabulary, device = 8, head.out_features, head.weight.device
    token_ids = [number % vocabulary for number in range(1, tokens + 1)]
    layout = Trajectory([Segment("prompt", token_ids)]).to(device)
    plan = BlockPlan.of(layout)
    # The first token's numbers are so small that no cap shows, the second's so large that only the
    # cap shows. The others' are a spread of logits, which scale and cap must explain.
    spread = torch.linspace(-100, 100, 41, dtype=torch.float64, device=device)
    chosen = spread[torch.arange(tokens * vocabulary, device=device) % len(spread)]
    chosen = chosen.reshape(tokens, vocabulary)
    chosen[0], chosen[1] = 2.0**-60, 2.0**60
    read: list[Tensor] = []

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read.append(args[0])
        return chosen.clone()[None]

    was_training = policy.training
    hook = head.register_forward_hook(replace)
    try:
        hidden = attend(policy.train(), layout, plan)
        logits = policy.eval()(**_inputs(layout, plan)).logits
        same = len(read) == 1 and torch.equal(read[0][0], hidden)
        quiet = same or torch.equal(attend(policy, layout, plan), hidden)
    finally:
        hook.remove()
        policy.train(was_training)

    if not quiet:
        raise ValueError(
            f"policy: {name} computes other hidden states in training than in a rollout; expected "
            "no dropout and no other noise"
        )
    if len(read) != 1 or read[0].numel() != hidden.numel() or logits.shape != (1, *chosen.shape):
        raise ValueError(
            f"policy: expected one logit for each output of the LM head, {[1, *chosen.shape]}, "
            f"got {list(logits.shape)} from {name}"
        )
    before = 1.0 if same else _factor(hidden, read[0].reshape(hidden.shape))
    if before is None or (before != 1 and head.bias is not None):
        raise ValueError(
            f"policy: {name} changes its decoder's hidden states before the LM head; expected "
            "those states, or without a bias in the head a multiple of them"
        )
    after, most = float(logits[0, 0, 0]) / 2.0**-60, float(logits[0, 1, 0])
    softcap = most if most < after * 2.0**59 else None
    expected = chosen * after
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if not (after > 0 and torch.allclose(logits[0].double(), expected, rtol=1e-6, atol=0.0)):
        raise ValueError(
            f"policy: {name} changes the output x of its LM head; expected logits of the form "
            "s * x or c * tanh(s * x / c)"
        )
    return LogitTransform(float(f"{before * after:.12g}"), softcap)


def _factor(hidden: Tensor, read: Tensor) -> float | None:
    """f where `read` is f times `hidden`, to rounding; None if there is no such number."""
    a, b = hidden.double(), read.double()
    factor = float((a * b).sum() / (a * a).sum())
    rtol = 2 * torch.finfo(hidden.dtype).eps
    return factor if torch.allclose(b, factor * a, rtol=rtol, atol=0.0) else None


def without_dropout(model: nn.Module) -> None:
    """Sets every dropout rate to 0: a rollout has none, and its log-probs are those of the update.

    A rate is the `p` of a Dropout module, or a number that another module calls so (`dropout`,
    `layerdrop`).
    """
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name, value in vars(part).items():
            if isinstance(value, float) and "drop" in name:
                setattr(part, name, 0.0)


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one wrapper (DDP, FSDP2) serves both.

    Args:
        policy: a patched causal LM; its dropout is set to 0.
        critic: "head" reads the policy's hidden states, "detached" does so without training them,
            "model" is a second decoder with a head, "none" gives no values.
        temperature: of the distribution that the log-probs are of.

    Raises:
        ValueError: the policy's logits are not those that `logit_transform` describes.
    """

    def __init__(
        self, policy: Any, critic: str, temperature: float = 1.0, attend: Attend = attend
    ) -> None:
        super().__init__()
        self.policy = policy
        without_dropout(policy)
        # cap(s x) / T, at scale s and softcap c, is cap(x) / T at T / s and c / s.
        scale, softcap = logit_transform(policy)
        self.temperature = temperature / scale
        self.softcap = None if softcap is None else softcap / scale
        self.attend = attend
        self.detach = critic == "detached"
        self.critic_model = None
        if critic == "model":
            self.critic_model = patch(deepcopy(unpatch(policy).get_decoder()))
            patch(policy)
        width = policy.get_output_embeddings().in_features
        self.value_head = None if critic == "none" else nn.Linear(width, 1)
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        # FSDP2 wraps these, layer by layer; a model may name layers that it does not have.
        kinds = {type(part).__name__ for part in policy.modules()}
        self._no_split_modules = [name for name in policy._no_split_modules or () if name in kinds]

    def forward(self, layout: Layout, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies of a row's generated tokens, and the values before them.

        Each is fp32 `[generated]`, in packed order; values are None without a critic.
        """
        assert is_patched(self.policy), "an unpatched model would drop the plan without a word"
        assert layout.token_ids is not None
        before = layout.predecessor[layout.loss_mask]
        hidden = self.attend(self.policy, layout, plan)[before]
        head = self.policy.get_output_embeddings()
        log_probs, entropy = token_log_probs(
            hidden,
            head.weight,
            layout.token_ids[layout.loss_mask],
            bias=head.bias,
            temperature=self.temperature,
            softcap=self.softcap,
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
            values = hidden.float() @ weight[0] + bias
        return log_probs, entropy, values
