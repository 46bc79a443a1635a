"""KV-cache ops: pruning against gathers and the device's copy rate, attention against padded SDPA.

    python -m bench.kv_cache --device cpu --batch 1 --survivors 356
    python -m bench.kv_cache --device cuda --out out/bench    # writes out/bench/kv_cache.json

A row is `prompt | dropped turn | state and action`, as at a state boundary; `survivors` counts the
first and the last part. Two layouts: `mem1` (556 dropped, the 56 tokens behind them survive, the
rest is prompt) and `all move` (as many dropped as survive, no prompt: the most moves there can be).

The work of a prune is its moved bytes, read and written: `2 * moves * batch * bytes a token`.
`of copy` is the rate of moving against that of one plain copy of the same bytes in the same round,
`over ours` a peer's time over the prune's.

Peers: `index_select` and `gather` (Hugging Face's and kvpress's ways: survivors go to new tensors,
layer by layer), `cat` (slices of the parts, for one contiguous hole), `copy` (the device's rate).

The part `paged` prunes a cache of pages: `dropped` tokens behind a prompt of 300 go, and the 56
behind them stay. Its work is the pages that it frees, `pages_freed` per row. `dense_moves_ms` is a
plain copy of the bytes that a dense row's hole filling would move.

The part `attend` is one layer's cached_attention over ragged rows, whose lengths spread evenly from
a quarter of the context to all of it. The work of a decode step is the keys and values of the
rows, read once: `2 * sum(lengths) * kv_heads * head_dim * bytes an element`; `of copy` compares
that rate with the copy's. Of a longer piece (`new` tokens a row, such as an observation's) it is
`4 * head_dim * heads * visible pairs` FLOP. Peers: `sdpa` (padded to the longest row, under a
boolean mask, as Hugging Face calls it), `rows` (one SDPA a row, cut to its length), and on CUDA
`flex` (FlexAttention, with --flex; its block mask is made beforehand) and, where importable,
`flash` (flash-attn's kvcache op) and `flashinfer` (paged decode, with the plan that each new set
of lengths costs).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import cli
from bench.record import write_results
from bench.timing import measure, print_row
from mem1_kernels.ops._library import implementations
from mem1_kernels.ops.kv_cache import (
    Rope,
    append_kv_,
    cached_attention,
    prune_kv_,
    prune_paged_kv_,
)


@dataclass(frozen=True)
class Shape:
    """What a model's cache holds of a token."""

    layers: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        item = torch.empty(0, dtype=dtype).element_size()
        return 2 * self.layers * self.kv_heads * self.head_dim * item


MODELS = {"qwen2.5-7b": Shape(28, 4, 128), "qwen2.5-14b": Shape(48, 8, 128)}
DROPPED, STATE_AND_ACTION = 556, 56
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PAGE_SIZE = 16
# The device's memory that the caches may take; gathers and copies take as much again.
CACHE_BYTES = {"cpu": 3 * 2**30, "cuda": 40 * 2**30}


@dataclass(frozen=True)
class RowLayout:
    """Tokens of a row's three parts."""

    prompt: int
    dropped: int
    tail: int

    @property
    def length(self) -> int:
        return self.prompt + self.dropped + self.tail

    @property
    def moves(self) -> int:
        return min(self.dropped, self.tail)


def row_layout(kind: str, survivors: int) -> RowLayout:
    if kind == "all move":
        return RowLayout(0, survivors, survivors)
    tail = min(STATE_AND_ACTION, survivors)
    return RowLayout(survivors - tail, DROPPED, tail)


