"""Any OpenAI-compatible chat model as the policy, for evaluation.

    engine = ChatEngine("https://api.example.com/v1", "name-there", tokenizer)
    agent = MemoryEfficientAgent(None, engine=engine, environment="corpus.jsonl")

`ServerEngine` is the engine for servers that return token ids, and for training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mem1_kernels._text import error_text, valid_text
from mem1_kernels.rollout import EngineError, Generation, OnTokens, Respond, Rollout, ServerEngine
from mem1_kernels.rollout.loop import RolloutRow, Written, open_rows, run_turns


class ChatEngine:
    """A chat model behind `POST /chat/completions`, which answers in text only.

    Every turn sends the live context as one user message: the prompt, what the retention policy
    keeps, nothing else. The reply is turned into ids by `tokenizer`, so tokens are counted by it,
    the model's own are not known, and all log-probs are NaN: what it plays is for evaluation, not
    for training.

    Args:
        base_url, model: as for `ServerEngine`.
        tokenizer: a Hugging Face tokenizer, near the model's own if there is one. Its chat template
            is not used: the server has its own.
        options: further ones of `ServerEngine`: api_key, timeout, turn_timeout, max_bytes, retries,
            workers.

    Raises:
        ImportError: openai is not installed (`pip install mem1-kernels[agent]`).
        TypeError: no tokenizer.
        ValueError: an argument out of its range.
    """

    def __init__(self, base_url: str, model: str, tokenizer: Any, **options: Any) -> None:
        if tokenizer is None:
            raise TypeError("tokenizer: expected one to count tokens with, got None")
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.chat_template = None
        self._server = ServerEngine(base_url, model, self.tokenizer, **options)
        self.eos_ids = self._server.eos_ids
        self.vocabulary = self._server.vocabulary

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in order. A reply that is refused or empty ends its row.

        Raises:
            EngineError: the server writes the first turn of no row.
            ValueError: no prompts or an empty one, a policy that no server can follow, or marks,
                which need each token as it is sampled.
        """
        if generation.mark is not None:
            raise ValueError("mark: expected none, as the server's tokens are not known")
        rows = open_rows(prompts, generation, "reprefill", self.vocabulary)
        with ThreadPoolExecutor(min(self._server.workers, len(rows))) as pool:
            backend = _ChatBackend(self._server, generation, on_tokens, pool)
            return run_turns(rows, backend, respond, generation)


class _ChatBackend:
    """The turn loop's backend on a chat server, which remembers nothing."""

    def __init__(
        self,
        server: ServerEngine,
        generation: Generation,
        on_tokens: OnTokens | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.server = server
        self.generation = generation
        self.on_tokens = on_tokens
        self.pool = pool

    def drop(self, row: RolloutRow, segments: Sequence[int]) -> None:
        """Nothing to do: `write` sends what is left."""

    def read(self, row: RolloutRow, token_ids: Sequence[int]) -> None:
        """Nothing to do: `write` sends it."""

    def retire(self, row: RolloutRow) -> None:
        """Nothing to do: the server holds nothing of the row."""

    def write(self, rows: Sequence[RolloutRow], number: int) -> list[Written]:
        """One request per row, several at a time."""

        def reply(row: RolloutRow) -> Written:
            context = row.prompt + row.live_ids()
            try:
                text, closed = self._reply(self._decode(context))
            except EngineError as error:
                return Written([], [], closed=False, error=str(error))
            ids = self.server.tokenizer.encode(text, add_special_tokens=False)
            row.peak_context = max(row.peak_context, len(context) + len(ids))
            if self.on_tokens is not None:
                self.on_tokens(row.index, ids)
            return Written(ids, [math.nan] * len(ids), closed)

        return list(self.pool.map(reply, rows))

    def _decode(self, ids: list[int]) -> str:
        own = self.server.tokenizer
        silent = {own.bos_token_id, own.eos_token_id, own.pad_token_id}
        return str(
            own.decode([i for i in ids if i not in silent], clean_up_tokenization_spaces=False)
        )

    def _reply(self, context: str) -> tuple[str, bool]:
        """A turn as text, and whether a stop ended it."""
        generation, server = self.generation, self.server
        options: dict[str, Any] = {"stop": list(generation.stop_strings)}
        if generation.seed is not None:
            options["seed"] = generation.seed % 2**31
        try:
            answer: Any = server._client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": context}],
                max_tokens=generation.max_new_tokens,
                temperature=generation.temperature,
                **options,
            )
            (choice,) = answer.choices
            text, refusal = choice.message.content, getattr(choice.message, "refusal", None)
            finish = choice.finish_reason
        except Exception as error:  # of the connection, a status, or an odd reply
            raise server.error(error_text(error)) from None
        if not isinstance(text, str) or not text.strip():
            said = f"the refusal {refusal!r:.200}" if refusal else f"{text!r}, finish {finish!r}"
            raise server.error(f"expected a reply of text, got {said}")
        if finish not in ("stop", "length"):
            raise server.error(f"expected a turn that ends by stop or length, got {finish!r}")
        return closed_by(valid_text(text), generation.stop_strings, finish == "stop")


def closed_by(text: str, stops: Sequence[str], stopped: bool) -> tuple[str, bool]:
    """A chat model's reply as a turn: chat servers leave out the stop that ended it.

    Returns:
        The reply up to its first stop, or with the stop of the last tag that stands open; and
        whether it ends with a stop.

    >>> closed_by("<think>a</think><search>b", ["</search>", "</answer>"], True)
    ('<think>a</think><search>b</search>', True)
    >>> closed_by("<think>a</think><search>b</search> and", ["</search>", "</answer>"], False)
    ('<think>a</think><search>b</search>', True)
    >>> closed_by("<think>a</think><search>b", ["</search>", "</answer>"], False)
    ('<think>a</think><search>b', False)
    """
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if ends:
        return text[: min(ends)], True
    opened = {stop: text.rfind(stop.replace("</", "<", 1)) for stop in stops}
    last = max(opened, key=opened.__getitem__, default=None)
    if stopped and last is not None and opened[last] >= 0:
        return text + last, True
    return text, False
