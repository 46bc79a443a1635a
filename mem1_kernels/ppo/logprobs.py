"""Token log-probs and entropy straight from hidden states, a chunk of tokens at a time.

The logits of 100,000 tokens over a vocabulary of 152,064 are 61 GB in fp32. Here at most `chunk`
rows of them exist, in the forward pass and again in the backward pass, which recomputes them from
the hidden states and the saved log-sum-exp.

Liger's fused linear cross-entropy (read at 0.8.5) is not used, because it means something else: it
rounds the logits to the inputs' precision before the softmax, knows no temperature and gives no
entropy. A policy's ratio is the exponential of a difference of two log-probs, so that rounding
would show up as an importance weight.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mem1_kernels.ppo.masked import wide

__all__ = ["token_log_probs"]

# fp32 logits held at once when the caller names no chunk: 256 MiB
LOGITS_BUDGET = 2**26


def _operands(hidden: Tensor, weight: Tensor, low: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Both operands in the dtype that the matmul reads: bf16 on CUDA, else the accumulator's."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if low is not None and dtype != torch.float64:  # autocast leaves fp64 alone
        hidden, weight, dtype = hidden.to(low), weight.to(low), low
    if not (hidden.is_cuda and dtype == torch.bfloat16):
        dtype = wide(dtype)
    return hidden.to(dtype), weight.to(dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and returned in fp32 (fp64 for fp64)."""
    if b.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _add_matmul_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's fp32 or fp64."""
    if b.dtype == torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a, b)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """`[rows, vocabulary]` in fp32 or fp64, after bias, cap and temperature."""
    z = _matmul(hidden, weight.t())
    if bias is not None:
        z.add_(bias)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1.0 else z.div_(temperature)