def prune_row(
    model: str, kind: str, batch: int, survivors: int, args: argparse.Namespace
) -> dict[str, Any] | None:
    """One line of the table, or None where the caches would not fit."""
    shape, row, dtype = MODELS[model], row_layout(kind, survivors), DTYPES[args.dtype]
    capacity = (row.length + 63) // 64 * 64
    token_bytes = shape.token_bytes(dtype)
    if batch * capacity * token_bytes > args.cache_bytes:
        return None
    cache_shape = (batch, shape.kv_heads, capacity, shape.head_dim)

    def cache() -> list[Tensor]:
        return [torch.randn(cache_shape, device=args.device).to(dtype) for _ in range(shape.layers)]

    keys, values = cache(), cache()
    lengths = torch.full((batch,), row.length, dtype=torch.int32, device=args.device)
    keep = torch.ones(batch, capacity, dtype=torch.bool, device=args.device)
    keep[:, row.prompt : row.prompt + row.dropped] = False
    slots = [torch.arange(batch * capacity, device=args.device).int().reshape(batch, capacity)]
    rope = Rope(1e6 ** -(torch.arange(0, shape.head_dim, 2, device=args.device) / shape.head_dim))
    delta = torch.zeros(batch, capacity, dtype=torch.int32, device=args.device)
    delta[:, row.prompt :] = -row.dropped
    kept = keep[0, : row.length].nonzero()[:, 0]
    gathered = kept[None, None, :, None].expand(batch, shape.kv_heads, -1, shape.head_dim)
    moved = row.moves * batch * token_bytes
    source = torch.ones(moved, dtype=torch.uint8, device=args.device)
    target = torch.zeros_like(source)
    behind = row.prompt + row.dropped

    def prune(**options: Any) -> Callable[[], None]:
        return lambda: prune_kv_(keys, values, lengths, keep, slots=slots, **options)

    ours: dict[str, Callable[[], Any]] = {
        "prune": prune(),
        "ordered": prune(ordered=True),
        "rotated": prune(position_delta=delta, rope=rope),
    }
    if args.device == "cuda" and "Triton" not in implementations["prune_kv_", "CUDA"]:
        from mem1_kernels.ops.triton import prune_kv as triton_prune

        ours["triton"] = lambda: triton_prune.prune_kv_(
            keys, values, lengths, keep, slots, False, None, [], False
        )
    peers: dict[str, Callable[[], Any]] = {
        "index_select": lambda: [x.index_select(2, kept) for x in (*keys, *values)],
        "gather": lambda: [x.gather(2, gathered) for x in (*keys, *values)],
        "cat": lambda: [
            torch.cat((x[:, :, : row.prompt], x[:, :, behind : row.length]), 2)
            for x in (*keys, *values)
        ],
        "copy": lambda: target.copy_(source),
    }
    candidates: dict[str, Callable[[], Any]] = {}
    for name, run in ours.items():
        candidates[f"reset for {name}"] = lambda: lengths.fill_(row.length)
        candidates[name] = run
    candidates |= peers
    times = measure(
        candidates, device=args.device, rounds=args.rounds, seconds=args.seconds, warmup=1
    )
    result: dict[str, Any] = {
        "model": model,
        "layout": kind,
        "batch": batch,
        "survivors": survivors,
        "moves": row.moves,
        "moved_mb": moved / 1e6,
        "gb_s": 2 * moved / times["prune"].median / 1e9,
        "of_copy": times["copy"].over(times["prune"]),
        "ordered_of_copy": times["copy"].over(times["ordered"]),
    }
    for name in (*ours, *peers):
        result[f"{name}_ms"] = 1e3 * times[name].median
        result[name] = times[name].row()
        if name != "prune":
            result[f"{name}_over_ours"] = times[name].over(times["prune"])
    return result


PRUNE_COLUMNS = [
    "model", "layout", "batch", "survivors", "moves", "moved_mb", "prune_ms", "gb_s", "of_copy",
    "ordered_of_copy", "ordered_over_ours", "rotated_over_ours", "index_select_over_ours",
    "gather_over_ours", "cat_over_ours",
]  # fmt: skip


