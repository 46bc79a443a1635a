"""Ragged KV caches with poison in what must not be read, and attention over them; for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mem1_kernels.ops.kv_cache import cached_attention
from mem1_kernels.testing import assert_within_budget

GENERATOR = partial(torch.Generator().manual_seed)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Case:
    """One call: ragged caches whose dead slots and tails hold NaN, and how it is asked."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    lengths: Tensor
    counts: Tensor | None = None
    options: dict = field(default_factory=dict)

    def run(self) -> tuple[Tensor, Tensor]:
        tensors = (self.query, self.key_cache, self.value_cache, self.lengths)
        return cached_attention(*tensors, counts=self.counts, **self.options, return_lse=True)

    def operands(self) -> tuple:
        """Arguments of `torch.ops.mem1.cached_attention` and of what serves it."""
        options = self.options
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.lengths,
            self.counts,
            options.get("position_ids"),
            options.get("window") or 0,
            options.get("scale") or self.query.shape[3] ** -0.5,
            options.get("softcap") or 0.0,
        )

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Row by row in plain torch, every step rounded to `dtype`."""
        batch, new_tokens, heads, head_dim = self.query.shape
        kv_heads = self.key_cache.shape[1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale = self.options.get("scale") or head_dim**-0.5
        softcap, window = self.options.get("softcap"), self.options.get("window")
        out = torch.zeros(batch, new_tokens, heads, head_dim, dtype=dtype)
        lse = torch.full((batch, heads, new_tokens), -torch.inf, dtype=wide)
        for row, held in enumerate(self.lengths.tolist()):
            count = new_tokens if self.counts is None else int(self.counts[row])
            if held == 0 or count == 0:
                continue
            q = self.query[row, :count].to(dtype)
            k, v = (
                cache[row, :, :held].to(dtype).repeat_interleave(heads // kv_heads, 0)
                for cache in (self.key_cache, self.value_cache)
            )
            slot = torch.arange(held)
            own = slot[held - count :, None]
            mask = slot <= own
            if window is not None:
                position = self.options["position_ids"][row, :held]
                mask &= position[own] - position < window
            scores = torch.einsum("qhd,hkd->hqk", q, k) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.to(wide).masked_fill(~mask, -torch.inf)
            lse[row, :, :count] = scores.logsumexp(2)
            p = torch.exp(scores - lse[row, :, :count, None]).to(dtype)
            out[row, :count] = torch.einsum("hqk,hkd->qhd", p, v)
        return out, lse

    def check(self, result: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Holds a result, by default of the public op, to the error budget."""
        out, lse = self.run() if result is None else result
        assert out.dtype == self.query.dtype and out.is_contiguous()
        assert lse.dtype == torch.float32
        plain, exact = self.plain(self.query.dtype), self.plain(torch.float64)
        assert_within_budget("out", out, plain[0], exact[0])
        assert_within_budget("lse", lse, plain[1], exact[1])
        return out, lse

    def check_equal_values(self) -> None:
        """The weights of what is multiplied sum to 1, so equal values come back, bit by bit."""
        one = self.value_cache[:1, :, :1].clone()
        self.value_cache[:] = one
        out, _ = self.run()
        heads = one[:, :, 0].repeat_interleave(out.shape[2] // one.shape[1], 1)
        assert torch.equal(out, heads[:, None].expand_as(out))


def make_case(
    lengths: list[int],
    new_tokens: int,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    counts: list[int] | None = None,
    capacity: int | None = None,
    seed: int = 0,
    **options,
) -> Case:
    """Random values in what is held, NaN in every other slot and in queries that are not tokens."""
    generator = GENERATOR(seed)
    batch, capacity = len(lengths), capacity or max(*lengths, 1) + 5
    query = torch.randn(batch, new_tokens, heads, head_dim, generator=generator).to(dtype)
    caches = torch.randn(2, batch, kv_heads, capacity, head_dim, generator=generator).to(dtype)
    for row, held in enumerate(lengths):
        caches[:, row, :, held:] = torch.nan
        query[row, new_tokens if counts is None else counts[row] :] = torch.nan
        if held == 0:
            query[row] = torch.nan
    if options.get("window"):
        rows = [torch.randperm(capacity, generator=generator) for _ in lengths]
        options["position_ids"] = torch.stack(rows)
    given_counts = None if counts is None else int32(*counts)
    return Case(query, caches[0], caches[1], int32(*lengths), given_counts, options)
