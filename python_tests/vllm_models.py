"""What the vLLM tests share: tiny models on disk, engines, and the comparison with `score()`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers

from mem1_kernels.rollout import Generation, collate, score
from mem1_kernels.vllm import VLLMEngine

# vLLM's own way to pin threads takes cores away from the rest of the suite.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

VOCABULARY = 128
FP32 = 1e-4
"""The largest difference of vLLM's log-prob and score() in float32: sums of another order."""


def save_model(folder: Path, tokenizer: Any = None, **changes: Any) -> str:
    """A random Llama, whose logits are far apart, in a folder."""
    torch.manual_seed(1)
    config: dict[str, Any] = {
        "vocab_size": VOCABULARY if tokenizer is None else len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes)).save_pretrained(
        folder
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def load(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def options(**changes: Any) -> dict[str, Any]:
    """Of `vllm.LLM`, for such a model."""
    chosen = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 * 2**20,
        "skip_tokenizer_init": True,
        "async_scheduling": False,
        "seed": 0,
    }
    return chosen | changes


_OPEN: list[Any] = []


def open_engine(folder: str, **changes: Any) -> VLLMEngine:
    """An engine that lives on: one that is collected ends the process group of all others."""
    _OPEN.append(VLLMEngine(folder, **options(**changes)))
    return _OPEN[-1]


def scheduler_of(engine: Any) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(engine: Any) -> int:
    return scheduler_of(engine).kv_cache_manager.block_pool.get_num_free_blocks()


def held_blocks(engine: Any) -> list[int]:
    """Of each request that vLLM holds, the blocks."""
    manager = scheduler_of(engine).kv_cache_manager.coordinator.single_type_managers[0]
    return [len(blocks) for blocks in manager.req_to_blocks.values() if blocks]


def differences(model: Any, rollouts: list[Any], temperature: float = 1.0) -> torch.Tensor:
    """|sampled - score()| of every generated token."""
    layout, sampled = collate(rollouts)
    with torch.no_grad():
        scored = score(model, layout, temperature=temperature)
    return (scored - sampled).abs()[layout.loss_mask]


def world(last_turns: list[int], most: int = 17) -> Callable[[Any], list[list[int] | None]]:
    """Observations of 0 to `most` tokens; row r ends after its own last turn."""

    def respond(turns: Any) -> list[list[int] | None]:
        return [
            None
            if turn.number >= last_turns[turn.row]
            else [(50 + turn.number + turn.row) % 100 + 20] * (turn.number * 5 % (most + 1))
            for turn in turns
        ]

    return respond


@contextlib.contextmanager
def running(folder: str, *options: str, **variables: str) -> Iterator[str]:
    """The address of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mem1_kernels.vllm.serve", folder, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
        "--block-size", "32", "--kv-cache-memory-bytes", str(64 * 2**20), *options,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    variables = {**os.environ, **variables, "MEM1_LOAD_PORT": str(port)}
    server = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/v1/mem1").status_code == 200:
                    break
            time.sleep(0.5)
        yield url
        assert server.poll() is None  # it lives
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


PROMPTS = [[(7 * i + r) % 100 + 20 for i in range(50 + 3 * r)] for r in range(4)]
LAST_TURNS = [8, 1, 5, 10]
GENERATION = Generation(
    max_turns=20,
    max_new_tokens=19,
    stop_ids=(3, 44, 5, 6),
    state_tokens=lambda ids: len(ids) // 2,
    seed=4,
)
