"""The engine over HTTP: a server that speaks the OpenAI completions API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mem1_kernels.rollout.engine import (
    EngineError,
    Generation,
    OnTokens,
    Respond,
    Rollout,
    check_count,
    eos_ids,
)
from mem1_kernels.rollout.loop import RolloutRow, Written, open_rows, run_turns


class ServerEngine:
    """An OpenAI-compatible completions server: vLLM from 0.10.2 on, or an SGLang that knows
    `return_token_ids`.

    Every turn sends the live context as token ids, so what is dropped is never sent, and the
    server's prefix cache serves the rest. The rollouts are of the "reprefill" form. The server's
    own sampling defaults (vLLM takes top-k, top-p and a repetition penalty from the model's
    generation_config.json) are overridden, as log-probs would not be those of the model otherwise;
    at temperatures other than 0 and 1, vLLM needs `--logprobs-mode processed_logprobs` for that.

    Args:
        base_url: such as "http://127.0.0.1:8000/v1".
        model: the name that the server knows the model by.
        tokenizer: the model's tokenizer, for prompts and observations; None for token ids only.
        api_key: sent to the server. Default: the environment variable OPENAI_API_KEY.
        timeout: seconds for a connection and for each read of a reply.
        retries: further attempts after a lost connection, a time-out, or a status that may pass.
        workers: how many rows are generated at once.

    Raises:
        ImportError: openai is not installed (`pip install mem1-kernels[agent]`).
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: Any = None,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        retries: int = 3,
        workers: int = 32,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "openai is not installed (`pip install mem1-kernels[agent]`)"
            ) from error
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: expected an address like http://…/v1, got {base_url!r}")
        if not timeout > 0:
            raise ValueError(f"timeout: expected more than 0 seconds, got {timeout}")
        check_count("retries", retries, 0)
        check_count("workers", workers)
        self.base_url = base_url
        self.model = model
        self.tokenizer = tokenizer
        self.workers = workers
        self.eos_ids = eos_ids(getattr(tokenizer, "eos_token_id", None))
        self.vocabulary = None if tokenizer is None else len(tokenizer)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=retries,
        )

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in order.

        A row that the server cannot go on with (its context is too long, its request timed out)
        ends with its error, and the others go on.

        Raises:
            EngineError: the server writes the first turn of no row: it is not there, it refuses, or
                it sends no token ids or log-probs.
            ValueError: no prompts or an empty one, or a policy that no server can follow.
        """
        rows = open_rows(prompts, generation, "reprefill")
        with ThreadPoolExecutor(min(self.workers, len(rows))) as pool:
            backend = _ServerBackend(self, generation, on_tokens, pool)
            return run_turns(rows, backend, respond, generation)


@dataclass
class _ServerBackend:
    """The turn loop's backend on a server, which remembers nothing: each turn sends it all."""

    engine: ServerEngine
    generation: Generation
    on_tokens: OnTokens | None
    pool: Executor

    def drop(self, row: RolloutRow, segments: Sequence[int]) -> None:
        """Nothing to do: `write` sends what is left."""

    def read(self, row: RolloutRow, token_ids: Sequence[int]) -> None:
        """Nothing to do: `write` sends it."""

    def retire(self, row: RolloutRow) -> None:
        """Nothing to do: the server holds nothing of the row."""

    def write(self, rows: Sequence[RolloutRow], number: int) -> list[Written]:
        """One request per row, several at a time."""

        def complete(row: RolloutRow) -> Written:
            context = row.prompt + row.live_ids()
            try:
                written = self._complete(context, row.index, number)
            except EngineError as error:
                return Written([], [], closed=False, error=str(error))
            row.peak_context = max(row.peak_context, len(context) + len(written.token_ids))
            return written

        return list(self.pool.map(complete, rows))

    def _complete(self, context: list[int], row: int, number: int) -> Written:
        import httpx
        import openai

        engine, generation = self.engine, self.generation
        options: dict[str, Any] = {"temperature": generation.temperature, "top_p": 1.0}
        if generation.stop_strings:
            options["stop"] = list(generation.stop_strings)
        if generation.seed is not None:
            options["seed"] = (generation.seed * 1_000_003 + row * 1009 + number) % 2**31
        written = Written([], [], closed=False)
        finish = ""
        stream = self.on_tokens is not None
        try:
            reply: Any = engine._client.completions.create(
                model=engine.model,
                prompt=context,
                max_tokens=generation.max_new_tokens,
                logprobs=1,
                stream=stream,
                extra_body={
                    "return_token_ids": True,
                    "stop_token_ids": list(generation.stop_ids),
                    "include_stop_str_in_output": True,
                    "no_stop_trim": True,
                    "top_k": -1,
                    "min_p": 0.0,
                    "repetition_penalty": 1.0,
                    "skip_special_tokens": False,
                },
                **options,
            )
            for part in reply if stream else [reply]:
                for choice in part.choices:
                    fresh, log_probs = self._read(choice, context)
                    written.token_ids += fresh
                    written.log_probs += log_probs
                    finish = choice.finish_reason or finish
                    if self.on_tokens is not None and fresh:
                        self.on_tokens(row, fresh)
        except openai.APITimeoutError as error:
            raise EngineError(f"server {engine.base_url}: no answer in time") from error
        except openai.APIConnectionError as error:
            raise EngineError(
                f"server {engine.base_url}: no connection ({error.__cause__})"
            ) from error
        except openai.APIStatusError as error:
            raise EngineError(
                f"server {engine.base_url}, model {engine.model!r}: status {error.status_code}: "
                f"{error.message[:500]}"
            ) from error
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise EngineError(f"server {engine.base_url}: {error}") from error
        if finish not in ("stop", "length"):
            raise EngineError(
                f"server {engine.base_url}: expected a turn that ends by stop or length, "
                f"got finish_reason {finish!r}"
            )
        if not written.token_ids:
            raise EngineError(f"server {engine.base_url}: expected at least one token, got none")
        written.closed = finish == "stop"
        return written

    def _read(self, choice: Any, context: list[int]) -> tuple[list[int], list[float]]:
        """The ids and log-probs that a reply, or a part of a streamed one, brings."""
        url = self.engine.base_url
        sent = getattr(choice, "prompt_token_ids", None)
        if sent is not None and list(sent) != context:
            raise EngineError(
                f"server {url}: the prompt was changed there: sent {len(context)} tokens, it read "
                f"{len(sent)}"
            )
        ids = list(getattr(choice, "token_ids", None) or ())
        log_probs = list(getattr(choice.logprobs, "token_logprobs", None) or ())
        if not ids and choice.text:
            raise EngineError(
                f"server {url}: it answers in text only; the engine needs a server that knows "
                "return_token_ids (vLLM 0.10.2 or newer, a recent SGLang)"
            )
        if len(ids) != len(log_probs):
            raise EngineError(
                f"server {url}: expected a log-prob for each of {len(ids)} tokens, "
                f"got {len(log_probs)}"
            )
        return ids, log_probs
