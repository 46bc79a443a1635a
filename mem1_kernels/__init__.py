"""Exact, fast training and rollout of constant-memory (MEM1) agents."""

from __future__ import annotations

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.context_editing import (
    clear_tool_results,
    memento,
    strip_reasoning,
    sub_agents,
)
from mem1_kernels.mask import visible
from mem1_kernels.ops.attention import trajectory_attention
from mem1_kernels.ops.kv_cache import (
    Rope,
    append_kv_,
    cached_attention,
    move_slots_,
    prune_kv_,
    prune_paged_kv_,
)
from mem1_kernels.retention import (
    Retention,
    Segment,
    fold,
    keep_all,
    keep_last,
    mem1,
    mem1_release,
)
from mem1_kernels.trajectory import Layout, Trajectory, compacted, pack
from mem1_kernels.tree import TokenRow, TreeLayout, pack_tree, unroll

__version__ = "0.2.0"

__all__ = [
    "BlockPlan",
    "Layout",
    "Retention",
    "Rope",
    "Segment",
    "TokenRow",
    "Trajectory",
    "TreeLayout",
    "append_kv_",
    "cached_attention",
    "clear_tool_results",
    "compacted",
    "fold",
    "keep_all",
    "keep_last",
    "mem1",
    "mem1_release",
    "memento",
    "move_slots_",
    "pack",
    "pack_tree",
    "prune_kv_",
    "prune_paged_kv_",
    "strip_reasoning",
    "sub_agents",
    "trajectory_attention",
    "unroll",
    "visible",
]
