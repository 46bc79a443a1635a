"""The main job on one screen, a few minutes on two cores: `make demo`.

What it runs on; the picture of the mask; the op against a dense mask; a few training steps of a
small Qwen2 on real text (the documentation that Python ships), through the patch and with the dense
mask; a rollout on a pruned cache against the training pass; and PPO on the chain task, whose agent
then chases pointers over up to 32 hops on a context that stays flat.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
import transformers

from bench.timing import measure
from mem1_kernels import (
    BlockPlan,
    Layout,
    Segment,
    Trajectory,
    info,
    keep_all,
    pack,
    trajectory_attention,
    visible,
)
from mem1_kernels.hf import patched
from mem1_kernels.rollout import Generation, HFEngine, Turn, collate, score
from mem1_kernels.testing import turns

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
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    base = megabytes("VmRSS")
    losses, seconds = [], []
    for layout in batches:
        started = time.perf_counter()
        inputs = {"input_ids": layout.token_ids[None], "position_ids": layout.position_ids[None]}
        if way == "mem1_kernels":
            with patched(model):
                logits = model(**inputs, plan=BlockPlan.of(layout)).logits[0]
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
    return {"losses": losses, "seconds": seconds, "megabytes": megabytes("VmHWM") - base}


def megabytes(name: str) -> float:
    """Resident memory of this process, as Linux has it: now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def show_training() -> None:
    results = {}
    for way in ("mem1_kernels", "dense mask"):
        command = [sys.executable, "-m", "examples.demo", "--train", way]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results[way] = json.loads(output.splitlines()[-1])
    print(
        f"\nTraining: {STEPS} steps of {TOKENS:,} tokens of Python's documentation, 2-layer Qwen2"
    )
    print(f"{'':14}{'loss':^36}{'s/step':>8}{'peak MB over the model':>26}")
    for way, result in results.items():
        losses = "  ".join(f"{loss:7.4f}" for loss in result["losses"])
        pace = sorted(result["seconds"])[len(result["seconds"]) // 2]
        print(f"{way:14}{losses:^36}{pace:8.2f}{result['megabytes']:26.0f}")
    pairs = zip(*(result["losses"] for result in results.values()), strict=True)
    print(f"largest difference of the losses: {max(abs(a - b) for a, b in pairs):.1e}")


def show_speed() -> None:
    layout = turns(300, 8, 40, 16, 500)
    plan = BlockPlan.of(layout)
    mask = visible(layout.expiry)
    query, key, value = (torch.randn(1, layout.num_tokens, heads, 64) for heads in (8, 2, 2))
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    times = measure(
        {
            "mem1_kernels": lambda: trajectory_attention(query, key, value, plan=plan),
            "dense mask": lambda: sdpa(*heads_first, attn_mask=mask, enable_gqa=True),
        },
        device="cpu",
        rounds=5,
        warmup=1,
    )
    ours, dense = times["mem1_kernels"], times["dense mask"]
    print(
        f"\nForward over {layout.num_tokens:,} tokens of 8 turns, 8 heads: "
        f"{1e3 * ours.median:.0f} ms; scaled_dot_product_attention with the dense mask "
        f"{1e3 * dense.median:.0f} ms ({dense.over(ours):.1f}x)"
    )


def show_rollout() -> None:
    model = make_model("sdpa").eval()
    generator = torch.Generator().manual_seed(0)

    def respond(written: list[Turn]) -> list[list[int]]:
        return [torch.randint(0, 256, (100,), generator=generator).tolist() for _ in written]

    rollouts = HFEngine(model).run(
        [list(b"What does this module do?"), list(b"And this one?")],
        respond,
        Generation(max_turns=8, max_new_tokens=16),
        generator=generator,
    )
    layout, sampled = collate(rollouts)
    with torch.no_grad():
        gap = float((score(model, layout) - sampled).abs().max())
    for rollout in rollouts:
        print(
            f"\nRollout of {len(rollout.turns)} turns, {rollout.trajectory.num_tokens} tokens: at "
            f"most {rollout.peak_context} in the cache",
            end="",
        )
    print(
        f"\nlargest |difference| of {int(layout.loss_mask.sum())} sampled log-probs and one masked "
        f"training pass: {gap:.1e}"
    )


def show_ppo(out: Path) -> None:
    from mem1_kernels.ppo.config import read_config
    from mem1_kernels.ppo.trainer import evaluate, train

    config = read_config(
        Path(__file__).parents[1] / "configs" / "chain.toml", out=str(out / "chain"), eval_every=0
    )
    print("\nPPO on the chain task (pointers over 2 to 4 hops; the teacher forgot on purpose)")
    run = train(config)
    print("reward:", "  ".join(f"{reward:.2f}" for reward in run.rewards))
    gap = max(record["log_prob_gap"] for record in run.history if "log_prob_gap" in record)
    print(f"largest |difference| of rollout and trainer log-probs in any step: {gap:.1e}")
    print(f"curves -> {out / 'chain'}\n\n64 episodes a line, and the largest cache row of any:\n")
    print(
        f"{'hops':>5}{'reward':>9}{'peak context':>15}{'under full context: reward':>29}{'peak':>7}"
    )
    sizes = [2, 4, 8, 16, 32]
    ours = evaluate(config, run.policy, sizes=sizes)
    full = evaluate(config, run.policy, sizes=sizes, retention=keep_all)
    for row, other in zip(ours, full, strict=True):
        print(
            f"{row['size']:5.0f}{row['reward']:9.2f}{row['peak_context']:15.0f}"
            f"{other['reward']:29.2f}{other['peak_context']:7.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", choices=["mem1_kernels", "dense mask"], help=argparse.SUPPRESS)
    parser.add_argument("--out", default="out/demo", help="folder for pictures and checkpoints")
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(options.train)))
        return
    transformers.utils.logging.disable_progress_bar()
    versions = info.versions()
    print(
        ", ".join(f"{name} {versions[name]}" for name in ("mem1_kernels", "torch", "transformers"))
    )
    print(", ".join([*info.devices().values(), f"SIMD {info.extension().get('SIMD', 'none')}"]))
    out = Path(options.out)
    shutil.rmtree(out / "chain", ignore_errors=True)  # the last demo's checkpoints
    out.mkdir(parents=True, exist_ok=True)
    layout = text_trajectory(b"x" * 2520, 2520)
    layout.plot(out / "mask.png")
    print(f"\nMask: {layout}, peak context {layout.peak_context} tokens -> {out / 'mask.png'}")
    show_speed()
    show_training()
    show_rollout()
    show_ppo(out)


if __name__ == "__main__":
    main()
