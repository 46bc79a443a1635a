"""Attention over MEM1 layouts: ours against dense masks, causal kernels and FlexAttention.

    python -m bench.attention --device cpu --tokens 2048 8192 --layouts qa turns500
    python -m bench.attention --device cuda --out out/bench    # writes out/bench/attention.json

The work is counted in visible pairs only: forward 4 * pairs * heads * head_dim FLOP (two matrix
products), backward 2.5 times that (five). A peer that can only be causal (it computes another
function, and more of it) is credited with its own causal pairs, so that TFLOP/s compare.

Passes: `plan` (ours: BlockPlan.from_expiry; FlexAttention: create_block_mask), `forward` with the
plan made beforehand, `backward` alone, and `all` three in one, as the first layer of a step pays
them; a plan serves all layers of a step, so its share of a deep model lies between the two.
`over_ours` is the peer's time over ours in the same rounds.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cli
from bench.record import write_results
from bench.timing import measure, print_row
from mem1_kernels import BlockPlan, Segment, Trajectory, pack, trajectory_attention, visible
from mem1_kernels.mask import visible_pairs

DENSE_LIMIT = {"cpu": 8192, "cuda": 32768}
"""Tokens above which a tokens x tokens mask is not tried."""


def mem1_layout(tokens: int, prompt: int, state: int, action: int, info: int) -> Tensor:
    """Expiry of a trajectory of such turns, cut at `tokens`."""
    segments = [Segment("prompt", prompt)]
    for turn in range(1, tokens // (state + action + info) + 2):
        segments += [
            Segment("state", state, turn),
            Segment("action", action, turn),
            Segment("info", info, turn),
        ]
    return Trajectory(segments).expiry[:tokens].clamp(max=tokens)


def documents(tokens: int) -> Tensor:
    """Causal documents of 512 to 4,096 tokens behind each other."""
    lengths = [4096, 1024, 2048, 512, 3072]
    ends: list[int] = []
    while not ends or ends[-1] < tokens:
        ends.append((ends[-1] if ends else 0) + lengths[len(ends) % len(lengths)])
    stops = torch.tensor(ends)
    expiry = stops[torch.searchsorted(stops, torch.arange(tokens), right=True)]
    return expiry.clamp(max=tokens).int()


def prefix_tree(tokens: int) -> Tensor:
    """A GRPO group: a prompt of a quarter of the tokens, then 8 branches."""
    prompt = tokens // 4
    branch = (tokens - prompt) // 8
    members = [
        Trajectory([Segment("prompt", prompt), Segment("action", branch, 1)]) for _ in range(8)
    ]
    expiry = pack([members]).expiry
    return F.pad(expiry, (0, tokens - len(expiry)), value=tokens)


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "qa": partial(mem1_layout, prompt=300, state=40, action=16, info=500),
    "turns500": partial(mem1_layout, prompt=500, state=100, action=20, info=380),
    "turns1000": partial(mem1_layout, prompt=1000, state=200, action=50, info=750),
    "turns2000": partial(mem1_layout, prompt=2000, state=300, action=100, info=1600),
    "documents": documents,
    "tree": prefix_tree,
    "causal": lambda tokens: torch.full((tokens,), tokens, dtype=torch.int32),
}


@dataclass
class Case:
    """One layout's inputs, leaves of autograd: `[batch, tokens, heads, head_dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    expiry: Tensor


def make_case(expiry: Tensor, dtype: torch.dtype, options: argparse.Namespace) -> Case:
    """Seeded normal values for a layout; zeros would run faster than real data."""
    tokens = len(expiry)
    generator = torch.Generator(options.device).manual_seed(tokens)

    def normal(count: int) -> Tensor:
        shape = (options.batch, tokens, count, options.head_dim)
        return torch.randn(shape, generator=generator, device=options.device).to(dtype)

    query, key, value = (normal(n) for n in (options.heads, options.kv_heads, options.kv_heads))
    return Case(
        query.requires_grad_(),
        key.requires_grad_(),
        value.requires_grad_(),
        normal(options.heads),
        expiry.to(options.device),
    )


Forward = Callable[[], Tensor]


def ours(case: Case) -> Forward:
    plan = BlockPlan.from_expiry(case.expiry)
    return lambda: trajectory_attention(case.query, case.key, case.value, plan=plan)  # type: ignore[return-value]


