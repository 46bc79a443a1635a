"""Ops on KV caches: prune in place, append, and attend over ragged rows.

A cache holds `[batch, kv_heads, capacity, head_dim]`, of which row `b` uses slots
`0 .. lengths[b] - 1`. Slots of a row need no order: position is baked into the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem1_kernels.ops import _library  # noqa: F401  registers the operators
from mem1_kernels.ops._checks import (
    DTYPES,
    check_head_dim,
    check_plain,
    check_scale,
    check_window,
    mark_written,
)
from mem1_kernels.ops._memory import check_disjoint
from mem1_kernels.ops.move_slots import move_slots_
from mem1_kernels.ops.prune_kv import prune_kv_, prune_paged_kv_
from mem1_kernels.ops.rope import Rope

__all__ = [
    "Rope",
    "append_kv_",
    "cached_attention",
    "move_slots_",
    "prune_kv_",
    "prune_paged_kv_",
]


def append_kv_(
    keys: Tensor,
    values: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    counts: Tensor | None = None,
) -> None:
    """Writes each row's new tokens behind the `lengths[b]` tokens that its cache row holds.

    Token `t` of row `b` goes to slot `lengths[b] + t` if `t < counts[b]`; every other slot keeps
    its bytes. `lengths` is read, not advanced: all layers of a model share it, so its owner adds
    `counts` once per forward pass, after the last append or in a second tensor.

    On the CPU a row without room raises before anything is written. On a GPU nothing is read back
    to check that: the caller, who knows an upper bound of its lengths, makes sure of it, and
    tokens past the capacity are dropped, never written elsewhere.

    Args:
        keys, values: `[batch, kv_heads, new_tokens, head_dim]`, the caches' dtype; any strides.
        key_cache, value_cache: `[batch, kv_heads, capacity, head_dim]`, changed in place; any
            strides with a contiguous last dimension; any dtype of 1, 2 or 4 bytes. They share no
            memory with each other or with keys and values.
        lengths: int32 `[batch]`, tokens that each row holds before the call.
        counts: int32 `[batch]`, how many of the new tokens (the first ones) each row takes;
            None: all of them.

    Raises:
        TypeError: dtypes that are not supported or differ.
        ValueError: shapes or devices that do not fit, a tensor that requires gradients while
            they are recorded, and, on the CPU, lengths or counts outside their range.

    >>> keys = torch.ones(2, 1, 3, 16)
    >>> cache, lengths = torch.zeros(2, 2, 1, 8, 16), torch.tensor([4, 0], dtype=torch.int32)
    >>> counts = torch.tensor([3, 1], dtype=torch.int32)
    >>> append_kv_(keys, keys, cache[0], cache[1], lengths, counts=counts)
    >>> cache[0, :, 0, :, 0]
    tensor([[0., 0., 0., 0., 1., 1., 1., 0.],
            [1., 0., 0., 0., 0., 0., 0., 0.]])
    """
    _check_caches(key_cache, value_cache)
    batch, kv_heads, _, head_dim = key_cache.shape
    for name, x in (("keys", keys), ("values", values)):
        _check_like(name, x, key_cache, "key_cache")
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (
            batch,
            kv_heads,
            head_dim,
        ):
            raise ValueError(
                f"{name}: expected [{batch}, {kv_heads}, new_tokens, {head_dim}], "
                f"got {list(x.shape)}"
            )
    if values.shape != keys.shape:
        raise ValueError(f"values: expected {list(keys.shape)} like keys, got {list(values.shape)}")
    if key_cache.element_size() not in (1, 2, 4):
        raise TypeError(f"key_cache: expected a dtype of 1, 2 or 4 bytes, got {key_cache.dtype}")
    _check_batch_vector("lengths", lengths, key_cache)
    if counts is not None:
        _check_batch_vector("counts", counts, key_cache)
    _check_no_grad("append_kv_", keys=keys, values=values, key_cache=key_cache)
    _check_no_grad("append_kv_", value_cache=value_cache)
    _check_caches_apart(keys, values, key_cache, value_cache)
    torch.ops.mem1.append_kv_(
        _dense_last(keys), _dense_last(values), key_cache, value_cache, lengths, counts
    )
    mark_written(key_cache, value_cache)


def cached_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    counts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    position_ids: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each row's newest tokens over the ragged cache that already holds them.

    With `n = counts[b]`, query `i < n` of row `b` stands in slot `lengths[b] - n + i` and sees
    every slot up to its own: all older tokens, and the new ones causally. Queries `i >= n` are no
    tokens of the row (its tail when rows bring different numbers): they give 0 and LSE -inf, and
    are not read. Slots from `lengths[b]` on are never read, so they may hold NaN.
    The work follows `lengths`, whatever the capacity. For inference: no gradients.

    Args:
        query: `[batch, new_tokens, heads, head_dim]`; float32, float16 or bfloat16; any strides.
            head_dim: a multiple of 8 from 16 to 256.
        key_cache, value_cache: `[batch, kv_heads, capacity, head_dim]`, query's dtype; any strides
            with a contiguous last dimension; heads divisible by kv_heads.
        lengths: int32 `[batch]`, tokens that each row holds, the new ones included. A row that
            holds none gives 0 and LSE -inf.
        counts: int32 `[batch]`, how many of the queries (the first ones) are tokens of the row;
            None: all of them.
        scale: of the scores, 1e-18 to 1e18; default: `head_dim ** -0.5`.
        softcap: scores become `softcap * tanh(scores / softcap)`, if given; 1e-18 to 1e18.
        window: a key is seen only while `query position - key position < window` (tokens, >= 1).
            Needs `position_ids`, since pruning leaves the slots in no order.
        position_ids: int32 or int64 `[batch, capacity]`, each slot's position; read under a window.
            Those of a row's new tokens lie less than 2^31 apart.
        return_lse: return the log-sum-exp of the scores too (natural log).

    Returns:
        The output, `[batch, new_tokens, heads, head_dim]` in query's dtype; with `return_lse` also
        the LSE, float32 `[batch, heads, new_tokens]`.

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: shapes or devices that do not fit, a tensor that requires gradients while
            they are recorded, and, on the CPU, lengths or counts outside their range. (A GPU
            reads nothing back; there such rows are cut to the cache and never read outside it.)

    Source: FlashAttention-2 (arXiv 2307.08691) with split keys (Flash-Decoding).

    >>> cache, query = torch.randn(2, 2, 1, 8, 16), torch.randn(2, 1, 4, 16)
    >>> lengths = torch.tensor([5, 0], dtype=torch.int32)  # the second row holds nothing
    >>> out, lse = cached_attention(query, cache[0], cache[1], lengths, return_lse=True)
    >>> out.shape, out[1].abs().max(), lse[1, 0]
    (torch.Size([2, 1, 4, 16]), tensor(0.), tensor([-inf]))
    """
    _check_caches(key_cache, value_cache)
    batch, kv_heads, capacity, head_dim = key_cache.shape
    _check_like("query", query, key_cache, "key_cache")
    if query.dtype not in DTYPES:
        raise TypeError(f"query: expected float32, float16 or bfloat16, got {query.dtype}")
    if query.dim() != 4 or (query.shape[0], query.shape[3]) != (batch, head_dim):
        raise ValueError(
            f"query: expected [{batch}, new_tokens, heads, {head_dim}], got {list(query.shape)}"
        )
    new_tokens, heads = query.shape[1:3]
    if new_tokens == 0:
        raise ValueError("query: expected at least one token, got none")
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"query: expected heads divisible by {kv_heads} kv_heads, got {heads}")
    check_head_dim(head_dim)
    _check_batch_vector("lengths", lengths, key_cache)
    if counts is not None:
        _check_batch_vector("counts", counts, key_cache)
    scale = check_scale(head_dim, scale, softcap)
    if window is not None:
        window = check_window(window)
        if position_ids is None:
            raise ValueError("position_ids: a window needs each slot's position, got None")
        if not isinstance(position_ids, Tensor):
            raise TypeError(f"position_ids: expected a tensor, got {type(position_ids).__name__}")
        if position_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"position_ids: expected int32 or int64, got {position_ids.dtype}")
        if list(position_ids.shape) != [batch, capacity]:
            raise ValueError(
                f"position_ids: expected {[batch, capacity]} (batch, capacity), "
                f"got {list(position_ids.shape)}"
            )
        if position_ids.device != query.device:
            raise ValueError(
                f"position_ids: expected on {query.device} like query, got {position_ids.device}"
            )
    _check_no_grad("cached_attention", query=query, key_cache=key_cache, value_cache=value_cache)
    out, lse = torch.ops.mem1.cached_attention(
        _dense_last(query),
        key_cache,
        value_cache,
        lengths,
        counts,
        None if window is None else position_ids,
        window or 0,
        scale,
        float(softcap or 0.0),
    )
    return (out, lse) if return_lse else out


