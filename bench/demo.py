"""The main job on one screen: `make demo`.

Trains a small Qwen2-shaped model for a few steps on packed MEM1 trajectories cut from real text
(the documentation that Python ships), once through the patch and once with the dense mask, each in
a process of its own, and prints loss, time and memory side by side.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch

from mem1_kernels import BlockPlan, Layout, Segment, Trajectory, pack, visible
from mem1_kernels.hf import patched

TOKENS = 4096
STEPS = 4


def text_trajectory(text: bytes, tokens: int) -> Trajectory:
    """Bytes as tokens, cut into the released MEM1-QA shape: prompt 300, turns of 40 + 16 + 500."""
    ids = list(text[:tokens])
    segments = [Segment("prompt", ids[:300])]
    start, turn = 300, 1
    while start < tokens:
        for role, count in (("state", 40), ("action", 16), ("info", 500)):
            segments.append(Segment(role, ids[start : start + count], turn))
            start += count
        turn += 1
    return Trajectory(segments)


def text_batches(steps: int) -> list[Layout]:
    """Two packed trajectories a step."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    half = TOKENS // 2
    return [
        pack([text_trajectory(text[start : start + half], half) for start in (at, at + half)])
        for at in range(0, steps * TOKENS, TOKENS)
    ]


def make_model(implementation: str) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        attn_implementation=implementation,
    )
    return Qwen2ForCausalLM(config)


def train(way: str) -> dict[str, list[float] | float]:
    """Trains on every token's successor, within the mask; returns losses, seconds, peak MB."""
    model = make_model("sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = text_batches(STEPS)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses, seconds = [], []
    for layout in batches:
        started = time.perf_counter()
        inputs = {"input_ids": layout.token_ids[None], "position_ids": layout.position_ids[None]}
        if way == "mem1_kernels":
            with patched(model):
                logits = model(**inputs, plan=BlockPlan.from_expiry(layout.expiry)).logits[0]
        else:
            mask = visible(layout.expiry)[None, None]
            logits = model(**inputs, attention_mask=mask).logits[0]
        target = (layout.predecessor >= 0).nonzero().flatten()
        loss = torch.nn.functional.cross_entropy(
            logits[layout.predecessor[target]], layout.token_ids[target]
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"losses": losses, "seconds": seconds, "megabytes": (peak - base) / 1024}


def show_training() -> None:
    results = {}
    for way in ("mem1_kernels", "dense mask"):
        command = [sys.executable, "-m", "bench.demo", "--train", way]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results[way] = json.loads(output.splitlines()[-1])
    print(f"\nTraining: {STEPS} steps of {TOKENS:,} tokens of Python's documentation, 2-layer Qwen2")
    print(f"{'':14}{'loss':^36}{'s/step':>8}{'peak MB over the model':>26}")
    for way, result in results.items():
        losses = "  ".join(f"{loss:7.4f}" for loss in result["losses"])
        pace = sorted(result["seconds"])[len(result["seconds"]) // 2]
        print(f"{way:14}{losses:^36}{pace:8.2f}{result['megabytes']:26.0f}")
    pairs = zip(*(result["losses"] for result in results.values()), strict=True)
    print(f"largest difference of the losses: {max(abs(a - b) for a, b in pairs):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", choices=["mem1_kernels", "dense mask"], help=argparse.SUPPRESS)
    parser.add_argument("--out", default="out", help="folder for pictures")
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(options.train)))
        return
    from mem1_kernels import info

    print(info.report())
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    layout = text_trajectory(b"x" * 2520, 2520)
    layout.plot(out / "mask.png")
    print(f"\nMask: {layout}, peak context {layout.peak_context} tokens -> {out / 'mask.png'}")
    show_training()


if __name__ == "__main__":
    main()
