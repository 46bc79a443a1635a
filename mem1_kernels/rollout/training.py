"""From rollouts to a training pass: pack them, and compute the log-probs that a trainer sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.hf import is_patched, patched
from mem1_kernels.hf.cache import rope_limit
from mem1_kernels.rollout.engine import Rollout, check_temperature
from mem1_kernels.trajectory import Layout, Positions, check_positions, pack


def collate(
    rollouts: Sequence[Rollout | Sequence[Rollout]],
    *,
    positions: Positions | None = None,
) -> tuple[Layout, Tensor]:
    """Packs rollouts for one training pass; a sequence among them is a group behind one prompt.

    Args:
        rollouts: all of one form of positions; each is laid out as it was computed.
        positions: the form that the trainer is set up for, to be held against the rollouts'.

    Returns:
        The layout and its sampled log-probs, float32 `[tokens]`: 0 outside the loss, and NaN where
        a token in the loss was not sampled (`Segment.trainable` of an info), as it has none.

    Raises:
        TypeError: something that is not a Rollout or a sequence of them.
        ValueError: nothing to pack, rollouts of two forms, or of another form than `positions`:
            their log-probs differ by whole units, so training would be off-policy.
    """
    if isinstance(rollouts, Rollout):
        raise TypeError("rollouts: expected a sequence, got one Rollout")
    flat: list[Rollout] = []
    for item in rollouts:
        flat += [item] if isinstance(item, Rollout) else item
    for rollout in flat:
        if not isinstance(rollout, Rollout):
            raise TypeError(f"rollouts: expected Rollouts, got {type(rollout).__name__}")
    forms = {rollout.positions for rollout in flat}
    if len(forms) != 1:
        raise ValueError(f"rollouts: expected positions of one form, got {sorted(forms) or 'none'}")
    if positions is not None and forms != {check_positions(positions)}:
        raise ValueError(
            f"rollouts: their positions are {forms.pop()!r}, the trainer's {positions!r}; "
            "that pairing is off-policy"
        )
    layout = pack(
        [
            item.layout if isinstance(item, Rollout) else [member.layout for member in item]
            for item in rollouts
        ]
    )
    log_probs = [r.log_probs.masked_fill(~r.sampled, torch.nan) for r in flat]
    sampled = torch.cat(log_probs)[layout.source]
    return layout, sampled.masked_fill(~layout.loss_mask, 0)


def score(model: Any, layout: Layout, *, temperature: float = 1.0) -> Tensor:
    """Log-probs of a layout's tokens in the loss in one masked forward pass; differentiable.

    Args:
        model: a transformers causal LM, patched for the call if it is not.
        layout: with token ids; from `collate`, `pack`, `unroll` or a Trajectory.
        temperature: the rollout's (0 counts as 1, as there).

    Returns:
        float32 `[tokens]`, 0 where `layout.loss_mask` is False.

    Raises:
        ValueError: the layout has no token ids, or a generated token that nothing predicts; a
            temperature < 0; positions past those where a "dynamic" or "longrope" RoPE changes; a
            model under gradient checkpointing that is not patched.
    """
    check_temperature(temperature)
    if layout.token_ids is None:
        raise ValueError("layout: has no token ids; its segments were given as counts")
    generated = layout.loss_mask.nonzero().flatten()
    before = layout.predecessor[generated]
    if bool((before < 0).any()):
        raise ValueError("layout: its first token is generated, but nothing predicts it")
    layers = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
    again = model.training and any(layers)
    if again and torch.is_grad_enabled() and not is_patched(model):
        raise ValueError(
            "model: with gradient checkpointing the backward pass runs its layers again; patch() "
            "it for both"
        )
    limit = rope_limit(model)
    if limit is not None and (last := int(layout.position_ids.max())) >= limit:
        raise ValueError(
            f"layout: expected positions less than {limit}, from where this model's RoPE (dynamic "
            f"or longrope) turns keys otherwise than the rollout's, got {last}"
        )
    device = next(model.parameters()).device
    plan = BlockPlan.of(layout).to(device)
    with patched(model):
        logits = model(
            input_ids=layout.token_ids[None].to(device),
            position_ids=layout.position_ids[None].to(device),
            plan=plan,
            use_cache=False,
            logits_to_keep=before.to(device),
        ).logits[0]
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), 1)
    picked = log_probs.gather(1, layout.token_ids[generated].to(device)[:, None])[:, 0]
    return picked.new_zeros(layout.num_tokens).index_put((generated.to(device),), picked)
