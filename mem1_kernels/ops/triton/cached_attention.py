"""Launches the kernels of `append_kv_` and `cached_attention`: tiles, splits, grids, workspace."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mem1_kernels.ops.triton.attention_configs import head_chunks
from mem1_kernels.ops.triton.cached_attention_kernels import (
    _append_kernel,
    _combine_kernel,
    _decode_kernel,
)

LOG2_E = math.log2(math.e)
# Triton's default changes with its version; the tiles below are chosen with it on.
FUSED = {"enable_fp_fusion": True}
# Programs that a multiprocessor's shared memory holds at decode: the splits make one wave of them.
PROGRAMS_PER_SM = 3
# Tiles a split has at least, so that its partial result stays small beside the keys it read.
MIN_TILES = 2
# Batches above this are never split: one load of all lengths a program would cost too much.
MAX_SPLIT_BATCH = 1024


class Config(NamedTuple):
    """Tile sizes of one `_decode_kernel` variant."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def select_config(
    query_rows: int,
    head_dim: int,
    dtype: torch.dtype,
    generation: int,
    position_dtype: torch.dtype | None = None,
) -> Config:
    """Tiles for `query_rows` (new tokens x group) packed rows against one kv head.

    Up to 16 rows the keys' way through memory is the cost: narrow tiles that leave room for
    three programs a multiprocessor. More rows are matrix work: tiles that fill the tensor cores.
    generation: the major number of the GPU's compute capability; 9 and 10 have 227 KiB of shared
    memory, others may have 99.
    position_dtype: of the window's positions, which take registers; None: no window.
    """
    wide = head_dim > 128
    if dtype == torch.float32:
        return Config(16, 16, 8, 2) if wide else Config(16, 32, 4, 2)
    if generation not in (9, 10):
        return Config(16, 32, 4, 3) if query_rows <= 16 else Config(64, 16 if wide else 32, 8, 2)
    if query_rows <= 16:
        return Config(16, 32 if wide else 64, 4, 3)
    if wide:
        narrow = head_dim > 192 or position_dtype is not None
        return Config(64, 32, 8, 3) if narrow else Config(64, 64, 8, 2)
    if query_rows <= 64:
        return Config(64, 32, 4, 3)
    return Config(128, 64 if position_dtype is None else 32, 8, 3)


def append_kv_(
    keys: Tensor,
    values: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
) -> None:
    """One launch for keys and values; see `mem1_kernels.ops.kv_cache.append_kv_`."""
    batch, kv_heads, new_tokens, head_dim = keys.shape
    if new_tokens == 0:
        return
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[keys.element_size()]
    keys, values, key_cache, value_cache = (
        x.view(bits) for x in (keys, values, key_cache, value_cache)
    )
    block_d = triton.next_power_of_2(head_dim)
    block_rows = max(1, 2048 // block_d)
    _append_kernel[(triton.cdiv(new_tokens * kv_heads, block_rows), batch)](
        keys,
        values,
        key_cache,
        value_cache,
        lengths,
        counts,
        *keys.stride()[:3],
        *values.stride()[:3],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        new_tokens,
        key_cache.shape[2],
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_ROWS=block_rows,
        HAS_COUNTS=counts is not None,
    )


def _shares(device: torch.device, tiles: int, batch: int, kv_heads: int) -> int:
    """Into how many parts the keys of all rows together are split (1: rows are never split).

    Enough for PROGRAMS_PER_SM programs on each multiprocessor; at decode (one query tile) also
    enough to split a row of more than twice the mean length, which would else finish last.
    """
    if batch > MAX_SPLIT_BATCH:
        return 1
    multiprocessors = 8  # of an interpreter
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    shares = PROGRAMS_PER_SM * multiprocessors // (kv_heads * tiles)
    return max(1, shares, batch // 2 if tiles == 1 else 1)


def _check_spread(
    position_ids: Tensor, lengths: Tensor, counts: Tensor | None, new_tokens: int, window: int
) -> None:
    """The kernel compares int64 positions as int32, relative to the least one that a new token of
    the tile sees."""
    taken = lengths.clamp(max=new_tokens) if counts is None else counts
    column = torch.arange(new_tokens, device=lengths.device)
    slots = (lengths - taken)[:, None] + column
    own = position_ids.gather(1, slots.clamp(0, position_ids.shape[1] - 1).long())
    limits = torch.iinfo(torch.int64)
    first = own.clamp(min=limits.min + window - 1) - (window - 1)
    live = column < taken[:, None]
    least = first.masked_fill(~live, limits.max).amin(1)
    near = first <= least.clamp(max=limits.max - 2**31)[:, None] + (2**31 - 2)
    message = "position_ids: expected the new tokens of a row less than 2^31 apart"
    if near.is_cuda:
        torch._assert_async((near | ~live).all(), message)
    elif not bool((near | ~live).all()):
        raise ValueError(f"{message}, got {own.tolist()}")


def cached_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    position_ids: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the caches, then the sum of the splits; see `mem1_kernels.ops.kv_cache`."""
    batch, new_tokens, heads, head_dim = query.shape
    kv_heads, capacity = key_cache.shape[1:3]
    group = heads // kv_heads
    query_rows = new_tokens * group
    generation = 9  # of an interpreter
    if query.is_cuda:
        generation = torch.cuda.get_device_capability(query.device)[0]
    position_dtype = None if position_ids is None else position_ids.dtype
    if position_ids is not None and position_dtype == torch.int64 and new_tokens > 1:
        _check_spread(position_ids, lengths, counts, new_tokens, window)
    config = select_config(query_rows, head_dim, query.dtype, generation, position_dtype)
    tiles = triton.cdiv(query_rows, config.block_m)
    shares = _shares(query.device, tiles, batch, kv_heads)
    split = shares > 1
    out = query.new_empty(batch, new_tokens, heads, head_dim)
    lse = query.new_empty(batch, heads, new_tokens, dtype=torch.float32)
    split_out, split_lse = out, lse
    if split:
        split_lse = lse.new_empty(2 * shares, kv_heads, query_rows)
        split_out = lse.new_empty(2 * shares, kv_heads, query_rows, head_dim)
    position_strides = (0, 0) if position_ids is None else position_ids.stride()
    schedule = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "BLOCK_N": config.block_n,
        "BLOCK_B": triton.next_power_of_2(batch),
        "MIN_TILES": MIN_TILES,
        "HAS_COUNTS": counts is not None,
    }
    d0, d1 = head_chunks(head_dim)
    _decode_kernel[((shares + batch if split else batch) * kv_heads * tiles,)](
        query,
        key_cache,
        value_cache,
        out,
        lse,
        split_out,
        split_lse,
        lengths,
        counts,
        position_ids,
        *query.stride()[:3],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        *position_strides,
        batch,
        kv_heads,
        new_tokens,
        capacity,
        shares,
        window,
        scale / softcap if softcap else 1.0,
        (softcap or scale) * LOG2_E,
        **schedule,
        SPLIT=split,
        D0=d0,
        D1=d1,
        BLOCK_M=config.block_m,
        HAS_WINDOW=position_ids is not None,
        HAS_SOFTCAP=softcap > 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **FUSED,
    )
    if split:
        _combine_kernel[(batch * kv_heads * query_rows,)](
            out,
            lse,
            split_out,
            split_lse,
            lengths,
            counts,
            batch,
            kv_heads,
            new_tokens,
            capacity,
            shares,
            **schedule,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_S=32,
            num_warps=4,
            **FUSED,
        )
    return out, lse
