"""Layouts, poison and error budgets, for the tests and the benchmarks only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mem1_kernels.trajectory import Retention, Segment, Trajectory, mem1, visible


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
    """Masked attention and its gradients as a few lines of torch with autograd, all in `dtype`.

    In fp64 it is what kernels are held to; in a kernel's own dtype it tells the error that this
    precision brings with it. Sees no NaN in dead keys and blind rows, since it clears them first.
    """
    dtype = dtype or query.dtype
    floors = None if floor is None else torch.atleast_2d(floor)
    mask = visible(torch.atleast_2d(expiry), floors)
    blind, unseen = ~mask.any(2), ~mask.any(1)
    q = query.detach().to(dtype).masked_fill(blind[:, :, None, None], 0).requires_grad_()
    k, v = (
        x.detach().to(dtype).masked_fill(unseen[:, :, None, None], 0).requires_grad_()
        for x in (key, value)
    )
    group = query.shape[2] // key.shape[2]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2))
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None], torch.finfo(dtype).min)
    lse = torch.logsumexp(scores.float() if dtype != torch.float64 else scores, 3)
    p = torch.softmax(scores, 3).masked_fill(~mask[:, None], 0)
    out = torch.einsum("bhqk,bkhd->bqhd", p, v.repeat_interleave(group, 2))
    keep = ~blind[:, None]
    loss = (out * grad_out.to(dtype).masked_fill(blind[:, :, None, None], 0)).sum()
    if grad_lse is not None:
        loss = (
            loss + (lse * grad_lse.to(lse.dtype).masked_fill(~keep, 0)).masked_fill(~keep, 0).sum()
        )
    grads = torch.autograd.grad(loss, (q, k, v))
    return AttentionResult(
        out.detach(), lse.detach().masked_fill(~keep, -torch.inf), *(g.detach() for g in grads)
    )


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
