"""Launches the kernels of `prune_kv_` and `prune_paged_kv_`, and remembers their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mem1_kernels.ops.triton.prune_kv_kernels import (
    _list_moves_kernel,
    _move_slots_kernel,
    _turn_keys_kernel,
)

# Programs that fill a GPU; moves of a head are split until there are so many.
PROGRAMS = 1024
MAX_PARTS = 16
LIST_BLOCK = 2048
TILE_BYTES = 16 * 1024  # that a program moves at a time
ELEMENTS = {1: tl.int8, 2: tl.int16, 4: tl.int32}
KEYS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Group(NamedTuple):
    """Tensors that one launch moves: alike in element size and alignment."""

    table: Tensor  # int64 [tensors, 8]
    element: int  # bytes
    aligned: int  # elements that address, strides and slots are multiples of
    heads: int  # the most of any tensor
    elements: int  # of a slot, the most of any tensor


class Plan(NamedTuple):
    """What the launches read of a cache: depends on nothing but addresses, shapes and strides."""

    groups: list[Group]
    turned: Group | None  # keys that turn; `elements` are their pairs
    moves: Tensor  # int32 [batch, 2, slots], written by each call
    counts: Tensor  # int32 [batch, 2]


class _Remembered(NamedTuple):
    plan: Plan
    storages: list[StorageWeakRef]


# A plan lives as long as the memory it describes, so that neither a second call nor a captured
# graph finds it gone.
_plans: dict[tuple, _Remembered] = {}


def _plan_for(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Sequence[Tensor],
    steps: Sequence[Tensor],
    batch: int,
    slot_count: int,
    paged: bool,
) -> Plan:
    tensors = (*keys, *values, *slots, *steps)
    key = (
        *((x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors),
        (len(keys), len(values), len(slots), batch, slot_count, paged),
    )
    found = _plans.get(key)
    if found is not None:
        if any(storage.expired() for storage in found.storages):
            # Other tensors at the same addresses: the plan is theirs now.
            _plans[key] = _Remembered(found.plan, _storages(tensors))
        return found.plan
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("prune: call once on these tensors before a graph captures the call")
    for old in [k for k, x in _plans.items() if any(s.expired() for s in x.storages)]:
        del _plans[old]
    plan = _make_plan(keys, values, slots, steps, batch, slot_count, paged)
    _plans[key] = _Remembered(plan, _storages(tensors))
    return plan


def _storages(tensors: Sequence[Tensor]) -> list[StorageWeakRef]:
    return [StorageWeakRef(x.untyped_storage()) for x in tensors]


def _make_plan(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Sequence[Tensor],
    steps: Sequence[Tensor],
    batch: int,
    slot_count: int,
    paged: bool,
) -> Plan:
    slot_dim, head_dim = (1, 2) if paged else (2, 1)
    groups: dict[tuple[int, int], list[list[int]]] = {}
    turned: list[list[int]] = []
    turned_units: list[int] = []

    def add(x: Tensor, first: int, last: int, pairs: int, pair_steps: Tensor | None) -> None:
        if x.numel() == 0 or first == last:
            return
        item = x.element_size()
        flat = x.dim() == 2
        page, slot = x.stride(0), x.stride(1 if flat else slot_dim)
        head = 0 if flat else x.stride(head_dim)
        heads = 1 if flat else x.shape[head_dim]
        address = x.data_ptr() + first * item
        if pair_steps is not None:
            row = [address, page, head, slot, heads, 2 * pairs, pair_steps.data_ptr(), pairs]
            turned.append(row)
            sizes = [address, page * item, head * item, slot * item, pairs * item]
            turned_units.append(_unit(sizes) // item or 1)
            return
        sizes = [address, page * item, head * item, slot * item, (last - first) * item]
        unit = _unit(sizes)
        element = min(unit, 4)
        strides = [size // element for size in sizes[1:4]]
        row = [address, *strides, heads, sizes[4] // element, 0, 0]
        groups.setdefault((element, unit // element), []).append(row)

    for layer, key in enumerate(keys):
        pair_steps = steps[layer if len(steps) > 1 else 0] if steps else None
        pairs = 0 if pair_steps is None else len(pair_steps)
        if pairs:
            add(key, 0, 2 * pairs, pairs, pair_steps)
        add(key, 2 * pairs, key.shape[-1], 0, None)
    for value in values:
        add(value, 0, value.shape[-1], 0, None)
    for slot in slots:
        add(slot, 0, 1, 0, None)

    device = keys[0].device if keys else slots[0].device

    def group(rows: list[list[int]], element: int, aligned: int, elements: int) -> Group:
        table = torch.tensor(rows, dtype=torch.int64).to(device)
        return Group(table, element, aligned, max(row[4] for row in rows), elements)

    return Plan(
        [
            group(rows, element, aligned, max(row[5] for row in rows))
            for (element, aligned), rows in groups.items()
        ],
        group(turned, 0, min(turned_units), max(row[7] for row in turned)) if turned else None,
        torch.zeros(batch, 2, slot_count, dtype=torch.int32, device=device),
        torch.zeros(batch, 2, dtype=torch.int32, device=device),
    )


def _unit(sizes: Sequence[int]) -> int:
    """The largest power of two up to 16 that divides all of them."""
    bits = 16
    for size in sizes:
        bits |= size
    return bits & -bits


def _parts(group: Group, batch: int, ordered: bool) -> int:
    if ordered:
        return 1
    items = len(group.table) * group.heads * batch
    return min(MAX_PARTS, triton.next_power_of_2(triton.cdiv(PROGRAMS, items)))


def _move(plan: Plan, page_size: int, paged: bool, ordered: bool) -> None:
    batch, _, slot_count = plan.moves.shape
    for group in plan.groups:
        parts = _parts(group, batch, ordered)
        block_elements = min(triton.next_power_of_2(group.elements), 1024 // group.element)
        block_moves = TILE_BYTES // (block_elements * group.element)
        _move_slots_kernel[(len(group.table) * group.heads * parts, batch)](
            group.table,
            plan.moves,
            plan.counts,
            slot_count,
            page_size,
            group.heads,
            ELEMENT=ELEMENTS[group.element],
            ALIGNED=group.aligned,
            PAGED=paged,
            ORDERED=ordered,
            PARTS=parts,
            BLOCK_MOVES=min(block_moves, 512),
            BLOCK_ELEMENTS=block_elements,
            num_warps=4,
        )


def prune_kv_(
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
    keep: Tensor,
    slots: list[Tensor],
    ordered: bool,
    position_delta: Tensor | None,
    rope_steps: list[Tensor],
    interleaved: bool,
) -> None:
    """The op `mem1::prune_kv_`: one launch lists the moves, one a kind of tensor makes them."""
    batch, capacity = keep.shape
    if batch == 0 or capacity == 0:
        return
    plan = _plan_for(keys, values, slots, rope_steps, batch, capacity, paged=False)
    _list_moves_kernel[(batch,)](
        lengths,
        keep.view(torch.uint8),
        plan.moves,
        plan.counts,
        lengths.stride(0),
        keep.stride(0),
        capacity,
        ORDERED=ordered,
        BLOCK=LIST_BLOCK,
        num_warps=8,
        sanitize_overflow=False,
    )
    _move(plan, capacity, False, ordered)
    turned = plan.turned
    if turned is None or position_delta is None:
        return
    parts = _parts(turned, batch, ordered)
    block_pairs = min(triton.next_power_of_2(turned.elements), 128)
    _turn_keys_kernel[(len(turned.table) * turned.heads * parts, batch)](
        turned.table,
        plan.moves,
        plan.counts,
        keep.view(torch.uint8),
        position_delta,
        keep.stride(0),
        position_delta.stride(0),
        capacity,
        turned.heads,
        KEY=_turned_dtype(keys, rope_steps),
        ALIGNED=turned.aligned,
        INTERLEAVED=interleaved,
        ORDERED=ordered,
        PARTS=parts,
        BLOCK_MOVES=max(1, 1024 // block_pairs),
        BLOCK_PAIRS=block_pairs,
        num_warps=4,
    )


def _turned_dtype(keys: Sequence[Tensor], steps: Sequence[Tensor]) -> tl.dtype:
    for layer, key in enumerate(keys):
        if len(steps[layer if len(steps) > 1 else 0]):
            return KEYS[key.dtype]
    raise AssertionError("no key turns")


def prune_paged_kv_(
    keys: list[Tensor],
    values: list[Tensor],
    block_table: Tensor,
    lengths: Tensor,
    keep: Tensor,
    page_refs: Tensor | None,
    slots: list[Tensor],
    freed: Tensor,
    freed_counts: Tensor,
) -> None:
    """The op `mem1::prune_paged_kv_`: torch ops on the device list what a launch moves."""
    batch, max_pages = block_table.shape
    pages, page_size = keys[0].shape[:2]
    if batch == 0 or max_pages == 0:
        freed.fill_(-1)
        freed_counts.zero_()
        return
    tokens = max_pages * page_size
    plan = _plan_for(keys, values, slots, [], batch, tokens, paged=True)
    _list_paged_moves(
        block_table, lengths, keep, page_refs, freed, freed_counts, plan, pages, page_size
    )
    _move(plan, page_size, True, False)


def _list_paged_moves(
    block_table: Tensor,
    lengths: Tensor,
    keep: Tensor,
    page_refs: Tensor | None,
    freed: Tensor,
    freed_counts: Tensor,
    plan: Plan,
    pages: int,
    page_size: int,
) -> None:
    """Edits the tables and lists the moves as prune_index.h says, without a look from the host."""
    batch, max_pages = block_table.shape
    tokens = max_pages * page_size
    device = keep.device
    length = lengths[:, None].long()
    capacity = min(keep.shape[1], tokens)
    in_range = ((length >= 0) & (length <= capacity)).all()
    torch._assert_async(in_range, f"lengths: expected 0 to {capacity} in every row")
    used_before = (length + page_size - 1) // page_size
    page = torch.arange(max_pages, device=device)
    in_use = page < used_before
    table = block_table.long().masked_fill(~in_use, 0)
    exist = ((table >= 0) & (table < pages)).all()
    torch._assert_async(exist, f"block_table: expected pages 0 to {pages - 1} in every row")

    token = torch.arange(tokens, device=device)
    alive = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    alive[:, :capacity] = keep[:, :capacity]
    alive &= token < length
    by_page = alive.view(batch, max_pages, page_size)
    survivors = by_page.sum(2)
    shared = (page_refs[table] > 1) if page_refs is not None else torch.zeros_like(in_use)
    # 0 whole, 1 partial, 2 dead, 3 shared, 4 not in use
    kind = torch.where(survivors > 0, 1, 2)
    kind = torch.where(shared, 3, kind)
    kind = torch.where(survivors == page_size, 0, kind)
    kind = torch.where(in_use, kind, 4)
    order = kind.argsort(dim=1, stable=True)

    whole = (kind == 0).sum(1, keepdim=True)
    kept = survivors.sum(1, keepdim=True)
    packed = kept - whole * page_size
    receivers = (packed + page_size - 1) // page_size
    changes = kept < length
    fits = receivers <= ((kind == 1) | (kind == 2)).sum(1, keepdim=True)
    go = changes & fits

    lies = by_page.gather(1, order[:, :, None].expand(-1, -1, page_size)).flatten(1)
    place = table.gather(1, order)[:, :, None] * page_size
    place = (place + torch.arange(page_size, device=device)).flatten(1).to(torch.int32)
    slot = token - whole * page_size  # among the pages to pack, laid end to end
    hole = go & (slot >= 0) & (slot < packed) & ~lies
    source = go & (slot >= packed) & lies
    for which, chosen in enumerate((source, hole)):
        rank = torch.where(chosen, chosen.cumsum(1) - 1, tokens)
        ranked = place.new_zeros(batch, tokens + 1).scatter_(1, rank, place)
        plan.moves[:, which] = ranked[:, :tokens]
    plan.counts[:, 0] = hole.sum(1)

    used = whole + receivers
    reordered = block_table.gather(1, order)
    leaving = torch.where(go, used_before - used, 0)
    behind = (page + used).clamp(max=max_pages - 1)
    freed.copy_(torch.where(page < leaving, reordered.gather(1, behind), -1))
    freed_counts.copy_(torch.where(changes & ~fits, -1, leaving)[:, 0])
    block_table.copy_(torch.where(go, reordered, block_table))
    lengths.copy_(torch.where(go, kept, length)[:, 0])


def move_slots_(
    pages: list[Tensor], sources: Tensor, destinations: Tensor, offsets: Tensor | None
) -> None:
    """The op `mem1::move_slots_`: one launch per kind of tensor makes the moves listed."""
    if offsets is not None:
        raise ValueError("offsets: expected None on a GPU, whose caches are not packed")
    moves = sources.shape[0]
    if moves == 0:
        return
    views = [x.transpose(1, 2) for x in pages]
    plan = _plan_for(views, [], [], [], 1, 1, paged=True)
    listed = torch.stack([sources, destinations]).to(torch.int32)[None]
    counts = torch.tensor([[moves, 0]], dtype=torch.int32).to(sources.device)
    _move(plan._replace(moves=listed, counts=counts), pages[0].shape[2], True, False)
