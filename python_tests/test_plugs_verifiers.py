"""Environments of `verifiers` played by our agent, and its traces as trees."""

from __future__ import annotations

import asyncio

import pytest
import torch
from agent_models import Script, greedy_writer, make_model, make_tokenizer

from mem1_kernels.agent import MemoryEfficientAgent, ToolError
from mem1_kernels.plugs.verifiers import REPLY, VerifiersEnv, trace_layout, trace_rows
from mem1_kernels.rollout import score

vf = pytest.importorskip("verifiers")
datasets = pytest.importorskip("datasets")

vf_types = pytest.importorskip("verifiers.types")
model_name = "tiny"

ROWS = [
    {"prompt": [{"role": "user", "content": "Guess 1 to 9. </message>"}], "answer": "7"},
    {"prompt": [{"role": "user", "content": "Guess 1 to 3."}], "answer": "2"},
]


class Guessing(vf.MultiTurnEnv):
    """Says higher or lower until the guess is right."""

    async def env_response(self, messages, state, **kwargs):
        said = messages[-1].content
        if said == "crash":
            raise vf.ToolError("out of order")
        if said == state["answer"]:
            state["final_env_response"] = [{"role": "user", "content": "Right."}]
            return state["final_env_response"]
        hint = "Higher." if said < state["answer"] else "Lower."
        return [{"role": "user", "content": hint}]


def make_env():
    async def few_turns(state) -> float:
        right = state["trajectory"][-1]["completion"][-1].content == state["answer"]
        return float(right) / len(state["trajectory"])

    return Guessing(
        dataset=datasets.Dataset.from_list(ROWS), rubric=vf.Rubric(funcs=[few_turns]), max_turns=4
    )


def say(text: str):
    return REPLY.parse(f"<think>so far</think><reply>{text}</reply>")


def test_a_rollout_by_hand():
    env = VerifiersEnv(make_env())
    tasks = env.tasks()
    prompt = env.reset(tasks[0])
    assert prompt.endswith("Guess 1 to 9. ‹/message>\n")
    assert [env.step(say(guess)).observation for guess in ("5", "9")] == ["Higher.", "Lower."]
    assert "could not be read" in env.step(REPLY.parse("7")).observation
    last = env.step(say("7"))
    assert last.done and last.reward == pytest.approx(1 / 3)
    assert last.scores["few_turns"] == pytest.approx(1 / 3) and last.scores["num_turns"] == 3
    with pytest.raises(RuntimeError, match="step: expected reset"):
        env.step(say("7"))


def test_its_own_limit_of_turns_ends_it():
    env = VerifiersEnv(make_env())
    env.reset(ROWS[0])
    steps = [env.step(say("1")) for _ in range(4)]
    assert [step.done for step in steps] == [False] * 3 + [True] and steps[-1].reward == 0


def test_an_agent_plays_its_dataset(monkeypatch):
    tokenizer = make_tokenizer()
    write = "<think>on</think><reply>{}</reply>".format
    Script(monkeypatch, tokenizer, [write("5"), write("7")], [write("1"), write("2")])
    env = VerifiersEnv(make_env())
    agent = MemoryEfficientAgent(
        make_model(len(tokenizer)),
        tokenizer=tokenizer,
        environment=env,
        progress=False,
        max_new_tokens=60,
    )
    results = agent.run(env.tasks())
    assert [result.reward for result in results] == [0.5, 0.5]
    assert [result.turns[0].observation for result in results] == ["Higher.", "Higher."]


def test_what_fails_there_ends_the_episode():
    env = VerifiersEnv(make_env())
    env.reset(ROWS[0])
    with pytest.raises(ToolError, match="verifiers: ToolError: out of order"):
        env.step(say("crash"))
    env.reset(ROWS[1])
    assert env.step(say("1")).observation == "Higher."
    env.close()


def test_arguments():
    with pytest.raises(TypeError, match="env: expected a verifiers Environment, got int"):
        VerifiersEnv(3)

    async def look(place: str) -> str:
        """Looks."""
        return place

    data = datasets.Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="env: expected one without tools, got .'look'"):
        VerifiersEnv(vf.ToolEnv(tools=[look], dataset=data, rubric=vf.Rubric()))
    env = VerifiersEnv(make_env())
    with pytest.raises(TypeError, match="task: expected a row of the dataset, got str"):
        env.reset("x")
    with pytest.raises(ValueError, match="task: expected a row with 'prompt', got .'answer'"):
        env.reset({"answer": "7"})


class IdsClient(vf.Client):
    """A client that gives token ids: a greedy model, the messages as one text."""

    def __init__(self, write, tokenizer):
        super().__init__(write)
        self.tokenizer = tokenizer

    def setup_client(self, config):
        raise NotImplementedError

    async def to_native_tool(self, tool):
        raise NotImplementedError

    async def to_native_prompt(self, messages):
        text = "".join(f"{m.role}: {m.content}\n" for m in messages)
        return self.tokenizer.encode(text, add_special_tokens=False), {}

    async def get_native_response(self, prompt, model, sampling_args, tools=None, **kwargs):
        asked = {"max_tokens": 5, "stop_token_ids": []}
        return prompt, *self.client(prompt, asked)

    async def raise_from_native_response(self, response):
        pass

    async def from_native_response(self, response):
        prompt, ids, log_probs, _ = response
        tokens = vf_types.ResponseTokens(
            prompt_ids=prompt,
            prompt_mask=[0] * len(prompt),
            completion_ids=ids,
            completion_mask=[1] * len(ids),
            completion_logprobs=log_probs,
        )
        message = vf_types.ResponseMessage(
            content=self.tokenizer.decode(ids),
            finish_reason="stop",
            is_truncated=False,
            tokens=tokens,
        )
        return vf_types.Response(id="1", created=0, model=model_name, message=message)

    async def close(self):
        pass


def test_its_traces_train_as_sampled():
    """Rollouts by verifiers itself: the tree's log-probs are those of the sampling model."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    env = make_env()
    client = IdsClient(greedy_writer(model, tokenizer), tokenizer)

    async def play():
        rows = [{"example_id": n, **row} for n, row in enumerate(ROWS)]
        return [await env.rollout(row, client, model_name) for row in rows]

    states = asyncio.run(play())
    rows = trace_rows(states)
    assert len(rows) == sum(len(state["trajectory"]) for state in states) == 8
    assert len({row.sample for row in rows}) == 2
    layout = trace_layout(states)
    assert layout.num_tokens < sum(len(row) for row in rows)
    assert int(layout.loss_mask.sum()) == 8 * 5
    with torch.no_grad():
        scored = layout.gather_rows(score(model, layout))
    for row, ours in zip(rows, scored, strict=True):
        torch.testing.assert_close(
            ours[row.loss_mask], row.log_probs[row.loss_mask], rtol=0, atol=2e-5
        )


def test_traces_without_token_ids():
    states = [{"trajectory": [{"tokens": None}]}]
    with pytest.raises(ValueError, match="expected token ids in rollout 0, step 0, got none"):
        trace_rows(states)
