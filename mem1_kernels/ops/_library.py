"""Every `mem1::` schema, its fake, and which implementation serves it on which device.

The extension `mem1_kernels._C` brings the CPU (and, built for it, CUDA) kernels; without it the
CPU runs the plain-torch reference. Attention on CUDA runs Triton, or the reference where Triton
is not installed. `python -m mem1_kernels.info` prints the outcome.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from mem1_kernels import block_plan
from mem1_kernels.ops import reference

library = torch.library.Library("mem1", "DEF")

library.define("block_plan(Tensor expiry, Tensor? floor) -> Tensor[]")
library.define(
    "trajectory_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor expiry, Tensor? floor, "
    "Tensor[] rows, float scale, float softcap) -> (Tensor, Tensor)"
)
library.define(
    "trajectory_attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor lse, Tensor expiry, Tensor? floor, Tensor[] rows, "
    "Tensor[] columns, float scale, float softcap) -> (Tensor, Tensor, Tensor)"
)

# Importing the extension registers its kernels for the schemas above; torch must be in first.
HAS_EXTENSION = importlib.util.find_spec("mem1_kernels._C") is not None
if HAS_EXTENSION:
    from mem1_kernels import _C  # noqa: F401
HAS_TRITON = importlib.util.find_spec("triton") is not None

implementations: dict[tuple[str, str], str] = {}


def _serve(op: str, device: str, fallback: Callable | None, fallback_name: str) -> None:
    """Registers `fallback` for `op` on `device` unless the extension already serves it."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mem1::{op}", device):
        implementations[op, device] = f"mem1_kernels._C (C++/{device})"
    elif fallback is not None:
        library.impl(op, fallback, device)
        implementations[op, device] = fallback_name


def _reference_fwd(query, key, value, expiry, floor, rows, scale, softcap):
    return reference.attention_forward(query, key, value, expiry, floor, scale, softcap)


def _reference_bwd(
    grad_out, grad_lse, query, key, value, out, lse, expiry, floor, rows, columns, scale, softcap
):
    return reference.attention_backward(
        grad_out, grad_lse, query, key, value, out, lse, expiry, floor, scale, softcap
    )


def _triton_fwd(query, key, value, expiry, floor, rows, scale, softcap):
    from mem1_kernels.ops.triton import attention

    return attention.forward(query, key, value, expiry, floor, rows, scale, softcap)


def _triton_bwd(
    grad_out, grad_lse, query, key, value, out, lse, expiry, floor, rows, columns, scale, softcap
):
    from mem1_kernels.ops.triton import attention

    return attention.backward(
        grad_out, grad_lse, query, key, value, out, lse, expiry, floor, rows, columns, scale, softcap
    )


_serve("block_plan", "CPU", block_plan.build_lists, "plain torch")
_serve("block_plan", "CUDA", block_plan.build_lists, "plain torch")
_serve("trajectory_attention_fwd", "CPU", _reference_fwd, "plain torch (no extension built)")
_serve("trajectory_attention_bwd", "CPU", _reference_bwd, "plain torch (no extension built)")
if HAS_TRITON:
    _serve("trajectory_attention_fwd", "CUDA", _triton_fwd, "Triton")
    _serve("trajectory_attention_bwd", "CUDA", _triton_bwd, "Triton")
else:
    _serve("trajectory_attention_fwd", "CUDA", _reference_fwd, "plain torch (no Triton)")
    _serve("trajectory_attention_bwd", "CUDA", _reference_bwd, "plain torch (no Triton)")


@torch.library.register_fake("mem1::block_plan")
def _(expiry, floor) -> list[Tensor]:
    layouts, tokens = expiry.shape
    n = (tokens + block_plan.BLOCK - 1) // block_plan.BLOCK
    lists = [n, n + 1, n, n * (n + 1) // 2]
    items = [2 * n, 2 * n, 2 * n, 2 * n, n, n]
    return [expiry.new_empty(layouts, size) for size in (*lists, *lists, *items)]


@torch.library.register_fake("mem1::trajectory_attention_fwd")
def _(query, key, value, expiry, floor, rows, scale, softcap) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = query.shape
    out = query.new_empty(batch, tokens, heads, head_dim)
    lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    return out, lse


@torch.library.register_fake("mem1::trajectory_attention_bwd")
def _(
    grad_out, grad_lse, query, key, value, out, lse, expiry, floor, rows, columns, scale, softcap
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
