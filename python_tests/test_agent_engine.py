"""Engines: the same turns from each, and exactly what a masked forward pass scores."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import replace

import pytest
import torch
from agent_models import completions, greedy_writer, make_model, make_tokenizer
from local_server import Raw, drips, serve

from mem1_kernels import keep_all, keep_last, mem1, mem1_release
from mem1_kernels.agent import BM25, MemoryEfficientAgent, Passage
from mem1_kernels.rollout import EngineError, Generation, HFEngine, ServerEngine, collate, score

PROMPTS = [[5, 9, 11, 7, 30, 8], [6, 7], list(range(10, 27))]
LAST_TURNS = [5, 1, 3]
GENERATION = Generation(
    max_turns=6,
    max_new_tokens=9,
    stop_ids=(3, 44),
    state_tokens=lambda ids: len(ids) // 2,
    temperature=1.0,
    seed=4,
)


def world(turns):
    """Observations of 0 to 6 tokens; row r ends after its own last turn."""
    return [
        None if turn.number >= LAST_TURNS[turn.row] else [50 + turn.number] * (turn.number * 2 % 7)
        for turn in turns
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture(scope="module")
def server(model, tokenizer):
    with serve(completions(greedy_writer(model, tokenizer))) as running:
        yield running


def engine_for(server, tokenizer=None, **options) -> ServerEngine:
    return ServerEngine(f"{server.url}/v1", "tiny", tokenizer, **options)


@torch.no_grad()
def largest_difference(model, rollouts) -> float:
    layout, sampled = collate(rollouts)
    return float((score(model, layout) - sampled).abs().max())


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
@pytest.mark.parametrize("policy", [mem1, keep_all, keep_last(2)], ids=lambda p: p.__name__)
def test_in_process_rollouts_score_as_they_were_sampled(model, positions, policy):
    engine = HFEngine(model, positions=positions)
    rollouts = engine.run(PROMPTS, world, replace(GENERATION, retention=policy))
    assert [len(rollout.turns) for rollout in rollouts] == LAST_TURNS
    assert {rollout.positions for rollout in rollouts} == {positions}
    assert largest_difference(model, rollouts) <= 2e-5
    again = engine.run(PROMPTS, world, replace(GENERATION, retention=policy))
    assert torch.equal(again[0].trajectory.token_ids, rollouts[0].trajectory.token_ids)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("policy", [mem1, keep_last(2)], ids=lambda p: p.__name__)
def test_a_server_writes_what_reprefill_in_process_writes(
    model, tokenizer, server, streamed, policy
):
    generation = replace(
        GENERATION, temperature=0.0, retention=policy, stop_strings=(tokenizer.decode([66]),)
    )
    here = HFEngine(model, tokenizer, positions="reprefill").run(PROMPTS, world, generation)
    heard: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    there = engine_for(server, tokenizer).run(
        PROMPTS, world, generation, (lambda row, ids: heard[row].extend(ids)) if streamed else None
    )
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.trajectory.segments == ours.trajectory.segments
        assert torch.equal(theirs.trajectory.expiry, ours.trajectory.expiry)
        assert theirs.turns == ours.turns
        assert theirs.positions == "reprefill"
        assert theirs.peak_context <= ours.peak_context <= ours.trajectory.peak_context
    assert largest_difference(model, there) <= 2e-5
    written = [[i for turn in rollout.turns for i in turn.token_ids] for rollout in there]
    assert list(heard.values()) == (written if streamed else [[], [], []])


def test_tokens_are_told_of_while_they_are_sampled_in_process(model):
    heard: dict[int, list[int]] = {row: [] for row in range(len(PROMPTS))}
    rollouts = HFEngine(model).run(
        PROMPTS, world, GENERATION, lambda row, ids: heard[row].extend(ids)
    )
    assert list(heard.values()) == [
        [i for turn in rollout.turns for i in turn.token_ids] for rollout in rollouts
    ]


def test_a_server_gets_the_live_ids_and_none_of_its_own_sampling_defaults(tokenizer):
    def write(prompt, asked):
        return [7, 8, 44], [-1.0, -2.0, -3.0], "stop"

    with serve(completions(write)) as server:
        (rollout,) = engine_for(server, tokenizer, workers=1, seeded=True).run(
            [[5, 6]],
            lambda turns: [[60, 61] if turns[0].number < 4 else None],
            replace(GENERATION, stop_strings=("</answer>",), temperature=0.7),
        )
    asked = [request.json for request in server.requests]
    turn = [7, 8, 44, 60, 61]
    assert [a["prompt"] for a in asked] == [[5, 6]] + [[5, 6, *turn]] * 3
    expected = {
        "model": "tiny",
        "max_tokens": 9,
        "logprobs": 1,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "return_token_ids": True,
        "stop_token_ids": [3, 44],
        "stop": ["</answer>"],
    }
    assert expected.items() <= asked[0].items()
    assert len({a["seed"] for a in asked}) == 4
    assert rollout.log_probs[rollout.trajectory.loss_mask].tolist() == [-1.0, -2.0, -3.0] * 4
    assert rollout.peak_context == 2 + 5 + 3


@pytest.mark.parametrize(("temperature", "warned"), [(0.0, 0), (0.7, 1)])
def test_no_seed_is_sent_unless_asked_for(tokenizer, recwarn, temperature, warned):
    """A seeded request may end vLLM's CPU engine; run says where the seed would have mattered."""
    with serve(completions(lambda prompt, asked: ([7, 44], [-1.0, -2.0], "stop"))) as server:
        engine_for(server, tokenizer).run(
            [[5, 6]], lambda turns: [None], replace(GENERATION, temperature=temperature)
        )
    assert all("seed" not in request.json for request in server.requests)
    said = [w for w in recwarn if "seeded=True" in str(w.message)]
    assert len(said) == warned


