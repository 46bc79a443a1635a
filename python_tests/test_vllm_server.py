"""A real vLLM server with sessions: exact, streamed, asked twice, left alone.

Run by `make test-vllm`, in an environment that has vLLM.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")

import httpx
from agent_models import make_tokenizer
from vllm_models import (
    FP32,
    GENERATION,
    LAST_TURNS,
    PROMPTS,
    differences,
    load,
    running,
    save_model,
    world,
)

from mem1_kernels import fold, keep_last, mem1, memento
from mem1_kernels.agent import BM25, MemoryEfficientAgent, Passage
from mem1_kernels.rollout import EngineError, ServerEngine
from mem1_kernels.vllm import VLLMServerEngine

IDLE = 6.0


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return save_model(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def url(folder):
    with running(folder, "--max-num-seqs", "8", MEM1_SESSION_IDLE=str(IDLE)) as address:
        yield address


def sessions_at(url: str) -> int:
    return httpx.get(f"{url}/v1/mem1").json()["sessions"]


def blocks_and_summaries(ids: list[int]) -> str | None:
    return {4: "block"}.get(len(ids)) if ids[0] % 2 else {2: "summary"}.get(len(ids))


POLICIES = {
    "mem1": {"retention": mem1},
    "keep_last": {"retention": keep_last(2)},
    "fold": {
        "retention": fold,
        "depth": lambda turn: turn.depth + (turn.number % 4 == 2) - (turn.number % 4 == 0),
    },
    "memento": {"retention": memento, "mark": blocks_and_summaries},
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_log_probs_are_those_of_the_masked_forward_pass(url, model, policy, streamed):
    heard: dict[int, list[int]] = {row: [] for row in range(4)}
    rollouts = VLLMServerEngine(url).run(
        PROMPTS,
        world(LAST_TURNS),
        replace(GENERATION, **POLICIES[policy]),
        (lambda row, ids: heard[row].extend(ids)) if streamed else None,
    )
    assert [len(rollout.turns) for rollout in rollouts] == LAST_TURNS
    assert [rollout.error for rollout in rollouts] == [""] * 4
    assert float(differences(model, rollouts).max()) <= FP32
    written = [[i for turn in rollout.turns for i in turn.token_ids] for rollout in rollouts]
    assert list(heard.values()) == (written if streamed else [[]] * 4)
    assert sessions_at(url) == 0


def test_turns_end_at_texts_of_several_tokens(url, model, tokenizer):
    stop = "ab"
    generation = replace(
        GENERATION, stop_ids=(), stop_strings=(stop, "er", "i", "o"), max_new_tokens=40
    )
    rollouts = VLLMServerEngine(url, tokenizer).run(PROMPTS, world(LAST_TURNS), generation)
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    assert any(turn.closed for turn in turns)
    for turn in turns:
        ends = [stop in tokenizer.decode(turn.token_ids) for stop in generation.stop_strings]
        before = tokenizer.decode(turn.token_ids[:-1])
        assert turn.closed == any(ends)
        assert not any(stop in before for stop in generation.stop_strings)
    assert float(differences(model, rollouts).max()) <= FP32


def test_the_stock_server_engine_and_the_sessions_are_at_the_same_address(url, model, folder):
    engine = ServerEngine(f"{url}/v1", folder)
    rollouts = engine.run(PROMPTS, world(LAST_TURNS), replace(GENERATION, seed=None))
    assert {rollout.positions for rollout in rollouts} == {"reprefill"}
    assert float(differences(model, rollouts).max()) <= FP32


STEP = {"chunks": [{"token_ids": list(range(20, 40)), "max_tokens": 12}], "stop_token_ids": []}


def post(url, name, number, **changes):
    address = f"{url}/v1/mem1/sessions/{name}/steps/{number}"
    return httpx.post(address, json=STEP | changes, timeout=60)


def test_a_step_that_is_asked_for_again_is_not_computed_again(url):
    answers = [post(url, "twice", 1) for _ in range(2)]
    assert answers[0].status_code == 200 and answers[0].json() == answers[1].json()
    assert len(answers[0].json()["token_ids"]) == 12
    both: list[dict] = []
    threads = [
        threading.Thread(target=lambda: both.append(post(url, "twice", 2).json())) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert both[0] == both[1] == both[2] and "error" not in both[0]
    assert post(url, "twice", 2, temperature=0.5).status_code == 409
    assert post(url, "twice", 1).status_code == 409
    assert post(url, "twice", 4).status_code == 409
    assert httpx.delete(f"{url}/v1/mem1/sessions/twice").json() == {"closed": True}
    assert httpx.delete(f"{url}/v1/mem1/sessions/twice").json() == {"closed": False}
    assert post(url, "twice", 3).status_code == 409


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_loses_connections_gets_exact_turns(url, model, monkeypatch, streamed):
    """The first reply to every step is lost on its way, whole or in the middle of the stream."""
    engine = VLLMServerEngine(url, retries=1)
    send = engine._client.stream
    lost: set[str] = set()

    @contextlib.contextmanager
    def lossy(method, path, **options):
        with send(method, path, **options) as reply:
            if method == "POST" and path not in lost:
                lost.add(path)
                lines = reply.iter_lines()
                kept = [next(lines) for _ in range(3 if streamed else 0)]

                def cut():
                    yield from kept
                    raise httpx.ReadError("lost")

                reply.iter_lines = cut
            yield reply

    monkeypatch.setattr(engine._client, "stream", lossy)
    monkeypatch.setattr("mem1_kernels.vllm.client.time.sleep", lambda _: None)
    heard: dict[int, list[int]] = {row: [] for row in range(4)}
    rollouts = engine.run(
        PROMPTS,
        world(LAST_TURNS),
        GENERATION,
        (lambda row, ids: heard[row].extend(ids)) if streamed else None,
    )
    assert len(lost) > 20
    assert [rollout.error for rollout in rollouts] == [""] * 4
    assert float(differences(model, rollouts).max()) <= FP32
    written = [[i for turn in rollout.turns for i in turn.token_ids] for rollout in rollouts]
    assert list(heard.values()) == (written if streamed else [[]] * 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunks": []}, "chunks: expected a list of at least one chunk"),
        ({"chunks": [{"token_ids": []}]}, "token_ids: expected a list of at least 1"),
        ({"chunks": [{"token_ids": [1], "max_tokens": 0}]}, "max_tokens: expected 1 or more"),
        ({"chunks": [{"token_ids": [1], "drop": [[2, 1]]}]}, "drop: expected pairs"),
        ({"stop": ["a", ""]}, "stop: expected a list of texts"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_a_bad_step_is_refused_and_opens_nothing(url, changes, said):
    reply = post(url, "bad", 1, **changes)
    assert reply.status_code == 400 and said in reply.json()["error"]
    assert sessions_at(url) == 0


def test_a_session_that_cannot_go_on_says_why_and_the_others_go_on(url, model):
    rollouts = VLLMServerEngine(url).run(
        [PROMPTS[0], [40] * 300],
        world([3, 40], 30),
        replace(GENERATION, retention=keep_last(60), max_turns=40, stop_ids=()),
    )
    assert rollouts[0].error == "" and "max_model_len" in rollouts[1].error
    with pytest.raises(EngineError, match="512"):
        VLLMServerEngine(url).run([[40] * 600], world([2]), GENERATION)
    assert sessions_at(url) == 0


def test_sessions_left_alone_are_closed_and_more_than_fit_are_refused(url):
    for index in range(8):
        assert post(url, f"left-{index}", 1).status_code == 200
    reply = post(url, "one-more", 1)
    assert reply.status_code == 429 and "max_num_seqs=8" in reply.json()["error"]
    for _ in range(100):
        if sessions_at(url) == 0:
            break
        time.sleep(0.2)
    assert sessions_at(url) == 0
    assert post(url, "left-0", 2).status_code == 409


def test_an_agent_on_the_server_by_its_address(url, folder, model):
    agent = MemoryEfficientAgent(
        folder,
        engine=f"vllm+{url}",
        environment=BM25([Passage("1", "A lake", "It is deep.")]),
        progress=False,
        max_new_tokens=24,
        temperature=1.0,
    )
    result = agent.process(queries=["What is it?"], max_turns=3)
    assert result.turns and result.rollout.positions == "kept"
    assert float(differences(model, [result.rollout]).max()) <= FP32


def test_a_server_that_is_not_there():
    engine = VLLMServerEngine("http://127.0.0.1:9", retries=0)
    with pytest.raises(EngineError, match=r"server http://127\.0\.0\.1:9: no connection"):
        engine.run(PROMPTS, world(LAST_TURNS), GENERATION)
