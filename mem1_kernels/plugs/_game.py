"""What the adapters to games share: commands as text, one per turn."""

from __future__ import annotations

from mem1_kernels.agent.environment import Step
from mem1_kernels.agent.tags import MALFORMED, ParsedTurn, TagSet

GAME = TagSet(actions={"act": "act"}, info="game")
"""The tags of games."""


def game_prompt(rules: str, first: str) -> str:
    """The format, the rules, and what is seen first; tags in the last two are defused."""
    parts = [GAME.guard(part).strip() for part in (rules, first)]
    return (
        f"You play a game, turn by turn. In every turn, first write <{GAME.state}> ... "
        f"</{GAME.state}>. It is your only memory: older turns and what you saw in them are "
        "removed, so carry over all that you still need.\n"
        f"Then write <act> one command </act>. What happens comes back in <{GAME.info}> ... "
        f"</{GAME.info}>.\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    )


def unreadable(turn: ParsedTurn) -> Step | None:
    """What answers a turn that holds no command: it costs a turn and ends nothing."""
    if turn.kind == MALFORMED:
        return Step(f"This turn could not be read: {turn.error}.")
    return None if turn.payload else Step("The command was empty.")