def test_a_turn_cut_by_the_limit_is_marked(server):
    generation = replace(GENERATION, stop_ids=(), max_new_tokens=2, temperature=0.0)
    for engine in (HFEngine(make_model(420)), engine_for(server)):
        for rollout in engine.run(PROMPTS, world, generation):
            assert [turn.closed for turn in rollout.turns] == [False] * len(rollout.turns)
            assert {len(turn.token_ids) for turn in rollout.turns} == {2}


def one_choice(**changes):
    choice = {
        "index": 0,
        "text": "x",
        "finish_reason": "stop",
        "token_ids": [7],
        "logprobs": {"token_logprobs": [-1.0], "tokens": ["x"]},
    }
    return {
        "id": "1",
        "object": "text_completion",
        "created": 1,
        "model": "tiny",
        "choices": [choice | changes],
    }


REPLIES = {
    "answers in text only": one_choice(token_ids=None),
    "a log-prob for each of 1 tokens, got 0": one_choice(logprobs=None),
    "sent 6 tokens, it read 2": one_choice(prompt_token_ids=[1, 2]),
    "got finish_reason 'abort'": one_choice(finish_reason="abort"),
    "expected at least one token": one_choice(text="", token_ids=[], logprobs=None),
    "model 'tiny': status 404: .*no such model": (404, {"error": {"message": "no such model"}}),
}


@pytest.mark.parametrize("message", REPLIES)
def test_replies_that_cannot_be_used_say_why(message):
    with serve(lambda request: REPLIES[message]) as server:
        with pytest.raises(EngineError, match=message):
            engine_for(server).run([PROMPTS[0]], world, GENERATION)
    assert len(server.requests) == 1


def limited(model, tokenizer, limit):
    """A server whose context holds so many tokens."""
    answer = completions(greedy_writer(model, tokenizer))

    def reply(request):
        sent = len(request.json["prompt"])
        if sent + request.json["max_tokens"] > limit:
            return 400, {"error": {"message": f"maximum context length is {limit}, sent {sent}"}}
        return answer(request)

    return reply


