"""The engine over HTTP: a server that speaks the OpenAI completions API."""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from mem1_kernels._clock import Clock
from mem1_kernels._secrets import Mask, origin_of, public_address, secrets_of
from mem1_kernels._text import error_text, valid_text
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

_MOST_IDS = 2**31


class ServerEngine:
    """An OpenAI-compatible completions server: vLLM from 0.10.2 on, or an SGLang that knows
    `return_token_ids`.

    Every turn sends the live context as token ids, so what is dropped is never sent, and the
    server's prefix cache serves the rest. The rollouts are of the "reprefill" form. The server's
    own sampling defaults (vLLM takes top-k, top-p and a repetition penalty from the model's
    generation_config.json) are overridden, as log-probs would not be those of the model otherwise;
    at temperatures other than 0 and 1, vLLM needs `--logprobs-mode processed_logprobs` for that.

    A seed is sent only if `seeded`: a seeded request whose prompt is computed in parts ends vLLM's
    CPU engine for everybody. Without it, sampling is the server's own choice, and `run` warns where
    a seed would have mattered.

    Args:
        base_url: such as "http://127.0.0.1:8000/v1".
        model: the name that the server knows the model by.
        tokenizer: the model's tokenizer, for prompts and observations; None for token ids only.
        api_key: sent to the server. Default: the environment variable OPENAI_API_KEY.
        timeout: seconds for a connection and for each read of a reply.
        turn_timeout: seconds per attempt at a turn, from the connection to the last byte, however
            steadily they trickle in. A turn takes at most `retries + 1` times as long, and the
            pauses between attempts.
        max_bytes: the most bytes of a reply. Compressed replies are not asked for, and refused.
        retries: further attempts after a lost connection, a time-out, or a status that may pass.
        workers: how many rows are generated at once.
        seeded: send `Generation.seed`, turned into one per row and turn.

    Warns:
        RuntimeWarning: in `run`: a seed at a temperature above 0, without `seeded`.

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
        seeded: bool = False,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "openai is not installed (`pip install mem1-kernels[agent]`)"
            ) from error
        origin_of("base_url", base_url)
        self.address = public_address(base_url)
        for name, value in (("timeout", timeout), ("turn_timeout", turn_timeout)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected seconds, got {value!r}")
            if not value > 0:
                raise ValueError(f"{name}: expected more than 0 seconds, got {value}")
        check_count("max_bytes", max_bytes)
        check_count("retries", retries, 0)
        check_count("workers", workers)
        self.model = model
        self.tokenizer = tokenizer
        self.workers = workers
        self.seeded = seeded
        self.eos_ids = eos_ids(getattr(tokenizer, "eos_token_id", None))
        self.vocabulary = None if tokenizer is None else len(tokenizer)
        key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        secrets, private = secrets_of(base_url)
        self._mask = Mask([key, *secrets, *private])
        # No redirects: the key and the prompts go to this origin only.
        self._httpx = httpx = _httpx_of(openai)
        transport = limited_transport(httpx, turn_timeout, max_bytes)
        try:
            self._client = openai.OpenAI(
                base_url=base_url,
                api_key=key or "none",
                timeout=timeout,
                max_retries=retries,
                http_client=httpx.Client(transport=transport, timeout=timeout),
            )
        except (httpx.InvalidURL, ValueError):
            fits = False
        else:
            fits = True
        if not fits:  # outside of except: the context of an exception would show the address
            raise ValueError(f"base_url: expected a valid address, got {self.address!r}")

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

        A row that the server cannot go on with (its context is too long, its request timed out, its
        reply cannot be used) ends with its error, and the others go on.

        Raises:
            EngineError: the server writes the first turn of no row: it is not there, it refuses, or
                it sends no token ids or log-probs.
            ValueError: no prompts or an empty one, or a policy that no server can follow.
        """
        rows = open_rows(prompts, generation, "reprefill", self.vocabulary)
        if generation.seed is not None and generation.temperature > 0 and not self.seeded:
            warnings.warn(
                "seed: not sent to the server, whose own choice the sampling is; "
                "ServerEngine(..., seeded=True) sends it (vLLM's CPU engine may end at one)",
                RuntimeWarning,
                stacklevel=2,
            )
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
        engine = self.engine
        written = Written([], [], closed=False)
        finish: Any = None
        for part in self._parts(context, row, number):
            written.token_ids += part.token_ids
            written.log_probs += part.log_probs
            finish = part.finish or finish
            if self.on_tokens is not None and part.token_ids:
                self.on_tokens(row, part.token_ids)
        if finish not in ("stop", "length"):
            raise engine.error(
                f"expected a turn that ends by stop or length, got finish_reason {finish!r}"
            )
        if not written.token_ids:
            raise engine.error("expected at least one token, got none")
        if len(written.token_ids) > self.generation.max_new_tokens:
            raise engine.error(
                f"expected at most {self.generation.max_new_tokens} tokens, "
                f"got {len(written.token_ids)}"
            )
        written.closed = finish == "stop"
        return written

    def _parts(self, context: list[int], row: int, number: int) -> Iterator[_Part]:
        """The parts of a reply, one unless it is streamed; every failure is an EngineError."""
        import openai

        engine, generation = self.engine, self.generation
        httpx = engine._httpx
        options: dict[str, Any] = {"temperature": generation.temperature, "top_p": 1.0}
        if generation.stop_strings:
            options["stop"] = list(generation.stop_strings)
        if generation.seed is not None and engine.seeded and generation.temperature > 0:
            options["seed"] = (generation.seed * 1_000_003 + row * 1009 + number) % 2**31
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
            for content in reply if stream else [reply]:
                yield self._read(content, context)
        except EngineError:
            raise
        except (openai.APITimeoutError, httpx.TimeoutException):
            raise engine.error("no answer in time") from None
        except openai.APIConnectionError as error:
            raise engine.error(f"no connection ({error.__cause__})") from None
        except openai.APIStatusError as error:
            raise engine.error(f"status {error.status_code}: {error.message}") from None
        except Exception as error:  # whatever openai makes of an odd reply
            raise engine.error(error_text(error)) from None

    def _read(self, content: Any, context: list[int]) -> _Part:
        """What a reply, or a part of a streamed one, brings."""
        engine = self.engine
        choices = getattr(content, "choices", None)
        if not isinstance(choices, list):
            raise engine.error(f"expected a completion, got {type(content).__name__}")
        if not choices and self.on_tokens is not None:
            return _Part([], [], None)  # such as one that counts the tokens of a stream
        if len(choices) != 1:
            raise engine.error(f"expected 1 choice, got {len(choices)}")
        choice = choices[0]
        sent = getattr(choice, "prompt_token_ids", None)
        if sent is not None and sent != context:
            got = f"{len(sent)} tokens" if isinstance(sent, list) else type(sent).__name__
            raise engine.error(
                f"the prompt was changed there: sent {len(context)} tokens, it read {got}"
            )
        ids = self._listed("token_ids", choice)
        log_probs = self._listed("token_logprobs", getattr(choice, "logprobs", None))
        if not ids and getattr(choice, "text", None):
            raise engine.error(
                "it answers in text only; the engine needs a server that knows return_token_ids "
                "(vLLM 0.10.2 or newer, a recent SGLang)"
            )
        if len(ids) != len(log_probs):
            raise engine.error(
                f"expected a log-prob for each of {len(ids)} tokens, got {len(log_probs)}"
            )
        for token, log_prob in zip(ids, log_probs, strict=True):
            if type(token) is not int or not 0 <= token < _MOST_IDS:
                raise engine.error(f"expected token ids, got {token!r:.80}")
            if type(log_prob) not in (int, float) or not math.isfinite(log_prob):
                raise engine.error(f"expected finite log-probs, got {log_prob!r:.80}")
        return _Part(ids, log_probs, getattr(choice, "finish_reason", None))

    def _listed(self, name: str, part: Any) -> list[Any]:
        """A list of a reply; an empty one where it is null or missing."""
        values = getattr(part, name, None)
        if values is not None and not isinstance(values, list):
            raise self.engine.error(f"expected a list of {name}, got {values!r:.80}")
        return values or []


