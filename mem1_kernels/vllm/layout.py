"""How vLLM's CPU attention packs a page."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def packed_offsets(pages: Tensor, cache_config: Any) -> Tensor:
    """Where each slot's key and value lie in a page, as `move_slots_` takes it.

    vLLM's CPU attention orders the elements of a page as its instruction set likes (AMX: pairs of
    tokens or channels side by side). Its own cache writer says how: it writes the numbers of slots
    and channels into an empty page.

    Args:
        pages: a layer of the cache, `[pages, heads, page_size, 2 * head_dim]`.
        cache_config: vLLM's, for the cache's dtype.

    Returns:
        int32 `[page_size, 2 * head_dim]`.
    """
    page_size, row = pages.shape[2], pages.shape[3]
    head_dim = row // 2
    slots = torch.arange(page_size)[:, None].expand(page_size, head_dim)
    channels = torch.arange(head_dim).expand(page_size, head_dim)
    slot_at = _written(pages, slots, cache_config)
    channel_at = _written(pages, channels, cache_config)
    half = page_size * head_dim
    is_value = torch.arange(2 * half) >= half
    offsets = torch.empty(page_size, row, dtype=torch.int32)
    offsets[slot_at, channel_at + head_dim * is_value] = torch.arange(2 * half, dtype=torch.int32)
    found = offsets.flatten().sort().values
    if not torch.equal(found, torch.arange(2 * half, dtype=torch.int32)):
        raise RuntimeError(f"vLLM's CPU cache writer leaves gaps in pages of {list(pages.shape)}")
    return offsets


def _written(pages: Tensor, numbers: Tensor, cache_config: Any) -> Tensor:
    """The elements of a page, in memory order, after writing `numbers` `[page_size, head_dim]`.

    Written as digits of base 128, which every dtype holds exactly.
    """
    return 128 * _digits(pages, numbers // 128, cache_config) + _digits(
        pages, numbers % 128, cache_config
    )


def _digits(pages: Tensor, numbers: Tensor, cache_config: Any) -> Tensor:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, heads, page_size, row = pages.shape
    isa = _get_attn_isa(pages.dtype, page_size, row // 2, cache_config.cache_dtype)
    page = torch.full((1, heads, page_size, row), 127, dtype=pages.dtype)
    rows = numbers.to(pages.dtype)[:, None, :].expand(page_size, heads, row // 2).contiguous()
    key, value = page.view(1, heads, page_size * 2, -1).chunk(2, dim=2)
    slots = torch.arange(page_size)
    ops.cpu_attn_reshape_and_cache(
        rows, rows, key, value, slots, isa, 1.0, 1.0, cache_config.cache_dtype
    )
    return page[0, 0].flatten().float().long()
