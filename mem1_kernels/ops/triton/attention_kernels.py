"""The jit kernels of trajectory attention: forward, backward preprocess, dK/dV and its sum, dQ.

This file imports triton and nothing else, so that it compiles for a GPU where neither the GPU nor
torch is present. `attention.py` beside it launches what is here.

Work arrives as a BlockPlan: for each tile of 128 tokens on one side, the tiles that it meets on the
other, partial ones first. A loop over partial tiles masks by `_visible`; the loop over full tiles
does no mask work. Both step through a tile in blocks of BLOCK_M queries or BLOCK_N keys; a step
asks for the next step's tile number, so that loads run num_stages - 1 steps ahead.

A score is kept as `y`: the raw product q.k, or tanh(q.k * pre) under a softcap. `y * post` is the
score in log2 units, as are all row statistics between the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _offsets(rows, stride, d):
    """Offsets inside a block; unsigned, which spares the upper halves of 64-bit ones a register."""
    return rows.to(tl.uint32)[:, None] * tl.cast(stride, tl.uint32) + d.to(tl.uint32)[None, :]


@triton.jit
def _aligned(strides, ALIGN: tl.constexpr):
    """The strides, which are multiples of ALIGN, so that the compiler sees it and loads in vectors.

    Unasked it sees 16 alone; a head_dim of 72 has strides that are multiples of 8.
    """
    if ALIGN == 16:
        return strides
    else:
        out = ()
        for i in tl.static_range(len(strides)):
            out = out + (strides[i] // ALIGN * ALIGN,)
        return out


@triton.jit
def _row(ptr, row, stride):
    """Address of a row: one wide multiplication of two unsigned 32-bit numbers."""
    return ptr + row.to(tl.uint32).to(tl.uint64) * tl.cast(stride, tl.uint32).to(tl.uint64)


@triton.jit
def _load_chunk(ptrs, keep, in_head, PADDED: tl.constexpr):
    if keep is None:
        if PADDED:
            return tl.load(ptrs, mask=in_head[None, :], other=0.0)
        else:
            return tl.load(ptrs)
    else:
        if PADDED:
            return tl.load(ptrs, mask=keep[:, None] & in_head[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=keep[:, None], other=0.0)


@triton.jit
def _load_rows(ptr, rows, stride, keep, HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of head_dim values as chunks [rows, D0] and, where D1, [rows, D1]; 0 where not keep."""
    d = tl.arange(0, D0)
    x0 = _load_chunk(ptr + _offsets(rows, stride, d), keep, d < HEAD_DIM, D0 > HEAD_DIM)
    if D1 == 0:
        return (x0,)
    else:
        d = D0 + tl.arange(0, D1)
        x1 = _load_chunk(ptr + _offsets(rows, stride, d), keep, d < HEAD_DIM, D0 + D1 > HEAD_DIM)
        return (x0, x1)