def _sdpa(case: Case, **options: Any) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (case.query, case.key, case.value))
    return F.scaled_dot_product_attention(*heads_first, enable_gqa=True, **options).transpose(1, 2)


def sdpa_dense(case: Case) -> Forward:
    """What the released trainer means to do: a mask of tokens x tokens."""
    mask = visible(case.expiry)[None, None]
    return lambda: _sdpa(case, attn_mask=mask)


def sdpa_causal(case: Case, backend: str) -> Forward:
    chosen = getattr(torch.nn.attention.SDPBackend, backend)

    def run() -> Tensor:
        with torch.nn.attention.sdpa_kernel(chosen):
            return _sdpa(case, is_causal=True)

    return run


def flex(case: Case) -> Forward:
    block_mask = flex_plan(case)
    attention = compiled("flex_attention")
    heads_first = [x.transpose(1, 2) for x in (case.query, case.key, case.value)]
    if case.query.device.type == "cpu":  # FlexAttention on the CPU is forward only
        heads_first = [x.detach() for x in heads_first]

    def run() -> Tensor:
        out = attention(*heads_first, block_mask=block_mask, enable_gqa=True)
        return out.transpose(1, 2)

    return run


@cache
def compiled(name: str) -> Callable[..., Any]:
    return torch.compile(
        getattr(importlib.import_module("torch.nn.attention.flex_attention"), name)
    )


def flex_plan(case: Case) -> Any:
    expiry = case.expiry

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < expiry[k])

    tokens, device = len(expiry), str(expiry.device)
    make = compiled("create_block_mask")
    return make(mask_mod, None, None, tokens, tokens, device=device)


