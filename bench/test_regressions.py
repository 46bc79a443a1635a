"""The ops' times, kept and compared by pytest-benchmark.

    pytest bench --benchmark-autosave
    pytest bench --benchmark-compare --benchmark-compare-fail=median:15%

It times one process after another, so it tells a change from the one before on the same quiet
machine, and nothing more; how the ops stand against others is for the other files here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mem1_kernels import BlockPlan, trajectory_attention
from mem1_kernels.ops.kv_cache import append_kv_, cached_attention, prune_kv_
from mem1_kernels.testing import turns

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LAYERS, BATCH, CAPACITY, DROPPED, HELD = 4, 4, 1024, slice(300, 856), 912


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def timed(benchmark: Any, device: str) -> Callable[..., None]:
    """Times a call to its end on the device; `setup` comes before each and is not timed."""

    def run(call: Callable[[], Any], setup: Callable[[], Any] | None = None) -> None:
        def whole() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(whole, setup=setup, rounds=20, warmup_rounds=3)

    return run


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def attention(request: pytest.FixtureRequest, device: str) -> dict[str, Any]:
    """The released MEM1-QA shape: eight turns of 556 tokens."""
    expiry = turns(300, 8, 40, 16, 500).expiry.to(device)
    made = [torch.randn(1, len(expiry), heads, 64, device=device) for heads in (8, 2, 2, 8)]
    query, key, value, grad_out = (x.to(request.param) for x in made)
    return {
        "leaves": [x.requires_grad_() for x in (query, key, value)],
        "grad_out": grad_out,
        "plan": BlockPlan.from_expiry(expiry),
    }


def test_plan(timed: Callable[..., None], device: str) -> None:
    expiry = turns(300, 8, 40, 16, 500).expiry.to(device)
    timed(lambda: BlockPlan.from_expiry(expiry))


def test_attention_forward(timed: Callable[..., None], attention: dict[str, Any]) -> None:
    leaves = [x.detach() for x in attention["leaves"]]
    timed(lambda: trajectory_attention(*leaves, plan=attention["plan"]))


def test_attention_backward(timed: Callable[..., None], attention: dict[str, Any]) -> None:
    leaves, grad_out = attention["leaves"], attention["grad_out"]
    out = trajectory_attention(*leaves, plan=attention["plan"])
    timed(lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))


def make_caches(device: str, layers: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shape = (BATCH, 4, CAPACITY, 128)
    keys, values = (
        [torch.randn(shape, device=device).bfloat16() for _ in range(layers)] for _ in range(2)
    )
    return keys, values


@pytest.mark.parametrize("ordered", [False, True])
def test_prune(timed: Callable[..., None], device: str, ordered: bool) -> None:
    keys, values = make_caches(device, LAYERS)
    lengths = torch.full((BATCH,), HELD, dtype=torch.int32, device=device)
    keep = torch.ones(BATCH, CAPACITY, dtype=torch.bool, device=device)
    keep[:, DROPPED] = False

    def reset() -> None:
        lengths.fill_(HELD)

    timed(lambda: prune_kv_(keys, values, lengths, keep, ordered=ordered), setup=reset)


@pytest.mark.parametrize("new_tokens", [1, 500])
def test_append_and_attend(timed: Callable[..., None], device: str, new_tokens: int) -> None:
    (keys,), (values,) = make_caches(device, 1)
    lengths = torch.tensor([912, 700, 640, 512], dtype=torch.int32, device=device)
    query = torch.randn(BATCH, new_tokens, 28, 128, device=device).bfloat16()
    new = torch.randn(BATCH, 4, new_tokens, 128, device=device).bfloat16()

    def step() -> None:
        append_kv_(new, new, keys, values, lengths - new_tokens)
        cached_attention(query, keys, values, lengths)

    timed(step)
