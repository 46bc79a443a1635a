"""The Triton kernels of append_kv_ and cached_attention, held to fp64: interpreted on the CPU,
compiled if there is a GPU. test_sm90_compile_decode.py tests what they compile to."""

from __future__ import annotations

import os

import pytest
import torch
from cache_cases import int32, make_case
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    reason = "needs a GPU, or TRITON_INTERPRET=1 set before triton is imported"
    pytest.skip(reason, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from mem1_kernels.ops import reference  # noqa: E402
from mem1_kernels.ops.kv_cache import append_kv_, cached_attention  # noqa: E402
from mem1_kernels.ops.triton import cached_attention as launchers  # noqa: E402
from mem1_kernels.ops.triton.cached_attention_kernels import _first_split_slot, _row_splits  # noqa: E402

pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU else "cpu"
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
# tl.dot of the interpreter takes bfloat16 for uint16.
LOW = BFLOAT if GPU else HALF
LIMITS = torch.iinfo(torch.int64)


@pytest.fixture(autouse=True)
def _unwritten_is_nan():
    """What the launchers allocate holds NaN until a kernel writes it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(case):
    operands = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.operands()]
    return tuple(x.cpu() for x in launchers.cached_attention(*operands))


def check(lengths, new_tokens, *arguments, **options):
    case = make_case(lengths, new_tokens, *arguments, **options)
    return case.check(run(case))


@pytest.mark.parametrize(
    ("new_tokens", "heads", "kv_heads", "head_dim", "dtype"),
    [
        (1, 2, 2, 64, FLOAT),
        (1, 7, 1, 128, LOW),
        (3, 4, 2, 80, FLOAT),
        (3, 7, 1, 24, LOW),  # 21 query rows: a tile of 64
        (17, 4, 2, 192, LOW),
        (70, 2, 1, 64, LOW),  # 140 query rows: two tiles of 128, with a loop that has no masks
        (1, 2, 1, 256, FLOAT),
    ],
)
def test_ragged_lengths(new_tokens, heads, kv_heads, head_dim, dtype):
    check([new_tokens, 0, 161, new_tokens + 9], new_tokens, heads, kv_heads, head_dim, dtype)


@pytest.mark.parametrize("dtype", [FLOAT, LOW], ids=str)
@pytest.mark.parametrize(("new_tokens", "counts"), [(1, [1, 0, 1]), (20, [20, 3, 0])])
def test_counts_window_and_softcap(new_tokens, counts, dtype):
    options = {"counts": counts, "window": 45, "softcap": 6.0}
    check([140, 60, 40], new_tokens, 4, 2, 32, dtype, **options)


def test_matrix_tiles_with_window_and_softcap():
    check([150, 100], 40, 4, 2, 64, LOW, counts=[33, 40], window=70, softcap=6.0)


@pytest.mark.parametrize("shares", [1, 2, 7, 40])
@pytest.mark.parametrize("dtype", [FLOAT, LOW], ids=str)
def test_splits(shares, dtype, monkeypatch):
    monkeypatch.setattr(launchers, "_shares", lambda *_: shares)
    check([700, 0, 65, 1], 1, 3, 1, 32, dtype)
    check([420, 130, 6], 6, 4, 2, 16, dtype, counts=[6, 1, 0], window=100)


def test_no_capacity_at_all():
    empty = torch.empty(2, 1, 0, 16, device=DEVICE)
    query = torch.full((2, 1, 1, 16), torch.nan, device=DEVICE)
    lengths = int32(0, 0).to(DEVICE)
    out, lse = launchers.cached_attention(query, empty, empty, lengths, None, None, 0, 0.25, 0.0)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_any_strides():
    case = make_case([50, 77], 3, 6, 2, 24, capacity=90)
    expected = run(case)
    both = torch.stack([case.key_cache, case.value_cache], 0).permute(1, 3, 0, 2, 4).contiguous()
    case.key_cache, case.value_cache = both.permute(2, 0, 3, 1, 4)
    wide = torch.full((2, 3, 6, 40), torch.nan)
    wide[..., 8:32] = case.query
    case.query = wide[..., 8:32]
    for got, want in zip(run(case), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_position_dtypes_and_strides(index_dtype):
    case = make_case([100, 70], 2, window=30)
    positions = case.options["position_ids"].to(index_dtype)
    case.options["position_ids"] = torch.stack([positions] * 2, 2)[:, :, 0]
    case.check(run(case))


@pytest.mark.parametrize("base", [-(2**31), 2**31 - 20, LIMITS.min, LIMITS.max - 2**40 - 60])
@pytest.mark.parametrize(
    ("far", "window", "new_tokens"),  # 2 new tokens fill a tile of 16 query rows, 20 one of 64
    [
        (0, 5, 2),
        (0, 2**62, 2),
        (2**31, 5, 2),
        (2**31, 5, 20),
        (2**31, 2**31 - 1, 2),
        (2**31, 2**31 + 15, 2),
        (2**40, 2**31, 2),
        (2**40, 2**40 + 25, 20),
    ],
)
def test_windows_and_positions_of_any_size(base, far, window, new_tokens):
    """The new tokens, in the slots from 10 on, are `far` positions ahead of the older ones."""
    tokens = 10 + new_tokens
    positions = [base + slot + (far if slot >= 10 else 0) for slot in range(tokens)]
    query, cache = torch.randn(1, new_tokens, 2, 16), torch.randn(2, 1, 1, tokens, 16)
    fits = all(-(2**31) <= position < 2**31 for position in positions)
    position_ids = torch.tensor([positions], dtype=torch.int32 if fits else torch.int64)
    operands = [int32(tokens), None, position_ids, window, 0.25, 0.0]
    expected = reference.cached_attention(query.double(), *cache.double(), *operands)
    operands = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in operands]
    got = launchers.cached_attention(query.to(DEVICE), *cache.to(DEVICE), *operands)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs.double(), rtol=1e-3, atol=1e-3)


def test_impossible_lengths_stay_inside_the_cache():
    """Nothing reads lengths back to the host, so the kernels cut them to what there is."""
    case = make_case([40, 40], 2, capacity=40)
    case.lengths = int32(60, -3)
    out, lse = run(case)
    case.lengths = int32(40, 0)
    expected = run(case)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@triton.jit
def _splits_kernel(
    lengths_ptr,
    counts_ptr,
    splits_ptr,
    slots_ptr,
    batch,
    capacity,
    shares,
    BATCH: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    rows = tl.arange(0, BATCH)
    splits = _row_splits(rows, lengths_ptr, counts_ptr, batch, capacity, shares, HAS_COUNTS, 64, 2)
    tl.store(splits_ptr + rows, splits)
    for row in range(batch):
        tl.store(slots_ptr + row, _first_split_slot(rows, splits, row))


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=9), st.integers(1, 200), st.booleans())
@settings(max_examples=40)
def test_the_schedule_fits_its_grid_and_its_workspace(lengths, shares, with_counts):
    batch = len(lengths)
    size = triton.next_power_of_2(batch)
    splits, slots = (torch.full((size,), -1, dtype=torch.int32, device=DEVICE) for _ in "ab")
    counts = [i % 2 for i in range(batch)]
    _splits_kernel[(1,)](
        int32(*lengths).to(DEVICE),
        int32(*counts).to(DEVICE) if with_counts else None,
        splits,
        slots,
        batch,
        4000,
        shares,
        BATCH=size,
        HAS_COUNTS=with_counts,
    )
    splits, slots = splits.tolist(), slots.tolist()
    assert all(x >= 1 for x in splits[:batch]) and not any(splits[batch:])
    assert sum(splits) <= shares + batch
    split_rows = [row for row in range(batch) if splits[row] > 1]
    assert sum(splits[row] for row in split_rows) <= 2 * shares
    for earlier, later in zip(split_rows, split_rows[1:], strict=False):
        assert slots[later] == slots[earlier] + splits[earlier]
    if with_counts:
        assert all(splits[row] == 1 for row in range(batch) if counts[row] == 0)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("with_counts", [False, True])
@pytest.mark.parametrize("slots_first", [False, True])
def test_append_writes_the_new_slots_and_nothing_else(dtype, with_counts, slots_first):
    def random_bytes(tokens):
        size = torch.empty((), dtype=dtype).element_size()
        shape = (3, tokens, 2, 20 * size) if slots_first else (3, 2, tokens, 20 * size)
        raw = torch.randint(0, 256, shape, dtype=torch.uint8).view(dtype).to(DEVICE)
        return raw.transpose(1, 2) if slots_first else raw

    def as_bytes(x):
        return x.contiguous().view(torch.uint8)

    # The last row has less room than new tokens: those past the capacity are dropped.
    lengths, counts = [0, 7, 98], [37, 0, 37] if with_counts else [37, 37, 37]
    caches = [random_bytes(100) for _ in "kv"]
    new = [random_bytes(37) for _ in "kv"]
    expected = [x.clone() for x in caches]
    for cache, tokens in zip(expected, new, strict=True):
        for row, (start, count) in enumerate(zip(lengths, counts, strict=True)):
            count = min(count, 100 - start)
            cache[row, :, start : start + count] = tokens[row, :, :count]
    given_counts = int32(*counts).to(DEVICE) if with_counts else None
    launchers.append_kv_(*new, *caches, int32(*lengths).to(DEVICE), given_counts)
    for got, want in zip(caches, expected, strict=True):
        assert torch.equal(as_bytes(got), as_bytes(want))


@pytest.mark.gpu
@pytest.mark.parametrize("new_tokens", [1, 5])
def test_a_captured_graph_replays_with_other_lengths(new_tokens):
    """Neither op looks at the host: captured once, they follow new lengths and counts."""
    case = make_case([3000, 40], new_tokens, 14, 2, 64, BFLOAT, capacity=3100)
    query, *caches, lengths = (
        x.cuda() for x in (case.query, case.key_cache, case.value_cache, case.lengths)
    )
    for x in (query, *caches):
        x.nan_to_num_(0.5)
    counts = torch.full_like(lengths, new_tokens)
    before = lengths - counts
    new = torch.randn(2, 2, 2, new_tokens, 64, device="cuda", dtype=BFLOAT)

    def step():
        append_kv_(*new, *caches, before, counts=counts)
        return cached_attention(query, *caches, lengths, counts=counts, return_lse=True)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for held, taken in (([30, 2900], [new_tokens, 1]), ([0, 700], [0, new_tokens])):
        lengths.copy_(int32(*held))
        counts.copy_(int32(*taken))
        torch.sub(lengths, counts, out=before)
        graph.replay()
        replayed = [x.clone() for x in captured]
        for got, want in zip(replayed, step(), strict=True):
            assert torch.equal(got, want)
