"""Environments of `verifiers` (Prime Intellect), and their traces as layouts."""

from __future__ import annotations

import asyncio
import copy
import queue
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from mem1_kernels._text import error_text
from mem1_kernels.agent.environment import Step, ToolError
from mem1_kernels.agent.tags import MALFORMED, ParsedTurn, TagSet
from mem1_kernels.plugs._loop import Loop
from mem1_kernels.tree import TokenRow, TreeLayout, pack_tree

REPLY = TagSet(actions={"reply": "reply"}, info="message")
"""The tags of `VerifiersEnv`."""


def _package() -> Any:
    try:
        import verifiers
    except ImportError as error:
        raise ImportError(
            "verifiers is not installed (`pip install mem1-kernels[verifiers]`)"
        ) from error
    return verifiers


class VerifiersEnv:
    """An environment of `verifiers` as one of ours: its rollout, its stops and its rubric.

    What the policy writes between the reply tags is the assistant's message; its state stays
    between it and its context. A task is a row of the environment's dataset: a mapping with
    "prompt", and "answer" and "info" where the rubric reads them. The reward is the rubric's, when
    the rollout is complete, and `scores` are its metrics.

    Args:
        env: a `verifiers` environment that answers in text. What it sends is the text of its
            messages; an image or another part raises.
        timeout: seconds for each of its answers, and for its rubric.

    Raises:
        ImportError: `verifiers` is not installed (`pip install mem1-kernels[verifiers]`).
        TypeError: something else.
        ValueError: an environment with tools, whose calls are no text.
    """

    tags = REPLY

    def __init__(self, env: Any, *, timeout: float = 300.0) -> None:
        package = _package()
        if not isinstance(env, package.Environment):
            raise TypeError(f"env: expected a verifiers Environment, got {type(env).__name__}")
        if env.tool_defs:
            names = [tool.name for tool in env.tool_defs]
            raise ValueError(f"env: expected one without tools, got {names}")
        self.env = env
        self.timeout = timeout
        self._client = _client_class(package)
        self._rollout: _Rollout | None = None

    def __copy__(self) -> VerifiersEnv:
        # An agent copies an environment for each task: each has a rollout of its own.
        return VerifiersEnv(self.env, timeout=self.timeout)

    def tasks(self, number: int = -1) -> list[dict[str, Any]]:
        """The first rows of the environment's dataset; -1: all."""
        return [dict(row) for row in self.env.get_dataset(number)]

    def reset(self, task: Mapping[str, Any]) -> str:
        """Begins a rollout.

        Raises:
            TypeError, ValueError: a task that is no row.
            ToolError: the environment failed.
        """
        if not isinstance(task, Mapping):
            raise TypeError(f"task: expected a row of the dataset, got {type(task).__name__}")
        if "prompt" not in task:
            raise ValueError(f"task: expected a row with 'prompt', got {sorted(task)}")
        self.close()
        row = {"example_id": 0, **copy.deepcopy(dict(task))}
        self._rollout = _Rollout(self.env, self._client, row, self.timeout)
        first = self._rollout.next()
        if first is None:
            raise ToolError("verifiers: the rollout ended before its first turn")
        rules = (
            f"You talk, turn by turn. In every turn, first write <{REPLY.state}> ... "
            f"</{REPLY.state}>. It is your only memory: older turns and messages are removed, so "
            "carry over all that you still need.\nThen write <reply> your message </reply>. What "
            f"comes back stands in <{REPLY.info}> ... </{REPLY.info}>."
        )
        return f"{rules}\n\n{REPLY.guard(first)}\n"

    def step(self, turn: ParsedTurn) -> Step:
        """Sends the policy's message.

        Raises:
            RuntimeError: no episode has begun.
            ToolError: the environment failed.
        """
        if self._rollout is None:
            raise RuntimeError("step: expected reset(task) first")
        if turn.kind == MALFORMED:
            return Step(f"This turn could not be read: {turn.error}.")
        said = self._rollout.next(str(turn.payload))
        if said is not None:
            return Step(said)
        reward, metrics = self._rollout.score()
        self.close()
        return Step("", reward, True, metrics)

    def close(self) -> None:
        """Ends a rollout that is not complete."""
        rollout, self._rollout = self._rollout, None
        if rollout is not None:
            rollout.close()


