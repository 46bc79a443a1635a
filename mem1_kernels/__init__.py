"""Exact, fast training and rollout of constant-memory (MEM1) agents."""

from __future__ import annotations

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.mask import visible
from mem1_kernels.ops.attention import trajectory_attention
from mem1_kernels.trajectory import (
    Layout,
    Retention,
    Segment,
    Trajectory,
    fold,
    keep_all,
    keep_last,
    mem1,
    mem1_release,
    pack,
    unroll,
)

__version__ = "0.1.0"

__all__ = [
    "BlockPlan",
    "Layout",
    "Retention",
    "Segment",
    "Trajectory",
    "fold",
    "keep_all",
    "keep_last",
    "mem1",
    "mem1_release",
    "pack",
    "trajectory_attention",
    "unroll",
    "visible",
]
