"""Does a trainer's forward pass see what the rollout saw? `python -m mem1_kernels.audit`

    audit(model, read_batch("rollouts.jsonl"))

A batch is what a rollout wrote down: token ids, which of them are trained, and the log-probs as
they were sampled. The audit computes those log-probs again as the trainer does, and counts what
differs, and why.
"""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("transformers") is None:
    raise ImportError("transformers is not installed (`pip install mem1-kernels[hf]`)")

from mem1_kernels.audit.batch import Batch, BatchRow, read_batch
from mem1_kernels.audit.findings import Findings, Gap, audit

__all__ = ["Batch", "BatchRow", "Findings", "Gap", "audit", "read_batch"]
