"""What generates the turns: a model in this process, or a server that speaks the OpenAI API.

    HFEngine(model, tokenizer)                         pruned cache, positions go on counting
    HFEngine(model, tokenizer, positions="reprefill")  the live text sent again every turn
    ServerEngine("http://127.0.0.1:8000/v1", name, tokenizer)   vLLM or SGLang

Token ids go in and token ids come out: what was sampled is never decoded and encoded again. Every
engine returns the same `Rollout`, whose `layout` is what a trainer has to compute.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from mem1_kernels.retention import Retention, Segment, mem1
from mem1_kernels.rollout import (
    Respond,
    Rollout,
    Row,
    TrajectoryRollout,
    ask,
    check_stop_strings,
    read_prompts,
)

OnTokens = Callable[[int, Sequence[int]], None]
"""(row, ids just sampled in it), called while a turn is written, perhaps from another thread."""


class EngineError(RuntimeError):
    """An engine could not generate: no server there, a refusal, or a reply without token ids."""


@dataclass(frozen=True)
class Generation:
    """How turns are generated and dropped; the same for every engine.

    Args:
        retention: which segment drops which.
        max_turns: turns after which a row ends.
        max_new_tokens: tokens after which a turn is cut.
        stop_ids, stop_strings: what ends a turn; it belongs to the turn.
        state_tokens: how many of a turn's ids are its state; 0 unless told.
        temperature: of sampling; 0 is greedy.
        seed: of sampling; None: torch's default generator, or the server's own choice.
    """

    retention: Retention = mem1
    max_turns: int = 20
    max_new_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    state_tokens: Callable[[list[int]], int] | None = None
    temperature: float = 0.0
    seed: int | None = None


class Engine(Protocol):
    """Runs a batch of prompts through turns.

    Attributes:
        tokenizer: a Hugging Face tokenizer, or None for models that know token ids only.
        eos_ids: ids with which the model ends a text.
    """

    tokenizer: Any
    eos_ids: tuple[int, ...]

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout a prompt, in order; `respond` is called after every turn."""


