"""Numbers at their limits, and arguments of odd types: right results or clear errors."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from mem1_kernels import (
    BlockPlan,
    append_kv_,
    cached_attention,
    prune_kv_,
    trajectory_attention,
    visible,
)
from mem1_kernels.mask import windowed
from mem1_kernels.ops import reference
from mem1_kernels.testing import assert_within_budget, plain_attention

LIMITS = torch.iinfo(torch.int64)


@pytest.mark.parametrize("base", [0, 2**31 - 50, -(2**62), 2**62, LIMITS.min, LIMITS.max - 60])
@pytest.mark.parametrize("far", [0, 2**30, 2**31, 2**40])
@pytest.mark.parametrize("implementation", ["op", "reference"])
def test_windows_and_positions_of_any_size(base, far, implementation):
    positions = [base + slot + (far if slot >= 5 else 0) for slot in range(10)]
    if positions[-1] > LIMITS.max:
        pytest.skip("no such position")
    query, cache = torch.randn(1, 2, 2, 16), torch.randn(2, 1, 1, 10, 16)
    lengths = torch.tensor([10], dtype=torch.int32)
    for window in (1, 2, 5, 2**30, 2**31 - 1, 2**31, 2**40, 10**30):
        seen = torch.tensor(
            [
                [slot <= own and positions[own] - positions[slot] < window for slot in range(10)]
                for own in (8, 9)
            ]
        )
        scores = torch.einsum("qhd,kd->hqk", query[0], cache[0, 0, 0]) / 4
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        expected = torch.einsum("hqk,kd->qhd", weights, cache[1, 0, 0])
        given = torch.tensor([positions])
        if implementation == "op":
            out = cached_attention(query, *cache, lengths, window=window, position_ids=given)
        else:
            arguments = (lengths, None, given, min(window, 2**62), 0.25, 0.0)
            out = reference.cached_attention(query, *cache, *arguments)[0]
        torch.testing.assert_close(out[0], expected)


@pytest.mark.parametrize("implementation", ["op", "triton"])
def test_positions_that_jump(implementation):
    """Any old slots, in any order; new tokens up to 2^31 apart, or a clear error."""
    rng = random.Random(0)
    attend = cached_attention
    if implementation == "triton":
        attend = pytest.importorskip("mem1_kernels.ops.triton.cached_attention").cached_attention
    near = 0
    for _ in range(40 if implementation == "op" else 10):
        slots, steps = rng.randint(2, 40), [1, 1, 7, 2**29, 2**33]
        new = rng.choice([1, rng.randint(1, slots)])
        positions = [rng.choice([0, -(2**62)])]
        while len(positions) < slots:
            far = rng.random() < (0.5 if len(positions) < slots - new else 0.1)
            positions.append(positions[-1] + (rng.choice(steps) if far else 1))
        old = positions[: slots - new]
        rng.shuffle(old)
        positions[: slots - new] = old
        query, cache = torch.randn(1, new, 2, 16), torch.randn(2, 1, 1, slots, 16)
        given, lengths = torch.tensor([positions]), torch.tensor([slots], dtype=torch.int32)
        own = range(slots - new, slots)
        for window in (1, 3, 2**31 - 1, 2**31, 2**33 + 3, 2**62):
            reach = positions[-1] - positions[slots - new]
            arguments: tuple = (query, *cache, lengths)
            options: dict = {"window": window, "position_ids": given, "return_lse": True}
            if implementation == "triton":
                arguments, options = (*arguments, None, given, window, 0.25, 0.0), {}
            if reach >= 2**31:
                with pytest.raises(ValueError, match="new tokens of a row less than 2.31 apart"):
                    attend(*arguments, **options)
                continue
            near += 1
            seen = [
                [slot <= o and positions[o] - positions[slot] < window for slot in range(slots)]
                for o in own
            ]
            scores = torch.einsum("qhd,kd->hqk", query[0], cache[0, 0, 0]) / 4
            weights = scores.masked_fill(~torch.tensor(seen), -math.inf).softmax(-1)
            expected = torch.einsum("hqk,kd->qhd", weights, cache[1, 0, 0])
            torch.testing.assert_close(attend(*arguments, **options)[0][0], expected)
    assert near > 40


@pytest.mark.parametrize("window", [2**31, 2**40, 10**30])
def test_a_huge_window_hides_nothing_in_training(window):
    expiry = torch.tensor([6, 6, 4, 6, 6, 6])
    positions = torch.tensor([0, 1, 2, 3, 4, 5])
    for places in (positions, positions + LIMITS.max - 9, positions + LIMITS.min + 1):
        with_window = windowed(expiry, None, places, window)
        assert torch.equal(visible(*with_window), visible(expiry))


CALLS = {
    "window": lambda value: cached_attention(
        torch.zeros(1, 1, 1, 16),
        torch.zeros(1, 1, 4, 16),
        torch.zeros(1, 1, 4, 16),
        torch.tensor([1], dtype=torch.int32),
        window=value,
        position_ids=torch.zeros(1, 4, dtype=torch.int32),
    ),
    "windowed": lambda value: windowed(torch.tensor([2, 2]), None, torch.arange(2), value),
    "scale": lambda value: trajectory_attention(*[torch.ones(1, 2, 1, 16)] * 3, scale=value),
    "softcap": lambda value: trajectory_attention(*[torch.ones(1, 2, 1, 16)] * 3, softcap=value),
    "ordered": lambda value: prune_kv_(
        [torch.zeros(1, 1, 4, 16)],
        [torch.zeros(1, 1, 4, 16)],
        torch.tensor([2], dtype=torch.int32),
        torch.ones(1, 4, dtype=torch.bool),
        ordered=value,
    ),
}
WRONG = {
    "window": [True, 2.0, "3", np.int64(3), torch.tensor(3), 0, -1, math.inf, math.nan],
    "windowed": [True, 2.0, "3", 0, -1],
    "scale": [True, "1", 0, -1.0, math.inf, math.nan, 1e38, 1e-30, 3e38, [1.0]],
    "softcap": [True, "1", -1.0, math.inf, math.nan, 1e38, 1e-30],
    "ordered": ["x", 1, None, 0.5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_odd_values_raise_by_name(name, value):
    label = "window" if name == "windowed" else name
    with pytest.raises((TypeError, ValueError), match=f"{label}: expected .*, got "):
        CALLS[name](value)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize("softcap", [None, 1e-18, 1e18, 30.0])
def test_results_are_finite_at_the_ends_of_what_is_allowed(scale, softcap):
    """Inputs over float16's whole range, some of them 0."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        6e4 * (2 * torch.rand(1, 40, 2, 16, generator=generator) - 1) for _ in range(3)
    )
    key[:, 5] = 0
    for x in (query, key, value):
        x.requires_grad_()
    out = trajectory_attention(query, key, value, scale=scale, softcap=softcap)
    out.sum().backward()
    for x in (out, query.grad, key.grad, value.grad):
        assert x.isfinite().all()


