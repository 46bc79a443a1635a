"""Pruning a KV cache in place, and attention over it, against plain torch.

`kernels benchmark <folder or repository>` runs it. Nine tokens in ten leave the cache, as at a
state boundary late in an episode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class KVCache(Benchmark):
    seed = 0

    def setup(self) -> None:
        on_gpu = self.device != "cpu"
        self.layers, self.batch, kv_heads, head_dim = (32, 8, 8, 128) if on_gpu else (2, 2, 2, 64)
        self.capacity, self.used = (8192, 8000) if on_gpu else (512, 500)
        dtype = torch.bfloat16 if on_gpu else torch.float32
        shape = (self.batch, kv_heads, self.capacity, head_dim)
        caches = [
            [torch.randn(shape, device=self.device, dtype=dtype) for _ in range(self.layers)]
            for _ in range(2)
        ]
        self.keys, self.values = caches
        self.full = torch.full((self.batch,), self.used, dtype=torch.int32, device=self.device)
        self.lengths = self.full.clone()
        self.keep = torch.rand(self.batch, self.capacity, device=self.device) < 0.1
        self.survivors = self._survivors(self.keep[0, : self.used])
        self.before = self.keys[0][0].clone()
        query = torch.randn(self.batch, 1, 4 * kv_heads, head_dim, device=self.device)
        self.query = query.to(dtype)

    @staticmethod
    def _survivors(keep: torch.Tensor) -> torch.Tensor:
        """The slot from which each slot is filled: survivors past the new length fill the holes."""
        length = int(keep.sum())
        source = torch.arange(length, device=keep.device)
        source[~keep[:length]] = keep[length:].nonzero()[:, 0] + length
        return source

    def benchmark_prune(self) -> None:
        """All layers. Later calls move the same slots, of whatever the last one left in them."""
        self.lengths.copy_(self.full)
        self.kernel.prune_kv_(self.keys, self.values, self.lengths, self.keep)
        self.out = self.keys[0][0, :, : len(self.survivors)]

    def verify_prune(self) -> torch.Tensor:
        """Row 0 of layer 0; the time is that of gathering the survivors of all rows and layers."""
        for cache in (*self.keys, *self.values):
            for row in range(self.batch):
                cache[row][:, self.keep[row]]
        return self.before[:, self.survivors]

    def benchmark_decode(self) -> None:
        self.out = self.kernel.cached_attention(self.query, self.keys[0], self.values[0], self.full)

    def verify_decode(self) -> torch.Tensor:
        keys, values = (x[0][:, :, : self.used] for x in (self.keys, self.values))
        out = F.scaled_dot_product_attention(
            self.query.transpose(1, 2), keys, values, enable_gqa=True
        )
        return out.transpose(1, 2)
