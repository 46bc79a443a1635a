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
    return d_q.to(query.dtype), d_k.to(key.dtype), d_v.to(value.dtype)
