"""Pruning KV caches in place: prune_kv_ for dense rows, prune_paged_kv_ for paged ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.ops._checks import DTYPES, check_plain, mark_written
from mem1_kernels.ops._library import implementations
from mem1_kernels.ops._memory import check_disjoint
from mem1_kernels.ops.rope import Rope


def prune_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Tensor,
    keep: Tensor,
    *,
    slots: Sequence[Tensor] | None = None,
    ordered: bool = False,
    position_delta: Tensor | None = None,
    rope: Rope | None = None,
) -> None:
    """Drops slots of a KV cache in place, in all layers at once.

    Of row `b`'s slots `0 .. lengths[b] - 1` those with `keep[b, slot]` survive, n of them, and
    `lengths[b]` becomes n. By default survivors in slots >= n fill the holes (dead slots < n), the
    r-th such survivor the r-th hole, and all others stay: attention does not care about the order
    of past slots, since positions are baked into the keys, and the moves are as few as can be. With
    `ordered` survivors keep their order. Every byte that moves is copied as it is; slots from n on
    keep theirs. `keep` from `lengths[b]` on is ignored.

    With `position_delta` and `rope` each surviving key is rotated on by its own number of
    positions, whether or not it moves (by 0: copied). Rotated again and again, 16-bit keys lose
    accuracy (bf16: about 2e-3 once, 3e-2 after 100 times), so shift as rarely as possible.

    On a GPU the call is one launch for all layers in CUDA C++ (a few in Triton), allocates nothing
    after the first call on a cache, never waits for the device, and replays in a CUDA graph with
    whatever keep, lengths and position_delta then hold. A length out of range traps there, as
    torch's own index checks do, since reading it back would cost a wait.

    Args:
        keys, values: one tensor per layer, `[batch, kv_heads, capacity, head_dim]`, of any dtype of
            1, 2, 4 or 8 bytes. kv_heads, head_dim, dtype and strides may differ from layer to
            layer; the last dimension must be contiguous. Storage `[batch, capacity, heads,
            head_dim]` goes in as `x.transpose(1, 2)`. Changed in place.
        lengths: int32 `[batch]`, tokens that each row holds. Changed in place.
        keep: bool `[batch, capacity]`.
        slots: further tensors `[batch, capacity]` with something for each slot (its expiry,
            position, token id; any dtype), which move along. Changed in place.
        ordered: keep the survivors' order.
        position_delta: int32 `[batch, capacity]`, by how many positions the key now in each slot
            (its slot before the prune) turns on. Needs `rope`.
        rope: the model's rotation. Needs `position_delta`, and keys of one dtype, float32,
            float16 or bfloat16, in the layers that it rotates.

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: shapes, devices or strides that do not fit, tensors that overlap in memory or
            that require gradients while they are recorded, position_delta without rope or the
            reverse, a rope that does not fit the keys, and, on the CPU, a length outside
            `0 .. capacity`. Nothing is written then.

    >>> keys = torch.arange(6.0).reshape(1, 1, 6, 1)
    >>> lengths = torch.tensor([5], dtype=torch.int32)
    >>> keep = torch.tensor([[True, False, False, True, True, False]])
    >>> prune_kv_([keys], [keys.clone()], lengths, keep)
    >>> keys[0, 0, :3, 0], lengths
    (tensor([0., 3., 4.]), tensor([3], dtype=torch.int32))
    """
    slots = [] if slots is None else list(slots)
    if (position_delta is None) != (rope is None):
        missing = "rope" if rope is None else "position_delta"
        raise ValueError(f"{missing}: position_delta and rope go together, got only one of them")
    if rope is not None and not isinstance(rope, Rope):
        raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
    if not isinstance(ordered, bool):
        raise TypeError(f"ordered: expected a bool, got {ordered!r}")
    steps = [] if rope is None else rope.steps
    arguments = (
        list(keys),
        list(values),
        lengths,
        keep,
        slots,
        ordered,
        position_delta,
        steps,
        rope is not None and rope.layout == "interleaved",
    )
    _call("prune_kv_", arguments, keep, lambda: _check_dense(*arguments[:5], position_delta, steps))
    mark_written(*keys, *values, *slots, lengths)


def prune_paged_kv_(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    block_table: Tensor,
    lengths: Tensor,
    keep: Tensor,
    *,
    layout: str = "NHD",
    page_refs: Tensor | None = None,
    slots: Sequence[Tensor] | None = None,
    freed: Tensor | None = None,
    freed_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Drops tokens of a paged KV cache in place: mostly an edit of the block table.

    Token `t` of row `b` lies in page `block_table[b, t // page_size]`. The tokens with `keep[b, t]`
    survive. Pages all of whose tokens survive are not touched. The survivors of the others are
    packed into as few of them as hold them, moving at most two pages of tokens a run of dropped
    tokens, however long the run. `block_table[b]` then lists the row's pages in use, whole ones
    first and in their order, so that token `t < lengths[b]` is again where the formula says, and
    behind them the freed ones; the rest of it is not touched.

    A page with `page_refs` > 1 is shared with a row of this or of another batch: it is read and it
    can leave the row's table, but it is never written. Its survivors, if it is not whole, move to
    pages that the row has for itself. A row without enough of those is left as it is, and
    `freed_counts` of it is -1: give it a copy of the page, and prune again. `page_refs` is not
    changed: its owner takes 1 off for each page in `freed`, shared ones included.

    Works on a GPU as `prune_kv_` does (a fixed `freed` and `freed_counts` keep it from
    allocating). Without the CUDA extension the moves are one launch, and torch ops on the device
    find them.

    Args:
        keys, values: one tensor per layer, `[pages, page_size, kv_heads, head_dim]` (NHD) or
            `[pages, kv_heads, page_size, head_dim]` (HND), otherwise as in `prune_kv_`. Caches
            that hold keys and values together go in as views: vLLM's and FlashInfer's
            `[pages, 2, ...]` as `kv[:, 0]` and `kv[:, 1]`, vLLM's `[2, pages, ...]` as `kv[0]` and
            `kv[1]`. Changed in place.
        block_table: int32 `[batch, max_pages]`. Entries that `lengths` does not reach may hold
            anything. Changed in place.
        lengths: int32 `[batch]`, tokens that each row holds. Changed in place.
        keep: bool `[batch, tokens]` in the rows' order, tokens >= lengths.
        layout: "NHD" or "HND".
        page_refs: int32 `[pages]`, how many rows use each page; None: no page is shared.
        slots: further tensors `[pages, page_size]` with something for each slot, which move along.
        freed, freed_counts: int32 `[batch, max_pages]` and `[batch]` to hold the result.

    Returns:
        freed: int32 `[batch, max_pages]`, the pages that left each row, -1 behind them.
        freed_counts: int32 `[batch]`, how many; -1: the row could not be pruned.

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: as `prune_kv_`; on the CPU also a page in use that does not exist, has
            `page_refs` < 1, or stands twice though it is not shared. (On a GPU the first of these
            traps, and the others are not seen.)

    >>> keys = torch.arange(8.0).reshape(4, 2, 1, 1)  # 4 pages of 2 tokens
    >>> table = torch.tensor([[3, 0, 2]], dtype=torch.int32)
    >>> lengths = torch.tensor([6], dtype=torch.int32)
    >>> keep = torch.tensor([[True, True, False, False, False, True]])
    >>> freed, counts = prune_paged_kv_([keys], [keys.clone()], table, lengths, keep)
    >>> table.tolist(), lengths.tolist(), freed.tolist(), keys[2, 0].item()
    ([[3, 2, 0]], [3], [[0, -1, -1]], 5.0)
    """
    if layout not in ("NHD", "HND"):
        raise ValueError(f"layout: expected 'NHD' or 'HND', got {layout!r}")
    slots = [] if slots is None else list(slots)
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table: expected a tensor, got {type(block_table).__name__}")
    if freed is None:
        freed = torch.empty_like(block_table, memory_format=torch.contiguous_format)
    if freed_counts is None:
        freed_counts = block_table.new_empty(block_table.shape[:1])
    pages = [list(keys), list(values)]
    if layout == "HND":
        pages = [[_heads_last(x) for x in xs] for xs in pages]
    results = (freed, freed_counts)
    arguments = (*pages, block_table, lengths, keep, page_refs, slots, *results)
    _call(
        "prune_paged_kv_",
        arguments,
        keep,
        lambda: _check_paged(
            keys, values, block_table, lengths, keep, layout, page_refs, slots, *results
        ),
    )
    mark_written(*keys, *values, *slots, block_table, lengths, freed, freed_counts)
    return freed, freed_counts