def run_prune(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    print_row({name: name for name in PRUNE_COLUMNS}, PRUNE_COLUMNS)
    for model in args.models:
        for kind in ("mem1", "all move"):
            for batch in args.batch:
                for survivors in args.survivors:
                    row = prune_row(model, kind, batch, survivors, args)
                    if row is not None:
                        print_row(row, PRUNE_COLUMNS)
                        yield {"part": "prune", **row}


PAGED_COLUMNS = ["model", "batch", "tokens", "dropped", "pages_freed", "paged_ms", "dense_moves_ms"]


def paged_row(
    model: str, batch: int, dropped: int, args: argparse.Namespace
) -> dict[str, Any] | None:
    """A paged row loses `dropped` tokens behind 300 of prompt; 56 stay behind them."""
    shape, dtype = MODELS[model], DTYPES[args.dtype]
    row = RowLayout(300, dropped, STATE_AND_ACTION)
    max_pages = -(-row.length // PAGE_SIZE)
    if batch * max_pages * PAGE_SIZE * shape.token_bytes(dtype) > args.cache_bytes:
        return None
    page_shape = (batch * max_pages, 2, PAGE_SIZE, shape.kv_heads, shape.head_dim)
    pages = [torch.randn(page_shape, device=args.device).to(dtype) for _ in range(shape.layers)]
    keys, values = [x[:, 0] for x in pages], [x[:, 1] for x in pages]
    first_table = torch.randperm(batch * max_pages).int().reshape(batch, max_pages)
    first_table = first_table.to(args.device)
    table, freed = first_table.clone(), torch.empty_like(first_table)
    lengths = torch.full((batch,), row.length, dtype=torch.int32, device=args.device)
    counts = torch.empty_like(lengths)
    keep = torch.ones(batch, row.length, dtype=torch.bool, device=args.device)
    keep[:, row.prompt : row.prompt + row.dropped] = False

    def reset() -> None:
        lengths.fill_(row.length)
        table.copy_(first_table)

    moved = torch.ones(row.moves * batch * shape.token_bytes(dtype), dtype=torch.uint8)
    moved = moved.to(args.device)
    target = torch.zeros_like(moved)
    times = measure(
        {
            "reset": reset,
            "paged": lambda: prune_paged_kv_(
                keys, values, table, lengths, keep, freed=freed, freed_counts=counts
            ),
            "copy": lambda: target.copy_(moved),
        },
        device=args.device,
        rounds=args.rounds,
        seconds=args.seconds,
        warmup=1,
    )
    return {
        "model": model,
        "batch": batch,
        "tokens": row.length,
        "dropped": dropped,
        "pages_freed": int(counts[0]),
        "paged_ms": 1e3 * times["paged"].median,
        "dense_moves_ms": 1e3 * times["copy"].median,
        "paged": times["paged"].row(),
        "dense_moves": times["copy"].row(),
    }


def run_paged(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`dense_moves_ms`: a plain copy of as many bytes as a dense row's hole filling would move."""
    print_row({name: name for name in PAGED_COLUMNS}, PAGED_COLUMNS)
    for model in args.models:
        for batch in args.batch:
            for dropped in (DROPPED, 4 * DROPPED, 16 * DROPPED):
                row = paged_row(model, batch, dropped, args)
                if row is not None:
                    print_row(row, PAGED_COLUMNS)
                    yield {"part": "paged", **row}


ATTEND_COLUMNS = [
    "model", "batch", "context", "new", "held", "attend_ms", "gb_s", "of_copy", "tflop_s",
    "append_ms", "sdpa_over_ours", "rows_over_ours", "flex_over_ours", "flash_over_ours",
    "flashinfer_over_ours",
]  # fmt: skip
QUERY_HEADS = {"qwen2.5-7b": 28, "qwen2.5-14b": 40}


@dataclass(frozen=True)
class Attend:
    """One layer's queries and ragged caches; these lie as `[batch, capacity, heads, dim]`."""

    query: Tensor
    keys: Tensor
    values: Tensor
    lengths: Tensor

    @property
    def new_tokens(self) -> int:
        return self.query.shape[1]

    def mask(self) -> Tensor:
        """bool `[batch, 1, new, longest row]`."""
        slot = torch.arange(int(self.lengths.max()), device=self.query.device)
        token = torch.arange(self.new_tokens, device=self.query.device)
        own = self.lengths[:, None] - self.new_tokens + token
        return (slot <= own[:, :, None])[:, None]


def sdpa(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, enable_gqa=True
    )


def sdpa_peers(case: Attend) -> dict[str, Callable[[], Any]]:
    query, mask = case.query.transpose(1, 2), case.mask()
    longest, lengths = mask.shape[3], case.lengths.tolist()

    def by_rows() -> None:
        for row, held in enumerate(lengths):
            own = slice(row, row + 1)
            rows_mask = None if case.new_tokens == 1 else mask[own, ..., :held]
            sdpa(query[own], case.keys[own, :, :held], case.values[own, :, :held], rows_mask)

    padded = case.keys[:, :, :longest], case.values[:, :, :longest]
    return {"sdpa": lambda: sdpa(query, *padded, mask), "rows": by_rows}


def flex_peer(case: Attend) -> dict[str, Callable[[], Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths, new_tokens = case.lengths, case.new_tokens
    batch, capacity = lengths.shape[0], case.keys.shape[2]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= lengths[b] - new_tokens + q

    block_mask = create_block_mask(visible, batch, None, new_tokens, capacity, device="cuda")
    query = case.query.transpose(1, 2).contiguous()
    compiled = torch.compile(flex_attention, dynamic=False)
    arguments = (query, case.keys, case.values)
    return {"flex": lambda: compiled(*arguments, block_mask=block_mask, enable_gqa=True)}


def flash_peer(case: Attend) -> dict[str, Callable[[], Any]]:
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return {}
    keys, values = case.keys.transpose(1, 2), case.values.transpose(1, 2)
    return {
        "flash": lambda: flash_attn_with_kvcache(
            case.query, keys, values, cache_seqlens=case.lengths, causal=True
        )
    }


def flashinfer_peer(case: Attend) -> dict[str, Callable[[], Any]]:
    try:
        import flashinfer
    except ImportError:
        return {}
    if case.new_tokens > 1:
        return {}
    batch, kv_heads, capacity, head_dim = case.keys.shape
    row_pages = capacity // PAGE_SIZE
    pages = torch.stack((case.keys, case.values)).permute(1, 3, 0, 2, 4)
    pages = pages.unflatten(1, (row_pages, PAGE_SIZE)).transpose(2, 3).flatten(0, 1).contiguous()
    used = (case.lengths + PAGE_SIZE - 1) // PAGE_SIZE
    ends = torch.nn.functional.pad(used.cumsum(0), (1, 0)).int()
    page = torch.arange(row_pages, device="cuda").expand(batch, -1)
    of_row = page + row_pages * torch.arange(batch, device="cuda")[:, None]
    indices = of_row[page < used[:, None]].int()
    last = case.lengths - (used - 1) * PAGE_SIZE
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    heads, dtype = case.query.shape[2], case.query.dtype
    query = case.query[:, 0].contiguous()

    def run() -> None:
        wrapper.plan(
            ends, indices, last, heads, kv_heads, head_dim, PAGE_SIZE,
            q_data_type=dtype, kv_data_type=dtype,
        )  # fmt: skip
        wrapper.run(query, pages)

    return {"flashinfer": run}


def attend_row(
    model: str, batch: int, context: int, new_tokens: int, args: argparse.Namespace
) -> dict[str, Any] | None:
    """One line of the table, or None where the cache would not fit."""
    shape, heads, dtype = MODELS[model], QUERY_HEADS[model], DTYPES[args.dtype]
    capacity = (context + 63) // 64 * 64
    token_bytes = shape.token_bytes(dtype) // shape.layers
    if batch * capacity * token_bytes > args.cache_bytes // 4:
        return None
    slots = (batch, capacity, shape.kv_heads, shape.head_dim)
    keys, values = (
        torch.randn(slots, device=args.device).to(dtype).transpose(1, 2) for _ in range(2)
    )
    least = max(context // 4, new_tokens)
    lengths = torch.linspace(context, least, batch, device=args.device).int()
    query = torch.randn(batch, new_tokens, heads, shape.head_dim, device=args.device).to(dtype)
    case = Attend(query, keys, values, lengths)
    new = keys[:, :, :new_tokens].clone()
    before = lengths - new_tokens
    held = int(lengths.sum())
    copied = torch.ones(held * token_bytes, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(copied)
    candidates: dict[str, Callable[[], Any]] = {
        "attend": lambda: cached_attention(query, keys, values, lengths),
        "append": lambda: append_kv_(new, new, keys, values, before),
        "copy": lambda: target.copy_(copied),
        **sdpa_peers(case),
    }
    if args.device == "cuda":
        candidates |= flash_peer(case) | flashinfer_peer(case)
        if args.flex:
            candidates |= flex_peer(case)
    times = measure(candidates, device=args.device, rounds=args.rounds, seconds=args.seconds)
    ours = times["attend"]
    pairs = new_tokens * held - batch * new_tokens * (new_tokens - 1) // 2
    result: dict[str, Any] = {
        "model": model,
        "batch": batch,
        "context": context,
        "new": new_tokens,
        "held": held,
        "gb_s": held * token_bytes / ours.median / 1e9,
        # The copy reads and writes every byte.
        "of_copy": times["copy"].over(ours) / 2,
        "tflop_s": 4 * shape.head_dim * heads * pairs / ours.median / 1e12,
    }
    for name, timing in times.items():
        result[f"{name}_ms"] = 1e3 * timing.median
        result[name] = timing.row()
        result[f"{name}_over_ours"] = timing.over(ours)
    return result


def run_attend(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    print_row({name: name for name in ATTEND_COLUMNS}, ATTEND_COLUMNS)
    for model in args.models:
        for batch in args.batch:
            for context in args.context:
                for new_tokens in args.new_tokens:
                    if new_tokens > context:
                        continue
                    row = attend_row(model, batch, context, new_tokens, args)
                    if row is not None:
                        print_row(row, ATTEND_COLUMNS)
                        yield {"part": "attend", **row}


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "prune": run_prune,
    "paged": run_paged,
    "attend": run_attend,
}


QUICK = {
    "models": ["qwen2.5-7b"],
    "batch": [1, 8],
    "survivors": [356],
    "context": [1400],
    "rounds": 3,
}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "kv_cache", quick=QUICK)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which ops are timed")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="whose cache's shape")
    add("--batch", nargs="+", type=int, default=[1, 8, 64, 256], help="rows of the cache")
    add(
        "--survivors", nargs="+", type=int, default=[100, 356, 1000, 4000],
        help="prune: tokens of a row that stay",
    )  # fmt: skip
    add("--context", nargs="+", type=int, default=[1400, 8192], help="attend: the longest row")
    add("--new-tokens", nargs="+", type=int, default=[1, 500], help="attend: queries per row")
    add("--flex", action="store_true", help="attend: FlexAttention too; it is slow to compile")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the caches")
    add("--seconds", type=float, default=4.0, help="bound on one line's measurement, in seconds")
    add(
        "--cache-bytes", type=int,
        help=f"largest cache that is tried (default: {CACHE_BYTES['cpu'] >> 30} GiB on the CPU, "
        f"{CACHE_BYTES['cuda'] >> 30} GiB on a GPU)",
    )  # fmt: skip
    return parser


def main() -> None:
    args = cli.parse(make_parser(), QUICK)
    if args.cache_bytes is None:
        args.cache_bytes = CACHE_BYTES[args.device]
    with torch.inference_mode():
        rows = []
        for part in args.parts:
            for row in PARTS[part](args):
                rows.append(row)
                write_results(args, args.device, rows=rows)


if __name__ == "__main__":
    main()
