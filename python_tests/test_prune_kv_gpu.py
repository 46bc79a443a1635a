"""What only a GPU shows of pruning: CUDA and Triton alike, no wait, no allocation, graph replay."""

from __future__ import annotations

import pytest
import torch
from kv_layouts import (
    PAGED_KINDS,
    STORAGES,
    assert_same_bytes,
    make_layer,
    make_pages,
    paged_rows,
    random_bytes,
    random_rows,
)

from mem1_kernels.ops import reference
from mem1_kernels.ops._library import implementations
from mem1_kernels.ops.prune_kv import prune_kv_, prune_paged_kv_
from mem1_kernels.ops.rope import Rope

pytestmark = pytest.mark.gpu


def to_gpu(x: torch.Tensor) -> torch.Tensor:
    base = x if x._base is None else x._base
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def dense_ops():
    """The op as it is served, and the Triton one beside it where that is CUDA C++."""
    from mem1_kernels.ops.triton import prune_kv

    served = torch.ops.mem1.prune_kv_.default
    both = [served, prune_kv.prune_kv_]
    return both if "Triton" not in implementations["prune_kv_", "CUDA"] else both[:1]


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize("storage", STORAGES)
def test_prune_bytes(storage: str, ordered: bool) -> None:
    shapes = [(1, 1), (3, 130), (2, 5000), (1, 70_000), (64, 600), (2, 1_000_000)]
    for seed, (batch, capacity) in enumerate(shapes):
        dims = [(2, 128), (1, 7)] if capacity < 100_000 else [(1, 8)]
        dtype = (torch.bfloat16, torch.float8_e4m3fn, torch.float32)[seed % 3]
        layers = [
            make_layer(storage, batch, heads, capacity, dim, dtype, seed) for heads, dim in dims
        ]
        slots = [random_bytes((batch, capacity), torch.int64, seed + 3)]
        lengths, keep = random_rows(batch, capacity, seed, (0.5, 0.05, 0.95)[seed % 3])
        lengths[0] = capacity
        keys, values = (list(xs) for xs in zip(*layers, strict=True))
        copies = [
            [[to_gpu(x) for x in xs] for xs in (keys, values, slots, [lengths, keep])]
            for _ in dense_ops()
        ]
        reference.prune_kv_(keys, values, lengths, keep, slots, ordered, None, [], False)
        expected = (*keys, *values, *slots, lengths)
        for op, mine in zip(dense_ops(), copies, strict=True):
            op(*mine[:2], *mine[3], mine[2], ordered, None, [], False)
            got = (*mine[0], *mine[1], *mine[2], mine[3][0])
            for x, y in zip(got, expected, strict=True):
                assert_same_bytes(x.cpu(), y, f"{batch} x {capacity}")


