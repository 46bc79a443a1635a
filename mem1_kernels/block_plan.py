"""Which tiles of the mask are empty, full or partial: made once, used by every layer and pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.mask import check_expiry, saturated
from mem1_kernels.trajectory import Layout

BLOCK = 128
"""Tokens on each side of a plan's tile. Kernels may cut a tile into smaller ones."""

MIN_CHUNK = 8
"""The fewest tiles that are worth a work item of their own in the backward."""


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Lists, for each query tile, the key tiles it meets, and the transpose for the backward.

    A tile is *full* when each of its pairs is visible (kernels do no mask work there), *empty*
    (in no list) when none is, else *partial*. Make one with `of` or `from_expiry` and
    pass it to `trajectory_attention` in every layer and step of that layout.

    `expiry` `[P, tokens]` and `floor` (the same, or None) are int32, P being 1 (one layout for the
    whole batch) or the batch size. `lists` is one int32 tensor, so that compiled code sees a single
    size; `rows` and `columns` are views of it. With n = ceil(tokens / 128) they are

        row_order       [P, n]          query tiles, most work first
        row_offsets     [P, n + 1]      where each query tile's list starts in row_tiles
        row_partial     [P, n]          its partial tiles come first; how many they are
        row_tiles       [P, n(n+1)/2]   key tiles; unused entries behind the last list are 0
        col_order, col_offsets, col_partial, col_tiles      the transpose
        item_column, item_begin, item_end, item_slot  [P, 2n]   pieces of columns for dK and dV,
                        heaviest first: `col_tiles[begin:end]` of a column (-1: unused item), and
                        the workspace slot of its partial sum (-1: it is the whole column)
        col_first_slot, col_slots  [P, n]   a split column's first slot (-1) and its count (0)

    A column is split when its list is longer than max(8, twice the mean), so that a prompt that
    every later token sees does not become one program that outlasts all others.

    The plan of a layout of "compact" positions lists all but the prompt's keys for the tokens
    behind it. `prompt` is the plan of these; its floor is where the prompt begins. `shift`, int64
    `[1, tokens]`, says by how many positions queries and keys turn on for the rest.

    A plan made `of` a layout also carries what a model needs to know of it beside the mask:
    `predecessor`, int64 `[1, tokens]`, the token whose logits predict each one (-1: none; None: not
    known), and `needs_position_ids`, whether the positions are others than 0, 1, 2, ...

    Memory: 4 n(n+1) + O(n) bytes per layout for the lists, whatever the layout: 4.2 MB at 128K
    tokens, 0.27 MB at 32K, 268 MB at 1M. On the CPU that is address space: only pages with listed
    tiles become memory, 8 bytes per tile. The compiled op takes time in proportion to the tokens
    and the tiles listed (`python -m bench.plan`); plain torch, which serves CUDA and builds without
    the extension, works on n x n tile pairs. On a GPU it has not been measured.
    """

    expiry: Tensor
    floor: Tensor | None
    lists: Tensor
    predecessor: Tensor | None = None
    needs_position_ids: bool = False
    prompt: BlockPlan | None = None
    shift: Tensor | None = None

    def __repr__(self) -> str:
        return f"BlockPlan({self.expiry.shape[0]} x {self.tokens} tokens, {self.expiry.device})"

    @staticmethod
    def of(layout: Layout) -> BlockPlan:
        """Plans a layout: its expiry and, where it has one, its floor.

        A patched model that gets this plan raises where the layout's `position_ids` are missing but
        needed, and where `labels=` would go by other predecessors than the layout's.

        Raises:
            TypeError: something that is not a Layout.
            ValueError: a layout without tokens.

        >>> from mem1_kernels import Segment, Trajectory
        >>> BlockPlan.of(Trajectory([Segment("prompt", 300)]))
        BlockPlan(1 x 300 tokens, cpu)
        """
        if not isinstance(layout, Layout):
            raise TypeError(f"layout: expected a Layout, got {type(layout).__name__}")
        expiry, floor = layout.expiry, layout.floor
        parts: dict[str, Any] = {}
        if layout.prompt_stop is not None and layout.kept_position_ids is not None:
            stop = layout.prompt_stop
            index = torch.arange(layout.num_tokens, device=expiry.device)
            in_prompt = index < stop
            length = layout.position_ids[(stop - 1).clamp(min=0)] + 1
            begin = torch.where(stop > 0, stop - length, 0)
            parts = {
                "prompt": BlockPlan.from_expiry(
                    torch.where(in_prompt, expiry.long(), index),
                    torch.where(in_prompt, stop, begin),  # the prompt's own queries see nothing
                ),
                "shift": (layout.kept_position_ids - layout.position_ids)[None],
            }
            expiry = torch.where(in_prompt, stop, expiry.long())
        plan = BlockPlan.from_expiry(expiry, floor)
        return replace(
            plan,
            **parts,
            predecessor=layout.predecessor[None],
            needs_position_ids=not layout.positions_are_consecutive,
        )

    @staticmethod
    def from_expiry(expiry: Tensor, floor: Tensor | None = None) -> BlockPlan:
        """Plans a mask, on the device of `expiry`, without a host sync. It keeps copies of both.

        Use `of` for a layout: it cannot lose the floor.

        Args:
            expiry: int32 or int64 `[tokens]`, or `[batch, tokens]` for rows of different layouts.
            floor: the same shape, or None.

        Raises:
            TypeError, ValueError: another dtype, rank or shape; no tokens; the expiry of a Layout
                that has a floor, without the floor.

        >>> plan = BlockPlan.from_expiry(torch.full((300,), 300))
        >>> order, offsets, partial, tiles = plan.rows
        >>> offsets.tolist(), partial.tolist()
        ([[0, 1, 3, 6]], [[1, 1, 3]])
        """
        check_expiry(expiry, floor)
        if floor is None and getattr(expiry, "needs_floor", False):
            raise ValueError(
                "floor: expected the floor of the layout that this expiry belongs to, got None "
                "(BlockPlan.of(layout) takes both)"
            )
        if expiry.shape[-1] == 0:
            raise ValueError("expiry: expected at least one token, got none")
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # A plan serves training, wherever it is made.
            with torch.inference_mode(False):
                return BlockPlan.from_expiry(expiry, floor)
        expiry = saturated(torch.atleast_2d(expiry))
        if floor is not None:
            floor = saturated(torch.atleast_2d(floor))
        return BlockPlan(expiry, floor, torch.ops.mem1.block_plan(expiry, floor))

    @property
    def tokens(self) -> int:
        """Tokens in a batch row."""
        return self.expiry.shape[1]

    @property
    def rows(self) -> list[Tensor]:
        """What the forward reads: row_order, row_offsets, row_partial, row_tiles."""
        return self._views()[:4]

    @property
    def columns(self) -> list[Tensor]:
        """What dK and dV read: the lists by key tile, the work items and the split columns."""
        return self._views()[4:]

    def _views(self) -> list[Tensor]:
        layouts, tokens = self.expiry.shape
        views, start = [], 0
        for width in list_widths(tokens):
            views.append(self.lists.as_strided((layouts, width), (width, 1), start))
            start += aligned(layouts * width)
        return views

    def named(self) -> dict[str, Tensor]:
        """Every list by its name above."""
        return dict(zip(NAMES, self._views(), strict=True))

    def to(self, device: torch.device | str) -> BlockPlan:
        """This plan on another device."""
        on_its_way = torch.device(device).type == "cuda"  # to the CPU it would be read unfinished
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=on_its_way)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        if self.prompt is not None:
            moved["prompt"] = self.prompt.to(device)
        return replace(self, **moved)


NAMES = (
    *("row_order", "row_offsets", "row_partial", "row_tiles"),
    *("col_order", "col_offsets", "col_partial", "col_tiles"),
    *("item_column", "item_begin", "item_end", "item_slot", "col_first_slot", "col_slots"),
)


def aligned(count: int) -> int:
    """Room for `count` entries: a list starts at 16 bytes, which Triton compiles its loads for."""
    return (count + 3) // 4 * 4


def list_widths(tokens: int) -> list[int]:
    """Entries a layout of each list, in the order of NAMES."""
    n = (tokens + BLOCK - 1) // BLOCK
    lists = [n, n + 1, n, n * (n + 1) // 2]
    return [*lists, *lists, 2 * n, 2 * n, 2 * n, 2 * n, n, n]


def build_lists(expiry: Tensor, floor: Tensor | None) -> Tensor:
    """`mem1::block_plan` in plain torch: all lists of a BlockPlan behind each other, int32.

    Works on `[P, n, n]` tile pairs, never on token pairs; no value is read on the host. The
    compiled op, csrc/cpu/block_plan.cpp, gives the same numbers.
    """
    full, any_visible = _classify(expiry, floor)
    rows = _lists(full, any_visible)
    columns = _lists(full.mT.contiguous(), any_visible.mT.contiguous())
    parts = [part.flatten() for part in (*rows, *columns, *_work_items(*columns))]
    padded = [torch.nn.functional.pad(x, (0, aligned(len(x)) - len(x))) for x in parts]
    return torch.cat(padded)


def _classify(expiry: Tensor, floor: Tensor | None) -> tuple[Tensor, Tensor]:
    """bool `[P, query tiles, key tiles]` each: every pair visible; perhaps some pair visible."""
    layouts, tokens = expiry.shape
    n = (tokens + BLOCK - 1) // BLOCK
    token = torch.arange(n * BLOCK, dtype=torch.int32, device=expiry.device)

    def tiled(values: Tensor, tail: int) -> Tensor:
        padded = torch.nn.functional.pad(values, (0, n * BLOCK - tokens), value=tail)
        return padded.view(layouts, n, BLOCK)

    ends = tiled(expiry, 0)
    alive = ends > token.view(n, BLOCK)
    last_end = torch.where(alive, ends, 0).amax(2)[:, None, :]
    first_end = ends.amin(2)[:, None, :]
    tile = torch.arange(n, dtype=torch.int32, device=expiry.device)
    query, key = tile[:, None], tile[None, :]
    any_visible = (key <= query) & (last_end > query * BLOCK)
    whole = (query + 1) * BLOCK <= tokens
    full = (key < query) & (first_end >= (query + 1) * BLOCK) & whole
    if floor is not None:
        lowest = tiled(floor, tokens).amin(2)[:, :, None]
        highest = tiled(floor, 0).amax(2)[:, :, None]
        any_visible = any_visible & (lowest < (key + 1) * BLOCK)
        full = full & (highest <= key * BLOCK)
    return full, any_visible


def _lists(full: Tensor, any_visible: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(order, offsets, partial, tiles) of the lists along the last axis."""
    layouts, n, _ = full.shape
    partial_rank = (any_visible & ~full).cumsum(2, dtype=torch.int32)
    full_rank = full.cumsum(2, dtype=torch.int32)
    partial_count, full_count = partial_rank[:, :, -1], full_rank[:, :, -1]
    offsets = torch.nn.functional.pad((partial_count + full_count).cumsum(1), (1, 0))
    rank = torch.where(full, partial_count[:, :, None] + full_rank, partial_rank) - 1
    # Entries of no list go to one spare place behind the buffer, which is cut off.
    capacity = n * (n + 1) // 2
    place = torch.where(any_visible, offsets[:, :-1, None] + rank, capacity).reshape(layouts, n * n)
    tile = torch.arange(n, dtype=torch.int32, device=full.device).expand(layouts, n, n)
    tiles = torch.zeros(layouts, capacity + 1, dtype=torch.int32, device=full.device)
    tiles.scatter_(1, place, tile.reshape(layouts, n * n))
    # A partial tile costs about a third more than a full one.
    order = (4 * partial_count + 3 * full_count).argsort(dim=1, descending=True, stable=True)
    return order.int(), offsets.int(), partial_count.int(), tiles[:, :capacity].contiguous()


