"""KV caches as the world lays them out in memory, filled with every bit pattern; for tests."""

from __future__ import annotations

import torch
from torch import Tensor

SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
]
STORAGES = ["head major", "slot major", "keys and values joined", "cut from a larger one"]


def as_bytes(x: Tensor) -> Tensor:
    return x.view(SAME_SIZE.get(x.element_size(), x.dtype))


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    flat = torch.randint(0, 256, (*shape, size), generator=generator).to(torch.uint8)
    return flat.view(dtype)[..., 0]


def make_layer(
    storage: str, batch: int, heads: int, capacity: int, dim: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor]:
    """Keys and values `[batch, heads, capacity, dim]` over memory laid out as `storage` says."""
    if storage == "head major":
        shape = (batch, heads, capacity, dim)
        return random_bytes(shape, dtype, seed), random_bytes(shape, dtype, seed + 1)
    if storage == "slot major":
        shape = (batch, capacity, heads, dim)
        both = random_bytes(shape, dtype, seed), random_bytes(shape, dtype, seed + 1)
        return both[0].transpose(1, 2), both[1].transpose(1, 2)
    if storage == "keys and values joined":
        both = random_bytes((batch, 2, heads, capacity, dim), dtype, seed)
        return both[:, 0], both[:, 1]
    both = random_bytes((batch, capacity + 1, heads, 2 * dim + 3), dtype, seed).transpose(1, 2)
    return both[:, :, 1:, 1 : dim + 1], both[:, :, 1:, dim + 2 : 2 * dim + 2]


def assert_same_bytes(got: Tensor, expected: Tensor, name: str) -> None:
    assert torch.equal(as_bytes(got), as_bytes(expected)), f"{name} differ"


def random_rows(batch: int, capacity: int, seed: int, keep_share: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, capacity + 1, (batch,), generator=generator, dtype=torch.int32)
    return lengths, torch.rand(batch, capacity, generator=generator) < keep_share


def make_pages(
    kind: str, pages: int, page_size: int, heads: int, dim: int, dtype: torch.dtype, seed: int
) -> tuple[str, Tensor, Tensor]:
    """A layer's layout, keys and values, as vLLM and FlashInfer hold them."""
    if kind == "NHD apart":
        shape = (pages, page_size, heads, dim)
        return "NHD", random_bytes(shape, dtype, seed), random_bytes(shape, dtype, seed + 1)
    if kind == "HND apart":
        shape = (pages, heads, page_size, dim)
        return "HND", random_bytes(shape, dtype, seed), random_bytes(shape, dtype, seed + 1)
    if kind == "NHD joined in the page":
        both = random_bytes((pages, 2, page_size, heads, dim), dtype, seed)
        return "NHD", both[:, 0], both[:, 1]
    if kind == "HND joined in the page":
        both = random_bytes((pages, 2, heads, page_size, dim), dtype, seed)
        return "HND", both[:, 0], both[:, 1]
    both = random_bytes((2, pages, page_size, heads, dim), dtype, seed)
    return "NHD", both[0], both[1]


PAGED_KINDS = [
    "NHD apart",
    "HND apart",
    "NHD joined in the page",
    "HND joined in the page",
    "NHD joined outside",
]


def paged_rows(
    batch: int, max_pages: int, page_size: int, seed: int, keep_share: float, runs: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """block_table, lengths, keep and the number of pages; ids past the lengths are absurd."""
    generator = torch.Generator().manual_seed(seed)
    tokens = max_pages * page_size
    lengths = torch.randint(0, tokens + 1, (batch,), generator=generator, dtype=torch.int32)
    pages = batch * max_pages + 3
    order = torch.randperm(pages, generator=generator).to(torch.int32)
    table = order[: batch * max_pages].reshape(batch, max_pages).clone()
    used = (lengths + page_size - 1) // page_size
    table[torch.arange(max_pages) >= used[:, None]] = 2**30
    keep = torch.rand(batch, tokens, generator=generator) < keep_share
    if runs:  # one middle run dropped
        first = torch.randint(0, tokens + 1, (batch, 1), generator=generator)
        last = first + torch.randint(0, tokens + 1, (batch, 1), generator=generator)
        token = torch.arange(tokens)
        keep = (token < first) | (token >= last)
    return table, lengths, keep, pages