class HFEngine:
    """A transformers causal LM in this process.

    Args:
        model: the model; it is patched while it runs and untouched otherwise.
        tokenizer: its tokenizer; None where environments speak token ids.
        positions: "kept" (the cache is pruned in place) or "reprefill" (the live text is sent again
            every turn at compact positions, as engines without pruning do).
        capacity: slots of a cache row; it grows unless told.

    Raises:
        ValueError: another form of positions.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        positions: Literal["kept", "reprefill"] = "kept",
        capacity: int | None = None,
    ) -> None:
        if positions not in ("kept", "reprefill"):
            raise ValueError(f"positions: expected 'kept' or 'reprefill', got {positions!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.positions = positions
        self.capacity = capacity
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.eos_ids = _ids(own, getattr(tokenizer, "eos_token_id", None))

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout a prompt, in order."""
        driver = TrajectoryRollout(
            self.model,
            retention=generation.retention,
            positions=self.positions,
            max_turns=generation.max_turns,
            max_new_tokens=generation.max_new_tokens,
            stop_ids=generation.stop_ids,
            stop_strings=generation.stop_strings,
            tokenizer=self.tokenizer,
            state_tokens=generation.state_tokens,
            temperature=generation.temperature,
            capacity=self.capacity,
        )
        generator = None
        if generation.seed is not None:
            device = next(self.model.parameters()).device
            generator = torch.Generator(device).manual_seed(generation.seed)
        return driver.run(prompts, respond, generator=generator, on_tokens=on_tokens)


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
        api_key: sent to the server; the environment's OPENAI_API_KEY unless told.
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
        if timeout <= 0:
            raise ValueError(f"timeout: expected more than 0 seconds, got {timeout}")
        for name, value, least in (("retries", retries, 0), ("workers", workers, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.base_url = base_url
        self.model = model
        self.tokenizer = tokenizer
        self.workers = workers
        self.eos_ids = _ids(getattr(tokenizer, "eos_token_id", None))
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
        """One rollout a prompt, in order.

        Raises:
            EngineError: the server is not there, refuses, or sends no token ids or log-probs.
            ValueError: no prompts or an empty one, or a policy that no server can follow.
        """
        check_stop_strings(generation.stop_strings)
        rows = [
            Row(
                index,
                prompt,
                generation.retention,
                "reprefill",
                generation.state_tokens,
            )
            for index, prompt in enumerate(read_prompts(prompts))
        ]
        active = rows
        with ThreadPoolExecutor(min(self.workers, len(rows))) as pool:
            for number in range(1, generation.max_turns + 1):
                contexts = []
                for row in active:
                    row.drop_before(Segment("state", 0, number))
                    contexts.append(row.prompt + row.live_ids())

                def write(job: tuple[Row, list[int]], number: int = number) -> _Completion:
                    row, context = job
                    return self._complete(context, generation, row.index, number, on_tokens)

                jobs = list(zip(active, contexts, strict=True))
                for (row, context), written in zip(jobs, pool.map(write, jobs), strict=True):
                    row.wrote(number, written.token_ids, written.finish == "stop")
                    row.log_probs += written.log_probs
                    row.peak_context = max(row.peak_context, len(context) + len(written.token_ids))
                going = ask(respond, active, last=number == generation.max_turns)
                for row, observed in going:
                    info = row.observation(observed)
                    row.drop_before(info)
                    row.add(info)
                active = [row for row, _ in going]
                if not active:
                    break
        return [row.finish() for row in rows]

    def _complete(
        self,
        context: list[int],
        generation: Generation,
        row: int,
        number: int,
        on_tokens: OnTokens | None,
    ) -> _Completion:
        import httpx
        import openai

        options: dict[str, Any] = {"temperature": generation.temperature, "top_p": 1.0}
        if generation.stop_strings:
            options["stop"] = list(generation.stop_strings)
        if generation.seed is not None:
            options["seed"] = (generation.seed * 1_000_003 + row * 1009 + number) % 2**31
        written = _Completion([], [], "")
        try:
            reply: Any = self._client.completions.create(
                model=self.model,
                prompt=context,
                max_tokens=generation.max_new_tokens,
                logprobs=1,
                stream=on_tokens is not None,
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
            for part in reply if on_tokens is not None else [reply]:
                for choice in part.choices:
                    self._add(written, choice, context)
                    if on_tokens is not None and written.fresh:
                        on_tokens(row, written.fresh)
        except openai.APITimeoutError as error:
            raise EngineError(f"server {self.base_url}: no answer in time") from error
        except openai.APIConnectionError as error:
            raise EngineError(
                f"server {self.base_url}: no connection ({error.__cause__})"
            ) from error
        except openai.APIStatusError as error:
            raise EngineError(
                f"server {self.base_url}, model {self.model!r}: status {error.status_code}: "
                f"{error.message[:500]}"
            ) from error
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise EngineError(f"server {self.base_url}: {error}") from error
        if written.finish not in ("stop", "length"):
            raise EngineError(
                f"server {self.base_url}: expected a turn that ends by stop or length, "
                f"got finish_reason {written.finish!r}"
            )
        if not written.token_ids:
            raise EngineError(f"server {self.base_url}: expected at least one token, got none")
        return written

    def _add(self, written: _Completion, choice: Any, context: list[int]) -> None:
        """Takes over what a reply, or a part of a streamed one, says."""
        sent = getattr(choice, "prompt_token_ids", None)
        if sent is not None and list(sent) != context:
            raise EngineError(
                f"server {self.base_url}: the prompt was changed there: sent {len(context)} "
                f"tokens, it read {len(sent)}"
            )
        ids = getattr(choice, "token_ids", None)
        log_probs = getattr(choice.logprobs, "token_logprobs", None)
        if ids is None and choice.text:
            raise EngineError(
                f"server {self.base_url}: it answers in text only; the engine needs a server that "
                "knows return_token_ids (vLLM 0.10.2 or newer, a recent SGLang)"
            )
        if len(ids or ()) != len(log_probs or ()):
            raise EngineError(
                f"server {self.base_url}: expected a log-prob for each of {len(ids or ())} tokens, "
                f"got {len(log_probs or ())}"
            )
        written.fresh = list(ids or ())
        written.token_ids += written.fresh
        written.log_probs += list(log_probs or ())
        written.finish = choice.finish_reason or written.finish


@dataclass
class _Completion:
    """A turn as the server wrote it; `fresh` are the ids that came last."""

    token_ids: list[int]
    log_probs: list[float]
    finish: str
    fresh: Sequence[int] = ()


def _ids(*values: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids in `values`, each once, in order."""
    flat = [i for v in values if v is not None for i in ([v] if isinstance(v, int) else v)]
    return tuple(dict.fromkeys(flat))
