"""Transformers models under trajectory masks, and a KV cache for them that is pruned in place.

    plan = BlockPlan.of(layout)
    with patched(model):
        logits = model(input_ids, position_ids=layout.position_ids[None], plan=plan).logits

The plan reaches every layer through transformers' own attention interface. Without a plan a
patched model computes what it computed before, including padding, packed documents, sliding
windows and `generate()`. With a `TrajectoryCache` as its past_key_values it decodes ragged rows.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError("transformers is not installed (`pip install mem1-kernels[hf]`)")

from mem1_kernels.hf.cache import TrajectoryCache
from mem1_kernels.hf.collator import TrajectoryCollator
from mem1_kernels.hf.patch import NAME, is_patched, patch, patched, rope_of, unpatch

__all__ = [
    "NAME",
    "TrajectoryCache",
    "TrajectoryCollator",
    "is_patched",
    "patch",
    "patched",
    "rope_of",
    "unpatch",
]
