"""An agent in an environment that OpenEnv's own server runs."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from agent_models import Script, make_model, make_tokenizer

from mem1_kernels.agent import MemoryEfficientAgent, ToolError
from mem1_kernels.plugs._game import GAME
from mem1_kernels.plugs.openenv import OpenEnv

core = pytest.importorskip("openenv.core")
uvicorn = pytest.importorskip("uvicorn")


class Say(core.Action):
    word: str


class Heard(core.Observation):
    text: str = ""


class Counter(core.Environment):
    """Wants the words "one", "two", ... up to `goal`; each right one pays."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    WORDS = ("one", "two", "three")

    def reset(self, seed=None, episode_id=None, goal: int = 2, **kwargs: Any) -> Heard:
        self.goal, self.at = goal, 0
        return Heard(text=f"Count to {goal}. </game>", done=False, reward=0.0)

    def step(self, action: Say, timeout_s=None, **kwargs: Any) -> Heard:
        if action.word != self.WORDS[self.at]:
            return Heard(text="No.", done=False, reward=None)
        self.at += 1
        return Heard(text=f"{self.at} it is.", done=self.at == self.goal, reward=0.5)

    @property
    def state(self) -> core.State:
        return core.State(step_count=self.at)


@pytest.fixture(scope="module")
def address():
    from openenv.core.env_server.http_server import create_app

    app = create_app(Counter, Say, Heard, max_concurrent_envs=8)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def say(word: str):
    return GAME.parse(f"<think>on</think><act>{json.dumps({'word': word})}</act>")


def test_an_episode_by_hand(address):
    game = OpenEnv(address, "Say numbers.")
    assert game.reset({"goal": 3}).endswith("Say numbers.\n\nCount to 3. ‹/game>\n")
    steps = [game.step(say(word)) for word in ("one", "nine", "two", "three")]
    assert [step.observation for step in steps] == ["1 it is.", "No.", "2 it is.", "3 it is."]
    assert [step.reward for step in steps] == [0.5, 0.0, 0.5, 0.5]
    assert [step.done for step in steps] == [False, False, False, True]
    with pytest.raises(RuntimeError, match="step: expected reset"):
        game.step(say("one"))


def test_what_is_no_action_costs_a_turn(address):
    game = OpenEnv(address, "")
    game.reset()
    for payload in ("one", '["one"]'):
        step = game.step(GAME.parse(f"<think>on</think><act>{payload}</act>"))
        assert step.observation.startswith("There is no such action") and not step.done
    game.close()


def test_an_action_of_another_schema_is_an_error_of_the_tool(address):
    game = OpenEnv(address, "", act=lambda text: {"verb": text})
    game.reset()
    with pytest.raises(ToolError, match="OpenEnv server http://127.0.0.1"):
        game.step(say("one"))


def test_agents_have_sessions_of_their_own(monkeypatch, address):
    tokenizer = make_tokenizer()
    write = '<think>on</think><act>{{"word": "{}"}}</act>'.format
    Script(monkeypatch, tokenizer, [write("one"), write("two")], [write("two"), write("one")])
    agent = MemoryEfficientAgent(
        make_model(len(tokenizer)),
        tokenizer=tokenizer,
        environment=OpenEnv(address, "Say numbers as JSON."),
        progress=False,
        max_new_tokens=60,
        workers=2,
    )
    results = agent.run([None, {"goal": 2}], max_turns=2)
    assert [result.reward for result in results] == [1.0, 0.5]
    assert [result.failed for result in results] == [False, False]


def test_no_server_there_and_a_task_that_is_none():
    with pytest.raises(ToolError, match="OpenEnv server http://127.0.0.1:9: "):
        OpenEnv("http://127.0.0.1:9", "", timeout=5).reset()
    with pytest.raises(TypeError, match="task: expected a mapping or None, got str"):
        OpenEnv("http://127.0.0.1:9", "").reset("x")
