"""The agent loop `mem1`: an episode under a retention policy, whatever serves the tokens."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    register,
)

from mem1_kernels.verl.episode import Played, RemoteEngine, Reply, Request, play
from mem1_kernels.verl.hooks.engine import KEY
from mem1_kernels.verl.refused import OPTIONS, selected
from mem1_kernels.verl.settings import Settings

EPISODES = "mem1_episode"
"""Where in a sample's `extra_fields` the figures of its episode are."""

# An episode waits in a thread of its own, for the server or for a tool; threads come as needed.
_THREADS = ThreadPoolExecutor(4096, "mem1-episode")


@register("mem1")
class Mem1AgentLoop(AgentLoopBase):
    """Plays one episode of the environment that the config or the row names."""

    def __init__(self, *args: Any, hf_model_type: str | None = None, **kwargs: Any) -> None:
        # Ids in and ids out: no chat template merges turns, whatever the type of the model.
        super().__init__(*args, hf_model_type=None, **kwargs)
        self.settings = Settings.read(dict(selected(self.config, OPTIONS).items()))
        self.backend = self.rollout_config.name

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        loop, name = asyncio.get_running_loop(), uuid4().hex

        def write(request: Request) -> Reply:
            asked = self._ask(name, request, sampling_params)
            return asyncio.run_coroutine_threadsafe(asked, loop).result()

        engine = RemoteEngine(
            write,
            self.settings.form(self.backend),
            self.tokenizer,
            room=self.rollout_config.response_length,
        )
        temperature = float(sampling_params["temperature"])
        played = await loop.run_in_executor(_THREADS, play, self.settings, row, engine, temperature)
        return output_of(played, int(row.get("global_steps", 0)))

    async def _ask(self, name: str, request: Request, sampling_params: dict[str, Any]) -> Reply:
        session: dict[str, Any] = {}
        if self.settings.form(self.backend) == "kept":
            session["session"] = {
                "id": name,
                "operations": request.operations,
                "opens": request.opens,
                "close": request.close,
            }
        output = await self.server_manager.generate(
            name,
            prompt_ids=request.context or [0],
            sampling_params={**sampling_params, **sampling_of(self.backend, request)},
            **session,
        )
        if output.stop_reason == "aborted":
            raise RuntimeError("rollout: the server aborted the turn")
        step = output.extra_fields.get("global_steps")
        return Reply(output.token_ids, output.log_probs or [], step)


def sampling_of(backend: str, request: Request) -> dict[str, Any]:
    """The sampling parameters of a request, as the rollout server `backend` names them."""
    params: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "stop_token_ids": list(request.stop_ids),
    }
    if backend == "vllm":
        params["skip_special_tokens"] = False
        if request.stop_strings:
            params |= {"stop": list(request.stop_strings), "include_stop_str_in_output": True}
    elif backend == "mem1":
        params["stop"] = list(request.stop_strings)
    # SGLang runs without a tokenizer under verl; a turn is cut at its stop afterwards.
    return params


def output_of(played: Played, step: int) -> AgentLoopOutput:
    """An episode as verl's agent loops return it."""
    steps = played.steps or [step]
    figures = {
        "turns": played.turns,
        "peak_context": played.peak_context,
        "tokens": len(played.prompt_ids) + len(played.response_ids),
        "failed": played.failed,
        "error": played.error,
        "scores": played.scores,
    }
    return AgentLoopOutput(
        prompt_ids=played.prompt_ids,
        response_ids=played.response_ids,
        response_mask=played.response_mask,
        response_logprobs=played.log_probs,
        reward_score=played.reward,
        num_turns=played.turns,
        metrics=AgentLoopMetrics(),
        extra_fields={
            KEY: played.runs,
            EPISODES: figures,
            "min_global_steps": min(steps),
            "max_global_steps": max(steps),
            "reward_extra_info": {"score": played.reward},
        },
    )