def _heads_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2) if isinstance(x, Tensor) and x.dim() == 4 else x


def _call(name: str, arguments: tuple, keep: Tensor, check: Callable[[], None]) -> None:
    """Calls an op whose arguments pass the checks given here.

    The compiled ops make these checks themselves, in a tenth of the time (28 layers: under 20 us,
    and 210 us here, on an AMD EPYC). The ones given here then only say what is wrong.
    """
    op = getattr(torch.ops.mem1, name)
    device = keep.device.type.upper() if isinstance(keep, Tensor) else None
    compiled = "mem1_kernels._C" in implementations.get((name, device), "")
    if not compiled or torch.compiler.is_compiling():
        check()
        op(*arguments)
        return
    try:
        op(*arguments)
    except (RuntimeError, TypeError, ValueError):
        check()
        raise


def _check_dense(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Tensor,
    keep: Tensor,
    slots: Sequence[Tensor],
    position_delta: Tensor | None,
    steps: Sequence[Tensor],
) -> None:
    _check_rows("lengths", lengths, keep)
    batch, capacity = keep.shape
    layout = "[batch, kv_heads, capacity, head_dim]"
    written = _check_layers(keys, values, keep, layout, {0: batch, 2: capacity})
    written |= _check_slots(slots, keep, (batch, capacity), "(batch, capacity)")
    written["lengths"] = lengths
    read = {"keep": keep}
    if position_delta is not None:
        read["position_delta"] = position_delta
        _check_int32("position_delta", position_delta, keep, (batch, capacity), "(batch, capacity)")
        _check_rotation(keys, steps, keep)
    _check_memory(written, read)