def _work_items(
    order: Tensor, offsets: Tensor, partial: Tensor, tiles: Tensor
) -> tuple[Tensor, ...]:
    """(item_column, item_begin, item_end, item_slot, col_first_slot, col_slots)."""
    layouts, n = order.shape
    lengths = offsets.diff(dim=1)
    # Twice the mean length bounds the chunks of split columns by n, and all items by 2n.
    chunk = ((2 * offsets[:, -1:] + n - 1) // n).clamp(min=MIN_CHUNK)
    chunks = torch.where(lengths > chunk, (lengths + chunk - 1) // chunk, 1)
    slots = torch.where(chunks > 1, chunks, 0)
    first_slot = torch.where(chunks > 1, slots.cumsum(1) - slots, -1)

    item = torch.arange(2 * n, device=order.device).expand(layouts, 2 * n).contiguous()
    ends = chunks.cumsum(1)
    column = torch.searchsorted(ends, item, right=True)
    used = column < n
    column = column.clamp(max=n - 1)
    part = item - (ends - chunks).gather(1, column)
    step = (lengths + chunks - 1) // chunks
    start, stop = offsets[:, :-1].gather(1, column), offsets[:, 1:].gather(1, column)
    begin = start + part * step.gather(1, column)
    end = torch.minimum(begin + step.gather(1, column), stop)
    begin = torch.minimum(begin, end)
    slot = torch.where(slots.gather(1, column) > 0, first_slot.gather(1, column) + part, -1)

    work = torch.where(used, end - begin, -1)
    heavy_first = work.argsort(dim=1, descending=True, stable=True)
    fields = (
        torch.where(used, column, -1),
        torch.where(used, begin, 0),
        torch.where(used, end, 0),
        torch.where(used, slot, -1),
    )
    sorted_fields = (values.gather(1, heavy_first).int() for values in fields)
    return *sorted_fields, first_slot.int(), slots.int()
