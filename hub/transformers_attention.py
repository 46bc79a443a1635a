"""What transformers calls for `attn_implementation="<repository of this kernel>"`.

transformers (from 5.23 on) looks for these two names in a kernel that brings its own attention.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .block_plan import BlockPlan
from .ops.attention import trajectory_attention

supports_flash_attn = True


def flash_attn_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    plan: BlockPlan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one transformers layer under the `plan` that the model was called with.

    `model(input_ids, position_ids=layout.position_ids[None], plan=BlockPlan.of(layout))` hands the
    plan to every layer. WITHOUT A PLAN THE MODEL IS MERELY CAUSAL: every token sees all earlier
    ones, and nothing of a trajectory is dropped. The first such call warns. transformers drops a
    misspelt keyword in silence; `mem1_kernels.hf.patch` of the full package raises on it.

    Args:
        query: `[batch, heads, tokens, head_dim]`, after RoPE.
        key, value: `[batch, kv_heads, tokens, head_dim]`.
        attention_mask: None. Padding belongs into the plan (a key with `expiry[k] = k`). Where
            `position_ids` jump, as in a tree, transformers makes a mask of its own, unless the
            model gets `attention_mask=torch.ones_like(input_ids)`.

    Returns:
        `[batch, tokens, heads, head_dim]`, and None for the weights.

    Raises:
        TypeError: a plan that this kernel's BlockPlan did not make.
        ValueError: what it cannot honour: a mask, dropout, a sliding window, or cached keys. The
            full package takes all but dropout.
    """
    name = type(module).__name__
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask: expected None, got {list(attention_mask.shape)}; put padding into "
            "the plan (expiry[k] = k), and where position_ids jump give the model "
            "attention_mask=torch.ones_like(input_ids)"
        )
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 (or model.eval()), got {dropout}")
    if sliding_window is not None:
        raise ValueError(f"sliding_window: {name} has {sliding_window}; expected none")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"model: {name} is not causal (is_causal is False)")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"past_key_values: expected none, got {key.shape[2] - query.shape[2]} cached tokens"
        )
    if plan is None:
        warnings.warn(
            "mem1-kernels: no plan, so attention is merely causal; call the model with plan=",
            stacklevel=2,
        )
    elif not isinstance(plan, BlockPlan):
        kind = type(plan)
        raise TypeError(
            f"plan: expected this kernel's own {BlockPlan.__module__}.BlockPlan, got "
            f"{kind.__module__}.{kind.__name__}"
        )
    out = trajectory_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        plan=plan,
        scale=scaling,
        softcap=softcap,
    )
    assert isinstance(out, Tensor)
    return out, None
