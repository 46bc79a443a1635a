"""Sessions over HTTP: routes that a vLLM server gets from this plug-in.

    POST   /v1/mem1/sessions/NAME/steps/N    computes step N of a session; step 1 opens it
    DELETE /v1/mem1/sessions/NAME            ends it
    GET    /v1/mem1                          what the server can hold

A step is a list of chunks (see `turns.Chunk`), of which the last one writes:

    {"chunks": [{"token_ids": [1, 2], "drop": [[5, 9]], "max_tokens": 1}, ...],
     "temperature": 1.0, "seed": null, "stop": ["</tag>"], "stop_token_ids": [2], "stream": false}

The answer has `token_ids`, `log_probs` and `finish` ("stop" or "length"). With "stream" it comes as
lines of JSON, the first of which has `start`, and the last `finish`. An `error` ends the session.

A step is computed once. Asked for again, while it is computed or afterwards, it gives the same
answer, so a client whose connection broke asks again. A client that is gone loses its session when
it has been idle for MEM1_SESSION_IDLE seconds (default: 600).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from vllm import SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from mem1_kernels.vllm.engine import SCHEDULER
from mem1_kernels.vllm.slots import read_spans
from mem1_kernels.vllm.support import Unsupported

PREFIX = "/v1/mem1"


@dataclass
class Step:
    """One step of a session, and what has come of it.

    Attributes:
        chunks: not yet sent.
        parts: what was sampled by the last one, (ids, log-probs) each.
        finish: "stop" or "length", once it is done.
        error: why it failed, or "".
        changed: set, and replaced, whenever one of these changes.
    """

    number: int
    digest: str
    chunks: list[StreamingInput]
    parts: list[tuple[list[int], list[float]]] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> bool:
        return bool(self.finish or self.error)

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def lines(self) -> AsyncIterator[dict[str, Any]]:
        """What has come and comes of it, from the beginning."""
        told = 0
        yield {"start": True}
        while True:
            changed = self.changed
            for ids, log_probs in self.parts[told:]:
                yield {"token_ids": ids, "log_probs": log_probs}
            told = len(self.parts)
            if self.done:
                yield {"error": self.error} if self.error else {"finish": self.finish}
                return
            await changed.wait()


class Session:
    """One resumable request of the engine, whose chunks come over HTTP."""

    def __init__(self, engine: Any, name: str) -> None:
        self.name = name
        self.used = time.monotonic()
        self.error = ""
        self.step: Step | None = None
        self._chunks: asyncio.Queue[StreamingInput] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(engine))

    def begin(self, step: Step) -> None:
        """Starts to compute a step; the one before is done."""
        self.step = step
        self.used = time.monotonic()
        self._chunks.put_nowait(step.chunks.pop(0))

    async def close(self) -> None:
        """Ends the session at the engine."""
        self._fail("the session was closed")
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, engine: Any) -> None:
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, detokenize=False, max_tokens=1)
        try:
            outputs = engine.generate(self._inputs(), params, f"mem1-{self.name}")
            async with contextlib.aclosing(outputs):  # ends the request, however this ends
                async for output in outputs:
                    self._heard(output.outputs[0])
                    if self.error:
                        return
        except Exception as error:  # whatever the engine raises ends this session only
            self._fail(str(error) or type(error).__name__)
        else:
            self._fail("the engine ended the session")

    async def _inputs(self) -> AsyncIterator[StreamingInput]:
        while True:
            yield await self._chunks.get()

    def _heard(self, output: Any) -> None:
        step = self.step
        if output.finish_reason == "error":
            self._fail(str(output.stop_reason))
            return
        if step is None or step.done:
            return
        self.used = time.monotonic()
        if not step.chunks and output.token_ids:
            ids = list(output.token_ids)
            found = zip(ids, output.logprobs, strict=True)
            step.parts.append((ids, [row[token].logprob for token, row in found]))
        if output.finish_reason is not None:
            if step.chunks:
                self._chunks.put_nowait(step.chunks.pop(0))
            else:
                step.finish = output.finish_reason
        step.notify()

    def _fail(self, why: str) -> None:
        self.error = self.error or why
        if self.step is not None and not self.step.done:
            self.step.error = self.error
            self.step.notify()


class Sessions:
    """All sessions of a server."""

    def __init__(self, engine: Any, idle: float) -> None:
        config = engine.vllm_config
        if config.scheduler_config.scheduler_cls != SCHEDULER:
            raise Unsupported(
                f"the endpoint needs --scheduler-cls {SCHEDULER}, got "
                f"{config.scheduler_config.scheduler_cls!r}; python -m mem1_kernels.vllm.serve "
                "sets all that it needs"
            )
        if config.model_config.logprobs_mode != "processed_logprobs":
            raise Unsupported(
                "the endpoint needs --logprobs-mode processed_logprobs, got "
                f"{config.model_config.logprobs_mode!r}"
            )
        self.engine = engine
        self.idle = idle
        self.open: dict[str, Session] = {}
        self.most: int = config.scheduler_config.max_num_seqs
        self.facts = {
            "model": config.model_config.served_model_name,
            "max_sessions": self.most,
            "max_model_len": config.model_config.max_model_len,
            "vocabulary": config.model_config.get_vocab_size(),
        }
        self._sweeper = asyncio.create_task(self._sweep())

    def step(self, name: str, number: int, body: bytes) -> Step:
        """The step asked for: begun now, being computed, or done.

        Raises:
            ValueError: a body that is no step.
            LookupError: a session or a step that cannot be asked for (any more).
            OverflowError: as many sessions as the server holds.
        """
        digest = hashlib.sha256(body).hexdigest()
        session = self.open.get(name)
        last = session.step if session is not None else None
        if last is not None and last.number == number:
            if last.digest != digest:
                raise LookupError(f"step {number} of this session was another one")
            return last
        expected = 1 if last is None else last.number + 1
        if number != expected or (last is not None and not last.done):
            at = "unknown here" if session is None else f"at step {expected - 1}"
            raise LookupError(
                f"the session is {at}, so step {number} cannot be computed (it is closed after "
                f"{self.idle:.0f} idle seconds)"
            )
        step = Step(number, digest, read_step(json.loads(body)))
        if session is None:
            if len(self.open) >= self.most:
                raise OverflowError(f"expected at most max_num_seqs={self.most} sessions at once")
            session = self.open[name] = Session(self.engine, name)
        if session.error:
            step.error = session.error
            session.step = step
            return step
        session.begin(step)
        return step

    async def close(self, name: str) -> bool:
        session = self.open.pop(name, None)
        if session is not None:
            await session.close()
        return session is not None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(5.0, self.idle / 4))
            now = time.monotonic()
            for name, session in list(self.open.items()):
                running = session.step is not None and not session.step.done
                if not running and now - session.used > self.idle:
                    await self.close(name)


def read_step(asked: Any) -> list[StreamingInput]:
    """The chunks of a step as the engine takes them.

    Raises:
        ValueError: anything else; the message names the field.
    """
    if not isinstance(asked, dict):
        raise ValueError(f"expected an object, got {type(asked).__name__}")
    chunks = asked.get("chunks")
    if not isinstance(chunks, list) or not chunks or not all(isinstance(x, dict) for x in chunks):
        raise ValueError("chunks: expected a list of at least one chunk")
    stop, stop_ids = asked.get("stop", []), asked.get("stop_token_ids", [])
    if not isinstance(stop, list) or not all(isinstance(x, str) and x for x in stop):
        raise ValueError(f"stop: expected a list of texts, got {stop!r:.80}")
    _check_ids("stop_token_ids", stop_ids, 0)
    made = []
    for place, chunk in enumerate(chunks):
        last = place == len(chunks) - 1
        ids, most = chunk.get("token_ids"), chunk.get("max_tokens", 1)
        _check_ids("token_ids", ids, 1)
        if type(most) is not int or most < 1:
            raise ValueError(f"max_tokens: expected 1 or more, got {most!r:.80}")
        want = {"drop": read_spans(chunk.get("drop", [])), "stop": stop if last else []}
        params = SamplingParams(
            temperature=asked.get("temperature", 1.0),
            seed=asked.get("seed"),
            max_tokens=most if last else 1,
            ignore_eos=True,
            stop_token_ids=stop_ids if last else [],
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"mem1": want},
        )
        made.append(StreamingInput(prompt=tokens_input(ids), sampling_params=params))
    return made


def _check_ids(name: str, ids: Any, least: int) -> None:
    fits = isinstance(ids, list) and len(ids) >= least
    if not fits or not all(type(x) is int and 0 <= x < 2**31 for x in ids):
        raise ValueError(f"{name}: expected a list of at least {least} token ids, got {ids!r:.80}")


class SessionPlugin:
    """The endpoint plug-in; vLLM loads it if VLLM_PLUGINS names `mem1`."""

    name = "mem1"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        @app.get(PREFIX)
        async def facts() -> JSONResponse:
            sessions: Sessions = app.state.mem1_sessions
            return JSONResponse({**sessions.facts, "sessions": len(sessions.open)})

        @app.post(PREFIX + "/sessions/{name}/steps/{number}")
        async def step(name: str, number: int, request: Request) -> Response:
            sessions: Sessions = app.state.mem1_sessions
            body = await request.body()
            try:
                asked = sessions.step(name, number, body)
                stream = bool(json.loads(body).get("stream"))
            except (ValueError, TypeError, VLLMClientError) as error:
                return JSONResponse({"error": str(error)}, 400)
            except LookupError as error:
                return JSONResponse({"error": error.args[0]}, 409)
            except OverflowError as error:
                return JSONResponse({"error": str(error)}, 429)
            if stream:
                return StreamingResponse(_ndjson(asked), media_type="application/x-ndjson")
            whole: dict[str, Any] = {"token_ids": [], "log_probs": []}
            async for line in asked.lines():
                for key, value in line.items():
                    whole[key] = whole[key] + value if key in whole else value
            return JSONResponse(whole)

        @app.delete(PREFIX + "/sessions/{name}")
        async def close(name: str) -> JSONResponse:
            sessions: Sessions = app.state.mem1_sessions
            return JSONResponse({"closed": await sessions.close(name)})

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        idle = float(os.environ.get("MEM1_SESSION_IDLE", "600"))
        if not idle > 0:
            raise ValueError(f"MEM1_SESSION_IDLE: expected more than 0 seconds, got {idle}")
        state.mem1_sessions = Sessions(engine_client, idle)


async def _ndjson(step: Step) -> AsyncIterator[str]:
    async for line in step.lines():
        yield json.dumps(line) + "\n"