def test_a_row_past_the_servers_context_ends_alone(model, tokenizer):
    """The third prompt has 17 tokens; with two turns and observations it does not fit."""
    with serve(limited(model, tokenizer, 44)) as server:
        generation = replace(GENERATION, temperature=0.0, retention=keep_all)
        rollouts = engine_for(server).run(PROMPTS, world, generation)
        assert [len(rollout.turns) for rollout in rollouts][1:] == [1, 2]
        assert "status 400: " in rollouts[2].error and "context length is 44" in rollouts[2].error
        assert rollouts[1].error == ""
        assert largest_difference(model, rollouts) <= 2e-5
        with pytest.raises(EngineError, match="maximum context length is 44"):
            engine_for(server).run([list(range(4, 44))], world, generation)


def test_rows_fail_one_by_one_and_the_others_go_on():
    """Of three rows one is refused, one times out and one is answered, in the second turn."""
    calls = dict.fromkeys((5, 6, 7), 0)

    def reply(request):
        row = request.json["prompt"][0]
        calls[row] += 1
        if calls[row] == 2:
            if row == 5:
                return 413, {"error": {"message": "too long"}}
            if row == 6:
                time.sleep(1.0)
        return one_choice(token_ids=[9])

    with serve(reply) as server:
        engine = engine_for(server, timeout=0.5, retries=0)
        rollouts = engine.run([[5], [6], [7]], lambda turns: [[8]] * len(turns), GENERATION)
    assert [len(rollout.turns) for rollout in rollouts] == [1, 1, GENERATION.max_turns]
    assert "status 413" in rollouts[0].error and "no answer in time" in rollouts[1].error
    for rollout in rollouts:
        assert rollout.trajectory.segments[0].role == "prompt"
        assert int(rollout.log_probs.ne(0).sum()) == len(rollout.turns)


def test_a_server_that_dies_on_the_way_ends_all_rows_and_raises_nothing():
    replies = iter([one_choice(token_ids=[9])] * 2)
    dead = 500, {"error": {"message": "out of memory"}}
    with serve(lambda request: next(replies, dead)) as server:
        engine = engine_for(server, retries=0)
        rollouts = engine.run([[5], [6]], lambda turns: [[8]] * len(turns), GENERATION)
    assert [len(rollout.turns) for rollout in rollouts] == [1, 1]
    assert all("out of memory" in rollout.error for rollout in rollouts)


def test_a_busy_server_is_asked_again():
    replies = iter([(503, {"error": "busy"}), one_choice(token_ids=[7])])
    with serve(lambda request: next(replies)) as server:
        (rollout,) = engine_for(server).run([[4]], lambda turns: [None], GENERATION)
    assert len(server.requests) == 2
    assert rollout.trajectory.token_ids.tolist() == [4, 7]


def test_no_server_and_no_answer_in_time():
    with serve(lambda request: time.sleep(0.3) or one_choice()) as server:
        with pytest.raises(EngineError, match="no answer in time"):
            engine_for(server, timeout=0.05, retries=0).run([[4]], world, GENERATION)
    with pytest.raises(EngineError, match=f"server {server.url}/v1, model .*: no connection"):
        engine_for(server, retries=0).run([[4]], world, GENERATION)


def test_policies_that_a_server_cannot_follow(server):
    engine = engine_for(server)
    with pytest.raises(ValueError, match="without floors, got mem1_release"):
        engine.run(PROMPTS, world, replace(GENERATION, retention=mem1_release))

    def fickle(segments):
        end = len(segments)
        return [
            index + 1 if s.role == "info" and end < 6 and index + 1 < end else end
            for index, s in enumerate(segments)
        ]

    with pytest.raises(ValueError, match="never change what it said of earlier drops"):
        engine.run(PROMPTS[:1], world, replace(GENERATION, retention=fickle))


def raising(row, error):
    """A function of a turn that raises in one row's second turn."""

    def hook(turn):
        if turn.row == row and turn.number == 2:
            raise error
        return 0

    return hook


