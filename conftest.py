"""Leaves out the modules of `mem1_kernels.vllm` that import vLLM, where there is none."""

from __future__ import annotations

import importlib.util

collect_ignore = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore += [
        f"mem1_kernels/vllm/{name}.py" for name in ("endpoint", "scheduler", "worker")
    ]
