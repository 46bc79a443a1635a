"""The engine over HTTP: sessions of a vLLM server that has the plug-in."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from mem1_kernels._secrets import Mask, origin_of, public_address, secrets_of
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
from mem1_kernels.rollout.server_engine import limited_transport
from mem1_kernels.vllm.turns import Chunk, Turns

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may pass


class VLLMServerEngine:
    """Rollouts on a vLLM server, whose KV cache drops tokens in place ("kept").

    The server is one that `python -m mem1_kernels.vllm.serve MODEL` starts. Each row is a session
    of it: only what is new is sent. `ServerEngine` at the same address sends the live text again
    every turn ("reprefill").

    A step of a session is numbered, and the server computes it once, however often it is asked for.
    So a lost connection, or a reply that does not come in time, is followed by asking again: no
    turn is generated twice.

    Args:
        base_url: such as "http://127.0.0.1:8000".
        tokenizer: the model's, for prompts and observations as text; None for token ids only.
        api_key: sent to the server. Default: the environment variable OPENAI_API_KEY.
        timeout: seconds for a connection and for each read of a reply.
        step_timeout: seconds per attempt at a step.
        retries: further attempts after a lost connection, a time-out, or a status that may pass.
        workers: how many rows are generated at once; the others wait.

    Raises:
        ImportError: httpx is not installed (`pip install mem1-kernels[agent]`).
        TypeError, ValueError: an argument that is none of the above.
    """

    def __init__(
        self,
        base_url: str,
        tokenizer: Any = None,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        step_timeout: float = 3600.0,
        retries: int = 3,
        workers: int = 64,
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ImportError(
                "httpx is not installed (`pip install mem1-kernels[agent]`)"
            ) from error
        origin_of("base_url", base_url)
        for name, value in (("timeout", timeout), ("step_timeout", step_timeout)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: expected seconds, got {value!r}")
            if not value > 0:
                raise ValueError(f"{name}: expected more than 0 seconds, got {value}")
        check_count("retries", retries, 0)
        check_count("workers", workers)
        self.address = public_address(base_url)
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids(getattr(tokenizer, "eos_token_id", None))
        self.retries = retries
        self.workers = workers
        key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        secrets, private = secrets_of(base_url)
        self._mask = Mask([key, *secrets, *private])
        self._httpx: Any = httpx
        root = base_url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(
            base_url=f"{root}/v1/",
            headers={"authorization": f"Bearer {key}"} if key else {},
            transport=limited_transport(httpx, step_timeout, 64 * 2**20),
            timeout=timeout,
        )
        self._vocabulary: int | None = None

    @property
    def vocabulary(self) -> int | None:
        """Ids from 0 to this number, exclusive, are known to the model, as the server says."""
        if self._vocabulary is None:
            said = self._ask("GET", "mem1", None).get("vocabulary")
            self._vocabulary = said if type(said) is int else None
        return self._vocabulary

    def error(self, problem: str) -> EngineError:
        """An error that names the server, without keys and passwords in any spelling."""
        return EngineError(self._mask(valid_text(f"server {self.address}: {problem}"))[:800])

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in order.

        A row that the server cannot go on with ends with its error, and the others go on.

        Raises:
            EngineError: the server writes the first turn of no row, or is not there.
            ValueError: no prompts or an empty one, stop_strings of a turn with marks without a
                tokenizer, or a policy that no engine can follow.
        """
        rows = open_rows(prompts, generation, "kept", self.vocabulary)
        if generation.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings: need a tokenizer, got none")
        with ThreadPoolExecutor(min(self.workers, len(rows))) as pool:
            backend = _Backend(self, rows, generation, on_tokens, pool)
            try:
                return run_turns(rows, backend, respond, generation)
            finally:
                backend.close()

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """A reply that is not streamed."""
        whole: dict[str, Any] = {}
        for line in self._lines(method, path, body):
            whole = line
        return whole

    def _lines(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> Iterator[dict[str, Any]]:
        """The lines of a reply; after a failure that may pass, all of them again.

        Raises:
            EngineError: no answer after all attempts, a refusal, or what is no JSON.
        """
        httpx = self._httpx
        for attempt in itertools.count():
            try:
                with self._client.stream(method, path, json=body) as reply:
                    if reply.status_code == 200:
                        for line in reply.iter_lines():
                            yield _object(line)
                        return
                    problem = f"status {reply.status_code}: {_said(reply.read())}"
                    passes = reply.status_code in _PASSING
            except httpx.TimeoutException:
                problem, passes = "no answer in time", True
            except httpx.HTTPError as error:
                problem, passes = f"no connection ({error})", True
            except ValueError as error:
                problem, passes = str(error), False
            if not passes or attempt >= self.retries:
                raise self.error(problem)
            time.sleep(min(8.0, 0.25 * 2**attempt))


class _Backend:
    """The turn loop's backend: a session per row."""

    marks = True

    def __init__(
        self,
        engine: VLLMServerEngine,
        rows: Sequence[RolloutRow],
        generation: Generation,
        on_tokens: OnTokens | None,
        pool: Executor,
    ) -> None:
        self.engine = engine
        self.generation = generation
        self.on_tokens = on_tokens
        self.pool = pool
        self.turns = [Turns(row, generation, engine.tokenizer) for row in rows]
        run = uuid.uuid4().hex
        self.names = [f"{run}-{row.index}" for row in rows]
        self.steps = [0] * len(rows)
        self.open: set[int] = set()

    def drop(self, row: RolloutRow, segments: Sequence[int]) -> None:
        self.turns[row.index].drop(segments)

    def read(self, row: RolloutRow, token_ids: Sequence[int]) -> None:
        self.turns[row.index].read(token_ids)

    def retire(self, row: RolloutRow) -> None:
        if row.index in self.open:
            self.open.discard(row.index)
            try:
                self.engine._ask("DELETE", f"mem1/sessions/{self.names[row.index]}", None)
            except EngineError:
                pass  # the server closes it itself, once it has been idle

    def close(self) -> None:
        """Ends what is left of the sessions."""
        list(self.pool.map(self.retire, [self.turns[index].row for index in list(self.open)]))

    def write(self, rows: Sequence[RolloutRow], number: int) -> list[Written]:
        """Writes one turn in each row, several at a time."""
        return list(self.pool.map(lambda row: self._turn(self.turns[row.index], number), rows))

    def _turn(self, turns: Turns, number: int) -> Written:
        turns.begin(number)
        while not turns.done:
            try:
                self._step(turns, number)
            except EngineError as error:
                turns.fail(str(error))
        return turns.written

    def _step(self, turns: Turns, number: int) -> None:
        index, generation = turns.row.index, self.generation
        self.open.add(index)
        self.steps[index] += 1
        seed = generation.seed
        body = {
            "chunks": [_chunk(chunk) for chunk in turns.chunks()],
            "temperature": generation.temperature,
            "seed": None if seed is None else (seed * 1_000_003 + index * 1009 + number) % 2**31,
            "stop": list(generation.stop_strings),
            "stop_token_ids": list(generation.stop_ids),
            "stream": self.on_tokens is not None,
        }
        path = f"mem1/sessions/{self.names[index]}/steps/{self.steps[index]}"
        ids: list[int] = []
        log_probs: list[float] = []
        finish = None
        told = 0
        for line in self.engine._lines("POST", path, body):
            if "error" in line:
                raise self.engine.error(str(line["error"]))
            if line.get("start"):
                ids, log_probs = [], []  # the reply begins again after a lost connection
            ids, log_probs = [*ids, *_ids(line)], [*log_probs, *_log_probs(line)]
            finish = line.get("finish")
            if self.on_tokens is not None and len(ids) > told:
                self.on_tokens(index, ids[told:])
                told = len(ids)
        if finish not in ("stop", "length") or not ids or len(ids) != len(log_probs):
            raise self.engine.error(
                f"expected tokens with log-probs and an end, got {len(ids)} tokens, "
                f"{len(log_probs)} log-probs, finish {finish!r}"
            )
        turns.heard(ids, log_probs, stopped=finish == "stop")


def _chunk(chunk: Chunk) -> dict[str, Any]:
    return {
        "token_ids": chunk.token_ids,
        "drop": [list(span) for span in chunk.drop],
        "max_tokens": chunk.max_tokens,
    }


def _object(line: str) -> dict[str, Any]:
    said = json.loads(line)
    if not isinstance(said, dict):
        raise ValueError(f"expected an object, got {line!r:.80}")
    return said


def _said(body: bytes) -> str:
    """What a refusal says."""
    try:
        said = json.loads(body)
    except ValueError:
        return body[:200].decode(errors="replace")
    return str(said.get("error", said) if isinstance(said, dict) else said)[:400]


def _ids(line: dict[str, Any]) -> list[int]:
    ids = line.get("token_ids", [])
    if not isinstance(ids, list) or any(type(x) is not int or not 0 <= x < 2**31 for x in ids):
        raise EngineError(f"expected token ids, got {ids!r:.80}")
    return ids


def _log_probs(line: dict[str, Any]) -> list[float]:
    found = line.get("log_probs", [])
    fits = isinstance(found, list) and all(type(x) in (int, float) for x in found)
    if not fits or not all(map(math.isfinite, found)):
        raise EngineError(f"expected finite log-probs, got {found!r:.80}")
    return found
