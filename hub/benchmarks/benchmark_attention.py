"""trajectory_attention in the released QA shape, against SDPA with the dense mask.

`kernels benchmark <folder or repository>` runs it. The mask is built outside the timed region.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class TrajectoryAttention(Benchmark):
    seed = 0

    def setup(self) -> None:
        """A prompt of 300 tokens, then turns of 56 tokens written and 500 read."""
        kernel, on_gpu = self.kernel, self.device != "cpu"
        turns, heads, kv_heads, head_dim = (14, 32, 8, 128) if on_gpu else (2, 4, 2, 64)
        dtype = torch.bfloat16 if on_gpu else torch.float32
        segments = [kernel.Segment("prompt", 300)]
        for turn in range(1, turns + 1):
            segments += [
                kernel.Segment("state", 40, turn),
                kernel.Segment("action", 16, turn),
                kernel.Segment("info", 500, turn),
            ]
        trajectory = kernel.Trajectory(segments).to(self.device)
        self.plan = kernel.BlockPlan.of(trajectory)
        self.mask = kernel.visible(trajectory.expiry, trajectory.floor)
        self.query, self.key, self.value, self.gradient = (
            torch.randn(1, trajectory.num_tokens, count, head_dim, device=self.device, dtype=dtype)
            for count in (heads, kv_heads, kv_heads, heads)
        )
        self.query.requires_grad_()

    def benchmark_forward(self) -> None:
        with torch.no_grad():
            self.out = self._attention()

    def verify_forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self._dense()

    def benchmark_forward_backward(self) -> None:
        (self.out,) = torch.autograd.grad(self._attention(), self.query, self.gradient)

    def verify_forward_backward(self) -> torch.Tensor:
        return torch.autograd.grad(self._dense(), self.query, self.gradient)[0]

    def _attention(self) -> torch.Tensor:
        return self.kernel.trajectory_attention(self.query, self.key, self.value, plan=self.plan)

    def _dense(self) -> torch.Tensor:
        heads_first = (x.transpose(1, 2) for x in (self.query, self.key, self.value))
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=self.mask, enable_gqa=True)
        return out.transpose(1, 2)
