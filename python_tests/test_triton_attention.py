"""The Triton attention kernels, held to fp64: interpreted on the CPU, compiled if there is a GPU.

The interpreter runs what the kernels say, tile by tile, so masks, indices, poison and the plan are
tested here; test_sm90_compile.py tests what they compile to, and test_gpu.py the compiled code.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1_kernels import BlockPlan
from mem1_kernels.testing import assert_within_budget, plain_attention, random_expiry, turns

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    reason = "needs a GPU, or TRITON_INTERPRET=1 set before triton is imported"
    pytest.skip(reason, allow_module_level=True)

from mem1_kernels.ops.triton import attention, attention_configs  # noqa: E402
from mem1_kernels.ops.triton.attention_configs import Config  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
RESULTS = ("out", "lse", "grad_query", "grad_key", "grad_value")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _unwritten_is_nan():
    """What the launchers allocate holds NaN until a kernel writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _interpreted_bfloat16():
    """The interpreter keeps bfloat16 as uint16, which its tl.dot multiplies; here it widens it."""
    if GPU:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    create_dot = InterpreterBuilder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder,
            "create_dot",
            lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest),
        )
        yield


def make_inputs(batch, tokens, heads, kv_heads, head_dim, dtype=FLOAT, seed=0):
    """query, key, value, grad_out, grad_lse."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count):
        shape = (batch, tokens, count, head_dim)
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    grad_lse = torch.randn(batch, heads, tokens, generator=generator).to(DEVICE)
    return normal(heads), normal(kv_heads), normal(kv_heads), normal(heads), grad_lse


def launch(inputs, plan, softcap=0.0, scale=None):
    query, key, value, grad_out, grad_lse = inputs
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out, lse = attention.forward(
        query, key, value, plan.expiry, plan.floor, plan.rows, scale, softcap
    )
    gradients = attention.backward(
        grad_out,
        grad_lse,
        query,
        key,
        value,
        out,
        lse,
        plan.expiry,
        plan.floor,
        plan.rows,
        plan.columns,
        scale,
        softcap,
    )
    return out, lse, *gradients


def check(inputs, expiry, floor=None, softcap=0.0, scale=None):
    """All five results within the error budget of their dtype."""
    expiry = expiry.to(DEVICE)
    floor = None if floor is None else floor.to(DEVICE)
    results = launch(inputs, BlockPlan.from_expiry(expiry, floor), softcap, scale)
    arguments = (*inputs[:3], expiry, floor, *inputs[3:])
    options = {"softcap": softcap or None, "scale": scale}
    plain = plain_attention(*arguments, **options)
    exact = plain_attention(*arguments, **options, dtype=torch.float64)
    for name, got in zip(RESULTS, results, strict=True):
        assert_within_budget(name, got, getattr(plain, name), getattr(exact, name))
    return results


def poisoned(inputs, expiry, floor=None):
    """NaN and inf in the keys and values of dead keys, in all that belongs to blind rows."""
    query, key, value, grad_out, grad_lse = (x.clone() for x in inputs)
    batch, tokens = query.shape[:2]
    expiry = torch.atleast_2d(expiry).expand(batch, tokens)
    floor = torch.zeros_like(expiry) if floor is None else torch.atleast_2d(floor)
    token = torch.arange(tokens, dtype=torch.int32)
    dead = expiry <= token
    i, k = token[:, None], token[None, :]
    seen = (floor[:, :, None] <= k) & (k <= i) & (i < expiry[:, None, :])
    blind = ~seen.any(2)
    assert dead.any() and blind.any()
    key[dead.to(DEVICE)] = torch.nan
    value[dead.to(DEVICE)] = torch.inf
    query[blind.to(DEVICE)] = torch.nan
    grad_out[blind.to(DEVICE)] = torch.inf
    grad_lse.transpose(1, 2)[blind.to(DEVICE)] = torch.nan
    return query, key, value, grad_out, grad_lse


@pytest.mark.parametrize(
    ("tokens", "head_dim", "heads", "kv_heads", "dtype"),
    [
        (1, 16, 1, 1, BFLOAT),
        (63, 16, 4, 1, FLOAT),
        (65, 80, 2, 2, BFLOAT),
        (127, 64, 2, 1, FLOAT),
        (129, 16, 2, 1, HALF),
        (129, 80, 1, 1, FLOAT),
        (255, 16, 4, 2, BFLOAT),
        (300, 64, 1, 1, BFLOAT),
        (300, 16, 1, 1, FLOAT),
    ],
)
def test_random_expiry(tokens, head_dim, heads, kv_heads, dtype):
    expiry = random_expiry(tokens, torch.Generator().manual_seed(tokens))
    check(make_inputs(1, tokens, heads, kv_heads, head_dim, dtype), expiry)


@pytest.mark.parametrize("head_dim", [24, 72, 96, 104, 192, 256])
def test_head_dims_of_one_and_two_chunks(head_dim):
    expiry = turns(30, 3, 10, 5, 10).expiry
    check(make_inputs(1, len(expiry), 1, 1, head_dim, BFLOAT), expiry)


def test_full_tiles_and_turns():
    expiry = turns(150, 3, 40, 16, 100).expiry
    plan = BlockPlan.from_expiry(expiry)
    _, offsets, partial, _ = plan.rows
    assert (offsets.diff(dim=1) > partial).any()
    check(make_inputs(1, len(expiry), 2, 1, 16, BFLOAT), expiry)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT])
def test_floor_softcap_and_scale(dtype):
    tokens = 200
    generator = torch.Generator().manual_seed(1)
    floor = torch.randint(0, tokens, (tokens,), generator=generator, dtype=torch.int32)
    inputs = make_inputs(1, tokens, 2, 1, 16, dtype)
    check(inputs, random_expiry(tokens, generator), floor)
    check(inputs, random_expiry(tokens, generator), floor, softcap=2.0, scale=0.7)


def test_softcap_on_full_tiles_with_large_scores():
    query, key, *rest = make_inputs(1, 300, 1, 1, 16)
    expiry = torch.full((300,), 300)
    check((4 * query, 4 * key, *rest), expiry, softcap=20.0)
    check((0.01 * query, 0.01 * key, *rest), expiry, softcap=50.0)


def test_rows_of_a_batch_have_their_own_layout():
    generator = torch.Generator().manual_seed(2)
    expiry = random_expiry(200, generator, batch=3)
    expiry[1] = 200
    floor = torch.randint(0, 100, (3, 200), generator=generator, dtype=torch.int32)
    check(make_inputs(3, 200, 2, 1, 16), expiry)
    check(make_inputs(3, 200, 1, 1, 16), expiry, floor)


def test_one_layout_for_a_batch():
    expiry = turns(40, 4, 12, 6, 20).expiry
    inputs = make_inputs(2, len(expiry), 2, 2, 16, HALF)
    results = check(inputs, expiry)
    for row in range(2):
        alone = launch([x[row : row + 1] for x in inputs], BlockPlan.from_expiry(expiry.to(DEVICE)))
        for got, expected in zip(alone, results, strict=True):
            assert torch.equal(got[0], expected[row])


def test_split_columns_are_summed_in_a_fixed_order():
    expiry = turns(100, 9, 60, 20, 40).expiry
    plan = BlockPlan.from_expiry(expiry.to(DEVICE))
    assert plan.named()["col_slots"].max() > 1
    inputs = make_inputs(1, len(expiry), 1, 1, 16, HALF)
    results = check(inputs, expiry)
    for got, again in zip(results[2:], launch(inputs, plan)[2:], strict=True):
        assert torch.equal(got, again)


@pytest.mark.parametrize("with_floor", [False, True])
def test_what_nobody_sees_may_hold_anything(with_floor):
    tokens = 290
    generator = torch.Generator().manual_seed(3)
    expiry = random_expiry(tokens, generator)
    expiry[:20] = torch.arange(20)
    expiry[130:140] = torch.arange(130, 140)
    expiry[260:] = torch.arange(260, tokens)
    floor = None
    if with_floor:
        # Only rows 100 to 109 are kept from keys, so that no live key is unseen.
        floor = torch.zeros(tokens, dtype=torch.int32)
        floor[100:110] = torch.arange(101, 111)
        expiry[100:110] = torch.arange(100, 110)
    inputs = make_inputs(1, tokens, 2, 1, 16)
    results = check(poisoned(inputs, expiry, floor), expiry, floor)
    assert torch.equal(results[0][0, 0], torch.zeros_like(results[0][0, 0]))
    plan = BlockPlan.from_expiry(expiry.to(DEVICE), None if floor is None else floor.to(DEVICE))
    clean = launch(inputs, plan)
    for name, got, expected in zip(RESULTS, results, clean, strict=True):
        assert torch.equal(got, expected), name


def test_strided_inputs():
    batch, tokens, heads, kv_heads, head_dim = 2, 140, 2, 1, 16
    fused = torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim, device=DEVICE)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=2)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    grad_out = torch.randn(batch, head_dim, tokens, heads, device=DEVICE).permute(0, 2, 3, 1)
    grad_lse = torch.randn(batch, tokens, heads, device=DEVICE).transpose(1, 2)
    inputs = (query, key, value, grad_out, grad_lse)
    expiry = random_expiry(tokens, torch.Generator().manual_seed(4))
    results = check(inputs, expiry)
    plan = BlockPlan.from_expiry(expiry.to(DEVICE))
    packed = launch([x.contiguous() for x in inputs], plan)
    for got, expected in zip(results, packed, strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, expected)


def test_grad_lse_is_optional():
    *inputs, grad_lse = make_inputs(1, 100, 1, 1, 16)
    plan = BlockPlan.from_expiry(random_expiry(100, torch.Generator().manual_seed(5)).to(DEVICE))
    without = launch((*inputs, None), plan)
    zero = launch((*inputs, torch.zeros_like(grad_lse)), plan)
    for got, expected in zip(without, zero, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "config", [Config(128, 128, 64, 8, 2), Config(64, 32, 16, 4, 2), Config(32, 64, 64, 4, 2)]
)
def test_every_way_to_cut_a_tile(config, monkeypatch):
    """The last query tile has 2 rows: all blocks but its first lie behind the last token."""
    monkeypatch.setattr(attention_configs, "select", lambda *_: config)
    expiry = random_expiry(258, torch.Generator().manual_seed(6))
    expiry[:140] = 258
    check(make_inputs(1, 258, 2, 1, 16), expiry)


@given(
    st.integers(0, 150),
    st.integers(1, 4),
    st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(0, 60)),
    st.integers(0, 2**16),
)
@settings(max_examples=8)
def test_layouts(prompt, turn_count, parts, seed):
    expiry = turns(prompt, turn_count, *parts).expiry
    check(make_inputs(2, len(expiry), 1, 1, 16, HALF, seed), expiry)


def test_strides_beyond_32_bits_are_copied_and_others_are_not():
    """Shapes alone: a meta tensor has strides and no memory."""

    def view(*strides):
        return torch.empty_strided((1, 256, 4, 128), strides, device="meta", dtype=BFLOAT)

    for near in (
        view(2**40, 4 * 128, 128, 1),  # the batch is added in 64 bits
        view(2**40, 128, 2**32 - 128, 1),  # head-major, with nearly 2^32 numbers per head
        view(0, 2**25 - 128, 128, 1),
    ):
        assert attention._in_reach(near) is near
    for far in (view(0, 128, 2**32, 1), view(0, 2**25, 128, 1), view(0, 512, 128, 2)):
        assert attention._in_reach(far).is_contiguous()


@pytest.mark.parametrize("far", ["query", "key", "value", "grad_out"])
def test_a_copy_gives_the_same(far, monkeypatch):
    """As if the offsets of one tensor were out of reach."""
    expiry = turns(40, 3, 12, 6, 20).expiry
    query, key, value, grad_out, grad_lse = make_inputs(1, len(expiry), 4, 2, 16)
    inputs = {"query": query, "key": key, "value": value, "grad_out": grad_out}
    rows = torch.empty(*inputs[far].shape[:3], 4096 // inputs[far].shape[2])
    inputs[far] = rows[..., :16].copy_(inputs[far])
    assert inputs[far].stride(1) == 4096
    plan = BlockPlan.from_expiry(expiry)
    expected = launch((*inputs.values(), grad_lse), plan)
    copied = []
    in_reach = attention._in_reach

    def reach(x):
        if x.stride(1) < 4096:
            return in_reach(x)
        copied.append(x)
        return x.contiguous()

    monkeypatch.setattr(attention, "_in_reach", reach)
    for got, want in zip(launch((*inputs.values(), grad_lse), plan), expected, strict=True):
        assert torch.equal(got, want)
    assert copied


def test_alignment_is_that_of_every_stride_that_says_something():
    x = torch.empty(1, 5, 3, 72)
    assert attention._strides(x) == [0, 216, 72] and attention._alignment([0, 216, 72]) == 8
    y = torch.empty(1, 5, 1, 128)[:, ::2]
    assert attention._strides(y) == [0, 256, 0] and attention._alignment([0, 256, 0]) == 16
    assert attention._alignment([0, 51, 17]) == 1


def test_more_blocks_than_a_grid_has_are_refused():
    assert attention._grid(8, 65535) == (8, 65535)
    with pytest.raises(ValueError, match="tokens: expected at most 65,535 blocks .* got 65536"):
        attention._grid(8, 65536)


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_both_loops_of_the_forward(pipelined, softcap, monkeypatch):
    """Partial and full tiles, blind rows, poison; the pipelined one with one to many steps."""
    config = Config(64, 32, 32, 4, 2, pipelined)
    select = attention_configs.select
    monkeypatch.setattr(
        attention_configs,
        "select",
        lambda name, *rest: config if name == "fwd" else select(name, *rest),
    )
    for tokens in (1, 31, 33, 129, 300):
        generator = torch.Generator().manual_seed(tokens)
        expiry = random_expiry(tokens, generator)
        inputs = make_inputs(1, tokens, 2, 1, 16, seed=tokens)
        check(inputs, expiry, softcap=softcap)
        check(inputs, torch.full((tokens,), tokens), softcap=softcap)
        check(inputs, torch.zeros(tokens, dtype=torch.int32), softcap=softcap)
    expiry = random_expiry(300, torch.Generator().manual_seed(9))
    expiry[:40] = 0
    inputs = make_inputs(1, 300, 2, 1, 16)
    plan = BlockPlan.from_expiry(expiry)
    clean = launch(inputs, plan, softcap)
    for got, want in zip(launch(poisoned(inputs, expiry), plan, softcap), clean, strict=True):
        assert torch.equal(got, want)