class _Rollout:
    """One rollout of `verifiers` in a thread of its own, whose model is whoever calls `next`."""

    def __init__(self, env: Any, client: Any, row: dict[str, Any], timeout: float) -> None:
        self.env, self.timeout = env, timeout
        self.shown = 0
        self.asked: queue.Queue[Any] = queue.Queue()
        self.loop = Loop()
        self.reply: asyncio.Future[str] | None = None
        self.state: Any = None
        self.work = self.loop.start(env.rollout(row, client(self._generate), "policy"))
        self.work.add_done_callback(lambda done: self.asked.put(None))

    async def _generate(self, messages: Sequence[Any]) -> str:
        self.reply = asyncio.get_running_loop().create_future()
        self.asked.put(list(messages))
        return await self.reply

    def next(self, said: str | None = None) -> str | None:
        """What the environment says next; None where the rollout is complete."""
        if said is not None:
            self.loop.run(self._answer(said))
        try:
            messages = self.asked.get(timeout=self.timeout)
        except queue.Empty:
            raise ToolError(f"verifiers: no answer within {self.timeout:g} s") from None
        if messages is None:
            try:
                self.state = self.work.result()
            except Exception as error:
                raise ToolError(f"verifiers: {error_text(error)}") from None
            failure = self.state.get("error")
            if failure is not None:
                raise ToolError(f"verifiers: {error_text(failure)}")
            return None
        new, self.shown = messages[self.shown :], len(messages) + 1  # our reply comes between
        return "\n\n".join(_text_of(message) for message in new)

    async def _answer(self, said: str) -> None:
        assert self.reply is not None
        self.reply.set_result(said)

    def score(self) -> tuple[float, dict[str, float]]:
        try:
            self.loop.run(self.env.rubric.score_rollout(self.state), self.timeout)
        except Exception as error:
            raise ToolError(f"verifiers: its rubric: {error_text(error)}") from None
        metrics = {name: float(value) for name, value in (self.state["metrics"] or {}).items()}
        return float(self.state["reward"]), metrics

    def close(self) -> None:
        if not self.work.done():
            self.work.cancel()
        self.loop.close()


def _text_of(message: Any) -> str:
    content = getattr(message, "content", None)
    if isinstance(content, str):
        return content
    parts = [getattr(part, "text", None) for part in content or ()]
    if not all(isinstance(part, str) for part in parts):
        raise ToolError(f"verifiers: expected messages of text, got {content!r:.200}")
    return "\n".join(str(part) for part in parts)


def _client_class(package: Any) -> Any:
    """A client of `verifiers` that asks a function for each message."""
    from verifiers.types import Response, ResponseMessage

    class PolicyClient(package.Client):
        def __init__(self, generate: Any) -> None:
            super().__init__(generate)

        def setup_client(self, config: Any) -> Any:
            raise TypeError("the policy has no address")

        async def to_native_tool(self, tool: Any) -> Any:
            raise TypeError(f"env: expected no tools, got {tool.name!r}")

        async def to_native_prompt(self, messages: Any) -> tuple[Any, dict[str, Any]]:
            return messages, {}

        async def get_native_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **kwargs: Any
        ) -> str:
            return str(await self.client(prompt))

        async def raise_from_native_response(self, response: Any) -> None:
            """Nothing to check: it is a text."""

        async def from_native_response(self, response: str) -> Any:
            message = ResponseMessage(content=response, finish_reason="stop", is_truncated=False)
            return Response(id=uuid.uuid4().hex, created=0, model="policy", message=message)

        async def close(self) -> None:
            """Nothing to close."""

    return PolicyClient


def trace_rows(states: Sequence[Mapping[str, Any]]) -> list[TokenRow]:
    """The rows of `verifiers` rollouts: one per step, whose completion is in the loss.

    A step is in the loss as its `completion_mask` says, with the log-probs that it was sampled
    with. All steps of a rollout have its `trajectory_id` as their `sample`.

    Args:
        states: rollouts (`State`), or what they hold under "trajectory": steps with "tokens", as
            clients that return token ids give them.

    Raises:
        ValueError: a step without token ids; names the rollout and the step.

    >>> tokens = {"prompt_ids": [1, 2], "prompt_mask": [0, 0], "completion_ids": [3],
    ...           "completion_mask": [1], "completion_logprobs": [-0.5]}
    >>> state = {"trajectory": [{"tokens": tokens, "trajectory_id": "a"}]}
    >>> (row,) = trace_rows([state])
    >>> row.token_ids.tolist(), row.loss_mask.tolist(), row.log_probs.tolist()
    ([1, 2, 3], [False, False, True], [0.0, 0.0, -0.5])
    """
    rows = []
    for number, state in enumerate(states):
        for at, step in enumerate(state["trajectory"]):
            tokens = step.get("tokens")
            if tokens is None:
                raise ValueError(
                    f"states: expected token ids in rollout {number}, step {at}, got none; use a "
                    "client that returns them"
                )
            before = [0] * len(tokens["prompt_ids"])
            rows.append(
                TokenRow(
                    [*tokens["prompt_ids"], *tokens["completion_ids"]],
                    [bool(m) for m in [*before, *tokens["completion_mask"]]],
                    log_probs=[*map(float, before), *tokens["completion_logprobs"]],
                    sample=step.get("trajectory_id", number),
                )
            )
    return rows


def trace_layout(states: Sequence[Mapping[str, Any]]) -> TreeLayout:
    """`verifiers` rollouts as one prefix tree: what their steps have in common stands once.

    Args:
        states: as for `trace_rows`.

    Raises:
        ValueError: a step without token ids, or no steps.
    """
    return pack_tree(trace_rows(states))
