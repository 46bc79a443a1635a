"""Every `mem1::` schema, its fake, and which implementation serves it on which device.

The extension `mem1_kernels._C` brings the CPU (and, built for it, CUDA) kernels. What it lacks runs
as plain-torch reference on the CPU, and on CUDA in Triton, or as the reference where Triton is not
installed. `python -m mem1_kernels.info` prints the outcome.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from mem1_kernels import block_plan, mask
from mem1_kernels.ops import _extension, reference

library = torch.library.Library("mem1", "DEF")

library.define("block_plan(Tensor expiry, Tensor? floor) -> Tensor")
library.define("window_floor(Tensor expiry, Tensor position_ids, int window) -> Tensor")
library.define(
    "trajectory_attention_fwd(Tensor query, Tensor key, Tensor value, Tensor expiry, "
    "Tensor? floor, Tensor[] rows, float scale, float softcap) -> (Tensor, Tensor)"
)
library.define(
    "trajectory_attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor lse, Tensor expiry, Tensor? floor, Tensor[] rows, "
    "Tensor[] columns, float scale, float softcap) -> (Tensor, Tensor, Tensor)"
)
library.define(
    "append_kv_(Tensor keys, Tensor values, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor lengths, Tensor? counts) -> ()"
)
library.define(
    "cached_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, "
    "Tensor? counts, Tensor? position_ids, int window, float scale, float softcap) "
    "-> (Tensor, Tensor)"
)
library.define(
    "prune_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!) lengths, Tensor keep, "
    "Tensor(d!)[] slots, bool ordered, Tensor? position_delta, Tensor[] rope_steps, "
    "bool interleaved) -> ()"
)
library.define(
    "prune_paged_kv_(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!) block_table, "
    "Tensor(d!) lengths, Tensor keep, Tensor? page_refs, Tensor(e!)[] slots, Tensor(f!) freed, "
    "Tensor(g!) freed_counts) -> ()"
)
library.define(
    "move_slots_(Tensor(a!)[] pages, Tensor sources, Tensor destinations, Tensor? offsets) -> ()"
)

OBSTACLE = _extension.load()  # why mem1_kernels._C is not loaded, or None
HAS_EXTENSION = OBSTACLE is None
HAS_TRITON = importlib.util.find_spec("triton") is not None

implementations: dict[tuple[str, str], str] = {}


def _serve(op: str, device: str, fallback: Callable, fallback_name: str) -> None:
    """Registers `fallback` for `op` on `device` unless the extension already serves it."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mem1::{op}", device):
        implementations[op, device] = f"mem1_kernels._C (C++/{device})"
    else:
        library.impl(op, fallback, device)
        implementations[op, device] = fallback_name


def _reference_fwd(query, key, value, expiry, floor, rows, scale, softcap):
    with torch.autocast(query.device.type, enabled=False):
        return reference.attention_forward(query, key, value, expiry, floor, scale, softcap)


def _reference_bwd(
    grad_out, grad_lse, query, key, value, out, lse, expiry, floor, rows, columns, scale, softcap
):
    with torch.autocast(query.device.type, enabled=False):
        return reference.attention_backward(
            grad_out, grad_lse, query, key, value, out, lse, expiry, floor, scale, softcap
        )


def _reference_cached_attention(
    query, key_cache, value_cache, lengths, counts, position_ids, window, scale, softcap
):
    with torch.autocast(query.device.type, enabled=False):
        return reference.cached_attention(
            query, key_cache, value_cache, lengths, counts, position_ids, window, scale, softcap
        )


def _triton(module: str, name: str) -> Callable:
    """A launcher in ops/triton, imported when first called.

    It runs under its tensors' device: Triton launches on the current one, whichever that is.
    """

    def launch(*arguments):
        launcher = getattr(importlib.import_module(f".triton.{module}", __package__), name)
        with torch.cuda.device_of(next(x for x in arguments if isinstance(x, Tensor))):
            return launcher(*arguments)

    return launch


for _device in ("CPU", "CUDA"):
    _serve("block_plan", _device, block_plan.build_lists, "plain torch")
    _serve("window_floor", _device, mask.window_floor, "plain torch")

_NO_COMPILED = OBSTACLE or "not in the extension"
for _op, _in_torch, _in_triton in (
    ("trajectory_attention_fwd", _reference_fwd, _triton("attention", "forward")),
    ("trajectory_attention_bwd", _reference_bwd, _triton("attention", "backward")),
    ("append_kv_", reference.append_kv_, _triton("cached_attention", "append_kv_")),
    (
        "cached_attention",
        _reference_cached_attention,
        _triton("cached_attention", "cached_attention"),
    ),
    ("prune_kv_", reference.prune_kv_, _triton("prune_kv", "prune_kv_")),
    ("prune_paged_kv_", reference.prune_paged_kv_, _triton("prune_kv", "prune_paged_kv_")),
    ("move_slots_", reference.move_slots_, _triton("prune_kv", "move_slots_")),
):
    _serve(_op, "CPU", _in_torch, f"plain torch ({_NO_COMPILED})")
    if HAS_TRITON:
        _serve(_op, "CUDA", _in_triton, "Triton")
    else:
        _serve(_op, "CUDA", _in_torch, "plain torch (no Triton)")


@torch.library.register_fake("mem1::block_plan")
def _(expiry, floor) -> Tensor:
    layouts, tokens = expiry.shape
    widths = block_plan.list_widths(tokens)
    return expiry.new_empty(sum(block_plan.aligned(layouts * width) for width in widths))


@torch.library.register_fake("mem1::window_floor")
def _(expiry, position_ids, window) -> Tensor:
    return expiry.new_empty(expiry.shape, dtype=torch.int32)


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


@torch.library.register_fake("mem1::append_kv_")
def _(keys, values, key_cache, value_cache, lengths, counts) -> None:
    return None


@torch.library.register_fake("mem1::cached_attention")
def _(
    query, key_cache, value_cache, lengths, counts, position_ids, window, scale, softcap
) -> tuple[Tensor, Tensor]:
    batch, new_tokens, heads, head_dim = query.shape
    out = query.new_empty(batch, new_tokens, heads, head_dim)
    lse = query.new_empty(batch, heads, new_tokens, dtype=torch.float32)
    return out, lse


def _check_devices(tensors: list[Tensor | None], like: Tensor, name: str = "keep") -> None:
    """One meta tensor among others makes a call a fake one: not what its caller meant."""
    for x in tensors:
        if x is not None and x.device != like.device:
            raise ValueError(f"expected all tensors on {like.device} like {name}, got {x.device}")


@torch.library.register_fake("mem1::prune_kv_")
def _(keys, values, lengths, keep, slots, ordered, position_delta, rope_steps, interleaved) -> None:
    _check_devices([*keys, *values, *slots, lengths, position_delta, *rope_steps], keep)


@torch.library.register_fake("mem1::prune_paged_kv_")
def _(keys, values, block_table, lengths, keep, page_refs, slots, freed, freed_counts) -> None:
    written = [*keys, *values, *slots, block_table, lengths, freed, freed_counts]
    _check_devices([*written, page_refs], keep)


@torch.library.register_fake("mem1::move_slots_")
def _(pages, sources, destinations, offsets) -> None:
    _check_devices([*pages, destinations, offsets], sources, "sources")