@triton.jit
def _store_rows(ptr, rows, stride, keep, x, HEAD_DIM: tl.constexpr, D0: tl.constexpr):
    for c in tl.static_range(len(x)):
        d = c * D0 + tl.arange(0, x[c].shape[1])
        ptrs = ptr + _offsets(rows, stride, d)
        tl.store(ptrs, x[c].to(ptr.dtype.element_ty), mask=keep[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    if D1 == 0:
        return (tl.zeros([ROWS, D0], tl.float32),)
    else:
        return (tl.zeros([ROWS, D0], tl.float32), tl.zeros([ROWS, D1], tl.float32))


@triton.jit
def _scaled(x, factor):
    out = ()
    for c in tl.static_range(len(x)):
        out = out + (x[c] * factor,)
    return out


@triton.jit
def _dot_nt(a, b):
    """a @ b.T, summed over the chunks of head_dim."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    for c in tl.static_range(1, len(a)):
        s = tl.dot(a[c], tl.trans(b[c]), s, input_precision="ieee")
    return s


@triton.jit
def _add_dot(acc, w, x):
    """acc + w @ x for each chunk of head_dim, w rounded to x's dtype."""
    w = w.to(x[0].dtype)
    out = ()
    for c in tl.static_range(len(acc)):
        out = out + (tl.dot(w, x[c], acc[c], input_precision="ieee"),)
    return out


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    if PRECISE:
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        far = (1.0 - e) / (1.0 + e)
        x2 = x * x
        near = x * (1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
        return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))
    else:
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def _scores(a, b, pre, HAS_SOFTCAP: tl.constexpr):
    y = _dot_nt(a, b)
    if HAS_SOFTCAP:
        y = _tanh(y * pre, a[0].dtype == tl.float32)
    return y


@triton.jit
def _score_grads(p, y, dp, delta, HAS_SOFTCAP: tl.constexpr):
    """Gradient of the scaled, uncapped scores over scale."""
    ds = p * (dp - delta)
    if HAS_SOFTCAP:
        ds = ds * (1.0 - y * y)
    return ds


@triton.jit
def _visible(i, k, expiry, floor, HAS_FLOOR: tl.constexpr):
    seen = (k <= i) & (i < expiry)
    if HAS_FLOOR:
        seen = seen & (floor <= k)
    return seen


@triton.jit
def _next_tile(tiles_ptr, step, count, STEPS: tl.constexpr):
    """Tile number of a step; behind the last one its tile again, 0 if the list is empty."""
    return tl.load(tiles_ptr + tl.minimum(step // STEPS, count - 1), mask=count > 0, other=0)


@triton.jit
def _weights(y, m, z, post, seen):
    """A block of scores into weights, and into each row's maximum m (log2 units) and sum z.

    Returns the weights, the factor by which what the row has so far shrinks, m and z.
    """
    if seen is not None:
        y = tl.where(seen, y, float("-inf"))
    m_new = tl.maximum(m, tl.max(y, 1) * post)
    base = m_new
    if seen is not None:
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(y * post - base[:, None])
    shrink = tl.exp2(m - base)
    return p, shrink, m_new, z * shrink + tl.sum(p, 1)


@triton.jit
def _fwd_step(q, k, v, acc, m, z, pre, post, seen, HAS_SOFTCAP: tl.constexpr):
    """One block of keys into the maximum m, the sum z and the output of each row."""
    p, shrink, m, z = _weights(_scores(q, k, pre, HAS_SOFTCAP), m, z, post, seen)
    return _add_dot(_scaled(acc, shrink[:, None]), p, v), m, z


@triton.jit(do_not_specialize=["heads", "tokens", "plan_step"])
def _fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    expiry_ptr,
    floor_ptr,
    row_order_ptr,
    row_offsets_ptr,
    row_partial_ptr,
    row_tiles_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    heads,
    tokens,
    plan_step,
    pre,
    post,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    PIPELINED: tl.constexpr,
):
    """BLOCK_M queries of one head; programs go by work first, then by head."""
    stride_qb, stride_qt, stride_qh = _aligned((stride_qb, stride_qt, stride_qh), ALIGN)
    stride_kb, stride_kt, stride_kh = _aligned((stride_kb, stride_kt, stride_kh), ALIGN)
    stride_vb, stride_vt, stride_vh = _aligned((stride_vb, stride_vt, stride_vh), ALIGN)
    SUB_M: tl.constexpr = TILE // BLOCK_M
    SUB_N: tl.constexpr = TILE // BLOCK_N
    SUB_PART: tl.constexpr = TILE // PART
    n = tl.cdiv(tokens, TILE)
    slot = tl.program_id(1)
    lane = tl.program_id(0).to(tl.int64)
    b = lane // heads
    h = lane % heads
    plan = b * plan_step
    row = tl.load(row_order_ptr + plan * n + slot // SUB_M)
    first = row * TILE + slot % SUB_M * BLOCK_M
    if first >= tokens:
        return
    begin = tl.load(row_offsets_ptr + plan * (n + 1) + row)
    count = tl.load(row_offsets_ptr + plan * (n + 1) + row + 1) - begin
    partial = tl.load(row_partial_ptr + plan * n + row)
    row_tiles_ptr += plan * (n.to(tl.int64) * (n + 1) // 2) + begin
    expiry_ptr += plan * tokens
    q_ptr = _row(q_ptr + b * stride_qb + h * stride_qh, first, stride_qt)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh

    offs_m = tl.arange(0, BLOCK_M)
    rows = first + offs_m
    floor = rows
    if HAS_FLOOR:
        floor = tl.load(floor_ptr + plan * tokens + rows, mask=rows < tokens, other=0)
    q = _load_rows(q_ptr, offs_m, stride_qt, rows < tokens, HEAD_DIM, D0, D1)
    acc = _zeros(BLOCK_M, D0, D1)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)

    tile = _next_tile(row_tiles_ptr, 0, count, 1)
    offs_p = tl.arange(0, PART)
    if PIPELINED:
        p = tl.zeros([BLOCK_M, PART], tl.float32)
        shrink = tl.full([BLOCK_M], 1.0, tl.float32)
        last, alive = first, offs_p < 0
    for step in tl.range(0, partial * SUB_PART):
        start = tile * TILE + step % SUB_PART * PART
        tile = _next_tile(row_tiles_ptr, step + 1, count, SUB_PART)
        keys = start + offs_p
        expiry = tl.load(expiry_ptr + keys, mask=keys < tokens, other=0)
        k_block = _row(k_ptr, start, stride_kt)
        k = _load_rows(k_block, offs_p, stride_kt, expiry > keys, HEAD_DIM, D0, D1)
        seen = _visible(rows[:, None], keys[None, :], expiry[None, :], floor[:, None], HAS_FLOOR)
        if PIPELINED:
            v_block = _row(v_ptr, last, stride_vt)
            v = _load_rows(v_block, offs_p, stride_vt, alive, HEAD_DIM, D0, D1)
            y = _scores(q, k, pre, HAS_SOFTCAP)
            acc = _add_dot(_scaled(acc, shrink[:, None]), p, v)
            p, shrink, m, z = _weights(y, m, z, post, seen)
            last, alive = start, expiry > keys
        else:
            v_block = _row(v_ptr, start, stride_vt)
            v = _load_rows(v_block, offs_p, stride_vt, expiry > keys, HEAD_DIM, D0, D1)
            acc, m, z = _fwd_step(q, k, v, acc, m, z, pre, post, seen, HAS_SOFTCAP)

    offs_n = tl.arange(0, BLOCK_N)
    if PIPELINED:
        for step in tl.range(partial * SUB_N, count * SUB_N):
            start = tile * TILE + step % SUB_N * BLOCK_N
            tile = _next_tile(row_tiles_ptr, step + 1, count, SUB_N)
            k_block = _row(k_ptr, start, stride_kt)
            k = _load_rows(k_block, offs_n, stride_kt, None, HEAD_DIM, D0, D1)
            v_block = _row(v_ptr, last, stride_vt)
            v = _load_rows(v_block, offs_n, stride_vt, alive, HEAD_DIM, D0, D1)
            y = _scores(q, k, pre, HAS_SOFTCAP)
            acc = _add_dot(_scaled(acc, shrink[:, None]), p, v)
            p, shrink, m, z = _weights(y, m, z, post, None)
            last, alive = start, offs_n >= 0
        v_block = _row(v_ptr, last, stride_vt)
        v = _load_rows(v_block, offs_n, stride_vt, alive, HEAD_DIM, D0, D1)
        acc = _add_dot(_scaled(acc, shrink[:, None]), p, v)
    else:
        for step in tl.range(partial * SUB_N, count * SUB_N):
            start = tile * TILE + step % SUB_N * BLOCK_N
            tile = _next_tile(row_tiles_ptr, step + 1, count, SUB_N)
            k_block = _row(k_ptr, start, stride_kt)
            v_block = _row(v_ptr, start, stride_vt)
            k = _load_rows(k_block, offs_n, stride_kt, None, HEAD_DIM, D0, D1)
            v = _load_rows(v_block, offs_n, stride_vt, None, HEAD_DIM, D0, D1)
            acc, m, z = _fwd_step(q, k, v, acc, m, z, pre, post, None, HAS_SOFTCAP)

    # Read again, so that the addresses of the output occupy no registers during the loops.
    first = tl.load(row_order_ptr + plan * n + slot // SUB_M) * TILE + slot % SUB_M * BLOCK_M
    rows = first + offs_m
    blind = z == 0.0
    z = tl.where(blind, 1.0, z)
    lse = tl.where(blind, float("-inf"), (m + tl.log2(z)) * LN2)
    tl.store(lse_ptr + lane * tokens + rows, lse, mask=rows < tokens)
    out_ptr += ((b * tokens + first) * heads + h) * HEAD_DIM
    acc = _scaled(acc, (1.0 / z)[:, None])
    _store_rows(out_ptr, offs_m, heads * HEAD_DIM, rows < tokens, acc, HEAD_DIM, D0)


@triton.jit(do_not_specialize=["heads", "tokens"])
def _bwd_preprocess_kernel(
    out_ptr,
    do_ptr,
    lse_ptr,
    grad_lse_ptr,
    lse2_ptr,
    delta_ptr,
    stride_dob,
    stride_dot,
    stride_doh,
    heads,
    tokens,
    HAS_GRAD_LSE: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """lse2 = lse in log2 units and delta = rowsum(out * dO) - grad_lse, [batch, heads, 128 n] each.

    A row that sees nothing, or stands behind the last token, gets +inf and 0.
    """
    stride_dob, stride_dot, stride_doh = _aligned((stride_dob, stride_dot, stride_doh), ALIGN)
    lane = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_M
    b = lane // heads
    h = lane % heads
    offs_m = tl.arange(0, BLOCK_M)
    rows = first + offs_m
    lse = tl.load(lse_ptr + lane * tokens + rows, mask=rows < tokens, other=float("-inf"))
    sees = lse != float("-inf")
    out_ptr += ((b * tokens + first) * heads + h) * HEAD_DIM
    do_ptr = _row(do_ptr + b * stride_dob + h * stride_doh, first, stride_dot)
    out = _load_rows(out_ptr, offs_m, heads * HEAD_DIM, sees, HEAD_DIM, D0, D1)
    do = _load_rows(do_ptr, offs_m, stride_dot, sees, HEAD_DIM, D0, D1)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for c in tl.static_range(len(out)):
        delta += tl.sum(out[c].to(tl.float32) * do[c].to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + lane * tokens + rows, mask=sees, other=0.0)
    at = lane * (tl.cdiv(tokens, TILE) * TILE) + rows
    tl.store(lse2_ptr + at, tl.where(sees, lse * LOG2E, float("inf")))
    tl.store(delta_ptr + at, delta)


@triton.jit
def _chunk(x, CHUNK: tl.constexpr):
    if CHUNK is None:
        return x
    else:
        return (x[CHUNK],)


@triton.jit
def _dkdv_step(
    k,
    v,
    q,
    do,
    dk,
    dv,
    lse2_ptrs,
    delta_ptrs,
    pre,
    post,
    seen,
    HAS_SOFTCAP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One block of queries into dK (before scale) and dV; scores are [keys, queries] here."""
    # Before the products, so that the exponentials run beside the second one.
    lse2 = tl.load(lse2_ptrs)
    y = _scores(k, q, pre, HAS_SOFTCAP)
    dp = _dot_nt(v, do)
    p = tl.exp2(y * post - lse2[None, :])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    ds = _score_grads(p, y, dp, tl.load(delta_ptrs)[None, :], HAS_SOFTCAP)
    return _add_dot(dk, ds, _chunk(q, CHUNK)), _add_dot(dv, p, _chunk(do, CHUNK))


@triton.jit(do_not_specialize=["heads", "tokens", "plan_step"])
def _bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    work_dk_ptr,
    work_dv_ptr,
    expiry_ptr,
    floor_ptr,
    col_offsets_ptr,
    col_partial_ptr,
    col_tiles_ptr,
    item_column_ptr,
    item_begin_ptr,
    item_end_ptr,
    item_slot_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    heads,
    tokens,
    plan_step,
    pre,
    post,
    scale,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """BLOCK_N keys of one work item and kv head, over its queries in all GROUP query heads.

    With a CHUNK, only for that chunk of head_dim: above 128 dK and dV do not both fit in registers.
    A whole column goes to dk and dv; a piece of a split one to work_dk and work_dv, fp32
    [batch, kv_heads, n, 128, head_dim], for `_bwd_sum_kernel`.
    """
    stride_qb, stride_qt, stride_qh = _aligned((stride_qb, stride_qt, stride_qh), ALIGN)
    stride_kb, stride_kt, stride_kh = _aligned((stride_kb, stride_kt, stride_kh), ALIGN)
    stride_vb, stride_vt, stride_vh = _aligned((stride_vb, stride_vt, stride_vh), ALIGN)
    stride_dob, stride_dot, stride_doh = _aligned((stride_dob, stride_dot, stride_doh), ALIGN)
    SUB_N: tl.constexpr = TILE // BLOCK_N
    SUB_M: tl.constexpr = TILE // BLOCK_M
    SUB_PART: tl.constexpr = TILE // PART
    n = tl.cdiv(tokens, TILE)
    kv_heads = heads // GROUP
    item = tl.program_id(1) // SUB_N
    sub = tl.program_id(1) % SUB_N
    lane = tl.program_id(0).to(tl.int64)
    b = lane // kv_heads
    h = lane % kv_heads
    plan = b * plan_step
    item_ptr = item_column_ptr + plan * (2 * n) + item
    column = tl.load(item_ptr)
    first = column * TILE + sub * BLOCK_N
    if (column < 0) | (first >= tokens):
        return
    begin = tl.load(item_begin_ptr + plan * (2 * n) + item)
    count = tl.load(item_end_ptr + plan * (2 * n) + item) - begin
    partial = tl.load(col_offsets_ptr + plan * (n + 1) + column) - begin
    partial += tl.load(col_partial_ptr + plan * n + column)
    partial = tl.maximum(tl.minimum(partial, count), 0)
    col_tiles_ptr += plan * (n.to(tl.int64) * (n + 1) // 2) + begin
    q_ptr += b * stride_qb + h * GROUP * stride_qh
    do_ptr += b * stride_dob + h * GROUP * stride_doh
    k_ptr = _row(k_ptr + b * stride_kb + h * stride_kh, first, stride_kt)
    v_ptr = _row(v_ptr + b * stride_vb + h * stride_vh, first, stride_vt)
    lse2_ptr += lane * GROUP * n * TILE
    delta_ptr += lane * GROUP * n * TILE

    offs_n = tl.arange(0, BLOCK_N)
    keys = first + offs_n
    expiry = tl.load(expiry_ptr + plan * tokens + keys, mask=keys < tokens, other=0)
    k = _load_rows(k_ptr, offs_n, stride_kt, expiry > keys, HEAD_DIM, D0, D1)
    v = _load_rows(v_ptr, offs_n, stride_vt, expiry > keys, HEAD_DIM, D0, D1)
    dk = _chunk(_zeros(BLOCK_N, D0, D1), CHUNK)
    dv = _chunk(_zeros(BLOCK_N, D0, D1), CHUNK)

    tile = _next_tile(col_tiles_ptr, 0, count, 1)
    offs_p = tl.arange(0, PART)
    for step in tl.range(0, partial * (SUB_PART * GROUP)):
        start = tile * TILE + step // GROUP % SUB_PART * PART
        g = step % GROUP
        tile = _next_tile(col_tiles_ptr, step + 1, count, SUB_PART * GROUP)
        rows = start + offs_p
        lse2_ptrs = lse2_ptr + (g * n * TILE + start) + offs_p
        delta_ptrs = delta_ptr + (g * n * TILE + start) + offs_p
        floor = rows
        if HAS_FLOOR:
            floor = tl.load(floor_ptr + plan * tokens + rows, mask=rows < tokens, other=0)
        sees = tl.load(lse2_ptrs) != float("inf")
        q_block = _row(_row(q_ptr, g, stride_qh), start, stride_qt)
        do_block = _row(_row(do_ptr, g, stride_doh), start, stride_dot)
        q = _load_rows(q_block, offs_p, stride_qt, sees, HEAD_DIM, D0, D1)
        do = _load_rows(do_block, offs_p, stride_dot, sees, HEAD_DIM, D0, D1)
        seen = _visible(rows[None, :], keys[:, None], expiry[:, None], floor[None, :], HAS_FLOOR)
        dk, dv = _dkdv_step(
            k, v, q, do, dk, dv, lse2_ptrs, delta_ptrs, pre, post, seen, HAS_SOFTCAP, CHUNK
        )
    offs_m = tl.arange(0, BLOCK_M)
    for step in tl.range(partial * (SUB_M * GROUP), count * (SUB_M * GROUP)):
        start = tile * TILE + step // GROUP % SUB_M * BLOCK_M
        g = step % GROUP
        tile = _next_tile(col_tiles_ptr, step + 1, count, SUB_M * GROUP)
        lse2_ptrs = lse2_ptr + (g * n * TILE + start) + offs_m
        delta_ptrs = delta_ptr + (g * n * TILE + start) + offs_m
        q_block = _row(_row(q_ptr, g, stride_qh), start, stride_qt)
        do_block = _row(_row(do_ptr, g, stride_doh), start, stride_dot)
        q = _load_rows(q_block, offs_m, stride_qt, None, HEAD_DIM, D0, D1)
        do = _load_rows(do_block, offs_m, stride_dot, None, HEAD_DIM, D0, D1)
        dk, dv = _dkdv_step(
            k, v, q, do, dk, dv, lse2_ptrs, delta_ptrs, pre, post, None, HAS_SOFTCAP, CHUNK
        )

    # Read again, so that the addresses of the gradients occupy no registers during the loops.
    first = tl.load(item_ptr) * TILE + sub * BLOCK_N
    keep = first + offs_n < tokens
    dk = _scaled(dk, scale)
    skip: tl.constexpr = D0 if CHUNK == 1 else 0
    slot = tl.load(item_slot_ptr + plan * (2 * n) + item)
    if slot < 0:
        at = ((b * tokens + first) * kv_heads + h) * HEAD_DIM + skip
        _store_rows(dk_ptr + at, offs_n, kv_heads * HEAD_DIM, keep, dk, HEAD_DIM - skip, D0)
        _store_rows(dv_ptr + at, offs_n, kv_heads * HEAD_DIM, keep, dv, HEAD_DIM - skip, D0)
    else:
        at = ((lane * n + slot) * TILE + sub * BLOCK_N) * HEAD_DIM + skip
        _store_rows(work_dk_ptr + at, offs_n, HEAD_DIM, keep, dk, HEAD_DIM - skip, D0)
        _store_rows(work_dv_ptr + at, offs_n, HEAD_DIM, keep, dv, HEAD_DIM - skip, D0)


@triton.jit
def _sum_pieces(
    ptr,
    stride,
    pieces,
    rows,
    keep,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
):
    total = _load_rows(ptr, rows, HEAD_DIM, keep, HEAD_DIM, D0, D1)
    for piece in tl.range(1, pieces):
        x = _load_rows(ptr + piece * stride, rows, HEAD_DIM, keep, HEAD_DIM, D0, D1)
        out = ()
        for c in tl.static_range(len(x)):
            out = out + (total[c] + x[c],)
        total = out
    return total


@triton.jit(do_not_specialize=["kv_heads", "tokens", "plan_step"])
def _bwd_sum_kernel(
    work_dk_ptr,
    work_dv_ptr,
    dk_ptr,
    dv_ptr,
    col_first_slot_ptr,
    col_slots_ptr,
    kv_heads,
    tokens,
    plan_step,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of a split column: its pieces, summed in a fixed order."""
    SUB_N: tl.constexpr = TILE // BLOCK_N
    n = tl.cdiv(tokens, TILE)
    column = tl.program_id(1) // SUB_N
    sub = tl.program_id(1) % SUB_N
    lane = tl.program_id(0).to(tl.int64)
    b = lane // kv_heads
    h = lane % kv_heads
    plan = b * plan_step
    slots = tl.load(col_slots_ptr + plan * n + column)
    first = column * TILE + sub * BLOCK_N
    if (slots == 0) | (first >= tokens):
        return
    first_slot = tl.load(col_first_slot_ptr + plan * n + column)
    offs_n = tl.arange(0, BLOCK_N)
    keep = first + offs_n < tokens
    at = ((lane * n + first_slot) * TILE + sub * BLOCK_N) * HEAD_DIM
    to = ((b * tokens + first) * kv_heads + h) * HEAD_DIM
    step = TILE * HEAD_DIM
    dk = _sum_pieces(work_dk_ptr + at, step, slots, offs_n, keep, HEAD_DIM, D0, D1)
    _store_rows(dk_ptr + to, offs_n, kv_heads * HEAD_DIM, keep, dk, HEAD_DIM, D0)
    dv = _sum_pieces(work_dv_ptr + at, step, slots, offs_n, keep, HEAD_DIM, D0, D1)
    _store_rows(dv_ptr + to, offs_n, kv_heads * HEAD_DIM, keep, dv, HEAD_DIM, D0)


@triton.jit
def _dq_step(q, do, k, v, dq, lse2, delta, pre, post, seen, HAS_SOFTCAP: tl.constexpr):
    """One block of keys into dQ (before scale)."""
    y = _scores(q, k, pre, HAS_SOFTCAP)
    dp = _dot_nt(do, v)
    p = tl.exp2(y * post - lse2[:, None])
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    return _add_dot(dq, _score_grads(p, y, dp, delta[:, None], HAS_SOFTCAP), k)


@triton.jit(do_not_specialize=["heads", "tokens", "plan_step"])
def _bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    expiry_ptr,
    floor_ptr,
    row_order_ptr,
    row_offsets_ptr,
    row_partial_ptr,
    row_tiles_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    heads,
    tokens,
    plan_step,
    pre,
    post,
    scale,
    GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
):
    """dQ of BLOCK_M queries of one head; the walk is `_fwd_kernel`'s."""
    stride_qb, stride_qt, stride_qh = _aligned((stride_qb, stride_qt, stride_qh), ALIGN)
    stride_kb, stride_kt, stride_kh = _aligned((stride_kb, stride_kt, stride_kh), ALIGN)
    stride_vb, stride_vt, stride_vh = _aligned((stride_vb, stride_vt, stride_vh), ALIGN)
    stride_dob, stride_dot, stride_doh = _aligned((stride_dob, stride_dot, stride_doh), ALIGN)
    SUB_M: tl.constexpr = TILE // BLOCK_M
    SUB_N: tl.constexpr = TILE // BLOCK_N
    SUB_PART: tl.constexpr = TILE // PART
    n = tl.cdiv(tokens, TILE)
    slot = tl.program_id(1)
    lane = tl.program_id(0).to(tl.int64)
    b = lane // heads
    h = lane % heads
    plan = b * plan_step
    row = tl.load(row_order_ptr + plan * n + slot // SUB_M)
    first = row * TILE + slot % SUB_M * BLOCK_M
    if first >= tokens:
        return
    begin = tl.load(row_offsets_ptr + plan * (n + 1) + row)
    count = tl.load(row_offsets_ptr + plan * (n + 1) + row + 1) - begin
    partial = tl.load(row_partial_ptr + plan * n + row)
    row_tiles_ptr += plan * (n.to(tl.int64) * (n + 1) // 2) + begin
    expiry_ptr += plan * tokens
    q_ptr = _row(q_ptr + b * stride_qb + h * stride_qh, first, stride_qt)
    do_ptr = _row(do_ptr + b * stride_dob + h * stride_doh, first, stride_dot)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh

    offs_m = tl.arange(0, BLOCK_M)
    rows = first + offs_m
    floor = rows
    if HAS_FLOOR:
        floor = tl.load(floor_ptr + plan * tokens + rows, mask=rows < tokens, other=0)
    lse2 = tl.load(lse2_ptr + lane * (n * TILE) + rows)
    delta = tl.load(delta_ptr + lane * (n * TILE) + rows)
    sees = lse2 != float("inf")
    q = _load_rows(q_ptr, offs_m, stride_qt, sees, HEAD_DIM, D0, D1)
    do = _load_rows(do_ptr, offs_m, stride_dot, sees, HEAD_DIM, D0, D1)
    dq = _zeros(BLOCK_M, D0, D1)

    tile = _next_tile(row_tiles_ptr, 0, count, 1)
    offs_p = tl.arange(0, PART)
    for step in tl.range(0, partial * SUB_PART):
        start = tile * TILE + step % SUB_PART * PART
        tile = _next_tile(row_tiles_ptr, step + 1, count, SUB_PART)
        keys = start + offs_p
        expiry = tl.load(expiry_ptr + keys, mask=keys < tokens, other=0)
        k_block = _row(k_ptr, start, stride_kt)
        v_block = _row(v_ptr, start, stride_vt)
        k = _load_rows(k_block, offs_p, stride_kt, expiry > keys, HEAD_DIM, D0, D1)
        v = _load_rows(v_block, offs_p, stride_vt, expiry > keys, HEAD_DIM, D0, D1)
        seen = _visible(rows[:, None], keys[None, :], expiry[None, :], floor[:, None], HAS_FLOOR)
        dq = _dq_step(q, do, k, v, dq, lse2, delta, pre, post, seen, HAS_SOFTCAP)
    offs_n = tl.arange(0, BLOCK_N)
    for step in tl.range(partial * SUB_N, count * SUB_N):
        start = tile * TILE + step % SUB_N * BLOCK_N
        tile = _next_tile(row_tiles_ptr, step + 1, count, SUB_N)
        k_block = _row(k_ptr, start, stride_kt)
        v_block = _row(v_ptr, start, stride_vt)
        k = _load_rows(k_block, offs_n, stride_kt, None, HEAD_DIM, D0, D1)
        v = _load_rows(v_block, offs_n, stride_vt, None, HEAD_DIM, D0, D1)
        dq = _dq_step(q, do, k, v, dq, lse2, delta, pre, post, None, HAS_SOFTCAP)

    # Read again, so that the addresses of dQ occupy no registers during the loops.
    first = tl.load(row_order_ptr + plan * n + slot // SUB_M) * TILE + slot % SUB_M * BLOCK_M
    dq_ptr += ((b * tokens + first) * heads + h) * HEAD_DIM
    keep = first + offs_m < tokens
    _store_rows(dq_ptr, offs_m, heads * HEAD_DIM, keep, _scaled(dq, scale), HEAD_DIM, D0)