def _check_paged(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    block_table: Tensor,
    lengths: Tensor,
    keep: Tensor,
    layout: str,
    page_refs: Tensor | None,
    slots: Sequence[Tensor],
    freed: Tensor,
    freed_counts: Tensor,
) -> None:
    _check_rows("lengths", lengths, keep)
    batch = keep.shape[0]
    if not keys:
        raise ValueError("keys: expected at least one layer, got none")
    names = "page_size, kv_heads" if layout == "NHD" else "kv_heads, page_size"
    names = f"[pages, {names}, head_dim]"
    _check_tensor("keys[0]", keys[0], 4, names)
    slot_dim = 1 if layout == "NHD" else 2
    pages, page_size = keys[0].shape[0], keys[0].shape[slot_dim]
    if page_size == 0:
        raise ValueError("keys[0]: expected a page size of at least 1, got 0")
    written = _check_layers(keys, values, keep, names, {0: pages, slot_dim: page_size})
    written |= _check_slots(slots, keep, (pages, page_size), "(pages, page_size)")
    _check_int32("block_table", block_table, keep, (batch, None), "(batch, max_pages)")
    written |= {"block_table": block_table, "lengths": lengths}
    read = {"keep": keep}
    if page_refs is not None:
        _check_int32("page_refs", page_refs, keep, (pages,), "(pages)")
        read["page_refs"] = page_refs
    _check_int32("freed", freed, keep, (batch, block_table.shape[1]), "(batch, max_pages)")
    _check_int32("freed_counts", freed_counts, keep, (batch,), "(batch)")
    written |= {"freed": freed, "freed_counts": freed_counts}
    _check_memory(written, read)


