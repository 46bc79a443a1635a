"""The engine over HTTP: a server that speaks the OpenAI completions API."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mem1_kernels._secrets import Mask, public_address, secrets_of
from mem1_kernels._text import valid_text
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
        turn_timeout: seconds for all of a turn, however steadily the reply trickles in.
        max_bytes: the most bytes of a reply. Compressed replies are not asked for, and refused.
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
        turn_timeout: float = 3600.0,
        max_bytes: int = 64 * 2**20,
        retries: int = 3,
        workers: int = 32,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "openai is not installed (`pip install mem1-kernels[agent]`)"
            ) from error
        self.address = public_address(base_url)
        if not base_url.startswith(("http://", "https://")):
            got = self.address
            raise ValueError(f"base_url: expected an address like http://…/v1, got {got!r}")
        for name, value in (("timeout", timeout), ("turn_timeout", turn_timeout)):
            if not value > 0:
                raise ValueError(f"{name}: expected more than 0 seconds, got {value}")
        check_count("max_bytes", max_bytes)
        check_count("retries", retries, 0)
        check_count("workers", workers)
        self.model = model
        self.tokenizer = tokenizer
        self.workers = workers
        self.eos_ids = eos_ids(getattr(tokenizer, "eos_token_id", None))
        self.vocabulary = None if tokenizer is None else len(tokenizer)
        key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        secrets, private = secrets_of(base_url)
        self._mask = Mask([key, *secrets, *private])
        # No redirects: the key and the prompts go to this origin only.
        self._httpx = httpx = _httpx_of(openai)
        transport = _limited(httpx, turn_timeout, max_bytes)
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=key or "none",
            timeout=timeout,
            max_retries=retries,
            http_client=httpx.Client(transport=transport, timeout=timeout),
        )

    def error(self, problem: str) -> EngineError:
        """An error that names the server, without keys and passwords in any spelling."""
        text = valid_text(f"server {self.address}, model {self.model!r}: {problem}")
        return EngineError(self._mask(text)[:800])

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
        import openai

        engine, generation = self.engine, self.generation
        httpx = engine._httpx
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
                choices = getattr(part, "choices", None)
                if choices is None:
                    raise engine.error(f"expected a completion, got {type(part).__name__}")
                for choice in choices:
                    fresh, log_probs = self._read(choice, context)
                    written.token_ids += fresh
                    written.log_probs += log_probs
                    finish = choice.finish_reason or finish
                    if self.on_tokens is not None and fresh:
                        self.on_tokens(row, fresh)
        except openai.APITimeoutError:
            raise engine.error("no answer in time") from None
        except openai.APIConnectionError as error:
            raise engine.error(f"no connection ({error.__cause__})") from None
        except openai.APIStatusError as error:
            raise engine.error(f"status {error.status_code}: {error.message}") from None
        except httpx.TimeoutException:
            raise engine.error("no answer in time") from None
        except (openai.OpenAIError, httpx.HTTPError, ValueError, RecursionError) as error:
            raise engine.error(f"{type(error).__name__}: {error}") from None
        if finish not in ("stop", "length"):
            raise engine.error(
                f"expected a turn that ends by stop or length, got finish_reason {finish!r}"
            )
        if not written.token_ids:
            raise engine.error("expected at least one token, got none")
        written.closed = finish == "stop"
        return written

    def _read(self, choice: Any, context: list[int]) -> tuple[list[int], list[float]]:
        """The ids and log-probs that a reply, or a part of a streamed one, brings."""
        engine = self.engine
        sent = getattr(choice, "prompt_token_ids", None)
        if sent is not None and list(sent) != context:
            raise engine.error(
                f"the prompt was changed there: sent {len(context)} tokens, it read {len(sent)}"
            )
        ids = list(getattr(choice, "token_ids", None) or ())
        log_probs = list(getattr(choice.logprobs, "token_logprobs", None) or ())
        if not ids and choice.text:
            raise engine.error(
                "it answers in text only; the engine needs a server that knows return_token_ids "
                "(vLLM 0.10.2 or newer, a recent SGLang)"
            )
        if len(ids) != len(log_probs):
            raise engine.error(
                f"expected a log-prob for each of {len(ids)} tokens, got {len(log_probs)}"
            )
        return ids, log_probs


def _httpx_of(openai: Any) -> Any:
    """The HTTP package that openai is built on: httpx, or its successor in newer versions."""
    client = next(x for x in openai.DefaultHttpxClient.__mro__ if x.__name__ == "Client")
    return importlib.import_module(client.__module__.partition(".")[0])


def _limited(httpx: Any, seconds: float, max_bytes: int) -> Any:
    """A transport with a limit on the time and the bytes of each reply."""
    transport = httpx.HTTPTransport()

    class Limited(httpx.BaseTransport):
        def handle_request(self, request: Any) -> Any:
            deadline = time.monotonic() + seconds
            request.headers["accept-encoding"] = "identity"
            response = transport.handle_request(request)
            if response.headers.get("content-encoding", "identity") != "identity":
                response.close()
                raise httpx.RemoteProtocolError("expected a reply that is not compressed")
            response.stream = Stream(response.stream, deadline)
            return response

        def close(self) -> None:
            transport.close()

    class Stream(httpx.SyncByteStream):
        def __init__(self, stream: Any, deadline: float) -> None:
            self.stream = stream
            self.deadline = deadline

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for part in self.stream:
                size += len(part)
                if size > max_bytes:
                    raise httpx.RemoteProtocolError(f"expected at most {max_bytes} bytes")
                if time.monotonic() > self.deadline:
                    raise httpx.ReadTimeout(f"no whole reply within {seconds} s")
                yield part

        def close(self) -> None:
            self.stream.close()

    return Limited()
