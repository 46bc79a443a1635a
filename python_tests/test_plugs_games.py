"""Gymnasium's and TextWorld's own environments, played and trained on."""

from __future__ import annotations

import random

import pytest
from agent_models import make_bytes_tokenizer, make_model

from mem1_kernels.agent import Episodes, Generation, HFEngine, MemoryEfficientAgent
from mem1_kernels.plugs import textworld as plug
from mem1_kernels.plugs._game import GAME
from mem1_kernels.plugs.gym import GymnasiumText
from mem1_kernels.ppo.config import Config
from mem1_kernels.ppo.trainer import train


def write(command: str):
    return GAME.parse(f"<think>on</think><act>{command}</act>")


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    pytest.importorskip("textworld")
    return tmp_path_factory.mktemp("games")


@pytest.mark.parametrize("size", [1, 4])
def test_a_walkthrough_wins_the_whole_reward(games, size):
    path = plug.make_game(games, size, 1)
    game = plug.TextWorldGame()
    prompt = game.reset(path)
    commands = plug.walkthrough(path)
    assert len(commands) == size and commands[0] in prompt
    steps = [game.step(write(command)) for command in commands]
    assert [step.done for step in steps] == [False] * (size - 1) + [True]
    assert sum(step.reward for step in steps) == 1.0
    assert steps[-1].scores == {"won": 1.0}


def test_what_is_no_command_costs_a_turn(games):
    game = plug.TextWorldGame(commands=False)
    game.reset(plug.make_game(games, 4, 1))
    for turn in (GAME.parse("hello"), write(""), write("fly to the moon")):
        step = game.step(turn)
        assert step.observation and not step.done and step.reward == 0
        assert "Possible commands" not in step.observation


def test_games_are_those_of_their_seed_and_are_made_once(games):
    first = plug.make_game(games, 3, 5)
    written = first.stat().st_mtime_ns
    assert plug.make_game(games, 3, 5).stat().st_mtime_ns == written
    again = plug.make_game(games.joinpath("again"), 3, 5)
    assert plug.walkthrough(again) == plug.walkthrough(first)
    world = plug.world(games, games=2)
    trained = {world.draw(3, random.Random(seed)) for seed in range(8)}
    measured = {world.draw_eval(3, random.Random(seed)) for seed in range(8)}
    assert len(trained) == len(measured) == 2 and not trained & measured


def test_two_episodes_play_two_games(games):
    paths = [plug.make_game(games, 4, 1), plug.make_game(games, 3, 5)]
    tokenizer = make_bytes_tokenizer()
    engine = HFEngine(make_model(len(tokenizer)), tokenizer)
    episodes = Episodes(plug.TextWorldGame, paths, engine, Generation(max_new_tokens=4))
    won = [plug.walkthrough(path) for path in paths]
    for number in range(3):
        turns = [write(commands[number]) for commands in won]
        steps = episodes.batch.step(turns)
    assert [step.done for step in steps] == [False, True]


def test_errors(games, tmp_path):
    game = plug.TextWorldGame()
    with pytest.raises(RuntimeError, match="step: expected reset"):
        game.step(write("look"))
    with pytest.raises(TypeError, match="task: expected the path of a game, got int"):
        game.reset(3)
    with pytest.raises(FileNotFoundError, match="task: expected the path of a game"):
        game.reset(tmp_path / "no.z8")
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        plug.make_game(tmp_path, 0, 0)


def test_a_model_learns_a_game(games, tmp_path):
    """Random weights lose; after the walkthrough's warm start and two steps of PPO they win."""
    tokenizer = make_bytes_tokenizer()
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    config = Config(
        environment="mem1_kernels.plugs.textworld:world",
        model=str(tmp_path / "model"),
        sizes=(1,),
        sft_steps=60,
        sft_batch=2,
        sft_lr=1e-2,
        steps=2,
        episodes=4,
        minibatch=4,
        max_turns=20,
        max_new_tokens=60,
        temperature=0.5,
        trackers="",
        out=str(tmp_path / "run"),
    )
    world = plug.world(games, games=1, tokenizer=tokenizer)
    before = MemoryEfficientAgent(
        str(tmp_path / "model"),
        tokenizer=tokenizer,
        environment=world.make,
        progress=False,
        max_new_tokens=60,
    )
    task = world.draw(1, random.Random(0))
    assert before.process(task, max_turns=2).reward == 0
    run = train(config, world=world, progress=False)
    assert run.history[-1]["reward"] >= 0.5 and run.history[-1]["log_prob_gap"] < 1e-3
    after = MemoryEfficientAgent(
        run.policy.eval(),
        tokenizer=tokenizer,
        environment=world.make,
        progress=False,
        max_new_tokens=60,
    )
    result = after.process(task)
    assert (result.reward, result.scores) == (1.0, {"won": 1.0})


@pytest.fixture
def taxi():
    gymnasium = pytest.importorskip("gymnasium")
    moves = ["south", "north", "east", "west", "pickup", "dropoff"]

    def make():
        return gymnasium.make("Taxi-v4", render_mode="ansi")

    class Shown(GymnasiumText):
        def __copy__(self):
            return build()

    def build():
        game = make()
        return Shown(
            lambda: game,
            f"Say one of {', '.join(moves)}.",
            act=moves.index,
            show=lambda _: game.render(),
        )

    return build()


def test_a_gymnasium_environment_shown_as_text(taxi):
    prompt = taxi.reset(7)
    assert "Say one of south" in prompt and "+---------+" in prompt
    assert prompt == taxi.reset(7)
    assert taxi.step(write("sideways")).observation == "There is no action 'sideways'."
    step = taxi.step(write("pickup"))
    assert step.reward == -10.0 and not step.done and "(Pickup)" in step.observation
    assert sum(taxi.step(write("dropoff")).done for _ in range(199)) == 1  # the limit of 200 steps


def test_gymnasium_arguments(taxi):
    import gymnasium

    with pytest.raises(TypeError, match="task: expected a seed or None, got 'x'"):
        taxi.reset("x")
    numbers = GymnasiumText(lambda: gymnasium.make("Taxi-v4"), "")
    with pytest.raises(TypeError, match="show: expected a function .* to text, got int"):
        numbers.reset(1)
    with pytest.raises(RuntimeError, match="step: expected reset"):
        numbers.__copy__().step(write("south"))


def test_an_agent_plays_gymnasium(taxi):
    tokenizer = make_bytes_tokenizer()
    agent = MemoryEfficientAgent(
        make_model(len(tokenizer)),
        tokenizer=tokenizer,
        environment=taxi,
        progress=False,
        max_new_tokens=8,
    )
    results = agent.run([1, 2], max_turns=2)
    assert [result.failed for result in results] == [False, False]
    assert results[0].prompt != results[1].prompt
