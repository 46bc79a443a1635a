"""Kernels of the pruning ops: list each row's moves, then copy, or turn, all tensors' slots.

A tensor is a row of eight int64: address, strides of page, head and slot (in elements of the size
that moves), heads, elements of a slot, address of its steps, pairs. `moves` holds, for each row,
sources and then destinations; `counts` the moves and the end of the slots that stay.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(8)


# debug: keeps the assertion, which is how a length out of range becomes an error.
@triton.jit(debug=True)
def _list_moves_kernel(
    lengths_ptr,
    keep_ptr,
    moves_ptr,
    counts_ptr,
    stride_length,
    stride_keep,
    capacity,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its moves in ascending order, their number, and its new length."""
    row = tl.program_id(0)
    length = tl.load(lengths_ptr + row * stride_length)
    tl.device_assert((length >= 0) & (length <= capacity), "lengths: out of range")
    keep_ptr += row.to(tl.int64) * stride_keep
    sources_ptr = moves_ptr + row.to(tl.int64) * 2 * capacity
    destinations_ptr = sources_ptr + capacity
    block = tl.arange(0, BLOCK)

    survivors = 0
    first_hole = length
    for start in range(0, length, BLOCK):
        slot = start + block
        kept = tl.load(keep_ptr + slot, mask=slot < length, other=0) != 0
        survivors += tl.sum(kept.to(tl.int32))
        first_hole = tl.minimum(first_hole, tl.min(tl.where(kept, length, slot)))

    if ORDERED:
        rank = 0
        for start in range(0, length, BLOCK):
            slot = start + block
            kept = tl.load(keep_ptr + slot, mask=slot < length, other=0) != 0
            ones = kept.to(tl.int32)
            destination = rank + tl.cumsum(ones) - ones
            moves = kept & (slot > first_hole)
            tl.store(sources_ptr + destination - first_hole, slot, mask=moves)
            tl.store(destinations_ptr + destination - first_hole, destination, mask=moves)
            rank += tl.sum(ones)
        stay_end = tl.minimum(first_hole, survivors)
        count = survivors - stay_end
    else:
        count = 0
        sources = 0
        for start in range(0, length, BLOCK):
            slot = start + block
            kept = tl.load(keep_ptr + slot, mask=slot < length, other=0) != 0
            hole = (slot < survivors) & ~kept
            source = (slot >= survivors) & kept
            hole_ones, source_ones = hole.to(tl.int32), source.to(tl.int32)
            hole_rank = count + tl.cumsum(hole_ones) - hole_ones
            source_rank = sources + tl.cumsum(source_ones) - source_ones
            tl.store(destinations_ptr + hole_rank, slot, mask=hole)
            tl.store(sources_ptr + source_rank, slot, mask=source)
            count += tl.sum(hole_ones)
            sources += tl.sum(source_ones)
        stay_end = survivors
    tl.store(counts_ptr + row * 2, count)
    tl.store(counts_ptr + row * 2 + 1, stay_end)
    tl.store(lengths_ptr + row * stride_length, survivors)


@triton.jit
def _place(
    page, place, page_size, stride_page, stride_slot, PAGED: tl.constexpr, ALIGNED: tl.constexpr
):
    """Offset of a slot: in the row's own page, or of slot `place` of all pages laid end to end."""
    place = place.to(tl.int64)
    if PAGED:
        page = place // page_size
        place %= page_size
    # Said of the sum itself: the compiler drops it from what a function returns.
    return tl.multiple_of(page * stride_page + place * stride_slot, [ALIGNED])


@triton.jit
def _work_item(table_ptr, max_heads, PARTS: tl.constexpr):
    """This program's tensor (its row of the table), head and part of the moves."""
    item = tl.program_id(0)
    part = item % PARTS
    head = item // PARTS % max_heads
    return table_ptr + item // PARTS // max_heads * FIELDS, head, part


