"""append_kv_ and cached_attention at their public door: whatever serves the CPU, held to fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from cache_cases import DTYPES, GENERATOR, int32, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

from mem1_kernels import trajectory_attention
from mem1_kernels.ops import reference
from mem1_kernels.ops._library import implementations
from mem1_kernels.ops.kv_cache import append_kv_, cached_attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("new_tokens", [1, 3, 17, 130])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (7, 1)])
def test_ragged_lengths(new_tokens, heads, kv_heads, dtype):
    lengths = [new_tokens, new_tokens + 9, 200, 331]
    make_case(lengths, new_tokens, heads, kv_heads, 64, dtype, seed=new_tokens).check()


@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("new_tokens", [1, 20])
def test_head_dims(head_dim, dtype, new_tokens):
    make_case([70, 141], new_tokens, 3, 1, head_dim, dtype).check()


@pytest.mark.parametrize("new_tokens", [1, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_in_several_splits(new_tokens, dtype):
    make_case([3000, 511, 513, 1024, 0], new_tokens, 4, 2, 64, dtype).check()


@given(st.data())
@settings(max_examples=60)
def test_any_layout(data):
    draw = data.draw
    new_tokens = draw(st.sampled_from([1, 2, 5, 16, 33, 70]))
    batch = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, new_tokens), min_size=batch, max_size=batch))
    older = draw(st.lists(st.integers(0, 150), min_size=batch, max_size=batch))
    group, kv_heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (5, 1), (7, 1), (16, 1)]))
    options = {}
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1.0, 30.0]))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.05, 0.6]))
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 120))
    case = make_case(
        [a + b for a, b in zip(counts, older, strict=True)],
        new_tokens,
        group * kv_heads,
        kv_heads,
        draw(st.sampled_from([16, 40, 64])),
        draw(st.sampled_from(DTYPES)),
        counts,
        seed=draw(st.integers(0, 9)),
        **options,
    )
    case.check()


@pytest.mark.parametrize("new_tokens", [1, 3, 17, 130])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_window_counts_positions_and_not_slots(new_tokens, index_dtype):
    case = make_case([new_tokens + 2, 300, 180], new_tokens, window=60, softcap=20.0)
    case.options["position_ids"] = case.options["position_ids"].to(index_dtype)
    case.check()
    # Positions of slots that the row does not hold say nothing.
    out, _ = case.run()
    for row, held in enumerate(case.lengths.tolist()):
        case.options["position_ids"][row, held:] = 2**31 - 1
    assert torch.equal(case.run()[0], out)
    # A view of positions with gaps between its elements.
    gapped = torch.stack([case.options["position_ids"]] * 2, 2)[:, :, 0]
    assert torch.equal(
        replace(case, options={**case.options, "position_ids": gapped}).run()[0], out
    )


def test_window_in_slot_order_is_the_plain_sliding_window():
    case = make_case([90, 90], 90, window=13)
    case.options["position_ids"] = torch.arange(case.key_cache.shape[2]).expand(2, -1) + 1000
    out, _ = case.check()
    key, value = (x[:, :, :90].transpose(1, 2) for x in (case.key_cache, case.value_cache))
    expiry = (torch.arange(90, dtype=torch.int32) + 13).clamp(max=90)
    torch.testing.assert_close(out, trajectory_attention(case.query, key, value, expiry))


def test_rows_without_tokens_give_zero_whatever_they_hold():
    case = make_case([0, 40, 40, 3], 3, counts=[0, 0, 2, 3])
    out, lse = case.check()
    for row, count in enumerate([0, 0, 2, 3]):
        assert (out[row, count:] == 0).all() and (lse[row, :, count:] == -torch.inf).all()
    all_empty = make_case([0, 0], 2)
    out, lse = all_empty.run()
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_no_capacity_at_all():
    empty = torch.empty(2, 1, 0, 16)
    strided = torch.empty(2, 1, 0, 32)[..., ::2]  # no new tokens, of any strides
    held = torch.ones(2, 1, 4, 16)
    append_kv_(strided, strided, held, held.clone(), int32(1, 2))
    assert torch.equal(held, torch.ones_like(held))
    out, lse = cached_attention(
        torch.full((2, 1, 1, 16), torch.nan), empty, empty, int32(0, 0), return_lse=True
    )
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("new_tokens", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(new_tokens, dtype):
    case = make_case([50, 77], new_tokens, 6, 2, 24, dtype, capacity=100)
    expected = case.run()
    # [batch, capacity, 2, kv_heads, head_dim] storage: tokens first, keys and values together.
    both = torch.stack([case.key_cache, case.value_cache], 0).permute(1, 3, 0, 2, 4).contiguous()
    key_cache, value_cache = both.permute(2, 0, 3, 1, 4)
    wide = torch.full((2, new_tokens, 6, 40), torch.nan, dtype=dtype)
    wide[..., 3:27] = case.query
    for query in (wide[..., 3:27], case.query.mT.contiguous().mT):
        strided = replace(case, query=query, key_cache=key_cache, value_cache=value_cache)
        for got, want in zip(strided.run(), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("new_tokens", [1, 9])
def test_capacity_does_not_matter(new_tokens):
    case = make_case([9, 40], new_tokens)
    grown = [
        torch.cat([x, torch.full((2, 2, 30_000, 32), torch.nan)], 2)
        for x in (case.key_cache, case.value_cache)
    ]
    for got, want in zip(
        replace(case, key_cache=grown[0], value_cache=grown[1]).run(), case.run(), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("new_tokens", [1, 200])
def test_result_is_the_same_on_any_number_of_threads(new_tokens):
    case = make_case([2500, 700, 200], new_tokens, 8, 2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(case.run())
    finally:
        torch.set_num_threads(threads)
    for got in results[1:]:
        assert torch.equal(got[0], results[0][0]) and torch.equal(got[1], results[0][1])


def test_huge_scores_do_not_overflow():
    case = make_case([64, 100], 2, scale=40.0)
    case.check()
    case.query *= 100
    assert case.run()[0].isfinite().all()


def test_agrees_with_the_reference():
    case = make_case([120, 7, 60], 5, counts=[5, 0, 2], window=40, softcap=9.0)
    tensors = (case.query.double(), case.key_cache.double(), case.value_cache.double())
    out, lse = reference.cached_attention(*tensors, *case.operands()[3:])
    exact = case.plain(torch.float64)
    torch.testing.assert_close(out, exact[0])
    torch.testing.assert_close(lse, exact[1])
    case.check()


def test_a_conversation_in_pieces_equals_one_causal_pass():
    torch.manual_seed(1)
    tokens, pieces = 97, [40, 1, 1, 30, 1, 24]
    query, key, value = (torch.randn(2, tokens, n, 32) for n in (4, 2, 2))
    whole = trajectory_attention(query, key, value)
    key_cache, value_cache = torch.full((2, 2, 2, 128, 32), torch.nan)
    lengths, start = int32(0, 0), 0
    for count in pieces:
        new = slice(start, start + count)
        append_kv_(
            key[:, new].transpose(1, 2),
            value[:, new].transpose(1, 2),
            key_cache,
            value_cache,
            lengths,
        )
        lengths = lengths + count
        out = cached_attention(query[:, new], key_cache, value_cache, lengths)
        torch.testing.assert_close(out, whole[:, new])
        start += count


APPEND_DTYPES = [*DTYPES, torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", APPEND_DTYPES, ids=str)
@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("slots_first", [False, True])
def test_append_writes_the_new_slots_and_nothing_else(dtype, with_counts, slots_first):
    def random_bytes(*shape):
        size = torch.empty((), dtype=dtype).element_size()
        raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
        return raw.view(dtype)

    def as_bytes(x):
        return x.contiguous().view(torch.uint8)

    batch, kv_heads, capacity, head_dim, new_tokens = 3, 2, 11, 20, 4
    if slots_first:
        key_cache, value_cache = (
            random_bytes(batch, capacity, kv_heads, head_dim).transpose(1, 2) for _ in range(2)
        )
        new = [random_bytes(batch, new_tokens, kv_heads, head_dim).transpose(1, 2) for _ in "kv"]
    else:
        key_cache, value_cache = (
            random_bytes(batch, kv_heads, capacity, head_dim) for _ in range(2)
        )
        new = [random_bytes(batch, kv_heads, new_tokens, head_dim) for _ in "kv"]
    lengths = int32(0, 7, 5)
    counts = [3, 0, 4] if with_counts else [4, 4, 4]
    expected = [key_cache.clone(), value_cache.clone()]
    for cache, tokens in zip(expected, new, strict=True):
        for row, count in enumerate(counts):
            start = int(lengths[row])
            cache[row, :, start : start + count] = tokens[row, :, :count]
    append_kv_(
        *new, key_cache, value_cache, lengths, counts=int32(*counts) if with_counts else None
    )
    assert torch.equal(as_bytes(key_cache), as_bytes(expected[0]))
    assert torch.equal(as_bytes(value_cache), as_bytes(expected[1]))
    assert lengths.tolist() == [0, 7, 5]


def append_arguments():
    caches = torch.randn(2, 2, 3, 8, 16)
    new = torch.randn(2, 2, 3, 2, 16)
    return {
        "keys": new[0],
        "values": new[1],
        "key_cache": caches[0],
        "value_cache": caches[1],
        "lengths": int32(0, 6),
        "counts": None,
    }


def attention_arguments():
    caches = torch.randn(2, 2, 3, 8, 16)
    return {
        "query": torch.randn(2, 2, 6, 16),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "lengths": int32(5, 8),
        "counts": None,
    }


APPEND_ERRORS = [
    ({"lengths": int32(0, 7)}, ValueError, r"lengths: expected 0 to 6 .* in row 1, got 7"),
    ({"lengths": int32(-1, 0)}, ValueError, r"lengths: expected 0 to 6 .* in row 0, got -1"),
    ({"counts": int32(2, 3)}, ValueError, r"counts: expected 0 to 2 .* in row 1, got 3"),
    ({"counts": int32(-1, 0)}, ValueError, r"counts: expected 0 to 2 .* in row 0, got -1"),
    ({"counts": int32(1, 1), "lengths": int32(0, 8)}, ValueError, r"lengths: expected 0 to 7"),
    ({"lengths": torch.tensor([0, 1])}, TypeError, r"lengths: expected int32, got torch.int64"),
    ({"lengths": int32(0)}, ValueError, r"lengths: expected \[2\] \(batch\), got \[1\]"),
    ({"lengths": [0, 1]}, TypeError, r"lengths: expected a tensor, got list"),
    ({"counts": int32(1, 1, 1)}, ValueError, r"counts: expected \[2\] \(batch\), got \[3\]"),
    ({"keys": torch.zeros(2, 3, 2, 8)}, ValueError, r"keys: expected \[2, 3, new_tokens, 16\]"),
    ({"keys": torch.zeros(2, 3, 16)}, ValueError, r"keys: expected \[2, 3, new_tokens, 16\]"),
    ({"values": torch.zeros(2, 3, 1, 16)}, ValueError, r"values: expected \[2, 3, 2, 16\]"),
    ({"values": torch.zeros(2, 3, 2, 16).half()}, TypeError, r"values: expected torch.float32"),
    ({"key_cache": torch.zeros(3, 8, 16)}, ValueError, r"key_cache: expected \[batch, kv_heads"),
    ({"value_cache": torch.zeros(2, 3, 9, 16)}, ValueError, r"value_cache: expected \[2, 3, 8, 16"),
    (
        {"key_cache": torch.zeros(2, 3, 16, 8).mT},
        ValueError,
        r"key_cache: expected a contiguous last dimension, got strides \[384, 128, 1, 8\]",
    ),
    (
        {"key_cache": torch.zeros(2, 1, 8, 16).expand(2, 3, 8, 16)},
        ValueError,
        r"key_cache: expected every element in memory of its own",
    ),
    (
        {"keys": torch.zeros(2, 3, 2, 16, requires_grad=True)},
        ValueError,
        "keys: requires gradients",
    ),
    (
        {"key_cache": torch._neg_view(torch.zeros(2, 3, 8, 16))},
        ValueError,
        "key_cache: expected a plain tensor, got a lazy conjugate or negative view",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), APPEND_ERRORS)
def test_append_errors_leave_the_caches_alone(change, error, message):
    arguments = {**append_arguments(), **change}
    caches = [arguments["key_cache"], arguments["value_cache"]]
    before = [x.clone() for x in caches]
    with pytest.raises(error, match=message):
        append_kv_(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(caches, before, strict=True))


def test_append_to_one_memory_twice_is_an_error():
    arguments = append_arguments()
    arguments["value_cache"] = arguments["key_cache"]
    with pytest.raises(
        ValueError, match="value_cache: expected memory apart from that of key_cache"
    ):
        append_kv_(**arguments)
    arguments = append_arguments()
    arguments["keys"] = arguments["key_cache"][:, :, 1:3]
    with pytest.raises(ValueError, match="keys: expected memory apart from that of key_cache"):
        append_kv_(**arguments)


def test_the_compiled_op_checks_memory_itself():
    if "C++" not in implementations["append_kv_", "CPU"]:
        pytest.skip("needs the extension")
    arguments = append_arguments()
    cache = arguments["key_cache"]
    for change in ({"value_cache": cache}, {"keys": cache[:, :, 1:3]}):
        overlapping = {**arguments, **change}
        with pytest.raises(ValueError, match="memory apart from all others, got an overlap"):
            torch.ops.mem1.append_kv_(*overlapping.values())
    expanded = {**arguments, "value_cache": torch.zeros(2, 1, 8, 16).expand(2, 3, 8, 16)}
    with pytest.raises(ValueError, match="every element of a tensor that is written"):
        torch.ops.mem1.append_kv_(*expanded.values())


def test_eight_byte_caches_are_an_error():
    arguments = {
        name: x.double() if x is not None and x.is_floating_point() else x
        for name, x in append_arguments().items()
    }
    with pytest.raises(TypeError, match="key_cache: expected a dtype of 1, 2 or 4 bytes"):
        append_kv_(**arguments)


def test_a_backward_pass_through_an_overwritten_cache_raises():
    arguments = append_arguments()
    weight = torch.ones((), requires_grad=True)
    product = (arguments["key_cache"] * weight).sum()
    with torch.no_grad():
        append_kv_(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


ATTENTION_ERRORS = [
    ({"lengths": int32(5, 9)}, ValueError, r"lengths: expected 0 to 8 .* in row 1, got 9"),
    ({"lengths": int32(-1, 8)}, ValueError, r"lengths: expected 0 to 8 .* in row 0, got -1"),
    ({"lengths": int32(5, 1)}, ValueError, r"lengths: expected 2 to 8 .* in row 1, got 1"),
    ({"counts": int32(3, 0)}, ValueError, r"counts: expected 0 to 2 .* in row 0, got 3"),
    ({"counts": int32(0, -1)}, ValueError, r"counts: expected 0 to 2 .* in row 1, got -1"),
    (
        {"counts": int32(1, 2), "lengths": int32(0, 8)},
        ValueError,
        r"lengths: expected 1 to 8 .* in row 0, got 0",
    ),
    ({"lengths": torch.tensor([5, 8])}, TypeError, r"lengths: expected int32, got torch.int64"),
    ({"query": torch.zeros(2, 2, 5, 16)}, ValueError, r"heads divisible by 3 kv_heads, got 5"),
    ({"query": torch.zeros(2, 2, 6, 8)}, ValueError, r"query: expected \[2, new_tokens, heads, 16"),
    ({"query": torch.zeros(2, 0, 6, 16)}, ValueError, r"query: expected at least one token"),
    ({"query": torch.zeros(2, 2, 6, 16).half()}, TypeError, r"query: expected torch.float32 like"),
    ({"scale": 0.0}, ValueError, r"scale: expected 1e-18 to 1e18 or None, got 0.0"),
    ({"scale": float("nan")}, ValueError, r"scale: expected 1e-18 to 1e18 or None, got nan"),
    ({"softcap": 0.0}, ValueError, r"softcap: expected 1e-18 to 1e18 or None, got 0.0"),
    ({"window": 3.5}, TypeError, r"window: expected an int or None, got float"),
    ({"window": 0}, ValueError, r"window: expected at least 1 token or None, got 0"),
    ({"window": 3}, ValueError, r"position_ids: a window needs each slot's position, got None"),
    (
        {"window": 3, "position_ids": torch.zeros(2, 8)},
        TypeError,
        r"position_ids: expected int32 or int6",
    ),
    (
        {"window": 3, "position_ids": torch.zeros(2, 7, dtype=torch.int32)},
        ValueError,
        r"position_ids: expected \[2, 8\] \(batch, capacity\), got \[2, 7\]",
    ),
    (
        {"key_cache": torch.zeros(2, 3, 8, 16, requires_grad=True)},
        ValueError,
        "key_cache: requires gradients, and cached_attention is for inference",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), ATTENTION_ERRORS)
def test_attention_errors(change, error, message):
    with pytest.raises(error, match=message):
        cached_attention(**{**attention_arguments(), **change})


BAD_HEAD_DIMS = [(size, torch.float32, ValueError) for size in (8, 20, 264)]


@pytest.mark.parametrize(
    ("head_dim", "dtype", "error"), [*BAD_HEAD_DIMS, (16, torch.float64, TypeError)]
)
def test_unsupported_head_dims_and_dtypes(head_dim, dtype, error):
    cache = torch.zeros(1, 1, 4, head_dim, dtype=dtype)
    with pytest.raises(error, match="query: expected"):
        cached_attention(torch.zeros(1, 1, 1, head_dim, dtype=dtype), cache, cache, int32(4))


def test_gradients_may_be_on_where_nothing_requires_them():
    arguments = attention_arguments()
    arguments["query"].requires_grad_()
    with torch.no_grad():
        without = cached_attention(**arguments)
    arguments["query"] = arguments["query"].detach()
    assert torch.equal(cached_attention(**arguments), without)


@pytest.mark.parametrize("counts", [None, int32(2, 1)], ids=["all", "counts"])
def test_opcheck(counts):
    arguments = append_arguments()
    torch.library.opcheck(
        torch.ops.mem1.append_kv_.default, (*list(arguments.values())[:-1], counts)
    )
    arguments = attention_arguments()
    position_ids = torch.randperm(16).view(2, 8)
    options = (counts, position_ids, 4, 0.25, 5.0)
    torch.library.opcheck(
        torch.ops.mem1.cached_attention.default, (*list(arguments.values())[:-1], *options)
    )


def test_compiles_whole_and_does_not_compile_again_for_other_lengths():
    def step(query, keys, values, key_cache, value_cache, lengths, counts):
        append_kv_(keys, values, key_cache, value_cache, lengths, counts=counts)
        lengths = lengths + counts
        return cached_attention(query, key_cache, value_cache, lengths, counts=counts) * 2

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    caches = torch.randn(2, 2, 3, 32, 16)
    for lengths, counts in ((int32(0, 8), int32(2, 1)), (int32(20, 3), int32(0, 2))):
        query, new = torch.randn(2, 2, 6, 16), torch.randn(2, 2, 3, 2, 16)
        eager_caches, compiled_caches = caches.clone(), caches.clone()
        with torch.no_grad():
            expected = step(query, *new, *eager_caches, lengths, counts)
            got = compiled(query, *new, *compiled_caches, lengths, counts)
        assert torch.equal(got, expected)
        assert torch.equal(compiled_caches, eager_caches)
    assert counter.frame_count == 1


def test_autocast_does_not_reach_inside():
    case = make_case([40, 12], 2)
    expected = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 50])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (8, 8, 32), (7, 1, 128)])
def test_decoding_repeats_training(heads, kv_heads, head_dim, chunk, dtype):
    """Both round a weight alike, so their outputs differ where a sum's last bit decides only."""
    tokens = 200
    query, key, value = (
        torch.randn(1, tokens, count, head_dim, generator=GENERATOR(count)).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    trained = trajectory_attention(3 * query, key, value, torch.full((tokens,), tokens))
    caches = key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()
    decoded = [
        cached_attention(3 * part, *caches, int32(min(start + chunk, tokens)))
        for start, part in zip(range(0, tokens, chunk), query.split(chunk, 1), strict=True)
    ]
    if dtype == torch.float32:
        torch.testing.assert_close(torch.cat(decoded, 1), trained)
    else:  # a finer grid is crossed more often
        limit = 1e-3 * torch.finfo(torch.bfloat16).eps / torch.finfo(dtype).eps
        assert (torch.cat(decoded, 1) != trained).float().mean() < limit


@pytest.mark.parametrize("level", ["default", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_simd_level(level):
    """Each level's code in a process of its own, since the level is decided once."""
    code = (
        "import sys; sys.path.insert(0, 'python_tests')\n"
        "import torch, cache_cases as t\n"
        "for dtype in t.DTYPES:\n"
        "    for head_dim in (24, 64, 80, 128):\n"
        "        for tokens, heads in ((1, 2), (1, 6), (1, 14), (3, 14), (70, 4)):\n"
        "            t.make_case([600, 0, tokens, 75], tokens, heads, 2, head_dim, dtype).check()\n"
        "    t.make_case([80, 33], 20, 4, 2, 32, dtype, [20, 3], window=30, softcap=5.0).check()\n"
        "    t.make_case([80, 33], 1, 4, 2, 32, dtype, window=30, softcap=5.0).check()\n"
        "for new, heads in ((1, 2), (1, 14), (40, 4)):\n"
        "    for dtype in (torch.bfloat16, torch.float16):\n"
        "        t.make_case([700, 90], new, heads, 2, 64, dtype, scale=0.5).check_equal_values()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MEM1_SIMD": level},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