def _check_tensor(name: str, x: Tensor, dim: int, layout: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    check_plain(name, x)
    if x.dim() != dim:
        raise ValueError(f"{name}: expected {layout}, got {list(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name}: expected a contiguous last dimension, got strides {list(x.stride())}"
        )


def _check_device(name: str, x: Tensor, keep: Tensor) -> None:
    if x.device != keep.device:
        raise ValueError(f"{name}: expected on {keep.device} like keep, got {x.device}")


def _check_int32(
    name: str, x: Tensor, keep: Tensor, shape: tuple[int | None, ...], meaning: str
) -> None:
    """An int32 tensor of that shape (None: any size) on keep's device."""
    _check_tensor(name, x, len(shape), meaning)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: expected int32, got {x.dtype}")
    if any(size not in (None, got) for size, got in zip(shape, x.shape, strict=True)):
        sizes = ["any" if size is None else size for size in shape]
        raise ValueError(f"{name}: expected {sizes} {meaning}, got {list(x.shape)}")
    _check_device(name, x, keep)


def _check_rows(name: str, lengths: Tensor, keep: Tensor) -> None:
    _check_tensor("keep", keep, 2, "[batch, capacity]")
    if keep.dtype != torch.bool:
        raise TypeError(f"keep: expected bool, got {keep.dtype}")
    _check_int32(name, lengths, keep, (keep.shape[0],), "(batch)")


def _check_item(name: str, x: Tensor) -> None:
    if x.element_size() not in (1, 2, 4, 8):
        raise TypeError(f"{name}: expected a dtype of 1, 2, 4 or 8 bytes, got {x.dtype}")


def _check_layers(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    keep: Tensor,
    layout: str,
    sizes: dict[int, int],
) -> dict[str, Tensor]:
    """The layers by name; `sizes` are those of the dimensions that all of them share."""
    if len(values) != len(keys):
        raise ValueError(f"values: expected {len(keys)} tensors like keys, got {len(values)}")
    layers: dict[str, Tensor] = {}
    for label, tensors in (("keys", keys), ("values", values)):
        passed = None
        for i, x in enumerate(tensors):
            name = f"{label}[{i}]"
            layers[name] = x
            if passed is not None and _facts(x) == passed:
                continue
            _check_tensor(name, x, 4, layout)
            if any(x.shape[dim] != size for dim, size in sizes.items()):
                expected = [sizes.get(dim, got) for dim, got in enumerate(x.shape)]
                raise ValueError(f"{name}: expected {expected} {layout}, got {list(x.shape)}")
            _check_item(name, x)
            _check_device(name, x, keep)
            passed = _facts(x)
    return layers


def _facts(x: Any) -> tuple | None:
    """All that `_check_layers` looks at in a layer: most layers of a model are alike."""
    if not isinstance(x, Tensor):
        return None
    view = not torch.compiler.is_compiling() and (x.is_conj() or x.is_neg())
    return x.shape, x.stride(), x.dtype, x.device, view


def _check_slots(
    slots: Sequence[Tensor], keep: Tensor, shape: tuple[int, int], meaning: str
) -> dict[str, Tensor]:
    for i, x in enumerate(slots):
        if not isinstance(x, Tensor):
            raise TypeError(f"slots[{i}]: expected a tensor, got {type(x).__name__}")
        check_plain(f"slots[{i}]", x)
        if x.shape != shape:
            raise ValueError(f"slots[{i}]: expected {list(shape)} {meaning}, got {list(x.shape)}")
        _check_item(f"slots[{i}]", x)
        _check_device(f"slots[{i}]", x, keep)
    return {f"slots[{i}]": x for i, x in enumerate(slots)}


def _check_rotation(keys: Sequence[Tensor], steps: Sequence[Tensor], keep: Tensor) -> None:
    if len(steps) not in (1, len(keys)):
        raise ValueError(
            f"rope: expected inv_freq as 1 tensor or {len(keys)} (layers), got {len(steps)}"
        )
    dtypes = set()
    for i, key in enumerate(keys):
        step = steps[i if len(steps) > 1 else 0]
        if step.device != keep.device:
            raise ValueError(f"rope: expected on {keep.device} like keep, got {step.device}")
        if len(step) == 0:
            continue
        if 2 * len(step) > key.shape[3]:
            raise ValueError(
                f"rope: expected at most {key.shape[3]} rotated elements for keys[{i}], "
                f"got {2 * len(step)}"
            )
        if key.dtype not in DTYPES:
            raise TypeError(
                f"keys[{i}]: expected float32, float16 or bfloat16 to rotate, got {key.dtype}"
            )
        dtypes.add(key.dtype)
    if len(dtypes) > 1:
        raise TypeError(f"keys: expected one dtype to rotate, got {sorted(map(str, dtypes))}")


def _check_memory(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    if torch.compiler.is_compiling():
        return  # tensors have no addresses yet
    for name, x in written.items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: requires gradients, and pruning is not differentiable")
    check_disjoint(written, read)
