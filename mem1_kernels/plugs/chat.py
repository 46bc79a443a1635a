"""Any OpenAI-compatible chat model as the policy, or a function of text, for evaluation.

    engine = ChatEngine("https://api.example.com/v1", "name-there", tokenizer)
    agent = MemoryEfficientAgent(None, engine=engine, environment="corpus.jsonl")

`ServerEngine` is the engine for servers that return token ids, and for training.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mem1_kernels._text import error_text, valid_text
from mem1_kernels.rollout import EngineError, Generation, OnTokens, Respond, Rollout, ServerEngine
from mem1_kernels.rollout.engine import check_count, eos_ids
from mem1_kernels.rollout.loop import RolloutRow, Written, open_rows, run_turns


class TextEngine:
    """A function as the policy: the text of the live context in, the text of a turn out.

    For scripted policies, and for models that know no token ids. The text is turned into ids by
    `tokenizer`, so tokens are counted by it, and all log-probs are NaN: what it plays is for
    evaluation, not for training.

    Args:
        write: (context) -> a turn, its closing tag included. What it raises as `EngineError` ends
            its row; anything else is raised.
        tokenizer: a Hugging Face tokenizer; its chat template is not used. None: a token is a byte
            of UTF-8.
        workers: how many rows are written at once.

    >>> engine = TextEngine(lambda context: "<think>easy</think><answer>4</answer>")
    >>> from mem1_kernels.agent import MemoryEfficientAgent
    >>> from mem1_kernels.agent.tools import Tool, ToolBox
    >>> box = ToolBox([Tool("none", "Does nothing.", {}, lambda arguments: "")])
    >>> agent = MemoryEfficientAgent(None, engine=engine, environment=box, progress=False)
    >>> agent.process("2 + 2?").answer
    '4'
    """

    def __init__(
        self, write: Callable[[str], str], tokenizer: Any = None, *, workers: int = 1
    ) -> None:
        check_count("workers", workers)
        self.tokenizer = byte_tokenizer() if tokenizer is None else copy.deepcopy(tokenizer)
        self.tokenizer.chat_template = None
        self.workers = workers
        self.eos_ids = eos_ids(self.tokenizer.eos_token_id)
        self.write = write

    @property
    def vocabulary(self) -> int | None:
        """Ids from 0 to this number, exclusive, are known."""
        return len(self.tokenizer)

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        respond: Respond,
        generation: Generation,
        on_tokens: OnTokens | None = None,
    ) -> list[Rollout]:
        """One rollout per prompt, in order.

        Raises:
            EngineError: the first turn of no row could be written.
            ValueError: no prompts or an empty one, a policy that drops the prompt or has a floor,
                or marks, which need each token as it is sampled.
        """
        if generation.mark is not None:
            raise ValueError("mark: expected none, as the policy's tokens are not known")
        rows = open_rows(prompts, generation, "reprefill", self.vocabulary)
        with ThreadPoolExecutor(min(self.workers, len(rows))) as pool:
            backend = _TextBackend(self, generation, on_tokens, pool)
            return run_turns(rows, backend, respond, generation)

    def reply(self, context: str, generation: Generation) -> tuple[str, bool]:
        """A turn as text, and whether a stop ended it."""
        return closed_by(self.write(context), generation.stop_strings, False)


class ChatEngine(TextEngine):
    """A chat model behind `POST /chat/completions`, which answers in text only.

    Every turn sends the live context as one user message: the prompt, what the retention policy
    keeps, nothing else. See `TextEngine` for what is counted. A reply that is refused or empty ends
    its row.

    Args:
        base_url, model: as for `ServerEngine`.
        tokenizer: as for `TextEngine`: near the model's own if there is one.
        options: further ones of `ServerEngine`: api_key, timeout, turn_timeout, max_bytes, retries,
            workers.

    Raises:
        ImportError: openai is not installed (`pip install mem1-kernels[agent]`).
        ValueError: an argument out of its range.
    """

    def __init__(self, base_url: str, model: str, tokenizer: Any = None, **options: Any) -> None:
        self._server = ServerEngine(base_url, model, None, **options)
        super().__init__(self._write_no_text, tokenizer, workers=self._server.workers)

    def _write_no_text(self, context: str) -> str:
        raise AssertionError("reply asks the server")

    def reply(self, context: str, generation: Generation) -> tuple[str, bool]:
        """A turn as the server writes it, and whether a stop ended it.

        Raises:
            EngineError: the server failed, or its reply cannot be used.
        """
        server = self._server
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


@dataclass
class _TextBackend:
    """The turn loop's backend on a policy of text, which remembers nothing."""

    engine: TextEngine
    generation: Generation
    on_tokens: OnTokens | None
    pool: Executor

    def drop(self, row: RolloutRow, segments: Sequence[int]) -> None:
        """Nothing to do: `write` shows what is left."""

    def read(self, row: RolloutRow, token_ids: Sequence[int]) -> None:
        """Nothing to do: `write` shows it."""

    def retire(self, row: RolloutRow) -> None:
        """Nothing to do: nothing is held of the row."""

    def write(self, rows: Sequence[RolloutRow], number: int) -> list[Written]:
        """One reply per row, several at a time."""

        def reply(row: RolloutRow) -> Written:
            context = row.prompt + row.live_ids()
            try:
                text, closed = self.engine.reply(self._decode(context), self.generation)
            except EngineError as error:
                return Written([], [], closed=False, error=str(error))
            ids = self.engine.tokenizer.encode(text, add_special_tokens=False)
            row.peak_context = max(row.peak_context, len(context) + len(ids))
            if self.on_tokens is not None:
                self.on_tokens(row.index, ids)
            return Written(ids, [math.nan] * len(ids), closed)

        return list(self.pool.map(reply, rows))

    def _decode(self, ids: list[int]) -> str:
        own = self.engine.tokenizer
        silent = {own.bos_token_id, own.eos_token_id, own.pad_token_id}
        return str(
            own.decode([i for i in ids if i not in silent], clean_up_tokenization_spaces=False)
        )


def byte_tokenizer() -> Any:
    """A Hugging Face tokenizer without a file: a token is a byte of UTF-8.

    >>> byte_tokenizer().decode(byte_tokenizer().encode("Zoë"))
    'Zoë'
    """
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: number for number, letter in enumerate(letters, 1)}}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


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
