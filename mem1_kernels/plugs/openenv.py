"""An OpenEnv server as an environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mem1_kernels._secrets import public_address
from mem1_kernels._text import error_text
from mem1_kernels.agent.environment import Step, ToolError
from mem1_kernels.agent.tags import ParsedTurn
from mem1_kernels.plugs._game import GAME, game_prompt, unreadable


class OpenEnv:
    """An environment that an OpenEnv server runs, over a session of its own per episode.

    A task is None, or a mapping of what the server's `reset` takes, such as `{"seed": 3}`.

    Args:
        address: of the server, such as "http://127.0.0.1:8000".
        rules: what the policy is told of the environment.
        act: the policy's text -> the fields of an action; ValueError says that there is none.
            Default: the text as a JSON object.
        show: the fields of an observation -> text. Default: the field "text" or "message", else
            the fields as JSON.
        timeout: seconds for each exchange.

    Raises:
        ImportError: `openenv` is not installed (`pip install mem1-kernels[openenv]`).
    """

    tags = GAME

    def __init__(
        self,
        address: str,
        rules: str,
        *,
        act: Callable[[str], dict[str, Any]] | None = None,
        show: Callable[[Mapping[str, Any]], str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        try:
            from openenv.core import GenericEnvClient
        except ImportError as error:
            raise ImportError(
                "openenv is not installed (`pip install mem1-kernels[openenv]`)"
            ) from error
        self._connect = GenericEnvClient
        self.address = address
        self.rules = rules
        self.act = act or _json_object
        self.show = show or _shown
        self.timeout = timeout
        self._session: Any = None

    def __copy__(self) -> OpenEnv:
        # An agent copies an environment for each task: each has a session of its own.
        return OpenEnv(self.address, self.rules, act=self.act, show=self.show, timeout=self.timeout)

    def reset(self, task: Mapping[str, Any] | None = None) -> str:
        """Begins an episode in a new session.

        Raises:
            TypeError: a task that is no mapping.
            ToolError: no server there, or one that refuses.
        """
        if not isinstance(task, Mapping | None):
            raise TypeError(f"task: expected a mapping or None, got {type(task).__name__}")
        self.close()
        client = self._connect(
            self.address, connect_timeout_s=self.timeout, message_timeout_s=self.timeout
        )
        self._session = client.sync()
        try:
            self._session.connect()
            result = self._session.reset(**dict(task or {}))
        except Exception as error:
            self.close()
            raise self._error(error) from None
        return game_prompt(self.rules, self.show(result.observation))

    def step(self, turn: ParsedTurn) -> Step:
        """Sends one action.

        Raises:
            RuntimeError: no episode has begun.
            ToolError: the server is gone, or refuses.
        """
        if self._session is None:
            raise RuntimeError("step: expected reset(task) first")
        if (answer := unreadable(turn)) is not None:
            return answer
        try:
            action = self.act(str(turn.payload))
        except ValueError as error:
            return Step(f"There is no such action: {error}.")
        try:
            result = self._session.step(action)
        except Exception as error:
            self.close()
            raise self._error(error) from None
        if result.done:
            self.close()
        return Step(self.show(result.observation), float(result.reward or 0.0), bool(result.done))

    def close(self) -> None:
        """Ends the session, if one is open."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _error(self, error: Exception) -> ToolError:
        return ToolError(f"OpenEnv server {public_address(self.address)}: {error_text(error)}")


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _shown(observation: Mapping[str, Any]) -> str:
    for name in ("text", "message"):
        if isinstance(observation.get(name), str):
            return str(observation[name])
    return json.dumps(observation, ensure_ascii=False, default=str)