class Silent(Exception):
    """Its message cannot be read."""

    def __str__(self):
        raise RuntimeError("no message")


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({"depth": raising(1, KeyError("x"))}, "KeyError: 'x'"),
        ({"depth": raising(1, Silent())}, "Silent: (its message cannot be read)"),
        ({"depth": lambda t: -1 if (t.row, t.number) == (1, 2) else 0}, "depth: expected at least"),
        ({"depth": lambda t: "a" if (t.row, t.number) == (1, 2) else 0}, "depth: expected an int"),
        ({"state_tokens": "second row"}, "state_tokens: expected 0 to "),
        ({"reply": [[99999]]}, "respond, row 1: expected token ids from 0 to "),
        ({"reply": [[-1]]}, "respond, row 1: expected token ids from 0 to "),
        ({"reply": ["text"]}, "respond, row 1: expected token ids, got str"),
        ({"reply": [[2.5]]}, "respond, row 1: expected integer token ids, got [2.5]"),
        ({"reply": [7]}, "respond, row 1: expected token ids, got int"),
    ],
)
@pytest.mark.parametrize("where", ["kept", "reprefill", "server"])
def test_what_goes_wrong_in_one_row_ends_that_row(model, tokenizer, server, where, hook, message):
    """Three rows of up to four turns; the second row goes wrong in its second turn."""
    calls = {"turns": 0}

    def state_tokens(ids):
        calls["turns"] += 1
        return 10**6 if calls["turns"] == 5 else 0

    def respond(turns):
        wrong = hook.get("reply", [[51, 52]])[0]
        return [wrong if (t.row, t.number) == (1, 2) else [51, 52] for t in turns]

    options = {"depth": hook.get("depth")}
    if "state_tokens" in hook:
        options["state_tokens"] = state_tokens
    engine = engine_for(server, tokenizer, workers=1)
    if where != "server":
        engine = HFEngine(model, tokenizer, positions=where)
    generation = Generation(max_turns=4, max_new_tokens=3, temperature=0.0, **options)
    rollouts = engine.run([[5, 9], [6, 7], [8]], respond, generation)
    assert [bool(rollout.error) for rollout in rollouts] == [False, True, False]
    assert message in rollouts[1].error
    turns = [len(rollout.turns) for rollout in rollouts]
    assert turns == [4, 1 if "state_tokens" in hook else 2, 4]
    assert largest_difference(model, rollouts) <= 2e-5


