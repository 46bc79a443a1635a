"""Benchmark your own shape: our attention, SDPA with the dense mask, and SDPA merely causal.

python examples/benchmark_shape.py --turns 16 --info 500 --heads 8 --kv-heads 2 --head-dim 64
"""

import argparse

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from mem1_kernels import BlockPlan, Segment, Trajectory, trajectory_attention, visible


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "prompt": 300,
        "turns": 16,
        "state": 40,
        "action": 16,
        "info": 500,
        "heads": 8,
        "kv-heads": 2,
        "head-dim": 64,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 [float32]")
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    o = parser.parse_args(arguments)

    segments = [Segment("prompt", o.prompt)]
    for turn in range(1, o.turns + 1):
        segments += [Segment("state", o.state, turn), Segment("action", o.action, turn)]
        segments += [Segment("info", o.info, turn)]
    trajectory = Trajectory(segments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = trajectory.to(device)
    tokens = layout.num_tokens
    query, key, value = (
        torch.randn(1, tokens, heads, o.head_dim, device=device, dtype=getattr(torch, o.dtype))
        for heads in (o.heads, o.kv_heads, o.kv_heads)
    )
    for x in (query, key, value):
        x.requires_grad_(o.backward)
    plan, dense = BlockPlan.of(layout), visible(layout.expiry, layout.floor)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    ways = {
        "ours": lambda: trajectory_attention(query, key, value, plan=plan),
        "dense mask": lambda: F.scaled_dot_product_attention(
            q, k, v, attn_mask=dense, enable_gqa=True
        ),
        "merely causal": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
    }
    # Work: 2 products of visible pairs x head_dim, 2 FLOP each; the backward has 5.
    flop = 4 * layout.visible_pairs * o.head_dim * o.heads * (3.5 if o.backward else 1)
    print(
        f"{tokens:,} tokens, {layout.visible_pairs / tokens**2:.1%} of all pairs visible, {device}"
    )
    seconds = {}
    for name, way in ways.items():
        run = (lambda way=way: way().sum().backward()) if o.backward else way
        timed = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        seconds[name] = timed.blocked_autorange(min_run_time=0.2).median
        print(
            f"{name:14}{1e3 * seconds[name]:9.1f} ms{1e-9 * flop / seconds[name]:9.0f} GFLOP/s on "
            f"visible pairs{seconds[name] / seconds['ours']:8.1f}x our time"
        )
    return seconds


if __name__ == "__main__":
    main()
