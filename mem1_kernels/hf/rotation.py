"""By how much a transformers model turns its queries and keys per position, found on the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mem1_kernels.hf.decoder import rope_limit
from mem1_kernels.ops.rope import LAYOUTS, Rope

_STEPS = (1, 7, 61)  # positions at which a rotation is held against the model's own keys


def find_rope(stack: PreTrainedModel) -> Rope:
    """The rotation of a patched model's layers, one tensor of frequencies per layer.

    One token is fed at several positions. A layer's keys must then differ by a rotation with
    frequencies that the model holds, in one of the two layouts, or not differ at all (a layer
    without RoPE). So what a config says, or leaves out, does not matter.

    Raises:
        ValueError: no RoPE, one that changes with the length, or keys that another position changes
            otherwise than by a rotation.
    """
    name = type(stack).__name__
    if rope_limit(stack) is not None:
        raise ValueError(
            f"positions: 'compact' needs a RoPE of fixed frequencies; that of {name} (dynamic or "
            "longrope) changes with the length"
        )
    buffers = {
        key: buffer.float()
        for key, buffer in stack.named_buffers()
        if key.endswith("inv_freq") and "original" not in key and buffer.dim() == 1
    }
    if not buffers:
        raise ValueError(f"positions: 'compact' needs a model with RoPE; {name} has none")
    at_0, *moved = _keys_at(stack, (0, *_STEPS))
    frequencies, layouts = [], set()
    for layer in sorted(at_0):
        key = at_0[layer]
        tolerance = (1e-3 if key.dtype == torch.float32 else 3e-2) * float(key.abs().max())
        fits = [(_error(key, layer, moved, None, ""), key.new_zeros(0).float(), "")]
        for inv_freq in buffers.values():
            if 2 * len(inv_freq) <= key.shape[3]:
                fits += [
                    (_error(key, layer, moved, inv_freq, layout), inv_freq, layout)
                    for layout in LAYOUTS
                ]
        error, inv_freq, layout = min(fits, key=lambda fit: fit[0])
        if not error <= tolerance:
            raise ValueError(
                f"positions: 'compact' needs keys that turn with their position; those of layer "
                f"{layer} of {name} change otherwise"
            )
        frequencies.append(inv_freq)
        layouts.add(layout)
    layouts.discard("")
    if len(layouts) != 1:
        got = sorted(layouts) or "keys that do not depend on the position"
        raise ValueError(f"positions: 'compact' needs one layout of RoPE; {name} has {got}")
    return Rope(frequencies, layouts.pop())


@torch.no_grad()
def _keys_at(stack: PreTrainedModel, positions: tuple[int, ...]) -> list[dict[int, Tensor]]:
    """Each layer's key `[1, kv_heads, 1, head_dim]` of one token alone, at each of `positions`."""
    like: Any = stack.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 1, like.shape[1], generator=generator).to(like)
    training = [module for module in stack.modules() if module.training]
    found: list[dict[int, Tensor]] = []
    for module in training:
        module.training = False
    try:
        for position in positions:
            keys: dict[int, Tensor] = {}
            position_ids = torch.full((1, 1), position, device=like.device)
            stack(inputs_embeds=inputs, position_ids=position_ids, use_cache=False, key_probe=keys)
            found.append(keys)
    finally:
        for module in training:
            module.training = True
    return found


def _error(
    key: Tensor, layer: int, moved: list[dict[int, Tensor]], inv_freq: Tensor | None, layout: str
) -> float:
    errors = []
    for step, keys in zip(_STEPS, moved, strict=True):
        turned = key
        if inv_freq is not None:
            shift = torch.full((1, 1), step, device=key.device)
            turned = turn(key, angles(shift, inv_freq), layout)
        errors.append(float((turned - keys[layer]).abs().max()))
    return max(errors)


def angles(shift: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 `[batch, 1, tokens, rotary_dim / 2]`, of a move by `shift`
    `[batch, tokens]` positions."""
    angle = shift[:, None, :, None].double() * inv_freq.to(shift.device).double()
    return angle.cos().float(), angle.sin().float()


def turn(x: Tensor, angle: tuple[Tensor, Tensor], layout: str) -> Tensor:
    """`x` `[batch, heads, tokens, head_dim]` rotated on by `angles`, as a model rotates, without
    its magnitude factor, which is in `x` already. Elements from `rotary_dim` on do not turn."""
    cos, sin = angle
    rotary = 2 * cos.shape[-1]
    part = x[..., :rotary].float()
    if layout == "half":
        a, b = part.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., rotary:]], -1)
