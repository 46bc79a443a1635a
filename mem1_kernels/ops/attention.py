"""trajectory_attention: exact attention under an expiry mask, differentiable, on CPU and GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.mask import check_expiry
from mem1_kernels.ops import _library  # noqa: F401  registers the operators
from mem1_kernels.ops._checks import DTYPES, check_head_dim, check_scale


class _TrajectoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        expiry: Tensor,
        floor: Tensor | None,
        scale: float,
        softcap: float,
        rows: list[Tensor],
        columns: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.mem1.trajectory_attention_fwd(
            query, key, value, expiry, floor, rows, scale, softcap
        )
        ctx.save_for_backward(query, key, value, out, lse, expiry, floor, *rows, *columns)
        ctx.scale, ctx.softcap, ctx.num_rows = scale, softcap, len(rows)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None):
        query, key, value, out, lse, expiry, floor, *lists = ctx.saved_tensors
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 9
            grad_out = torch.zeros_like(out)
        gradients = torch.ops.mem1.trajectory_attention_bwd(
            grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(),
            grad_lse,
            query,
            key,
            value,
            out,
            lse,
            expiry,
            floor,
            lists[: ctx.num_rows],
            lists[ctx.num_rows :],
            ctx.scale,
            ctx.softcap,
        )
        return *gradients, None, None, None, None, None, None


def trajectory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor | None = None,
    *,
    floor: Tensor | None = None,
    plan: BlockPlan | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    prompt_query: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which query `i` sees key `k` iff `floor[i] <= k <= i < expiry[k]`.

    The work grows with the visible area and the memory with the tokens. A key with
    `expiry[k] <= k` is seen by nobody and never read; a query that sees nothing gives 0, LSE -inf
    and no gradient. A NaN in a key that somebody sees may reach all queries of its tile. Under
    autocast the inputs are cast as for scaled_dot_product_attention.

    Args:
        query: `[batch, tokens, heads, head_dim]`; float32, float16 or bfloat16; any strides (a last
            dimension that is not contiguous is copied). head_dim: a multiple of 8 from 16 to 256.
        key, value: `[batch, tokens, kv_heads, head_dim]`, heads divisible by kv_heads.
        expiry: int32 or int64 `[tokens]`, or `[batch, tokens]`: first position that no longer sees
            the key. None, with no plan: causal.
        floor: as expiry: first key that the query sees. None: 0.
        plan: `BlockPlan.from_expiry(expiry, floor)`, in place of expiry and floor; make it once and
            reuse it. Without it one is made in the call.
        scale: of the scores, 1e-18 to 1e18; default: `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`, if given; 1e-18 to 1e18.
        return_lse: return the log-sum-exp of the scores too (natural log). It is differentiable.
        prompt_query: for the plan of a layout of "compact" positions, and only for it: the queries
            at its position_ids, shaped as query. They meet the prompt's keys; query, which meets
            all others, and key are at its kept_position_ids. It is one softmax over both.

    Returns:
        The output, `[batch, tokens, heads, head_dim]` in query's dtype; with `return_lse` also the
        LSE, float32 `[batch, heads, tokens]`. Gradients of gradients raise.

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: shapes or devices that do not fit, both a plan and an expiry or floor, or a
            prompt_query without such a plan or the reverse.

    Source: FlashAttention-2 (arXiv 2307.08691); the mask is MEM1's (arXiv 2506.15841, figure 4).

    >>> query, key = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
    >>> expiry = torch.tensor([5, 3, 3, 5, 5])  # tokens 1 and 2 are dropped before token 3
    >>> trajectory_attention(query, key, key, expiry).shape
    torch.Size([1, 5, 4, 16])
    """
    device_type = query.device.type if isinstance(query, Tensor) else "cpu"
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (
            x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in (query, key, value)
        )
    prompt_plan = plan.prompt if isinstance(plan, BlockPlan) else None
    if (prompt_query is None) != (prompt_plan is None):
        needs = "expected None without" if prompt_plan is None else "expected the queries for"
        raise ValueError(f"prompt_query: {needs} the plan of a layout of 'compact' positions")
    if prompt_query is not None:
        return _with_prompt(
            trajectory_attention(
                query, key, value, plan=replace(plan, prompt=None),  # type: ignore[type-var]
                scale=scale, softcap=softcap, return_lse=True,
            ),
            trajectory_attention(
                prompt_query, key, value, plan=prompt_plan,
                scale=scale, softcap=softcap, return_lse=True,
            ),
            return_lse,
        )  # fmt: skip
    _check_inputs(query, key, value)
    batch, tokens = query.shape[:2]
    if plan is not None:
        if expiry is not None or floor is not None:
            given = "expiry" if expiry is not None else "floor"
            raise ValueError(f"{given}: the plan carries it already; pass one of the two")
        if not isinstance(plan, BlockPlan):
            raise TypeError(f"plan: expected a BlockPlan, got {type(plan).__name__}")
        _check_layout("plan", plan.expiry, query)
    else:
        if expiry is None:
            if floor is not None:
                raise ValueError("floor: needs an expiry beside it, got none")
            expiry = torch.full((tokens,), tokens, dtype=torch.int32, device=query.device)
        check_expiry(expiry, floor)
        _check_layout("expiry", torch.atleast_2d(expiry), query)
        plan = BlockPlan.from_expiry(expiry, floor)
    scale = check_scale(query.shape[3], scale, softcap)
    if batch == 0:
        raise ValueError("query: expected at least one batch row, got none")

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out, lse = _TrajectoryAttention.apply(
        query,
        key,
        value,
        plan.expiry,
        plan.floor,
        scale,
        float(softcap or 0.0),
        plan.rows,
        plan.columns,
    )
    return (out, lse) if return_lse else out


def _with_prompt(window: Any, prompt: Any, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax over the keys of both, each an (out, lse). A query may see nothing in either."""
    (out, lse), (other, other_lse) = window, prompt
    unseen = other_lse == float("-inf")
    more = torch.where(unseen, float("-inf"), other_lse - lse)
    share = more.sigmoid().transpose(1, 2)[..., None]
    merged = torch.lerp(out.float(), other.float(), share).to(out.dtype)
    if not return_lse:
        return merged
    alone = lse == float("-inf")
    return merged, torch.where(alone, other_lse, lse + torch.nn.functional.softplus(more))


def _check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: expected {query.dtype} like query, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{name}: expected on {query.device} like query, got {x.device}")
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected [batch, tokens, heads, head_dim], got {list(x.shape)}"
            )
    batch, tokens, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    expected = [batch, tokens, kv_heads, head_dim]
    for name, x in (("key", key), ("value", value)):
        if list(x.shape) != expected:
            raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}")
    if tokens == 0:
        raise ValueError("query: expected at least one token, got none")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query: expected heads divisible by {kv_heads} kv_heads, got {heads}")
    check_head_dim(head_dim)


def _check_layout(name: str, expiry: Tensor, query: Tensor) -> None:
    batch, tokens = query.shape[:2]
    if expiry.shape[1] != tokens or expiry.shape[0] not in (1, batch):
        raise ValueError(
            f"{name}: expected {tokens} tokens in 1 or {batch} rows, got {list(expiry.shape)}"
        )
    if expiry.device != query.device:
        raise ValueError(f"{name}: expected on {query.device} like query, got {expiry.device}")
