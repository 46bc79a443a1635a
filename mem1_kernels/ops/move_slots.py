"""Moving slots of a paged KV cache: what a scheduler on the host has decided, in all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mem1_kernels.ops import _library  # noqa: F401  (declares the op)
from mem1_kernels.ops._checks import check_plain, mark_written
from mem1_kernels.ops._memory import check_disjoint

_LAYOUT = "[pages, heads, page_size, row]"


def move_slots_(
    pages: Sequence[Tensor],
    sources: Tensor,
    destinations: Tensor,
    *,
    offsets: Tensor | None = None,
) -> None:
    """Copies slots of a paged KV cache to other slots of it, in place, in all layers at once.

    Slot `s` is slot `s % page_size` of page `s // page_size`. What slot `sources[i]` holds goes to
    slot `destinations[i]`, byte for byte. No slot is written twice and none that is read is
    written, so the moves have no order. `prune_paged_kv_` finds the moves itself; this op is for an
    engine whose scheduler knows them, such as vLLM's.

    Some CPU caches pack a page: the elements of a slot do not lie side by side. `offsets` then says
    where they lie.

    Args:
        pages: one tensor per layer, `[pages, heads, page_size, row]`, of any dtype of 1, 2, 4 or 8
            bytes. All have the same pages and page_size; the last dimension must be contiguous.
            Keys and values may be one tensor (`row` is then 2 * head_dim), or two of the list.
            Changed in place.
        sources, destinations: int64 `[moves]`, slots, on the device of `pages`.
        offsets: int32 `[page_size, row]`, CPU only: where, among the `page_size * row` elements of
            a page's head, which must be in one piece, each of a slot's elements lies.

    Raises:
        TypeError: a dtype that is not as above.
        ValueError: shapes, devices or strides that do not fit, tensors that overlap in memory,
            `offsets` that are not each of `0 .. page_size * row - 1` once, and, on the CPU, a slot
            that does not exist, is written twice, or is both read and written. Nothing is written
            then.

    >>> pages = torch.arange(6.0).reshape(3, 1, 2, 1)  # 3 pages of 2 slots
    >>> move_slots_([pages], torch.tensor([4, 5]), torch.tensor([1, 2]))
    >>> pages.flatten()
    tensor([0., 4., 5., 3., 4., 5.])
    """
    layers = list(pages)
    _check_layers(layers, offsets is not None)
    page_count, _, page_size, row = layers[0].shape
    for name, x in (("sources", sources), ("destinations", destinations)):
        _check_list(name, x, layers[0])
    if sources.shape != destinations.shape:
        raise ValueError(
            f"destinations: expected {len(sources)} slots like sources, got {len(destinations)}"
        )
    if offsets is not None:
        _check_offsets(offsets, page_size, row, layers[0])
    read = {"sources": sources, "destinations": destinations}
    if not torch.compiler.is_compiling():
        check_disjoint({f"pages[{i}]": x for i, x in enumerate(layers)}, read)
    if sources.device.type == "cpu":
        _check_moves(sources, destinations, page_count * page_size)
    torch.ops.mem1.move_slots_(layers, sources, destinations, offsets)
    mark_written(*layers)


def _check_layers(layers: list[Tensor], packed: bool) -> None:
    if not layers:
        raise ValueError("pages: expected at least one layer, got none")
    for i, x in enumerate(layers):
        name = f"pages[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        check_plain(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected {_LAYOUT}, got {list(x.shape)}")
        like = layers[0]
        expected = [like.shape[0], x.shape[1], like.shape[2], x.shape[3]]
        if packed:
            expected[3] = like.shape[3]
        if list(x.shape) != expected or x.device != like.device:
            raise ValueError(
                f"{name}: expected {expected} {_LAYOUT} on {like.device}, got {list(x.shape)} on "
                f"{x.device}"
            )
        if x.element_size() not in (1, 2, 4, 8):
            raise TypeError(f"{name}: expected a dtype of 1, 2, 4 or 8 bytes, got {x.dtype}")
        dense = x.shape[3] <= 1 or x.stride(3) == 1
        whole = not packed or x.shape[2] <= 1 or x.stride(2) == x.shape[3]
        if not dense or not whole:
            piece = "a page's head in one piece" if packed else "a contiguous last dimension"
            raise ValueError(f"{name}: expected {piece}, got strides {list(x.stride())}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name}: requires gradients, and moving slots is not differentiable")


def _check_list(name: str, x: Tensor, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {x.dtype}")
    if x.dim() != 1 or not x.is_contiguous() or x.device != like.device:
        raise ValueError(
            f"{name}: expected contiguous [moves] on {like.device}, got {list(x.shape)} on "
            f"{x.device}"
        )


def _check_offsets(offsets: Tensor, page_size: int, row: int, like: Tensor) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: expected a tensor or None, got {type(offsets).__name__}")
    if like.device.type != "cpu":
        raise ValueError(f"offsets: expected None on {like.device}: only CPU caches are packed")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets: expected int32, got {offsets.dtype}")
    if list(offsets.shape) != [page_size, row] or not offsets.is_contiguous():
        raise ValueError(
            f"offsets: expected contiguous [{page_size}, {row}] [page_size, row], got "
            f"{list(offsets.shape)}"
        )
    if not torch.equal(offsets.flatten().sort().values, torch.arange(page_size * row).int()):
        raise ValueError(f"offsets: expected each of 0 to {page_size * row - 1} once")


def _check_moves(sources: Tensor, destinations: Tensor, slots: int) -> None:
    for name, x in (("sources", sources), ("destinations", destinations)):
        if len(x) and not 0 <= int(x.min()) <= int(x.max()) < slots:
            raise ValueError(
                f"{name}: expected slots 0 to {slots - 1}, got {int(x.min())} to {int(x.max())}"
            )
    if len(destinations.unique()) != len(destinations):
        raise ValueError("destinations: expected every slot once, got one again")
    both = sources[torch.isin(sources, destinations)]
    if len(both):
        raise ValueError(f"destinations: expected no slot of sources, got {int(both[0])}")
