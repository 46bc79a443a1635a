"""The rollout replica's server in this process, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from verl.utils.config import omega_conf_to_dataclass

from configs import GRPO, make_config
from mem1_kernels.verl.hooks.replica import Mem1Server, _buckets

SAMPLING = {"max_tokens": 6, "temperature": 0.0, "stop_token_ids": [], "stop": []}
PROMPTS = [[1, 2, 15 + i, 4] for i in range(5)]


@pytest.fixture
def server(folder: Path) -> Mem1Server:
    config = make_config(folder, *GRPO, "actor_rollout_ref.rollout.max_num_seqs=2")
    rollout = omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    return Mem1Server(rollout, config.actor_rollout_ref.model, replica_rank=0)


def together(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=60)

    return asyncio.run(gather())


def session(name: str, operations: list[Any], opens: bool = False, close: bool = False) -> Any:
    return {"id": name, "operations": operations, "opens": opens, "close": close}


async def episode(server: Mem1Server, name: str, prompt: list[int]) -> list[list[int]]:
    """Two turns, the prompt dropped between them."""
    opened = session(name, [("read", prompt)], opens=True)
    first = await server.generate("x", [0], dict(SAMPLING), opened)
    went_on = session(name, [("drop", [[1, 3]]), ("read", [20, 21])])
    second = await server.generate("x", [0], dict(SAMPLING), went_on)
    await server.generate("x", [0], {}, session(name, [], close=True))
    return [first.token_ids, second.token_ids]


def test_more_episodes_than_rows(server: Mem1Server) -> None:
    """They wait for each other, and write what each writes alone."""
    alone = [together(episode(server, "only", prompt))[0] for prompt in PROMPTS]
    calls = [episode(server, str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    assert together(*calls) == alone
    assert server.sessions is not None and not server.sessions.row_of


def test_a_request_without_a_session(server: Mem1Server) -> None:
    """It brings its whole context, as to any server."""
    outputs = together(*(server.generate("x", prompt, dict(SAMPLING)) for prompt in PROMPTS))
    firsts = [together(episode(server, "only", prompt))[0][0] for prompt in PROMPTS]
    assert [output.token_ids for output in outputs] == firsts


def test_a_session_that_was_ended(server: Mem1Server) -> None:
    """It does not begin anew: what it was told before is lost."""
    together(server.generate("x", [0], dict(SAMPLING), session("a", [("read", [5])], opens=True)))
    together(server.sleep())
    (error,) = together(server.generate("x", [0], dict(SAMPLING), session("a", [("read", [5])])))
    assert isinstance(error, ValueError) and "'a' is not there any more" in str(error)
    (again,) = together(episode(server, "a", PROMPTS[0]))
    assert len(again) == 2


def test_an_error_ends_the_episodes_that_wait(server: Mem1Server) -> None:
    unknown = [1, 2, 99]  # a word that the model does not have
    calls = [episode(server, "a", PROMPTS[0]), episode(server, "b", unknown)]
    for error in together(*calls):
        assert isinstance(error, IndexError)
    assert len(together(episode(server, "c", PROMPTS[0]))[0]) == 2


def test_weights(server: Mem1Server, folder: Path) -> None:
    """In buckets; a name that is missing, or one too many, is an error."""
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    buckets = list(_buckets(other.named_parameters(), size=50_000))
    assert len(buckets) > 3 and [last for _, _, last in buckets] == [False] * (len(buckets) - 1) + [
        True
    ]
    for bucket, first, last in buckets:
        together(server.load(bucket, 7, first, last))
    assert server.step == 7
    for name, value in other.named_parameters():
        assert torch.equal(server.model.state_dict()[name], value)
    (missing,) = together(server.load(buckets[0][0], 8, True, True))
    assert "weights: expected" in str(missing) and server.step == 7
    (unknown,) = together(server.load({"nonsense": torch.ones(1)}, 8, True, False))
    assert "weights: the model has no 'nonsense'" in str(unknown)
