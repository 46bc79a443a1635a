"""Sequence parallelism by heads (Ulysses): each process holds a slice of the tokens of one packed
row, and attends over all tokens with a share of the heads.

Source: Jacobs et al., DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From every head of a slice of the tokens to every token of a share of the heads.

    Differentiable. Every process of the group calls it, with the same shape.

    Args:
        x: `[batch, heads, tokens, head_dim]`. With fewer heads than processes each head is
            repeated, which serves the keys and values of grouped-query attention.

    Returns:
        `[batch, heads / processes, tokens * processes, head_dim]`.

    Raises:
        ValueError: the heads can neither be divided nor repeated evenly.
    """
    size, heads = dist.get_world_size(group), x.shape[1]
    if heads % size and size % heads:
        raise ValueError(
            f"sequence_group: expected a number of heads that {size} processes can share, or that "
            f"divides {size}, got {heads}"
        )
    if heads < size:
        x = x.repeat_interleave(size // heads, 1)
    return cast(Tensor, _AllToAll.apply(x, 1, 2, group))


def scatter_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back for attention's output. Differentiable.

    Args:
        x: `[batch, tokens * processes, heads / processes, head_dim]`.

    Returns:
        `[batch, tokens, heads, head_dim]`.
    """
    return cast(Tensor, _AllToAll.apply(x, 1, 2, group))


def gather_position_ids(position_ids: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[batch, tokens]` of each process, as `[batch, tokens * processes]`."""
    parts = [torch.empty_like(position_ids) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, position_ids.contiguous(), group=group)
    return torch.cat(parts, 1)


class _AllToAll(torch.autograd.Function):
    """Cuts dimension `split` into one part per process and joins what arrives along `join`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dims = split, join, group
        return _exchange(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        split, join, group = ctx.dims
        return _exchange(grads[0], join, split, group), None, None, None


def _exchange(x: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
    sent = torch.stack(x.chunk(dist.get_world_size(group), split))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(list(received), join)
