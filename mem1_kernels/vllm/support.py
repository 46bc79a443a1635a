"""What the plug-in was tested with. Everything else is refused by name when the engine starts."""

from __future__ import annotations

import os
import sys
from typing import Any

TESTED = ("0.32.0",)
"""The versions of vLLM that the suite (`make test-vllm`) ran with."""

UNTESTED = "MEM1_VLLM_UNTESTED"
"""Environment variable: `1` lets start what is written, but was never run."""


class Unsupported(RuntimeError):
    """This vLLM, or this way to run it, cannot drop tokens exactly; the message says what."""


def check_version(version: str) -> None:
    """Raises Unsupported for a vLLM that the suite has not run with.

    >>> check_version("0.32.0")
    """
    if version.split("+")[0] not in TESTED:
        raise Unsupported(
            f"vLLM {version}: the plug-in was tested with {', '.join(TESTED)}; its scheduler and "
            "workers are no public interface, so another version may differ where it matters"
        )


def check_engine(config: Any, kv_cache_config: Any) -> None:
    """Raises Unsupported unless every token's KV lies in one kind of page, at one position.

    Args:
        config: the VllmConfig.
        kv_cache_config: the KVCacheConfig that the engine starts with.
    """
    refuse(_problems(config, kv_cache_config))
    untested = _untested(config)
    if untested and os.environ.get(UNTESTED) != "1":
        raise Unsupported(
            f"{'; '.join(untested)}: written, but never run. {UNTESTED}=1 starts it all the same: "
            "compare its log-probs with score() first"
        )


def refuse(problems: list[str]) -> None:
    """Raises Unsupported if there are problems."""
    if problems:
        raise Unsupported("the engine cannot drop tokens with " + "; ".join(problems))


def _problems(config: Any, kv_cache_config: Any) -> list[str]:
    """What cannot be honoured."""
    model, parallel = config.model_config, config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    spec = groups[0].kv_cache_spec if groups else None
    cache_dtype = config.cache_config.cache_dtype
    checks = [
        (len(groups) != 1, f"{len(groups)} attention groups ({', '.join(kinds)})"),
        (kinds[:1] != ["FullAttentionSpec"], f"the cache {kinds[:1]}, expected FullAttentionSpec"),
        (getattr(spec, "sliding_window", None) is not None, "sliding windows"),
        (getattr(spec, "attention_chunk_size", None) is not None, "chunked attention"),
        (
            cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
            f"the KV cache {cache_dtype}",
        ),
        (config.kv_transfer_config is not None, "a KV connector"),
        (config.ec_transfer_config is not None, "an encoder-cache connector"),
        (_publishes(config), "KV cache events"),
        (config.speculative_config is not None, "speculative decoding"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism"),
        (parallel.data_parallel_size > 1, "data parallelism in one engine"),
        (model.uses_mrope, "M-RoPE"),
        (bool(getattr(model, "uses_xdrope_dim", 0)), "XD-RoPE"),
        (model.is_encoder_decoder, "an encoder-decoder model"),
        (model.is_multimodal_model, "a multimodal model"),
        (model.runner_type != "generate", f"the runner {model.runner_type!r}"),
        (model.enable_prompt_embeds, "prompt embeddings"),
        (config.lora_config is not None, "LoRA adapters"),
    ]
    return [said for found, said in checks if found]


def _publishes(config: Any) -> bool:
    events = config.kv_events_config
    return events is not None and events.enable_kv_cache_events


def _untested(config: Any) -> list[str]:
    """What is written, but could not be run."""
    device = config.device_config.device_type
    checks = [
        (device != "cpu", f"vLLM on {device}"),
        (config.use_v2_model_runner, "Model Runner V2"),
        (bool(config.scheduler_config.async_scheduling), "asynchronous scheduling"),
        (config.parallel_config.tensor_parallel_size > 1, "tensor parallelism"),
    ]
    return [said for found, said in checks if found]


def rope_rows(config: Any) -> int:
    """The positions that the model's tables hold: a position must be below.

    vLLM reads the table past its end without a word, and what it finds there is no rotation.
    """
    rows = getattr(config.model_config.hf_text_config, "max_position_embeddings", None)
    if not isinstance(rows, int) or rows < 1:
        raise Unsupported(
            "the model's config has no max_position_embeddings, so the end of its RoPE table is "
            "not known"
        )
    return rows


def prepare() -> None:
    """What vLLM calls in each of its processes: lets its CPU start pass by llvmlite.

    At its start on a CPU, vLLM reads `vars()` of all that any module holds. llvmlite, which numba
    (and so BM25 search) loads, takes every name for a function of its library, `__dict__` too, and
    vLLM fails at what it gets; with a table entry of that name, it gets {}.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    table = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(table, dict):
        table.setdefault("__dict__", {})