def test_what_goes_wrong_in_every_row_at_once_is_raised(server):
    """It is no fault of one episode."""
    generation = replace(GENERATION, depth=lambda turn: {}["a"])
    with pytest.raises(KeyError, match="a"):
        engine_for(server).run(PROMPTS, lambda turns: [[8]] * len(turns), generation)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": 7},
        {"token_ids": "7"},
        {"token_ids": ["7"]},
        {"token_ids": [7.0]},
        {"token_ids": [True]},
        {"token_ids": [-1]},
        {"token_ids": [2**31]},
        {"token_ids": [2**70]},
        {"token_ids": [None]},
        {"token_ids": {"7": 1}},
        {"token_ids": [7, 7], "logprobs": {"token_logprobs": [-1.0]}},
        {"token_ids": [7] * 10, "logprobs": {"token_logprobs": [-1.0] * 10}},
        {"logprobs": {"token_logprobs": [float("nan")]}},
        {"logprobs": {"token_logprobs": [float("-inf")]}},
        {"logprobs": {"token_logprobs": [None]}},
        {"logprobs": {"token_logprobs": -1.0}, "token_ids": [7, 7]},
        {"logprobs": {}},
        {"logprobs": "no"},
        {"logprobs": [1]},
        {"finish_reason": {"a": 1}},
        {"finish_reason": ["stop"]},
        {"prompt_token_ids": 5},
        {"prompt_token_ids": "5"},
        {"prompt_token_ids": [[5]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_odd_choice_ends_its_own_row(changes, streamed):
    ends_alone(one_choice(**changes), streamed)


@pytest.mark.parametrize(
    "reply",
    [
        one_choice() | {"choices": []},
        one_choice() | {"choices": one_choice()["choices"] * 2},
        one_choice() | {"choices": None},
        one_choice() | {"choices": {}},
        one_choice() | {"choices": ["x"]},
        one_choice() | {"choices": [None]},
        one_choice() | {"choices": [[]]},
        {},
        [],
        None,
        5,
        "text",
        Raw([b"not json"], headers={"Content-Type": "application/json"}),
        Raw([b"[" * 100_000], headers={"Content-Type": "application/json"}),
        Raw([b'{"choices":' * 50_000], headers={"Content-Type": "application/json"}),
        Raw([b"\xff\xfe\x00"], headers={"Content-Type": "application/json"}),
        Raw([b"{}"], headers={"Content-Type": "application/json; charset=nonsense"}),
        Raw([b""], headers={"Content-Type": "application/json"}),
        Raw([b"x"], status=204),
    ],
    ids=lambda reply: repr(reply)[:40],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_odd_reply_ends_its_own_row(reply, streamed):
    ends_alone(reply, streamed)


def ends_alone(odd, streamed):
    """Of three rows one gets an odd reply in its second turn; the others go on to their end."""
    calls = {"odd": 0}

    def answer(request):
        reply = one_choice(token_ids=[9])
        if request.json["prompt"][0] == 6:
            calls["odd"] += 1
            reply = odd if calls["odd"] == 2 else reply
        if not streamed:
            return reply
        if isinstance(reply, Raw):
            pieces = [b"data: ", *reply.pieces, b"\n\n"]
            kept = {k: v for k, v in reply.headers.items() if "charset" in v}
            return Raw(pieces, reply.status, kept)
        return f"data: {json.dumps(reply)}\n\ndata: [DONE]\n\n"

    with serve(answer) as server:
        engine = engine_for(server, retries=0)
        rollouts = engine.run(
            [[5], [6], [7]],
            lambda turns: [[8]] * len(turns),
            GENERATION,
            (lambda row, ids: None) if streamed else None,
        )
    assert [len(rollout.turns) for rollout in rollouts] == [6, 1, 6]
    assert [bool(rollout.error) for rollout in rollouts] == [False, True, False]
    assert "server http://127.0.0.1" in rollouts[1].error


def test_what_a_callback_raises_is_no_fault_of_the_server(server):
    def on_tokens(row, ids):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        engine_for(server).run(PROMPTS, world, GENERATION, on_tokens)


@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200 ",
        b"HTTP/1.1 200 OK\r\nX-A: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"\x16\x03\x03\x40\x00",
    ],
    ids=["status", "headers", "body", "body without an end", "TLS"],
)
def test_a_server_that_drips_is_left_in_time(begin):
    """A byte now and then satisfies every time limit of one read."""
    with drips(begin) as port:
        scheme = "http" if begin[:1] == b"H" else "https"
        engine = ServerEngine(
            f"{scheme}://127.0.0.1:{port}/v1", "tiny", timeout=30, turn_timeout=0.5, retries=0
        )
        begun = time.monotonic()
        with pytest.raises(EngineError, match="no answer in time"):
            engine.run([[4]], world, GENERATION)
        assert time.monotonic() - begun < 20  # it would drip for 60 seconds


ERRORS = {
    "base_url: expected an address": ("localhost:8000", {}),
    "timeout: expected more than 0": ("http://x/v1", {"timeout": 0}),
    "retries: expected at least 0, got -1": ("http://x/v1", {"retries": -1}),
    "workers: expected at least 1, got 0": ("http://x/v1", {"workers": 0}),
    "base_url: expected an address such as": ("http://", {}),
    "base_url: expected a valid address": ("http://a b\x00/v1", {}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_server_arguments(message):
    url, options = ERRORS[message]
    with pytest.raises(ValueError, match=message):
        ServerEngine(url, "tiny", **options)


@pytest.mark.parametrize(
    "url",
    [
        "http://u:hunter2/w@h/x",
        "http:/u:hunter2@h/x",
        "//u:hunter2@h/x",
        "http://[::1:hunter2@h",
        "https://user:hunt[er2@h/v1",
        "https:u:hunter2@h",
        "http:///u:hunter2@h/x",
        "http://http://u:hunter2@h/x",
        "u:hunter2@http://h/x",
        "http://u:hunter2#@h/x",
        "http://u:hunter2?@h/x",
        "http:\\\\u:hunter2@h",
        "http://u:hunter2",
        "http://u:hunter2@h\N{CARE OF}/",
        "http://u:hunter2@h\x00/",
        "http://u:hunter2@h:99999/",
    ],
)
def test_a_mistyped_address_shows_no_password(url):
    with pytest.raises(ValueError, match="^base_url: expected ") as caught:
        ServerEngine(url, "tiny")
    told = "".join(traceback.format_exception(caught.value))
    assert "hunt" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None, told
    if "\x00" not in url and "99999" not in url:
        with pytest.raises(ValueError, match="^engine: expected ") as caught:
            MemoryEfficientAgent("tiny", engine=url, environment=BM25([Passage("a", "b")]))
        assert "hunt" not in str(caught.value)


def test_an_address_that_is_no_text():
    for url in (None, 5, b"http://h"):
        with pytest.raises(TypeError, match="base_url: expected an address, got"):
            ServerEngine(url, "tiny")


def test_other_arguments(model, server):
    with pytest.raises(
        ValueError, match="positions: expected 'kept', 'compact' or 'reprefill', got 'both'"
    ):
        HFEngine(model, positions="both")
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="prompts: expected at least one"):
            engine_for(server).run(prompts, world, GENERATION)
    with pytest.raises(ValueError, match="respond: expected 1 replies, got 2"):
        engine_for(server).run([[1]], lambda turns: [None, None], GENERATION)
    with pytest.raises(TypeError, match="respond: expected a list of replies, got NoneType"):
        engine_for(server).run([[1]], lambda turns: None, GENERATION)
    with pytest.raises(TypeError, match="generation: expected a Generation, got dict"):
        engine_for(server).run([[1]], world, {})
    with pytest.raises(TypeError, match="prompts: expected a list, got int"):
        engine_for(server).run(5, world, GENERATION)
    for wrong in (99, None):
        splits = replace(GENERATION, state_tokens=lambda ids, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=f"state_tokens: expected 0 to .*, got {wrong}"):
            engine_for(server).run([[1]], world, splits)


def test_a_server_shows_no_secret(monkeypatch):
    """Neither the key nor what stands in the address comes back in an error, in any spelling."""
    key, password = "sk-very/secret key", "pass word"
    echoed = "sk-very%2Fsecret%20key and sk-very\\/secret key and pass+word"

    def reply(request):
        assert request.headers["authorization"] == f"Bearer {key}"
        return 401, {"error": {"message": f"wrong key {key}: {echoed} " + "x" * 5000}}

    with serve(reply) as server:
        # A password in the address would be sent in place of the key; here it is in the query.
        address = server.url + "/v1?token=abcdef123&password=pass%20word"
        engine = ServerEngine(address, "tiny", api_key=key, retries=0)
        with pytest.raises(EngineError) as raised:
            engine.run([[4]], world, GENERATION)
    said = str(raised.value) + repr(raised.value.__cause__) + repr(raised.value.__context__)
    for secret in (key, "secret", password, "pass%20word", "pass+word", "abcdef123"):
        assert secret not in str(raised.value), said
    assert "***" in said and len(str(raised.value)) <= 800
    assert f"server {server.url}/v1, model 'tiny': status 401" in said


def test_a_server_cannot_send_the_key_elsewhere():
    with serve(lambda request: one_choice()) as other:
        moved = (302, f"{other.url}/v1/completions")
        with serve(lambda request: moved) as server:
            engine = engine_for(server, api_key="secret", retries=0)
            with pytest.raises(EngineError, match="status 302"):
                engine.run([[4]], world, GENERATION)
    assert other.requests == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (Raw([b" "] * 60, pause=0.05), "no answer in time"),
        (Raw([b" " * 2**20] * 3), "expected at most 1048576 bytes"),
        (Raw([b"x"], headers={"Content-Encoding": "gzip"}), "not compressed"),
        (Raw([b"[" * 100_000]), "server"),
        (Raw([b"not json"]), "server"),
    ],
)
def test_replies_without_an_end_or_a_limit(raw, message):
    with serve(lambda request: raw) as server:
        engine = engine_for(server, retries=0, turn_timeout=0.5, max_bytes=2**20)
        with pytest.raises(EngineError, match=message):
            engine.run([[4]], world, GENERATION)
