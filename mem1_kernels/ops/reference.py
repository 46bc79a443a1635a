"""The oracle: every op in plain torch, written to be read. Runs in fp64 on the CPU.

Dense, so memory grows with tokens squared. The kernels never import this file, nor this file them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem1_kernels.trajectory import visible


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float) -> Tensor:
    """Scaled, capped scores `[batch, heads, queries, keys]` before any mask."""
    group = query.shape[2] // key.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(group, 2)) * scale
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _clean(x: Tensor, dead: Tensor) -> Tensor:
    """`x` `[batch, tokens, heads, head_dim]` with the rows of dead tokens `[P, tokens]` set to 0."""
    return x.masked_fill(dead[:, :, None, None], 0)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    floor: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Masked attention, its output `[batch, tokens, heads, head_dim]` and LSE `[batch, heads, tokens]`.

    expiry, floor: `[P, tokens]`, P in {1, batch}. A row that sees nothing: output 0, LSE -inf.
    """
    compute = _compute_dtype(query.dtype)
    mask = visible(expiry, floor)[:, None]
    never_seen = ~mask.any(2)[:, 0]
    q = _clean(query.to(compute), ~mask.any(3)[:, 0])
    k, v = (_clean(x.to(compute), never_seen) for x in (key, value))
    scores = _scores(q, k, scale, softcap).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(3)
    probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    v = v.repeat_interleave(query.shape[2] // key.shape[2], 2)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, v)
    lse_dtype = compute if compute == torch.float64 else torch.float32
    return out.to(query.dtype).contiguous(), lse.to(lse_dtype)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    expiry: Tensor,
    floor: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key, value in closed form.

    With P the probabilities, D = rowsum(out * grad_out) and g the gradient of the LSE:
    dV = P^T dO, dS = P * (dO V^T - D + g), dQ = scale * dS K, dK = scale * dS^T Q
    (FlashAttention-2, arXiv 2307.08691, section 3.1.2; g enters with d lse / d S = P).
    """
    compute = _compute_dtype(query.dtype)
    kv_heads = key.shape[2]
    group = query.shape[2] // kv_heads
    mask = visible(expiry, floor)[:, None]
    blind, never_seen = ~mask.any(3)[:, 0], ~mask.any(2)[:, 0]
    q, d_out, o = (_clean(x.to(compute), blind) for x in (query, grad_out, out))
    k, v = (_clean(x.to(compute), never_seen) for x in (key, value))
    scores = _scores(q, k, scale, softcap)
    log_z = lse.to(compute).masked_fill(blind[:, None], 0)[..., None]
    p = torch.exp(scores.masked_fill(~mask, -torch.inf) - log_z)
    d_p = torch.einsum("bqhd,bkhd->bhqk", d_out, v.repeat_interleave(group, 2))
    delta = (o * d_out).sum(3).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse.to(compute).masked_fill(blind[:, None], 0)
    d_scores = p * (d_p - delta[..., None])
    if softcap:
        d_scores = d_scores * (1 - (scores / softcap) ** 2)
    d_q = scale * torch.einsum("bhqk,bkhd->bqhd", d_scores, k.repeat_interleave(group, 2))
    d_k = scale * torch.einsum("bhqk,bqhd->bkhd", d_scores, q)
    d_v = torch.einsum("bhqk,bqhd->bkhd", p, d_out)
    d_k, d_v = (g.unflatten(2, (kv_heads, group)).sum(3) for g in (d_k, d_v))
    return (
        d_q.to(query.dtype).contiguous(),
        d_k.to(key.dtype).contiguous(),
        d_v.to(value.dtype).contiguous(),
    )


def _check_range(name: str, x: Tensor, low: int | Tensor, high: int | Tensor, meaning: str) -> None:
    """Raises ValueError unless low <= x <= high in every batch row."""
    wrong = (x < low) | (x > high)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        least, most = (int(y[row]) if isinstance(y, Tensor) else y for y in (low, high))
        raise ValueError(
            f"{name}: expected {least} to {most} ({meaning}) in row {row}, got {int(x[row])}"
        )


def append_kv_(
    keys: Tensor,
    values: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
) -> None:
    """Token `t < counts[b]` of row `b` goes to slot `lengths[b] + t` of the caches, in place."""
    new_tokens, capacity = keys.shape[2], key_cache.shape[2]
    if counts is None:
        counts = torch.full_like(lengths, new_tokens)
    _check_range("counts", counts, 0, new_tokens, "the new tokens")
    _check_range("lengths", lengths, 0, capacity - counts, "what the capacity leaves room for")
    for row, (start, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        key_cache[row, :, start : start + count] = keys[row, :, :count]
        value_cache[row, :, start : start + count] = values[row, :, :count]


def cached_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    positions: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over ragged caches: output and LSE as `attention_forward`.

    Query `i < counts[b]` stands in slot `lengths[b] - counts[b] + i` and sees the slots up to its
    own; under a window > 0 only those with `position of its slot - positions[slot] < window`.
    """
    batch, new_tokens = query.shape[:2]
    capacity = key_cache.shape[2]
    _check_range("lengths", lengths, 0, capacity, "the capacity")
    if counts is None:
        counts = new_tokens * (lengths > 0)
    _check_range("counts", counts, 0, new_tokens, "the new tokens")
    _check_range("lengths", lengths, counts, capacity, "the new tokens and the capacity")

    compute = _compute_dtype(query.dtype)
    token = torch.arange(new_tokens, device=query.device)
    slot = torch.arange(capacity, device=query.device)
    blind = token >= counts[:, None]
    own = ((lengths - counts)[:, None] + token).clamp(max=max(capacity - 1, 0))
    mask = (slot <= own[:, :, None]) & ~blind[:, :, None]
    if window:
        own_position = positions.gather(1, own.long())
        mask &= own_position[:, :, None] - positions[:, None] < window
    dead = slot >= lengths[:, None]
    q = _clean(query.to(compute), blind)
    k, v = (_clean(x.transpose(1, 2).to(compute), dead) for x in (key_cache, value_cache))
    scores = _scores(q, k, scale, softcap).masked_fill(~mask[:, None], -torch.inf)
    lse = scores.logsumexp(3)
    probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    v = v.repeat_interleave(query.shape[2] // key_cache.shape[1], 2)
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, v)
    lse_dtype = compute if compute == torch.float64 else torch.float32
    return out.to(query.dtype).contiguous(), lse.to(lse_dtype)
