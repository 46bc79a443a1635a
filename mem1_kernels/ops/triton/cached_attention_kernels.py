"""The jit kernels of `append_kv_` and `cached_attention`: append, attention over splits, their sum.

This file imports triton and nothing that needs torch, so that it compiles for a GPU on a machine
that has neither that GPU nor torch. `cached_attention.py` beside it launches what is here.

The keys of a row are read in splits. How many a row gets follows from the true lengths, which only
the device knows: every program computes the same small schedule from them and finds its own
share in it, so there is no plan step and no host sync, and the grid and the workspace are bounded
by the batch and the device alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mem1_kernels.ops.triton.attention_kernels import (
    LN2,
    _fwd_step,
    _load_rows,
    _scaled,
    _store_rows,
    _zeros,
)

INT64_MIN = tl.constexpr(-(2**63))
INT64_MAX = tl.constexpr(2**63 - 1)
INT32_MIN = tl.constexpr(-(2**31))
INT32_MAX = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["new_tokens", "capacity"])
def _append_kernel(
    keys_ptr,
    values_ptr,
    key_cache_ptr,
    value_cache_ptr,
    lengths_ptr,
    counts_ptr,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_kcb,
    stride_kch,
    stride_kcs,
    stride_vcb,
    stride_vch,
    stride_vcs,
    new_tokens,
    capacity,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    """Copies BLOCK_ROWS (token, kv head) rows of one batch row, keys and values, to the caches."""
    batch_row = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    token = rows // KV_HEADS
    head = (rows % KV_HEADS).to(tl.int64)
    slot = tl.load(lengths_ptr + batch_row) + token
    count = new_tokens
    if HAS_COUNTS:
        count = tl.minimum(tl.load(counts_ptr + batch_row), new_tokens)
    live = (token < count) & (slot >= 0) & (slot < capacity)
    mask = live[:, None] & (dims < HEAD_DIM)[None, :]
    token = token.to(tl.int64)
    slot = slot.to(tl.int64)
    source = batch_row * stride_kb + head * stride_kh + token * stride_kt
    target = batch_row * stride_kcb + head * stride_kch + slot * stride_kcs
    new = tl.load(keys_ptr + source[:, None] + dims[None, :], mask=mask)
    tl.store(key_cache_ptr + target[:, None] + dims[None, :], new, mask=mask)
    source = batch_row * stride_vb + head * stride_vh + token * stride_vt
    target = batch_row * stride_vcb + head * stride_vch + slot * stride_vcs
    new = tl.load(values_ptr + source[:, None] + dims[None, :], mask=mask)
    tl.store(value_cache_ptr + target[:, None] + dims[None, :], new, mask=mask)


@triton.jit
def _row_splits(
    rows,
    lengths_ptr,
    counts_ptr,
    batch,
    capacity,
    shares,
    HAS_COUNTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """How many splits each batch row in `rows` gets; 0 past the batch, else at least 1.

    A split holds about 1/shares of all tiles, so the splits of all rows number at most
    shares + batch, and those of rows with more than one at most 2 * shares.
    """
    inside = rows < batch
    held = tl.load(lengths_ptr + rows, mask=inside, other=0)
    held = tl.minimum(tl.maximum(held, 0), capacity)
    if HAS_COUNTS:
        held = tl.where(tl.load(counts_ptr + rows, mask=inside, other=0) > 0, held, 0)
    tiles = (held + BLOCK_N - 1) // BLOCK_N
    split_tiles = tl.maximum((tl.sum(tiles, 0) + shares - 1) // shares, MIN_TILES)
    splits = tl.maximum((tiles + split_tiles - 1) // split_tiles, 1)
    return tl.where(inside, splits, 0)


@triton.jit
def _first_split_slot(rows, splits, batch_row):
    """Workspace slot of `batch_row`'s first split; rows with a single split take no slot."""
    return tl.sum(tl.where((rows < batch_row) & (splits > 1), splits, 0), 0)


@triton.jit
def _load_positions(ptr, slots, stride, keep):
    return tl.load(ptr + tl.cast(slots, tl.int64) * stride, mask=keep, other=0)


@triton.jit
def _first_seen(position, window):
    """The first position in the window of each position, or the least that its dtype holds."""
    if position.dtype == tl.int32:
        behind = window - 1  # int64 if it needs to be
        return (tl.maximum(position, INT32_MIN + behind) - behind).to(tl.int32)
    else:
        behind = tl.cast(window, tl.int64) - 1
        return tl.maximum(position, INT64_MIN + behind) - behind


@triton.jit
def _narrow(position, base):
    """Positions as int32: int64 ones count from `base`, up to INT32_MAX, and are -1 before it."""
    if position.dtype == tl.int32:
        return position
    else:  # unsigned, so that no difference overflows
        distance = tl.minimum(position.to(tl.uint64) - base.to(tl.uint64), INT32_MAX).to(tl.int32)
        return tl.where(position < base, -1, distance)


