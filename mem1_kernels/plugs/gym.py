"""Gymnasium's environments whose observations are text, or can be shown as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.tags import ParsedTurn
from mem1_kernels.plugs._game import GAME, game_prompt, unreadable


class GymnasiumText:
    """A Gymnasium environment (`reset(seed=)`, `step` with five values) as one of ours.

    A task is the seed of an episode, or None. The rewards of the steps add up. An action that
    `act` cannot read comes back as text and costs a turn.

    Args:
        make: () -> an environment of Gymnasium; called once per copy of this one.
        rules: what the policy is told of the game, the actions included.
        act: the policy's text -> an action; ValueError and KeyError say that there is none.
            Default: the text itself, for action spaces of text.
        show: an observation -> text. Default: the observation, which must be text.

    >>> class Guess:                                  # stands in for gymnasium.make("...")
    ...     def reset(self, *, seed=None, options=None):
    ...         return "Heads or tails?", {}
    ...     def step(self, action):
    ...         return "", float(action == 0), True, False, {}
    >>> game = GymnasiumText(Guess, "Say heads or tails.", act={"heads": 0, "tails": 1}.__getitem__)
    >>> game.reset(3).endswith("Say heads or tails.\\n\\nHeads or tails?\\n")
    True
    >>> game.step(GAME.parse("<think>?</think><act>edge</act>")).observation
    "There is no action 'edge'."
    >>> game.step(GAME.parse("<think>?</think><act>heads</act>")).reward
    1.0
    """

    tags = GAME

    def __init__(
        self,
        make: Callable[[], Any],
        rules: str,
        *,
        act: Callable[[str], Any] = str,
        show: Callable[[Any], str] | None = None,
    ) -> None:
        self.make = make
        self.rules = rules
        self.act = act
        self.show = show
        self._game: Any = None

    def __copy__(self) -> GymnasiumText:
        # An agent copies an environment for each task: each plays a game of its own.
        return GymnasiumText(self.make, self.rules, act=self.act, show=self.show)

    def reset(self, task: int | None = None) -> str:
        """Begins an episode with a seed.

        Raises:
            TypeError: a seed of another type; an observation that is not text.
        """
        if isinstance(task, bool) or not isinstance(task, int | None):
            raise TypeError(f"task: expected a seed or None, got {task!r}")
        if self._game is None:
            self._game = self.make()
        observation, _ = self._game.reset(seed=task)
        return game_prompt(self.rules, self._text(observation))

    def step(self, turn: ParsedTurn) -> Step:
        """Does one action.

        Raises:
            RuntimeError: no episode has begun.
            TypeError: an observation that is not text.
        """
        if self._game is None:
            raise RuntimeError("step: expected reset(task) first")
        if (answer := unreadable(turn)) is not None:
            return answer
        try:
            action = self.act(str(turn.payload))
        except (KeyError, ValueError):
            return Step(f"There is no action {str(turn.payload)!r:.200}.")
        observation, reward, terminated, truncated, _ = self._game.step(action)
        return Step(self._text(observation), float(reward), bool(terminated or truncated))

    def _text(self, observation: Any) -> str:
        text = observation if self.show is None else self.show(observation)
        if not isinstance(text, str):
            raise TypeError(
                f"show: expected a function from observations to text, got {type(text).__name__}"
            )
        return text
