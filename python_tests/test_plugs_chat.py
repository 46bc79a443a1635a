"""A chat model as the policy: a scripted server that answers in text only."""

from __future__ import annotations

import pytest
from agent_models import make_bytes_tokenizer
from local_server import serve

from mem1_kernels.agent import BM25, EngineError, MemoryEfficientAgent, Passage, QATask
from mem1_kernels.plugs.chat import ChatEngine

CORPUS = BM25(
    [Passage("1", "Chad\nIts capital is N'Djamena."), Passage("2", "Mali\nBamako, Niger.")]
)
TASK = QATask(("Capital of Chad?", "Of Mali?"), (("N'Djamena",), ("Bamako",)))
TURNS = [
    "<think>None.</think><search>Chad capital",
    "<think>Chad: N'Djamena.</think><search>Mali Bamako</search> and so on",
    "<think>Both.</think><answer>N'Djamena; Bamako",
]


def chat(script):
    """/chat/completions: `script(context)` -> text, or (text, finish reason), or a message."""

    def answer(request):
        assert request.path == "/v1/chat/completions"
        reply = script(request.json["messages"][0]["content"])
        if isinstance(reply, tuple) and isinstance(reply[0], int):
            return reply
        text, finish = reply if isinstance(reply, tuple) else (reply, "stop")
        message = text if isinstance(text, dict) else {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [choice],
        }

    return answer


def scripted(context: str) -> str:
    if "Chad: N'Djamena." in context:
        return TURNS[2]
    return TURNS[1] if "<think>None.</think>" in context else TURNS[0]


@pytest.fixture
def make_agent():
    def make(url: str, **options) -> MemoryEfficientAgent:
        engine = ChatEngine(f"{url}/v1", "m", make_bytes_tokenizer(), retries=0)
        return MemoryEfficientAgent(
            None, engine=engine, environment=CORPUS, progress=False, **options
        )

    return make


def test_an_episode(make_agent):
    pieces = []
    with serve(chat(scripted)) as server:
        agent = make_agent(server.url, seed=3, on_text=lambda place, text: pieces.append(text))
        result = agent.run([TASK], max_turns=5)[0]
    assert result.answers == ["N'Djamena", "Bamako"] and result.reward == 1.0
    assert [turn.closed for turn in result.turns] == [True] * 3
    assert "".join(pieces) == "".join(turn.text for turn in result.turns)
    sent = [request.json for request in server.requests]
    assert all(s["stop"] == ["</search>", "</answer>"] and s["seed"] == 3 for s in sent)
    contexts = [s["messages"][0]["content"] for s in sent]
    assert contexts[0] == result.prompt
    assert TURNS[0] in contexts[1] and "N'Djamena" in contexts[1]
    assert TURNS[0] not in contexts[2], "the older turn is never sent"
    assert result.peak_context < result.total_tokens
    assert result.rollout.log_probs[result.rollout.sampled].isnan().all()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (({"role": "assistant", "content": None, "refusal": "I will not."}, "stop"), "I will not"),
        ("", "expected a reply of text, got ''"),
        (("<think>", "content_filter"), "ends by stop or length, got 'content_filter'"),
        ((500, {"error": {"message": "out of order"}}), "out of order"),
    ],
)
def test_a_reply_that_is_none_ends_its_row(make_agent, reply, message):
    def script(context):
        return reply if "Chad" in context else TURNS[2]

    with serve(chat(script)) as server:
        other = QATask(("What?", "Why?"))
        bad, good = make_agent(server.url).run([TASK, other], max_turns=2)
        assert message in bad.error and bad.failed
        assert good.answers == ["N'Djamena", "Bamako"] and not good.error
        with pytest.raises(EngineError, match="server http://127.0.0.1"):
            make_agent(server.url).run([TASK], max_turns=2)


def test_a_turn_cut_by_its_length_is_not_closed(make_agent):
    with serve(chat(lambda context: ("<think>On and on</think><answer>a; b", "length"))) as server:
        result = make_agent(server.url).run([TASK], max_turns=1)[0]
    assert [turn.closed for turn in result.turns] == [False]


def test_arguments(make_agent):
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        ChatEngine("http://127.0.0.1:9/v1", "m", workers=0)
    with pytest.raises(ValueError, match="mark: expected none"):
        make_agent("http://127.0.0.1:9", mark=lambda ids: None).run([TASK])
    with pytest.raises(EngineError, match="server http://127.0.0.1:9"):
        make_agent("http://127.0.0.1:9").run([TASK])