def flash_attn_causal(case: Case, module: str) -> Forward:
    function = importlib.import_module(module).flash_attn_func

    def run() -> Tensor:
        out = function(case.query, case.key, case.value, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return run


PEERS: dict[str, dict[str, Callable[[Case], Forward]]] = {
    "cpu": {
        "sdpa_dense": sdpa_dense,
        "sdpa_causal": partial(sdpa_causal, backend="FLASH_ATTENTION"),
        "flex": flex,
    },
    "cuda": {
        "sdpa_dense": sdpa_dense,
        "sdpa_causal": partial(sdpa_causal, backend="FLASH_ATTENTION"),
        "cudnn_causal": partial(sdpa_causal, backend="CUDNN_ATTENTION"),
        "flex": flex,
        "flash_attn_causal": partial(flash_attn_causal, module="flash_attn"),
        "fa4_causal": partial(flash_attn_causal, module="flash_attn.cute"),
    },
}


def prepare(
    name: str, make: Callable[[Case], Forward], case: Case, device: str
) -> tuple[Forward | None, str]:
    """The peer ready to run, or None and why it cannot."""
    tokens = len(case.expiry)
    if name == "sdpa_dense" and tokens > DENSE_LIMIT[device]:
        return None, f"a mask of {tokens} x {tokens} is over the limit of this benchmark"
    try:
        run = make(case)
        with torch.no_grad():
            run()
    except (ImportError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return run, ""


def backward_of(run: Forward, case: Case) -> Callable[[], Any]:
    leaves = (case.query, case.key, case.value)
    out = run()
    return lambda: torch.autograd.grad(out, leaves, case.grad_out, retain_graph=True)


def prepare_backward(
    name: str, run: Forward, case: Case, device: str
) -> tuple[Callable[[], Any] | None, str]:
    """The backward ready to run, or None and why it cannot."""
    if name == "flex" and device == "cpu":
        return None, "FlexAttention has no backward on the CPU"
    try:
        backward = backward_of(run, case)
        backward()
    except (RuntimeError, NotImplementedError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return backward, ""


def whole_step(name: str, run: Forward, case: Case) -> Callable[[], Any]:
    """Plan, forward and backward in one; those without a plan go on with `run`."""
    leaves = (case.query, case.key, case.value)
    make = {"ours": ours, "flex": flex}.get(name, lambda case: run)
    return lambda: torch.autograd.grad(make(case)(), leaves, case.grad_out)


def bench_case(case: Case, passes: list[str], peers: list[str], options: dict) -> list[dict]:
    device = options["device"]
    runs: dict[str, Forward] = {"ours": ours(case)}
    rows: list[dict[str, Any]] = []
    for name in peers:
        run, why = prepare(name, PEERS[device][name], case, device)
        if run is None:
            rows.append({"implementation": name, "skipped": why})
        else:
            runs[name] = run

    batch, tokens, heads, head_dim = case.query.shape
    exact = batch * visible_pairs(case.expiry)
    causal = batch * tokens * (tokens + 1) // 2
    timing = {"device": device, "rounds": options["rounds"], "seconds": options["seconds"]}

    def record(pass_name: str, flop_per_pair: float, times: dict) -> None:
        for name, timed in times.items():
            pairs = causal if name.endswith("_causal") else exact
            row = {"pass": pass_name, "implementation": name, **timed.row()}
            if flop_per_pair:
                row["pairs"] = pairs
                row["tflops"] = flop_per_pair * pairs * heads * head_dim / timed.median / 1e12
            row["over_ours"] = timed.over(times["ours"])
            rows.append(row)

    if "plan" in passes:
        plans: dict[str, Callable[[], Any]] = {"ours": lambda: BlockPlan.from_expiry(case.expiry)}
        if "flex" in runs:
            plans["flex"] = lambda: flex_plan(case)
        record("plan", 0, measure(plans, **timing))
    if "forward" in passes:
        with torch.no_grad():
            record("forward", 4, measure(runs, **timing))
    backwards: dict[str, Callable[[], Any]] = {}
    if {"backward", "all"} & set(passes):
        for name, run in runs.items():
            backward, why = prepare_backward(name, run, case, device)
            if backward is None:
                rows.append({"pass": "backward", "implementation": name, "skipped": why})
            else:
                backwards[name] = backward
    if "backward" in passes:
        record("backward", 10, measure(backwards, **timing))
    if "all" in passes:
        steps = {name: whole_step(name, runs[name], case) for name in backwards}
        record("all", 14, measure(steps, **timing))
    return rows


QUICK = {
    "tokens": [2048],
    "layouts": ["qa", "causal"],
    "passes": ["forward", "backward"],
    "rounds": 3,
}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "attention", quick=QUICK)
    add = parser.add_argument
    dtypes = ["float32", "float16", "bfloat16"]
    passes = ["plan", "forward", "backward", "all"]
    peers = ", ".join(PEERS["cuda"])
    add("--tokens", type=int, nargs="+", default=[1024, 4096, 8192], help="lengths of the row")
    add("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="masks")
    add("--dtypes", nargs="+", choices=dtypes, default=["float32", "bfloat16"], help="of q, k, v")
    add("--batch", type=int, default=1, help="rows, all of one layout")
    add("--heads", type=int, default=8, help="of the queries")
    add("--kv-heads", type=int, default=2, help="of keys and values; divides --heads")
    add("--head-dim", type=int, default=64, help="of queries, keys and values")
    add("--passes", nargs="+", choices=passes, default=passes, help="what is timed")
    add("--peers", nargs="*", help=f"of: {peers} (default: all that the device can run)")
    add("--seconds", type=float, default=20.0, help="bound on one measurement, in seconds")
    return parser


def main() -> None:
    parser = make_parser()
    options = cli.parse(parser, QUICK)
    peers = list(PEERS[options.device]) if options.peers is None else options.peers
    unknown = set(peers) - set(PEERS[options.device])
    if unknown:
        parser.error(f"--peers: {sorted(unknown)} not known on {options.device}")

    columns = ["layout", "tokens", "dtype", "pass", "implementation", "median_ms", "p20_ms"]
    columns += ["p80_ms", "tflops", "over_ours", "skipped"]
    print_row({name: name for name in columns}, columns)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for tokens in options.tokens:
            for layout in options.layouts:
                # FlexAttention compiles for each; past a limit it would go on uncompiled.
                torch._dynamo.reset()
                case = make_case(LAYOUTS[layout](tokens), getattr(torch, dtype), options)
                for row in bench_case(case, options.passes, peers, vars(options)):
                    shape = ("batch", "heads", "kv_heads", "head_dim")
                    row = {"layout": layout, "tokens": tokens, "dtype": dtype, **row}
                    rows.append({**row, **{name: getattr(options, name) for name in shape}})
                    print_row(rows[-1], columns)
                write_results(options, options.device, rows=rows)


if __name__ == "__main__":
    main()