@triton.jit
def _attend(
    q,
    acc,
    m,
    total,
    k_ptr,
    v_ptr,
    position,
    start,
    end,
    q_slot,
    q_nearest,
    nearest,
    stride_ks,
    stride_vs,
    pre,
    post,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One online-softmax step over BLOCK_N slots from `start` on, all of them seen if not MASKED.

    Reads no slot from `end` on, nor, under a window, one whose `position` is below `nearest`, the
    least of `q_nearest`, the first position that each row sees.
    """
    offs_n = tl.arange(0, BLOCK_N)
    slots = start + offs_n
    keep = None
    seen = None
    if MASKED:
        keep = slots < end
        seen = slots[None, :] <= q_slot[:, None]
        if HAS_WINDOW:
            keep = keep & (position >= nearest)
            seen = seen & (position[None, :] >= q_nearest[:, None])
        seen = seen & keep[None, :]
    first = tl.cast(start, tl.int64)
    k = _load_rows(k_ptr + first * stride_ks, offs_n, stride_ks, keep, HEAD_DIM, D0, D1)
    v = _load_rows(v_ptr + first * stride_vs, offs_n, stride_vs, keep, HEAD_DIM, D0, D1)
    return _fwd_step(q, k, v, acc, m, total, pre, post, seen, HAS_SOFTCAP)


@triton.jit(do_not_specialize=["batch", "new_tokens", "capacity", "shares", "window"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    split_out_ptr,
    split_lse_ptr,
    lengths_ptr,
    counts_ptr,
    position_ids_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_pb,
    stride_ps,
    batch,
    kv_heads,
    new_tokens,
    capacity,
    shares,
    window,
    pre,
    post,
    GROUP: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """BLOCK_M (token, head of the group) query rows over one split of one kv head's keys."""
    q_rows = new_tokens * GROUP
    q_tiles = tl.cdiv(q_rows, BLOCK_M)
    lane = tl.program_id(0) % (q_tiles * kv_heads)
    share = tl.program_id(0) // (q_tiles * kv_heads)
    h = lane // q_tiles
    first_row = (q_tiles - 1 - lane % q_tiles) * BLOCK_M
    if SPLIT:
        rows = tl.arange(0, BLOCK_B)
        splits = _row_splits(
            rows, lengths_ptr, counts_ptr, batch, capacity, shares, HAS_COUNTS, BLOCK_N, MIN_TILES
        )
        b = tl.sum((tl.cumsum(splits, 0) <= share).to(tl.int32), 0)
        if b >= batch:
            return
        split = share - tl.sum(tl.where(rows < b, splits, 0), 0)
        row_splits = tl.sum(tl.where(rows == b, splits, 0), 0)
        split_slot = _first_split_slot(rows, splits, b) + split
    else:
        b = share
        split = 0
        row_splits = 1
        split_slot = 0
    b = b.to(tl.int64)
    h = h.to(tl.int64)

    held = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), capacity)
    count = new_tokens
    if HAS_COUNTS:
        count = tl.minimum(tl.load(counts_ptr + b), new_tokens)
    offs_m = tl.arange(0, BLOCK_M)
    q_row = first_row + offs_m
    token = q_row // GROUP
    head = h * GROUP + q_row % GROUP
    q_slot = held - count + token
    live = (token < count) & (q_slot >= 0)
    # Slots [0, end) are seen by some row of this tile, [0, full_end) by every live one.
    first_token = first_row // GROUP
    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, count - 1)
    end = tl.where(first_token < count, tl.maximum(held - count + last_token + 1, 0), 0)
    full_end = tl.minimum(tl.maximum(held - count + first_token + 1, 0), end)
    tiles = tl.cdiv(end, BLOCK_N)
    begin_tile = tiles * split // row_splits
    end_tile = tiles * (split + 1) // row_splits

    q_offset = token.to(tl.int64) * stride_qt + head * stride_qh
    q = _load_rows(q_ptr + b * stride_qb, q_offset, 1, live, HEAD_DIM, D0, D1)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    q_nearest = q_slot
    nearest = 0
    position = None
    if HAS_WINDOW:
        position_ids_ptr += b * stride_pb
        q_nearest = _load_positions(position_ids_ptr, q_slot, stride_ps, live)
        q_nearest = _first_seen(q_nearest, window)
        most = INT32_MAX if q_nearest.dtype == tl.int32 else INT64_MAX
        base = tl.min(tl.where(live, q_nearest, most), 0)
        q_nearest = _narrow(q_nearest, base)
        nearest = _narrow(base, base)
        slots = begin_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        position = _load_positions(position_ids_ptr, slots, stride_ps, slots < end)
        position = _narrow(position, base)

    acc = _zeros(BLOCK_M, D0, D1)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Matrix-sized query tiles are worth a loop without masks; at decode the loads rule.
    SPARE_MASKS: tl.constexpr = BLOCK_M >= 64 and not HAS_WINDOW
    masked_from = begin_tile
    if SPARE_MASKS:
        masked_from = tl.minimum(tl.maximum(full_end // BLOCK_N, begin_tile), end_tile)
    for MASKED in tl.static_range(0 if SPARE_MASKS else 1, 2):
        for n in tl.range(
            masked_from if MASKED else begin_tile, end_tile if MASKED else masked_from
        ):
            if HAS_WINDOW:  # a step ahead, so that the keys' loads wait for no other load
                slots = (n + 1) * BLOCK_N + tl.arange(0, BLOCK_N)
                next_position = _load_positions(position_ids_ptr, slots, stride_ps, slots < end)
            acc, m, total = _attend(
                q,
                acc,
                m,
                total,
                k_ptr,
                v_ptr,
                position,
                n * BLOCK_N,
                end,
                q_slot,
                q_nearest,
                nearest,
                stride_ks,
                stride_vs,
                pre,
                post,
                MASKED,
                HAS_WINDOW,
                HAS_SOFTCAP,
                HEAD_DIM,
                D0,
                D1,
                BLOCK_N,
            )
            if HAS_WINDOW:
                position = _narrow(next_position, base)

    blind = (total == 0.0) | ~live
    total = tl.where(blind, 1.0, total)
    weight = tl.where(blind, 0.0, 1.0 / total)
    lse = tl.where(blind, float("-inf"), m + tl.log2(total))
    acc = _scaled(acc, weight[:, None])
    heads = kv_heads * GROUP
    inside = q_row < q_rows
    if row_splits == 1:
        out_ptr += b * new_tokens * heads * HEAD_DIM
        _store_rows(out_ptr, token * heads + head, HEAD_DIM, inside, acc, HEAD_DIM, D0)
        tl.store(lse_ptr + (b * heads + head) * new_tokens + token, lse * LN2, mask=inside)
    else:
        split_row = (split_slot.to(tl.int64) * kv_heads + h) * q_rows
        split_out_ptr += split_row * HEAD_DIM
        _store_rows(split_out_ptr, q_row, HEAD_DIM, inside, acc, HEAD_DIM, D0)
        tl.store(split_lse_ptr + split_row + q_row, lse, mask=inside)


@triton.jit(do_not_specialize=["batch", "new_tokens", "capacity", "shares"])
def _combine_kernel(
    out_ptr,
    lse_ptr,
    split_out_ptr,
    split_lse_ptr,
    lengths_ptr,
    counts_ptr,
    batch,
    kv_heads,
    new_tokens,
    capacity,
    shares,
    GROUP: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Adds the splits of one query row, always in the same order; rows of one split are done."""
    q_rows = new_tokens * GROUP
    q_row = tl.program_id(0) % q_rows
    h = tl.program_id(0) // q_rows % kv_heads
    b = (tl.program_id(0) // q_rows // kv_heads).to(tl.int64)
    rows = tl.arange(0, BLOCK_B)
    splits = _row_splits(
        rows, lengths_ptr, counts_ptr, batch, capacity, shares, HAS_COUNTS, BLOCK_N, MIN_TILES
    )
    row_splits = tl.sum(tl.where(rows == b, splits, 0), 0)
    if row_splits == 1:
        return
    split_slot = _first_split_slot(rows, splits, b).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for begin in tl.range(0, row_splits, BLOCK_S):
        part = begin + tl.arange(0, BLOCK_S)
        keep = part < row_splits
        split_row = ((split_slot + part) * kv_heads + h) * q_rows + q_row
        lse = tl.load(split_lse_ptr + split_row, mask=keep, other=float("-inf"))
        partial = tl.load(
            split_out_ptr + split_row[:, None] * HEAD_DIM + d[None, :],
            mask=keep[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        new_m = tl.maximum(m, tl.max(lse, 0))
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
        weight = tl.exp2(lse - base)
        shrink = tl.exp2(m - base)
        acc = acc * shrink + tl.sum(partial * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        m = new_m
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    token = q_row // GROUP
    head = h * GROUP + q_row % GROUP
    heads = kv_heads * GROUP
    out_ptr += ((b * new_tokens + token) * heads + head) * HEAD_DIM
    tl.store(out_ptr + d, (acc / total).to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
    lse = tl.where(blind, float("-inf"), (m + tl.log2(total)) * LN2)
    tl.store(lse_ptr + (b * heads + head) * new_tokens + token + tl.arange(0, 1), lse)
