"""Making a plan: time and memory of BlockPlan.from_expiry, beside its plain-torch form.

    python -m bench.plan --tokens 8192 131072 1048576
    python -m bench.plan --out out/bench    # writes out/bench/plan.json

A plan is made once per batch, for all layers and passes. The work is the tokens that are read and
the tiles that are listed, counted twice (by query and by key). Peers: `torch`, the same lists by
plain torch on tiles x tiles, which is also what CUDA uses; and with --flex FlexAttention's
`create_block_mask`, which looks at every pair of tokens. `list_mb` is what the lists take.
`over_ours` is a peer's time over ours, round by round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import cli
from bench.attention import mem1_layout
from bench.record import write_results
from bench.timing import measure, print_row
from mem1_kernels import BlockPlan
from mem1_kernels.block_plan import build_lists

LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "qa": lambda tokens: mem1_layout(tokens, 300, 40, 16, 500),
    "causal": lambda tokens: torch.full((tokens,), tokens, dtype=torch.int32),
}
COLUMNS = ["layout", "tokens", "tiles", "list_mb", "ours_ms", "torch_over_ours", "flex_over_ours"]
QUICK = {"tokens": [8192, 32768], "rounds": 3}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, "plan", quick=QUICK)
    add = parser.add_argument
    add("--tokens", nargs="+", type=int, default=[8192, 131072, 1048576], help="of the one row")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="which masks")
    add("--torch-limit", type=int, default=131072, help="tokens above which `torch` is not tried")
    add("--flex", action="store_true", help="also create_block_mask, up to 32,768 tokens")
    return parser


def flex_plan(expiry: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = len(expiry)
    return create_block_mask(
        lambda b, h, i, k: (k <= i) & (i < expiry[k]),
        None, None, tokens, tokens, device=expiry.device,
    )  # fmt: skip


def run(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for layout in args.layouts:
        for tokens in args.tokens:
            expiry = LAYOUTS[layout](tokens).to(args.device)
            plan = BlockPlan.from_expiry(expiry)
            candidates = {"ours": partial(BlockPlan.from_expiry, expiry)}
            if tokens <= args.torch_limit:
                candidates["torch"] = partial(build_lists, plan.expiry, None)
            if args.flex and tokens <= 32768:
                candidates["flex"] = partial(flex_plan, expiry)
            times = measure(candidates, device=args.device, rounds=args.rounds, warmup=1)
            tiles = int(plan.named()["row_offsets"][0, -1])
            row: dict[str, Any] = {
                "part": "plan",
                "layout": layout,
                "tokens": tokens,
                "tiles": tiles,
                "list_mb": 8 * tiles / 1e6,
                "ours": times["ours"].row(),
                "ours_ms": 1e3 * times["ours"].median,
            }
            for name in times.keys() - {"ours"}:
                row[name] = times[name].row()
                row[f"{name}_over_ours"] = times[name].over(times["ours"])
            print_row(row, COLUMNS)
            yield row


def main() -> None:
    args = cli.parse(make_parser(), QUICK)
    print_row({name: name for name in COLUMNS}, COLUMNS)
    write_results(args, args.device, rows=list(run(args)))


if __name__ == "__main__":
    main()
