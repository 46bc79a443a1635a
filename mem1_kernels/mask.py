"""The mask, as one integer per key.

`expiry[k]` is the first packed position whose query no longer sees key `k`, and the optional
`floor[i]` is the first key that query `i` may see:

    visible(i, k)  ==  floor[i] <= k <= i < expiry[k]
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_expiry(expiry: Tensor, floor: Tensor | None) -> None:
    """Raises ValueError or TypeError unless expiry (and floor) are `[tokens]` or `[batch, tokens]`
    integer tensors of one shape and device."""
    for name, value in (("expiry", expiry), ("floor", floor)):
        if value is None and name == "floor":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected int32 or int64, got {value.dtype}")
        if value.dim() not in (1, 2):
            got = list(value.shape)
            raise ValueError(f"{name}: expected [tokens] or [batch, tokens], got {got}")
    if floor is not None and floor.shape != expiry.shape:
        want, got = list(expiry.shape), list(floor.shape)
        raise ValueError(f"floor: expected the shape of expiry {want}, got {got}")
    if floor is not None and floor.device != expiry.device:
        raise ValueError(f"floor: expected on {expiry.device} like expiry, got {floor.device}")


def saturated(values: Tensor) -> Tensor:
    """A copy in int32, contiguous, in which what is too large or too small for it is its extreme.

    >>> saturated(torch.tensor([3, 2**40])).tolist()
    [3, 2147483647]
    """
    limits = torch.iinfo(torch.int32)
    if values.dtype != torch.int32:
        values = values.clamp(limits.min, limits.max)
    return values.to(torch.int32, copy=True).contiguous()


def visible(expiry: Tensor, floor: Tensor | None = None) -> Tensor:
    """The mask itself, dense: for small layouts, tests and pictures.

    Args:
        expiry: int32 or int64 `[tokens]` or `[batch, tokens]`.
        floor: the same shape, or None.

    Returns:
        bool `[tokens, tokens]` (with a batch, `[batch, tokens, tokens]`), True where the query of
        that row sees the key of that column.

    Raises:
        TypeError, ValueError: another dtype or rank, or a floor that does not fit the expiry.

    >>> visible(torch.tensor([3, 2, 3])).int().tolist()
    [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    check_expiry(expiry, floor)
    index = torch.arange(expiry.shape[-1], device=expiry.device)
    query, key = index[:, None], index[None, :]
    mask = (key <= query) & (query < expiry[..., None, :])
    return mask if floor is None else mask & (floor[..., :, None] <= key)


def windowed(
    expiry: Tensor, floor: Tensor | None, position_ids: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Adds a sliding window over positions: a query sees a key only while
    `position[query] - position[key] < window`.

    The window becomes a floor: behind the newest key alive at the query that lies outside it. So
    it holds for trees and packed documents too, whose positions differ from their indices, as long
    as the keys that a query sees have rising positions. O(tokens log tokens), without a host sync.

    Args:
        expiry: int32 or int64 `[tokens]` or `[batch, tokens]`.
        floor: the same shape, or None.
        position_ids: integer `[tokens]` or `[batch, tokens]`; 1 row serves any number of rows.
        window: tokens, the query's own included (Mistral's and Gemma's `sliding_window`).

    Returns:
        (expiry, floor) of the layout with the window; int32, of one shape.

    Raises:
        ValueError: shapes that do not fit, a window < 1, or (checked on the CPU; a device-side
            assertion on a GPU) a query that sees keys whose positions do not rise.
        TypeError: position_ids or a window that are not integers.

    >>> windowed(torch.tensor([5, 5, 5, 5, 5]), None, torch.arange(5), 2)[1].tolist()
    [0, 0, 1, 2, 3]
    >>> tree = torch.tensor([4, 4, 3, 4])  # two branches behind a prompt of two
    >>> windowed(tree, None, torch.tensor([0, 1, 2, 2]), 2)[1].tolist()
    [0, 0, 1, 1]
    """
    check_expiry(expiry, floor)
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: expected an int, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window: expected at least 1 token, got {window}")
    if not isinstance(position_ids, Tensor) or position_ids.dtype not in (torch.int32, torch.int64):
        kind = getattr(position_ids, "dtype", type(position_ids).__name__)
        raise TypeError(f"position_ids: expected an int32 or int64 tensor, got {kind}")
    count, rows = expiry.shape[-1], expiry.shape[0] if expiry.dim() == 2 else 1
    fits = position_ids.dim() in (1, 2) and position_ids.shape[-1] == count
    if fits and position_ids.dim() == 2 and rows > 1:
        fits = position_ids.shape[0] in (1, rows)
    if not fits:
        got = list(position_ids.shape)
        raise ValueError(f"position_ids: expected {count} tokens in 1 or {rows} rows, got {got}")
    if position_ids.device != expiry.device:
        raise ValueError(
            f"position_ids: expected on {expiry.device} like expiry, got {position_ids.device}"
        )
    shape = torch.broadcast_shapes(expiry.shape, position_ids.shape)
    expiry, position_ids = saturated(expiry).expand(shape), position_ids.long().expand(shape)
    first = torch.ops.mem1.window_floor(
        torch.atleast_2d(expiry), torch.atleast_2d(position_ids), min(window, 2**62)
    ).view(shape)
    return expiry, first if floor is None else torch.maximum(first, saturated(floor))


def window_floor(expiry: Tensor, position_ids: Tensor, window: int) -> Tensor:
    """`mem1::window_floor`: the floor of `windowed`, int32, from two `[rows, tokens]` tensors.

    Each key hangs below the newest earlier key that is alive when it comes: climbing those parents
    from a query meets every key that the query sees, newest first. The first one outside the
    window gives the floor. Both searches go in powers of two.
    """
    rows, count = expiry.shape
    node = torch.arange(count + 1, device=expiry.device).expand(rows, -1)
    query = node[:, 1:] - 1
    # Node k + 1 is key k. Node 0, below all of them, never expires and lies outside any window.
    ends = torch.nn.functional.pad(expiry, (1, 0), value=torch.iinfo(torch.int32).max)
    bottom = torch.iinfo(position_ids.dtype).min
    positions = torch.nn.functional.pad(position_ids, (1, 0), value=bottom)

    latest_end = [ends]  # of the 2 ** level nodes up to this one
    for level in range(count.bit_length() - 1):
        before = (node - 2**level).clamp(min=0)
        latest_end.append(torch.maximum(latest_end[-1], latest_end[-1].gather(1, before)))
    parent = query
    for level in reversed(range(len(latest_end))):
        all_dead = latest_end[level].gather(1, parent) <= query
        parent = torch.where(all_dead, parent - 2**level, parent)
    rises = (positions.gather(1, parent) < position_ids) | (expiry <= query)
    _check_rising(rises)

    # Positions rise, so at most window - 1 steps stay inside the window.
    climbs = [torch.nn.functional.pad(parent, (1, 0))]
    for _ in range(min(window - 1, count).bit_length() - 1):
        climbs.append(climbs[-1].gather(1, climbs[-1]))
    least = torch.iinfo(position_ids.dtype).min  # a difference below it is below all positions
    outside = position_ids.clamp(min=least + window) - window
    node = node[:, 1:]
    for climb in reversed(climbs if window > 1 else []):
        further = climb.gather(1, node)
        node = torch.where(positions.gather(1, further) > outside, further, node)
    return climbs[0].gather(1, node).int()


def _check_rising(rises: Tensor) -> None:
    message = "position_ids: expected rising positions among the keys that a query sees"
    if rises.is_cuda:
        torch._assert_async(rises.all(), message)
    elif not bool(rises.all()):
        row, token = (int(i) for i in (~rises).nonzero()[0])
        raise ValueError(f"{message}; they do not at token {token} of row {row}")


def visible_pairs(expiry: Tensor, floor: Tensor | None = None) -> int:
    """How many pairs `visible(expiry, floor)` holds, without building it.

    Memory O(tokens); with a floor, time O(tokens * runs of equal floor). Arguments and errors are
    those of `visible`.

    >>> visible_pairs(torch.tensor([3, 2, 3]))
    5
    """
    check_expiry(expiry, floor)
    if expiry.dim() == 2:
        rows = floor if floor is not None else [None] * expiry.shape[0]
        return sum(visible_pairs(e, f) for e, f in zip(expiry, rows, strict=True))
    count = expiry.numel()
    key = torch.arange(count, device=expiry.device)
    stop = expiry.long().clamp(max=count)
    if floor is None:
        return int((stop - key).clamp(min=0).sum())
    values, lengths = torch.unique_consecutive(floor, return_counts=True)
    total, begin = 0, 0
    for first, length in zip(values.clamp(min=0).tolist(), lengths.tolist(), strict=True):
        end = begin + length
        seen = stop[first:end].clamp(max=end) - key[first:end].clamp(min=begin)
        total += int(seen.clamp(min=0).sum())
        begin = end
    return total