def _dense_last(x: Tensor) -> Tensor:
    # Not contiguous(), which leaves an empty tensor's strides as they are.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _check_like(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    check_plain(name, x)
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} like {like_name}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like {like_name}, got {x.device}")


def _check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    """Both caches `[batch, kv_heads, capacity, head_dim]`, alike, last dimension contiguous."""
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        _check_like(name, x, x if name == "key_cache" else key_cache, "key_cache")
        if x.dim() != 4 or 0 in x.shape[:2]:
            raise ValueError(
                f"{name}: expected [batch, kv_heads, capacity, head_dim], got {list(x.shape)}"
            )
        if x.shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(
                f"{name}: expected a contiguous last dimension, got strides {list(x.stride())}"
            )
    if value_cache.shape != key_cache.shape:
        raise ValueError(
            f"value_cache: expected {list(key_cache.shape)} like key_cache, "
            f"got {list(value_cache.shape)}"
        )


def _check_batch_vector(name: str, x: Tensor, cache: Tensor) -> None:
    """An int32 `[batch]` tensor on the cache's device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    check_plain(name, x)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {x.dtype}")
    if list(x.shape) != [cache.shape[0]]:
        raise ValueError(f"{name}: expected [{cache.shape[0]}] (batch), got {list(x.shape)}")
    if x.device != cache.device:
        raise ValueError(f"{name}: expected on {cache.device} like key_cache, got {x.device}")


def _check_no_grad(op: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name}: requires gradients, and {op} is for inference; "
                "call it under torch.no_grad(), or train with trajectory_attention"
            )


def _check_caches_apart(
    keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor
) -> None:
    if torch.compiler.is_compiling():
        return  # tensors have no addresses yet
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    owners = {x.untyped_storage().data_ptr() for x in caches.values()}
    read = {
        name: x
        for name, x in (("keys", keys), ("values", values))
        if x.untyped_storage().data_ptr() in owners
    }
    if read or len(owners) < 2 or not all(x.is_contiguous() for x in caches.values()):
        check_disjoint(caches, read)