class _Part(NamedTuple):
    """What a reply, or a part of a streamed one, brings."""

    token_ids: list[int]
    log_probs: list[float]
    finish: Any


def _httpx_of(openai: Any) -> Any:
    """The HTTP package that openai is built on: httpx, or its successor in newer versions."""
    client = next(x for x in openai.DefaultHttpxClient.__mro__ if x.__name__ == "Client")
    return importlib.import_module(client.__module__.partition(".")[0])


def limited_transport(httpx: Any, seconds: float, max_bytes: int) -> Any:
    """A transport with a limit on the time and the bytes of each exchange."""
    # A connection serves one request, so that the clock can end it.
    transport = httpx.HTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))

    class Limited(httpx.BaseTransport):
        def handle_request(self, request: Any) -> Any:
            request.headers["accept-encoding"] = "identity"
            clock = Clock(seconds)
            request.extensions = {**request.extensions, "trace": clock.trace}
            try:
                response = transport.handle_request(request)
            except BaseException as error:
                clock.stop()
                raise late(clock, error) from None
            response.stream = Stream(response.stream, clock)
            if response.headers.get("content-encoding", "identity") != "identity":
                response.close()
                raise httpx.RemoteProtocolError("expected a reply that is not compressed")
            return response

        def close(self) -> None:
            transport.close()

    class Stream(httpx.SyncByteStream):
        def __init__(self, stream: Any, clock: Clock) -> None:
            self.stream = stream
            self.clock = clock

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            try:
                for part in self.stream:
                    size += len(part)
                    if size > max_bytes:
                        raise httpx.RemoteProtocolError(f"expected at most {max_bytes} bytes")
                    yield part
            except httpx.HTTPError as error:
                raise late(self.clock, error) from None
            if self.clock.expired:  # a reply without a length seems to end where it was cut
                raise late(self.clock, None)

        def close(self) -> None:
            self.clock.stop()
            self.stream.close()

    def late(clock: Clock, error: BaseException | None) -> BaseException:
        """What to raise for `error`: a time-out, where the clock caused it."""
        if error is None or (clock.expired and isinstance(error, httpx.HTTPError)):
            return httpx.ReadTimeout(f"no whole reply within {seconds:g} s")
        return error

    return Limited()
