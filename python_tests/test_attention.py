"""trajectory_attention at its public door: whatever serves the CPU, held to fp64."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from mem1_kernels import BlockPlan, Trajectory, pack, trajectory_attention, unroll, visible
from mem1_kernels.ops import reference
from mem1_kernels.testing import assert_within_budget, plain_attention, random_expiry, turns

GENERATOR = partial(torch.Generator().manual_seed)
RESULTS = ("out", "lse", "grad_query", "grad_key", "grad_value")


def make_inputs(batch, tokens, heads, kv_heads, head_dim, dtype=torch.float32, seed=0):
    generator = GENERATOR(seed)

    def normal(count):
        return torch.randn(batch, tokens, count, head_dim, generator=generator).to(dtype)

    grad_lse = torch.randn(batch, heads, tokens, generator=generator)
    return normal(heads), normal(kv_heads), normal(kv_heads), normal(heads), grad_lse


def check(inputs, expiry, floor=None, softcap=None, scale=None, plan=None):
    """Forward and backward of the op within the error budget of its dtype."""
    query, key, value, grad_out, grad_lse = inputs
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    given_layout = {"plan": plan} if plan is not None else {"floor": floor}
    out, lse = trajectory_attention(
        *leaves,
        None if plan is not None else expiry,
        **given_layout,
        scale=scale,
        softcap=softcap,
        return_lse=True,
    )
    gradients = torch.autograd.grad([out, lse], leaves, [grad_out, grad_lse])
    arguments = (query, key, value, expiry, floor, grad_out, grad_lse)
    options = {"scale": scale, "softcap": softcap}
    plain = plain_attention(*arguments, **options)
    exact = plain_attention(*arguments, **options, dtype=torch.float64)
    for name, got in zip(RESULTS, (out, lse, *gradients), strict=True):
        assert_within_budget(name, got.detach(), getattr(plain, name), getattr(exact, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 129, 255, 300])
def test_random_expiry(tokens, dtype):
    expiry = random_expiry(tokens, GENERATOR(tokens), batch=2)
    check(make_inputs(2, tokens, 4, 2, 32, dtype), expiry)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims(head_dim, dtype):
    check(make_inputs(1, 140, 2, 1, head_dim, dtype), turns(40, 4, 12, 6, 20).expiry[:140])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 2), (7, 1)])
def test_grouped_heads_with_floor_softcap_and_scale(heads, kv_heads):
    tokens = 200
    floor = torch.randint(0, tokens, (tokens,), generator=GENERATOR(3))
    inputs = make_inputs(2, tokens, heads, kv_heads, 16)
    check(inputs, random_expiry(tokens, GENERATOR(4)), floor, softcap=2.0, scale=0.7)


@given(
    st.lists(st.integers(0, 40), min_size=3, max_size=3),
    st.integers(1, 6),
    st.sampled_from(["kept", "unrolled", "packed", "tree"]),
)
@settings(max_examples=30, deadline=None)
def test_mem1_layouts(sizes, count, form):
    layout = turns(1 + sizes[0], count, 1 + sizes[1], 3, sizes[2])
    if form == "unrolled":
        layout = unroll(layout)
    if form in ("packed", "tree"):
        other = turns(1 + sizes[0], count + 1, 5, sizes[1], sizes[2])
        layout = pack([layout, other] if form == "packed" else [[layout, other]])
    plan = BlockPlan.of(layout)
    # Several rows, so that no lucky rounding of plain torch's sets the budget.
    check(make_inputs(8, layout.num_tokens, 2, 1, 16), layout.expiry, plan=plan)


def test_no_expiry_is_causal():
    query, key, value, *_ = make_inputs(2, 150, 4, 2, 16)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(trajectory_attention(query, key, value), want)


def test_batch_rows_with_their_own_layouts_equal_each_alone():
    inputs = make_inputs(3, 170, 2, 1, 16)
    expiry = random_expiry(170, GENERATOR(5), batch=3)
    together = trajectory_attention(*inputs[:3], expiry)
    for row in range(3):
        alone = trajectory_attention(*(x[row : row + 1] for x in inputs[:3]), expiry[row])
        assert torch.equal(together[row : row + 1], alone)


def test_strided_inputs_equal_contiguous_ones():
    query, key, value, *_ = make_inputs(2, 130, 4, 4, 32)
    expiry = random_expiry(130, GENERATOR(6))
    want = trajectory_attention(query, key, value, expiry)
    fused = torch.cat([query, key, value], 3)
    views = fused.split(32, 3)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    dim_first = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)]
    for strided in (views, heads_first, dim_first):
        assert not all(x.is_contiguous() for x in strided)
        assert torch.equal(trajectory_attention(*strided, expiry), want)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_padding_may_hold_anything(poison):
    """Keys and values that nobody sees, and the queries and gradients of blind rows."""
    tokens = 150
    inputs = make_inputs(1, tokens, 2, 1, 16)
    expiry = random_expiry(tokens, GENERATOR(7))
    token = torch.arange(tokens)
    expiry[:5] = token[:5]
    expiry[140:] = token[140:]
    mask = (token[None] <= token[:, None]) & (token[:, None] < expiry[None])
    blind, unseen = ~mask.any(1), ~mask.any(0)
    assert blind.any()
    for x, rows in zip(inputs[:4], (blind, unseen, unseen, blind), strict=True):
        x[:, rows] = poison
    inputs[4][:, :, blind] = poison
    check(inputs, expiry)


def test_blind_rows_give_zero_and_no_gradient():
    inputs = make_inputs(1, 70, 2, 1, 16)
    expiry = torch.arange(70)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    out, lse = trajectory_attention(*leaves, expiry, return_lse=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for gradient in torch.autograd.grad(out, leaves, inputs[3]):
        assert (gradient == 0).all()


def test_gradient_of_one_output_alone():
    inputs = make_inputs(1, 90, 2, 1, 16)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    expiry = torch.full((90,), 90)
    for pick in (0, 1):
        result = trajectory_attention(*leaves, expiry, return_lse=True)
        got = torch.autograd.grad(result[pick].sum(), leaves, allow_unused=True)
        grad_out = torch.ones_like(inputs[3]) * (pick == 0)
        grad_lse = torch.ones_like(inputs[4]) * (pick == 1)
        exact = plain_attention(*inputs[:3], expiry, None, grad_out, grad_lse, dtype=torch.float64)
        for name, gradient in zip(RESULTS[2:], got, strict=True):
            torch.testing.assert_close(gradient, getattr(exact, name).float())


def test_backward_is_deterministic():
    inputs = make_inputs(2, 400, 4, 2, 32)
    expiry = random_expiry(400, GENERATOR(8))
    leaves = [x.requires_grad_() for x in inputs[:3]]
    runs = [
        torch.autograd.grad(trajectory_attention(*leaves, expiry), leaves, inputs[3])
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_reference_passes_gradcheck_in_fp64():
    generator = GENERATOR(9)
    q, k, v = (
        torch.randn(1, 9, heads, 16, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (2, 1, 1)
    )
    expiry = torch.tensor([[9, 3, 2, 9, 4, 9, 7, 9, 9]])
    floor = torch.tensor([[0, 0, 1, 3, 0, 0, 2, 0, 0]])

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.results = reference.attention_forward(q, k, v, expiry, floor, 0.3, 1.5)
            ctx.save_for_backward(q, k, v)
            return ctx.results

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            return reference.attention_backward(
                grad_out, grad_lse, *ctx.saved_tensors, *ctx.results, expiry, floor, 0.3, 1.5
            )

    assert torch.autograd.gradcheck(Reference.apply, (q, k, v))


@pytest.mark.parametrize("with_floor", [False, True])
def test_opcheck(with_floor):
    query, key, value, grad_out, grad_lse = make_inputs(2, 150, 4, 2, 16)
    expiry = random_expiry(150, GENERATOR(1), batch=2)
    plan = BlockPlan.from_expiry(expiry, torch.zeros_like(expiry) if with_floor else None)
    layout = (plan.expiry, plan.floor, plan.rows)
    forward = (query, key, value, *layout, 0.25, 0.0)
    torch.library.opcheck(torch.ops.mem1.trajectory_attention_fwd, forward)
    out, lse = torch.ops.mem1.trajectory_attention_fwd(*forward)
    backward = (grad_out, grad_lse, query, key, value, out, lse, *layout, plan.columns, 0.25, 0.0)
    torch.library.opcheck(torch.ops.mem1.trajectory_attention_bwd, backward)


def test_compiles_whole_and_once_for_all_layouts():
    torch._dynamo.reset()

    def loss(query, key, value, plan):
        return trajectory_attention(query * 2, key, value, plan=plan, softcap=5.0).square().sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (300, 301, 520, 777):
        leaves = [x.requires_grad_() for x in make_inputs(1, tokens, 2, 1, 16)[:3]]
        plan = BlockPlan.from_expiry(random_expiry(tokens, GENERATOR(tokens)))
        got = torch.autograd.grad(compiled(*leaves, plan), leaves)
        want = torch.autograd.grad(loss(*leaves, plan), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_compiles_with_the_plan_made_inside():
    torch._dynamo.reset()
    compiled = torch.compile(
        trajectory_attention, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (200, 333):
        inputs = make_inputs(1, tokens, 2, 1, 16)[:3]
        expiry = random_expiry(tokens, GENERATOR(tokens))
        torch.testing.assert_close(compiled(*inputs, expiry), trajectory_attention(*inputs, expiry))
        torch.testing.assert_close(compiled(*inputs), trajectory_attention(*inputs))


def test_autocast_casts_like_sdpa():
    leaves = [x.requires_grad_() for x in make_inputs(1, 60, 2, 1, 16)[:3]]
    with torch.autocast("cpu", torch.bfloat16):
        out = trajectory_attention(*leaves)
    assert out.dtype == torch.bfloat16
    want = trajectory_attention(*(x.bfloat16() for x in leaves))
    assert torch.equal(out, want)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), leaves))


def test_gradient_checkpointing_gives_the_same_gradients():
    leaves = [x.requires_grad_() for x in make_inputs(1, 90, 2, 1, 16)[:3]]
    plan = BlockPlan.from_expiry(random_expiry(90, GENERATOR(2)))

    def block(q, k, v):
        return trajectory_attention(q.sin(), k, v, plan=plan).cos()

    want = torch.autograd.grad(block(*leaves).sum(), leaves)
    for reentrant in (False, True):
        out = checkpoint(block, *leaves, use_reentrant=reentrant)
        out.sum().backward()
        for leaf, gradient in zip(leaves, want, strict=True):
            assert torch.equal(leaf.grad, gradient)
            leaf.grad = None


def call(tokens=8, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, **changes):
    query, key, value, *_ = make_inputs(2, tokens, heads, kv_heads, head_dim, dtype)
    arguments = {"query": query, "key": key, "value": value, **changes}
    return trajectory_attention(**arguments)


VALUE_ERRORS = {
    "query: expected \\[batch, tokens, heads, head_dim\\], got \\[8, 2, 16\\]": {
        "query": torch.zeros(8, 2, 16)
    },
    "key: expected \\[2, 8, 1, 16\\], got \\[2, 9, 1, 16\\]": {"key": torch.zeros(2, 9, 1, 16)},
    "value: expected \\[2, 8, 1, 16\\], got \\[2, 8, 1, 24\\]": {"value": torch.zeros(2, 8, 1, 24)},
    "query: expected at least one token": {"tokens": 0},
    "query: expected heads divisible by 2 kv_heads, got 3": {"heads": 3, "kv_heads": 2},
    "query: expected head_dim 16 to 256 in steps of 8, got 8": {"head_dim": 8},
    "query: expected head_dim 16 to 256 in steps of 8, got 20": {"head_dim": 20},
    "query: expected head_dim 16 to 256 in steps of 8, got 264": {"head_dim": 264},
    "expiry: expected 8 tokens in 1 or 2 rows, got \\[1, 9\\]": {"expiry": torch.zeros(9).int()},
    "expiry: expected 8 tokens in 1 or 2 rows, got \\[3, 8\\]": {"expiry": torch.zeros(3, 8).int()},
    "floor: needs an expiry beside it": {"floor": torch.zeros(8).int()},
    "floor: expected the shape of expiry": {
        "expiry": torch.zeros(8).int(),
        "floor": torch.zeros(2, 8).int(),
    },
    "expiry: the plan carries it already": {
        "expiry": torch.zeros(8).int(),
        "plan": BlockPlan.from_expiry(torch.zeros(8).int()),
    },
    "plan: expected 8 tokens in 1 or 2 rows, got \\[1, 9\\]": {
        "plan": BlockPlan.from_expiry(torch.zeros(9).int())
    },
    "softcap: expected 1e-18 to 1e18 or None, got -1": {"softcap": -1.0},
    "softcap: expected 1e-18 to 1e18 or None, got inf": {"softcap": torch.inf},
    "softcap: expected 1e-18 to 1e18 or None, got 1e-50": {"softcap": 1e-50},
    "scale: expected 1e-18 to 1e18 or None, got -0.5": {"scale": -0.5},
    "scale: expected 1e-18 to 1e18 or None, got 0": {"scale": 0},
    "scale: expected 1e-18 to 1e18 or None, got nan": {"scale": torch.nan},
    "key: expected on cpu like query, got meta": {"key": torch.zeros(2, 8, 1, 16, device="meta")},
}


@pytest.mark.parametrize("message", VALUE_ERRORS)
def test_value_errors(message):
    with pytest.raises(ValueError, match=message):
        call(**VALUE_ERRORS[message])


TYPE_ERRORS = {
    "query: expected float32, float16 or bfloat16, got torch.float64": {"dtype": torch.float64},
    "key: expected torch.float32 like query, got torch.float16": {
        "key": torch.zeros(2, 8, 1, 16).half()
    },
    "value: expected a tensor, got NoneType": {"value": None},
    "expiry: expected int32 or int64, got torch.float32": {"expiry": torch.zeros(8)},
    "scale: expected a number or None, got str": {"scale": "0.1"},
    "softcap: expected a number or None, got bool": {"softcap": True},
    "plan: expected a BlockPlan, got Trajectory": {"plan": turns(2, 1, 3, 3, 0)},
}


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_type_errors(message):
    with pytest.raises(TypeError, match=message):
        call(**TYPE_ERRORS[message])


def test_works_with_no_extension_and_no_triton():
    """A process that cannot import either still computes, by the reference, and says so."""
    script = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "hidden = ('mem1_kernels._C', 'triton')\n"
        "u.find_spec = lambda name, package=None: None if name in hidden else find(name, package)\n"
        "import torch, mem1_kernels as m\n"
        "from mem1_kernels.ops import _library\n"
        "assert 'plain torch' in _library.implementations['trajectory_attention_fwd', 'CPU']\n"
        "q = torch.randn(1, 40, 2, 16, requires_grad=True)\n"
        "m.trajectory_attention(q, q, q, torch.full((40,), 30)).sum().backward()\n"
        "assert q.grad.isfinite().all() and 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_example_trajectory_is_usable_as_is():
    layout: Trajectory = turns(20, 3, 5, 3, 11)
    query, key, value, *_ = make_inputs(1, layout.num_tokens, 2, 1, 16)
    assert trajectory_attention(query, key, value, layout.expiry).shape == query.shape


def test_what_is_beyond_int32_means_what_it_says():
    """ "Never" may be written as the largest int64."""
    query, key, value, *_ = make_inputs(1, 200, 2, 1, 16)
    causal = trajectory_attention(query, key, value)
    for never in (2**31, 2**32, 2**63 - 1):
        expiry = torch.full((200,), never)
        assert torch.equal(trajectory_attention(query, key, value, expiry), causal)
        assert visible(expiry).sum() == 200 * 201 // 2
        out = trajectory_attention(query, key, value, torch.full((200,), 200), floor=expiry)
        assert not out.any()
    assert not trajectory_attention(query, key, value, torch.full((200,), -(2**40))).any()


def test_a_plan_keeps_its_layout():
    expiry = turns(40, 4, 12, 6, 20).expiry.clone()
    query, key, value, *_ = make_inputs(1, len(expiry), 2, 1, 16)
    plan = BlockPlan.from_expiry(expiry)
    before = trajectory_attention(query, key, value, plan=plan)
    expiry.fill_(1)
    assert torch.equal(trajectory_attention(query, key, value, plan=plan), before)


def test_gradients_of_gradients_raise():
    query, key, value, *_ = make_inputs(1, 40, 2, 1, 16)
    query.requires_grad_()
    out = trajectory_attention(query, key, value)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