@pytest.mark.parametrize("ordered", [False, True], ids=["hole filling", "ordered"])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_prune_rotation(dtype: torch.dtype, layout: str, ordered: bool) -> None:
    batch, capacity = 3, 3000
    inv_freqs = [1e4 ** -(torch.arange(n) / max(n, 1)) for n in (64, 21, 0)]
    keys = [torch.randn(batch, 2, capacity, 128).to(dtype) for _ in inv_freqs]
    values = [x.clone() for x in keys]
    delta = torch.randint(-50_000, 50_000, (batch, capacity), dtype=torch.int32)
    delta[:, ::5] = 0
    lengths, keep = random_rows(batch, capacity, 1, 0.6)
    lengths[0] = capacity
    rope = Rope(inv_freqs, layout)
    copies = [
        [[to_gpu(x) for x in xs] for xs in (keys, values, [lengths, keep, delta], rope.steps)]
        for _ in dense_ops()
    ]
    exact = [x.double() for x in keys]
    reference.prune_kv_(
        exact, values, lengths, keep, [], ordered, delta, rope.steps, layout == "interleaved"
    )
    for op, mine in zip(dense_ops(), copies, strict=True):
        op(*mine[:2], *mine[2][:2], [], ordered, mine[2][2], mine[3], layout == "interleaved")
        for layer, wanted in enumerate(exact):
            assert_same_bytes(mine[1][layer].cpu(), values[layer], "values")
            error = (mine[0][layer].cpu().double() - wanted).abs()
            rounding = wanted.abs() * torch.finfo(dtype).eps / 2
            assert (error <= rounding + 1e-6 * wanted.norm(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize("kind", PAGED_KINDS)
def test_prune_paged_bytes(kind: str) -> None:
    from mem1_kernels.ops.triton import prune_kv

    ops = [torch.ops.mem1.prune_paged_kv_.default, prune_kv.prune_paged_kv_]
    for seed, (page_size, max_pages) in enumerate([(1, 3000), (16, 500), (64, 40), (3, 70)]):
        for keep_share in (0.1, 0.6, 0.97):
            table, lengths, keep, pages = paged_rows(
                4, max_pages, page_size, seed, keep_share, runs=keep_share == 0.97
            )
            layout, key, value = make_pages(kind, pages, page_size, 2, 8, torch.bfloat16, seed)
            key, value = (x if layout == "NHD" else x.transpose(1, 2) for x in (key, value))
            refs = None
            if seed % 2:
                refs = torch.randint(1, 4, (pages,), dtype=torch.int32)
            tensors = (key, value, table, lengths, keep, table, lengths)
            copies = [[to_gpu(x) for x in tensors] for _ in ops]
            freed, counts = torch.empty_like(table), torch.empty_like(lengths)
            reference.prune_paged_kv_([key], [value], table, lengths, keep, refs, [], freed, counts)
            for op, x in zip(ops, copies, strict=True):
                own = None if refs is None else refs.cuda()
                op(x[:1], x[1:2], *x[2:5], own, [], x[5], x[6])
                expected = (key, value, table, lengths, keep, freed, counts)
                for got, wanted in zip(x, expected, strict=True):
                    assert_same_bytes(got.cpu(), wanted, f"{page_size} x {max_pages}")


def test_prune_neither_waits_nor_allocates_and_replays_in_a_graph() -> None:
    batch, capacity, layers = 4, 900, 28
    rope = Rope(1e6 ** -(torch.arange(64, device="cuda") / 64))
    keys = [torch.randn(batch, 4, capacity, 128, device="cuda").bfloat16() for _ in range(layers)]
    values = [x.clone() for x in keys]
    ids = torch.arange(batch * capacity, device="cuda").reshape(batch, capacity)
    lengths = torch.full((batch,), capacity, dtype=torch.int32, device="cuda")
    keep = torch.ones(batch, capacity, dtype=torch.bool, device="cuda")
    delta = torch.zeros(batch, capacity, dtype=torch.int32, device="cuda")

    def call() -> None:
        prune_kv_(keys, values, lengths, keep, slots=[ids], position_delta=delta, rope=rope)

    call()
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for seed in range(3):
        new_lengths, new_keep = random_rows(batch, capacity, seed, 0.6)
        lengths.copy_(new_lengths)
        keep.copy_(new_keep)
        delta.random_(-500, 500)
        ids.copy_(torch.arange(batch * capacity, device="cuda").view_as(ids))  # moves double them
        old = [x.clone() for x in (keys[-1], values[0], ids)]
        graph.replay()
        for b in range(batch):
            kept = new_keep[b, : new_lengths[b]].nonzero()[:, 0]
            n = int(lengths[b])
            assert n == len(kept)
            source = ids[b, :n].clone()
            position = {int(x): i for i, x in enumerate(old[2][b].tolist())}
            came_from = torch.tensor([position[int(x)] for x in source.tolist()]).long()
            assert sorted(came_from.tolist()) == kept.tolist()
            assert_same_bytes(values[0][b, :, :n], old[1][b][:, came_from.cuda()], "values")
            expected = reference.turned(
                old[0][b][:, came_from.cuda()], delta[b, came_from.cuda()], rope.steps[0], False
            )
            got = keys[-1][b, :, :n].double()
            assert (got - expected).norm() <= 2.5e-3 * expected.norm()


def test_prune_many_layers_take_several_launches() -> None:
    """More tensors than one launch's parameters hold, at both of their sizes."""
    for layers in (33, 300):
        keys = [torch.randn(2, 1, 50, 8, device="cuda") for _ in range(layers)]
        values = [-x for x in keys]
        lengths = torch.tensor([50, 31], dtype=torch.int32, device="cuda")
        keep = torch.rand(2, 50, device="cuda") < 0.5
        expected = [[x.cpu() for x in xs] for xs in (keys, values, [lengths, keep])]
        prune_kv_(keys, values, lengths, keep)
        reference.prune_kv_(*expected[:2], *expected[2], [], False, None, [], False)
        assert torch.equal(lengths.cpu(), expected[2][0])
        for got, wanted in zip((*keys, *values), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(got.cpu(), wanted)


def test_prune_paged_in_a_graph() -> None:
    page_size, max_pages, pages = 16, 20, 50
    keys, values = (torch.randn(pages, page_size, 2, 64, device="cuda") for _ in range(2))
    table = torch.arange(40, dtype=torch.int32, device="cuda").reshape(2, max_pages)
    lengths = torch.tensor([320, 200], dtype=torch.int32, device="cuda")
    keep = torch.ones(2, 320, dtype=torch.bool, device="cuda")
    freed, counts = torch.empty_like(table), torch.empty_like(lengths)

    def call() -> None:
        prune_paged_kv_([keys], [values], table, lengths, keep, freed=freed, freed_counts=counts)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    keep[:, 40:150] = False
    expected = [x.cpu() for x in (keys, values, table, lengths, keep, freed, counts)]
    graph.replay()
    reference.prune_paged_kv_(expected[:1], expected[1:2], *expected[2:5], None, [], *expected[5:])
    for got, wanted in zip(
        (keys, values, table, lengths, keep, freed, counts), expected, strict=True
    ):
        assert torch.equal(got.cpu(), wanted)