@triton.jit
def _move_slots_kernel(
    table_ptr,
    moves_ptr,
    counts_ptr,
    capacity,
    page_size,
    max_heads,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAGED: tl.constexpr,
    ORDERED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_MOVES: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
):
    """Copies one part of one row's moves of one head of one tensor.

    ALIGNED: address, strides and slots are whole multiples of so many elements.
    """
    tensor_ptr, head, part = _work_item(table_ptr, max_heads, PARTS)
    row = tl.program_id(1).to(tl.int64)
    if head >= tl.load(tensor_ptr + 4):
        return
    data_ptr = tl.load(tensor_ptr).to(tl.pointer_type(ELEMENT))
    stride_page = tl.load(tensor_ptr + 1)
    stride_slot = tl.load(tensor_ptr + 3)
    elements = tl.multiple_of(tl.load(tensor_ptr + 5), ALIGNED).to(tl.int32)
    data_ptr += head * tl.load(tensor_ptr + 2)
    data_ptr = tl.multiple_of(data_ptr, ALIGNED * (ELEMENT.primitive_bitwidth // 8))
    sources_ptr = moves_ptr + row * 2 * capacity
    destinations_ptr = sources_ptr + capacity
    count = tl.load(counts_ptr + row * 2)

    each = tl.cdiv(count, PARTS)
    last = tl.minimum(count, each * (part + 1))
    for start in range(each * part, last, BLOCK_MOVES):
        move = start + tl.arange(0, BLOCK_MOVES)
        source = tl.load(sources_ptr + move, mask=move < last, other=0)
        destination = tl.load(destinations_ptr + move, mask=move < last, other=0)
        source = _place(row, source, page_size, stride_page, stride_slot, PAGED, ALIGNED)
        destination = _place(row, destination, page_size, stride_page, stride_slot, PAGED, ALIGNED)
        for first in range(0, elements, BLOCK_ELEMENTS):
            element = first + tl.arange(0, BLOCK_ELEMENTS)
            mask = (move < last)[:, None] & (element < elements)[None, :]
            data = tl.load(data_ptr + source[:, None] + element[None, :], mask=mask)
            if ORDERED:
                tl.debug_barrier()  # all of the step is read before any of it is written
            tl.store(data_ptr + destination[:, None] + element[None, :], data, mask=mask)


@triton.jit
def _turn_cos_sin(steps, positions):
    """cos and sin of `steps` (2^-64 turns per position) times `positions`: see rope_angle.h."""
    angle = ((steps * positions.to(tl.int64)) >> 32).to(tl.int32)
    quarter = (angle + 0x20000000) >> 30  # of a turn, to the nearest; wraps with the angle
    x = (angle - (quarter << 30)).to(tl.float32) * 1.46291807926715968e-9  # 2 pi / 2^32
    y = x * x
    s = 1.0 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    s = x * s
    c = 1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))
    c = 1.0 + y * (-1 / 2 + y * c)
    swap = (quarter & 1) != 0
    cosine, sine = tl.where(swap, s, c), tl.where(swap, c, s)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    return cosine, tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def _turn(
    data_ptr, source, destination, delta, steps, pair, mask, stride_pair, stride_second,
    KEY: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Turns keys at `source` by `delta` positions to `destination`; by 0: copies them."""
    first = source[:, None] + (pair * stride_pair)[None, :]
    second = first + stride_second
    x = tl.load(data_ptr + first, mask=mask)
    y = tl.load(data_ptr + second, mask=mask)
    if ORDERED:
        tl.debug_barrier()
    cosine, sine = _turn_cos_sin(steps[None, :], delta[:, None])
    still = (delta == 0)[:, None]
    u, v = x.to(tl.float32), y.to(tl.float32)
    first = destination[:, None] + (pair * stride_pair)[None, :]
    second = first + stride_second
    tl.store(data_ptr + first, tl.where(still, x, (u * cosine - v * sine).to(KEY)), mask=mask)
    tl.store(data_ptr + second, tl.where(still, y, (u * sine + v * cosine).to(KEY)), mask=mask)


@triton.jit
def _turn_keys_kernel(
    table_ptr,
    moves_ptr,
    counts_ptr,
    keep_ptr,
    delta_ptr,
    stride_keep,
    stride_delta,
    capacity,
    max_heads,
    KEY: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ORDERED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_MOVES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Turns one part of one row's keys of one head: those that move, then the others.

    ALIGNED: address, strides and pairs are whole multiples of so many elements.
    """
    tensor_ptr, head, part = _work_item(table_ptr, max_heads, PARTS)
    row = tl.program_id(1).to(tl.int64)
    if head >= tl.load(tensor_ptr + 4):
        return
    data_ptr = tl.load(tensor_ptr).to(tl.pointer_type(KEY))
    stride_slot = tl.load(tensor_ptr + 3)
    pairs = tl.multiple_of(tl.load(tensor_ptr + 7), ALIGNED).to(tl.int32)
    steps_ptr = tl.load(tensor_ptr + 6).to(tl.pointer_type(tl.int64))
    data_ptr += row * tl.load(tensor_ptr + 1) + head * tl.load(tensor_ptr + 2)
    data_ptr = tl.multiple_of(data_ptr, ALIGNED * (KEY.primitive_bitwidth // 8))
    sources_ptr = moves_ptr + row * 2 * capacity
    destinations_ptr = sources_ptr + capacity
    keep_ptr += row * stride_keep
    delta_ptr += row * stride_delta
    count = tl.load(counts_ptr + row * 2)
    stay_end = tl.load(counts_ptr + row * 2 + 1)
    if INTERLEAVED:
        stride_pair, stride_second = 2, 1
    else:
        stride_pair, stride_second = 1, pairs

    for first_pair in range(0, pairs, BLOCK_PAIRS):
        pair = first_pair + tl.arange(0, BLOCK_PAIRS)
        steps = tl.load(steps_ptr + pair, mask=pair < pairs, other=0)
        each = tl.cdiv(count, PARTS)
        last = tl.minimum(count, each * (part + 1))
        for start in range(each * part, last, BLOCK_MOVES):
            move = start + tl.arange(0, BLOCK_MOVES)
            source = tl.load(sources_ptr + move, mask=move < last, other=0)
            destination = tl.load(destinations_ptr + move, mask=move < last, other=0)
            delta = tl.load(delta_ptr + source, mask=move < last, other=0)
            mask = (move < last)[:, None] & (pair < pairs)[None, :]
            source = tl.multiple_of(source.to(tl.int64) * stride_slot, [ALIGNED])
            destination = tl.multiple_of(destination.to(tl.int64) * stride_slot, [ALIGNED])
            _turn(
                data_ptr, source, destination, delta, steps, pair, mask, stride_pair,
                stride_second, KEY, ORDERED,
            )  # fmt: skip
        each = tl.cdiv(stay_end, PARTS)
        last = tl.minimum(stay_end, each * (part + 1))
        for start in range(each * part, last, BLOCK_MOVES):
            slot = start + tl.arange(0, BLOCK_MOVES)
            kept = tl.load(keep_ptr + slot, mask=slot < last, other=0) != 0
            delta = tl.load(delta_ptr + slot, mask=slot < last, other=0)
            mask = (kept & (delta != 0))[:, None] & (pair < pairs)[None, :]
            place = tl.multiple_of(slot.to(tl.int64) * stride_slot, [ALIGNED])
            _turn(
                data_ptr, place, place, delta, steps, pair, mask, stride_pair, stride_second, KEY,
                False,
            )  # fmt: skip
