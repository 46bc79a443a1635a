"""Layouts, poison and error budgets, for the tests and the benchmarks only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mem1_kernels.mask import visible
from mem1_kernels.retention import Retention, Segment, mem1
from mem1_kernels.trajectory import Trajectory


def turns(
    prompt: int, turn_count: int, state: int, action: int, info: int, retention: Retention = mem1
) -> Trajectory:
    """A regular trajectory: a prompt, then `turn_count` turns; the last one has no info.

    >>> turns(300, 2, 40, 16, 500).num_tokens
    912
    """
    segments = [Segment("prompt", prompt)]
    for turn in range(1, turn_count + 1):
        segments += [Segment("state", state, turn), Segment("action", action, turn)]
        if turn < turn_count:
            segments.append(Segment("info", info, turn))
    return Trajectory(segments, retention)


def random_expiry(tokens: int, generator: torch.Generator, batch: int | None = None) -> Tensor:
    """int32 expiries without any structure: dead keys, short and long lives, beyond the end."""
    shape = (tokens,) if batch is None else (batch, tokens)
    return torch.randint(0, tokens + 3, shape, generator=generator, dtype=torch.int32)


@dataclass
class AttentionResult:
    """Output, LSE and gradients of one attention call."""

    out: Tensor
    lse: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    floor: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionResult:
    """Masked attention and its gradients in a few lines of torch, every step rounded to `dtype`.

    In fp64 it is what kernels are held to; in a kernel's own dtype it tells the error that this
    precision brings with it. The gradients are in closed form, as in the kernels: autograd's own
    cancel differently. Dead keys and blind rows are cleared first, so they may hold NaN.
    """
    dtype = dtype or query.dtype
    mask = visible(torch.atleast_2d(expiry), None if floor is None else torch.atleast_2d(floor))
    blind, unseen = ~mask.any(2), ~mask.any(1)
    q, d_out = (x.to(dtype).masked_fill(blind[:, :, None, None], 0) for x in (query, grad_out))
    k, v = (x.to(dtype).masked_fill(unseen[:, :, None, None], 0) for x in (key, value))
    kv_heads, scale = key.shape[2], query.shape[3] ** -0.5 if scale is None else scale
    group = query.shape[2] // kv_heads
    k_all, v_all = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k_all) * scale
    if softcap:
        capped = torch.tanh(scores / softcap)
        # 1 - tanh^2, as autograd has it; in fp64 without its cancellation
        slope = 1 - capped**2 if dtype != torch.float64 else 1 / torch.cosh(scores / softcap) ** 2
        scores = softcap * capped
    wide = scores.to(torch.float64 if dtype == torch.float64 else torch.float32)
    wide = wide.masked_fill(~mask[:, None], -torch.inf)
    lse = wide.logsumexp(3)
    p = torch.exp(wide - lse.masked_fill(blind[:, None], 0)[..., None]).to(dtype)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v_all)
    delta = (out * d_out).sum(3).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype).masked_fill(blind[:, None], 0)
    d_scores = p * (torch.einsum("bqhd,bkhd->bhqk", d_out, v_all) - delta[..., None])
    if softcap:
        d_scores = d_scores * slope
    d_scores = d_scores * scale
    d_query = torch.einsum("bhqk,bkhd->bqhd", d_scores, k_all)
    d_key = torch.einsum("bhqk,bqhd->bkhd", d_scores, q).unflatten(2, (kv_heads, group)).sum(3)
    d_value = torch.einsum("bhqk,bqhd->bkhd", p, d_out).unflatten(2, (kv_heads, group)).sum(3)
    return AttentionResult(out, lse, d_query, d_key, d_value)


def assert_within_budget(name: str, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Fails unless max|got - exact| <= 2 max|plain - exact| + one rounding of the largest value.

    plain: the same computation in plain torch at the kernel's precision; exact: in fp64. Infinite
    values must agree in all three; a NaN anywhere in `got` fails.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, not {list(exact.shape)}"
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} NaN"
    finite = exact.isfinite()
    assert torch.equal(got.double()[~finite], exact.double()[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    reference = exact[finite].double()
    error = (got[finite].double() - reference).abs().max().item()
    allowed = 2 * (plain[finite].double() - reference).abs().max().item()
    allowed += torch.finfo(got.dtype).eps * reference.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e} > allowed {allowed:.3e}"