class _TokenLogProbs(torch.autograd.Function):
    """z = cap(h W^T + b) / T;  l = z_t - lse(z);  H = -sum_j p_j log p_j, p = softmax(z).

    dl/dz_j = [j = t] - p_j;  dH/dz_j = -p_j (log p_j + H);  dz/d(hW^T) = (1 - (T z / cap)^2) / T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        chunk: int,
        low: torch.dtype | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        h, w = _operands(hidden, weight, low)
        lse = h.new_empty(len(h), dtype=wide(w.dtype))
        log_probs = torch.empty_like(lse)
        entropy = torch.empty_like(lse) if with_entropy else None
        for start in range(0, len(h), chunk):
            rows = slice(start, start + chunk)
            z = _logits(h[rows], w, bias, temperature, softcap)
            lse[rows] = z.logsumexp(-1)
            log_probs[rows] = z.gather(-1, targets[rows, None]).squeeze(-1) - lse[rows]
            if entropy is not None:
                p = z.sub_(lse[rows, None]).exp_()
                entropy[rows] = torch.special.entr(p).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.constants = (temperature, softcap, chunk, low)
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> Any:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        temperature, softcap, chunk, low = ctx.constants
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(lse)
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = _operands(hidden, weight, low)
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(w, dtype=lse.dtype) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=lse.dtype) if needs_bias else None
            for start in range(0, len(h), chunk):
                rows = slice(start, start + chunk)
                grad_l = grad_log_probs[rows, None]
                z = _logits(h[rows], w, bias, temperature, softcap)
                slope = None
                if softcap is not None:
                    slope = (z * (temperature / softcap)).square_().neg_().add_(1.0)
                p = z.sub_(lse[rows, None]).exp_()
                if grad_entropy is None:
                    grad_z = p.mul_(-grad_l)
                else:
                    grad_h = grad_entropy[rows, None]
                    surprise = torch.special.entr(p).mul_(grad_h)
                    grad_z = p.mul_(-(grad_l + grad_h * entropy[rows, None])).add_(surprise)
                grad_z.scatter_add_(-1, targets[rows, None], grad_l)
                if slope is not None:
                    grad_z.mul_(slope)
                if temperature != 1.0:
                    grad_z.div_(temperature)
                if grad_bias is not None:
                    grad_bias.add_(grad_z.sum(0))
                grad_z = grad_z.to(w.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = _matmul(grad_z, w).to(grad_hidden.dtype)
                if grad_weight is not None:
                    _add_matmul_(grad_weight, grad_z.t(), h[rows])
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of its distribution, without the full logits.

        z = cap(W h + b) / T;  log p(t) = z_t - log sum_j exp(z_j);  H = -sum_j p_j log p_j

    with cap(x) = c tanh(x / c). `targets[i]` is what `hidden[i]` predicts: in one plain sequence
    the token after `i`. Gradients reach `hidden`, `weight` and `bias`, through the log-probs and
    the entropy; the backward pass is closed-form and recomputes each chunk's logits. Products of
    bf16 or fp16 inputs are accumulated and kept in fp32. On CUDA with bf16, the logits' gradient is
    rounded to bf16 before the two backward matmuls, as a bf16 linear layer rounds it; elsewhere it
    is not. Under autocast the operands are rounded to the autocast dtype first. A model that scales
    its logits by s, cap(s (W h + b)), has temperature T / s and cap c / s here.

    Args:
        hidden: `[..., D]`, floating point: the last hidden states, after the final norm.
        weight: `[V, D]`, floating point: the LM head.
        targets: `[...]`, integer in [0, V).
        bias: `[V]`, floating point, optional.
        mask: `[...]` bool. Where False nothing is computed (an agent's batch is mostly info
            tokens), results are 0, gradients are 0, and `hidden` and `targets` may hold anything.
        temperature: T > 0, that of sampling.
        softcap: c > 0, Gemma 2's cap on the final logits.
        chunk: tokens whose logits exist at once. None: as many as give 2**26 logits (256 MiB).
        return_entropy: also return H, in nats.

    Returns:
        `[...]` log-probs in nats, or (log-probs, entropy); fp32, fp64 if an operand is fp64.

    Raises:
        ValueError: shapes or devices do not fit, a target is outside [0, V) where `mask` is
            True, or `temperature`, `softcap` or `chunk` is not positive.
        TypeError: a dtype is of the wrong kind.

    Source: the definitions; soft cap: Gemma 2, arXiv 2408.00118, section 2.

    >>> hidden = torch.tensor([[1.0, 0.0], [float("nan"), 0.0]])
    >>> head = torch.tensor([[0.0, 0.0], [2.0, 0.0]]).log1p()  # logits 0 and log 3
    >>> keep = torch.tensor([True, False])
    >>> log_probs, entropy = token_log_probs(
    ...     hidden, head, torch.tensor([1, -100]), mask=keep, return_entropy=True
    ... )
    >>> log_probs.exp()[0], entropy
    (tensor(0.7500), tensor([0.5623, 0.0000]))
    """
    _check(hidden, weight, targets, bias, mask, temperature, softcap, chunk)
    rows = hidden.reshape(-1, hidden.shape[-1])
    flat_targets = targets.reshape(-1).long()
    where = None
    if mask is not None:
        where = mask.reshape(-1).nonzero().squeeze(-1)
        rows, flat_targets = rows.index_select(0, where), flat_targets.index_select(0, where)
    size = weight.shape[0]
    outside = (flat_targets < 0) | (flat_targets >= size)
    if bool(outside.any()):
        got = int(flat_targets[outside][0])
        raise ValueError(f"targets: expected ids in [0, {size}) where mask is True, got {got}")
    device = hidden.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if chunk is None:
        chunk = max(1, LOGITS_BUDGET // size)
    with torch.autocast(device, enabled=False):
        log_probs, entropy = _TokenLogProbs.apply(
            rows, weight, bias, flat_targets, temperature, softcap, chunk, low, return_entropy
        )
    log_probs = _scatter(log_probs, where, targets.shape)
    return (log_probs, _scatter(entropy, where, targets.shape)) if return_entropy else log_probs


def _scatter(x: Tensor, where: Tensor | None, shape: torch.Size) -> Tensor:
    """The rows' results back at their places, zero elsewhere."""
    if where is not None:
        x = x.new_zeros(shape.numel()).index_copy(0, where, x)
    return x if x.shape == shape else x.reshape(shape)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    chunk: int | None,
) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {tensor.dtype}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets: expected int32 or int64, got {targets.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            "weight: expected [V, D] with D the last dimension of hidden "
            f"{tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    tokens = hidden.shape[:-1]
    for name, tensor, shape in (
        ("weight", weight, weight.shape),
        ("targets", targets, tokens),
        ("mask", mask, tokens),
        ("bias", bias, weight.shape[:1]),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device}, got {tensor.device}")
    for name, number in (("temperature", temperature), ("softcap", softcap), ("chunk", chunk)):
        if number is not None and not 0 < number < float("inf"):
            raise ValueError(f"{name}: expected a positive finite number, got {number}")