def test_a_plan_made_in_inference_mode_serves_training():
    expiry = torch.tensor([300] * 100 + [250] * 100 + [300] * 100)
    with torch.inference_mode():
        plan = BlockPlan.from_expiry(expiry, torch.zeros_like(expiry))
    query = torch.randn(1, 300, 2, 16, requires_grad=True)
    trajectory_attention(query, query, query, plan=plan).sum().backward()
    assert query.grad.isfinite().all()


def test_nothing_is_appended_where_nothing_comes():
    caches, lengths = torch.ones(2, 1, 2, 4, 16), torch.tensor([1], dtype=torch.int32)
    before = caches.clone()
    for new in (torch.empty(1, 2, 0, 16), torch.empty(1, 0, 2, 16).transpose(1, 2)):
        append_kv_(new, new, *caches, lengths)
        append_kv_(new, new, *caches, lengths, counts=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(caches, before)


def test_meta_tensors_give_shapes():
    query = torch.empty(1, 300, 4, 16, device="meta", requires_grad=True)
    key = torch.empty(1, 300, 2, 16, device="meta", requires_grad=True)
    plan = BlockPlan.from_expiry(torch.empty(300, dtype=torch.int32, device="meta"))
    out, lse = trajectory_attention(query, key, key, plan=plan, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == (query.shape, (1, 4, 300), "meta")
    out.sum().backward()
    assert query.grad.shape == query.shape
    with pytest.raises(ValueError, match="expected on meta like query, got cpu"):
        trajectory_attention(query, key, key, torch.full((300,), 300))


def test_softcap_gradients_of_the_reference_keep_to_their_budget():
    """1 - tanh(x)^2 cancels for large x; over many random layouts, none may exceed the budget."""
    rng = random.Random(0)
    for trial in range(300):
        tokens, scale = rng.randint(2, 24), rng.choice([0.25, 1.0, 4.0])
        softcap = rng.choice([0.5, 2.0, 30.0])
        generator = torch.Generator().manual_seed(trial)
        q, k, v, grad = (torch.randn(1, tokens, 2, 16, generator=generator) for _ in range(4))
        expiry = torch.tensor([rng.randint(i + 1, tokens) for i in range(tokens)])
        layout = (expiry.int()[None], None, scale, softcap)
        out, lse = reference.attention_forward(q, k, v, *layout)
        got = reference.attention_backward(grad, None, q, k, v, out, lse, *layout)
        options = {"scale": scale, "softcap": softcap}
        exact = plain_attention(q, k, v, expiry, None, grad, **options, dtype=torch.float64)
        plain = plain_attention(q, k, v, expiry, None, grad, **options)
        names = ("grad_query", "grad_key", "grad_value")
        for name, mine in zip(names, got, strict=True):
            theirs = (getattr(plain, name), getattr(exact, name))
            assert_within_budget(f"{name} of layout {trial}", mine, *theirs)
