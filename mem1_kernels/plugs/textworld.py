"""TextWorld's games, to evaluate and to train on.

    python -m mem1_kernels.ppo --environment mem1_kernels.plugs.textworld:world --model ...

A game's size is the number of commands that its quest takes.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mem1_kernels._text import valid_text
from mem1_kernels.agent.environment import Step, observation_ids
from mem1_kernels.agent.tags import ParsedTurn
from mem1_kernels.agent.text import TextCodec
from mem1_kernels.agent.world import World
from mem1_kernels.plugs._game import GAME, game_prompt, unreadable
from mem1_kernels.retention import Segment
from mem1_kernels.rollout.engine import check_count

_HELD_OUT = 1_000_000  # seeds of the evaluation's games begin here


def _package() -> Any:
    try:
        import textworld
    except ImportError as error:
        raise ImportError(
            "textworld is not installed (`pip install mem1-kernels[textworld]`)"
        ) from error
    return textworld


class TextWorldGame:
    """One game of TextWorld per episode. A task is the path of a game (`.z8`, `.ulx`, `.json`).

    The reward of a command is what it adds to the score, as a share of the highest score. At the
    end, `scores` holds "won".

    Args:
        commands: show the commands that are possible now with every observation.

    Raises:
        ImportError: `textworld` is not installed (`pip install mem1-kernels[textworld]`).
    """

    tags = GAME

    def __init__(self, *, commands: bool = True) -> None:
        self._textworld = _package()
        self.commands = commands
        self._game: Any = None

    def __copy__(self) -> TextWorldGame:
        # An agent copies an environment for each task: each plays a game of its own.
        return TextWorldGame(commands=self.commands)

    def reset(self, task: str | Path) -> str:
        """Begins a game.

        Raises:
            TypeError: a task that is not a path.
            FileNotFoundError: no game there.
        """
        if not isinstance(task, str | Path):
            raise TypeError(f"task: expected the path of a game, got {type(task).__name__}")
        if not Path(task).is_file():
            raise FileNotFoundError(f"task: expected the path of a game, got {str(task)!r}")
        if self._game is not None:
            self._game.close()
        wanted = self._textworld.EnvInfos(
            admissible_commands=True,
            description=True,
            max_score=True,
            objective=True,
            score=True,
            won=True,
            lost=True,
        )
        self._game = self._textworld.start(str(task), wanted)
        state = self._game.reset()
        self._score = state.score or 0
        self._most = state.max_score
        return game_prompt(str(state.objective), self._seen(state, str(state.description)))

    def step(self, turn: ParsedTurn) -> Step:
        """Sends one command to the game.

        Raises:
            RuntimeError: no game has begun.
        """
        if self._game is None:
            raise RuntimeError("step: expected reset(task) first")
        if (answer := unreadable(turn)) is not None:
            return answer
        state, score, done = self._game.step(" ".join(str(turn.payload).split()))
        gain, self._score = (score or 0) - self._score, score or 0
        reward = gain / self._most if self._most else float(bool(state.won))
        scores = {"won": float(bool(state.won))} if done else {}
        return Step(self._seen(state, str(state.feedback)), reward, bool(done), scores)

    def _seen(self, state: Any, text: str) -> str:
        lines = [line.strip() for line in valid_text(text).splitlines() if line.strip()]
        if self.commands:
            lines.append(f"Possible commands: {', '.join(state.admissible_commands)}")
        return "\n".join(lines)


def make_game(folder: str | Path, size: int, seed: int) -> Path:
    """Writes a game whose quest takes `size` commands, and returns its path. It takes seconds.

    Args:
        folder: where games are kept; a game that is there is not made again.
        size: commands of the quest; the world has `max(1, size // 2)` rooms and `size` objects.
        seed: another seed, another game.

    Raises:
        ImportError: `textworld` is not installed.
        ValueError: a size < 1 or a negative seed.
    """
    check_count("size", size)
    check_count("seed", seed, 0)
    textworld = _package()
    path = Path(folder) / f"quest-{size}-{seed}.z8"
    if not path.is_file():
        options = textworld.GameOptions()
        options.path = str(path)
        options.seeds = seed
        options.nb_rooms = max(1, size // 2)
        options.nb_objects = size
        options.quest_length = size
        textworld.make(options)
    return path


def walkthrough(path: str | Path) -> list[str]:
    """The commands that win a game from its beginning, as TextWorld knows them.

    Raises:
        ImportError: `textworld` is not installed.
        ValueError: a game that has none.
    """
    textworld = _package()
    game = textworld.start(str(path), textworld.EnvInfos(extras=["walkthrough"]))
    commands = game.reset()["extra.walkthrough"]
    game.close()
    if not commands:
        raise ValueError(f"path: expected a game with a walkthrough, got {str(path)!r}")
    return list(commands)


@cache
def _games() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="textworld-")


def demonstrate(
    path: str | Path, tokenizer: Any, *, max_turns: int = 20, max_info_tokens: int = 600
) -> tuple[list[Segment], float]:
    """A game played by its walkthrough: the segments, with ids, and the reward.

    The state of each turn is the number of commands so far.

    Args:
        path: of the game.
        tokenizer: a Hugging Face tokenizer.
        max_turns, max_info_tokens: of the rollouts that it stands beside; observations say how many
            turns are left.

    Raises:
        ImportError: `textworld` is not installed.
        ValueError: a game without a walkthrough, or one of more than `max_turns` commands.
    """
    commands = walkthrough(path)
    if len(commands) > max_turns:
        raise ValueError(f"max_turns: expected at least {len(commands)}, got {max_turns}")
    game, codec = TextWorldGame(), TextCodec(tokenizer, GAME)
    segments = [Segment("prompt", codec.prompt(game.reset(path)))]
    reward = 0.0
    for number, command in enumerate(commands, 1):
        state, action = f"<think>{number - 1}</think>", f"<act>{command}</act>"
        opened = codec.opened.strip()  # a tag that the chat template has written already
        written = codec.encode_trusted(state.removeprefix(opened))
        segments.append(Segment("state", written, number))
        segments.append(Segment("action", codec.encode_trusted(action), number))
        step = game.step(GAME.parse(state + action))
        reward += step.reward
        if step.done:
            break
        seen = observation_ids(
            step.observation,
            GAME,
            codec=codec,
            max_tokens=max_info_tokens,
            turns_left=max_turns - number,
        )
        segments.append(Segment("info", seen, number))
    return segments, reward


def world(folder: str | Path | None = None, *, games: int = 20, tokenizer: Any = None) -> World:
    """TextWorld as a world, for `evaluate` and `--environment`.

    With a tokenizer it has a teacher, for the warm start: the walkthroughs.

    Args:
        folder: where games are kept. Default: a folder that is deleted when the program ends.
        games: how many there are to train on, per size; as many others are for evaluation.
        tokenizer: as for `World`.

    Raises:
        ImportError: `textworld` is not installed.
        ValueError: games < 1.
    """
    check_count("games", games)
    _package()
    place = Path(_games().name if folder is None else folder)

    def draw(size: int, rng: random.Random) -> Path:
        return make_game(place, size, rng.randrange(games))

    def draw_eval(size: int, rng: random.Random) -> Path:
        return make_game(place, size, _HELD_OUT + rng.randrange(games))

    def teach(path: Path, rng: random.Random) -> tuple[list[Segment], float]:
        return demonstrate(path, tokenizer)

    return World(
        draw=draw,
        make=TextWorldGame,
        demonstrate=None if tokenizer is None else teach,
        draw_eval=draw_eval,
        tokenizer=tokenizer,
    )
