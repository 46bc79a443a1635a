"""An agent of a hundred turns on a real vLLM, whose KV cache drops tokens in place.

    make serve-vllm     # SmolLM2-135M on this machine's CPU; in another terminal:
    make demo-vllm      # python examples/vllm_agent.py http://127.0.0.1:8000 build/smollm2

Only what is new goes to the server. At every boundary the dropped tokens leave its KV cache, so the
agent holds the same few blocks in turn 100 as in turn 5, and every log-prob that the server sampled
from is the one that a trainer computes in one masked pass. No GPU is needed.
"""

import argparse
import re
import time

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mem1_kernels import mem1
from mem1_kernels.rollout import Generation, collate, score
from mem1_kernels.vllm import VLLMServerEngine

FACTS = [
    "Bamako is the capital of Mali.",
    "N'Djamena is the capital of Chad.",
    "Lake Chad lies on the border of four countries.",
    "The Niger is the third-longest river of Africa.",
]
PROMPT = "You study West Africa. Each time you read a note, write one sentence about it.\nNote: "


def cache_use(url: str) -> float:
    """The part of the server's KV blocks that is in use, as its metrics say."""
    found = re.search(
        r"^vllm:kv_cache_usage_perc\S* (\S+)$", httpx.get(f"{url}/metrics").text, re.M
    )
    return float(found[1]) if found else float("nan")


def main(arguments: list[str] | None = None) -> tuple[float, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8000")
    parser.add_argument("model", help="the folder or Hugging Face id of what is served there")
    parser.add_argument("--turns", type=int, default=100, help="turns of the episode [100]")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    engine = VLLMServerEngine(options.url, tokenizer)
    use: list[float] = []

    def respond(turns):
        (turn,) = turns
        use.append(cache_use(options.url))
        if turn.number % 20 == 1:
            text = tokenizer.decode(turn.token_ids).strip()
            print(f"turn {turn.number:3}: {use[-1]:.2%} of the KV cache: {text[:60]!r}", flush=True)
        return [tokenizer.encode(f"\nNote: {FACTS[turn.number % len(FACTS)]}\nSentence: ")]

    generation = Generation(
        retention=mem1, max_turns=options.turns, max_new_tokens=30, stop_strings=("\n",), seed=0
    )
    started = time.perf_counter()
    (rollout,) = engine.run(
        [tokenizer.encode(PROMPT + FACTS[0] + "\nSentence: ")], respond, generation
    )
    print(f"{rollout} in {time.perf_counter() - started:.0f} s")
    if rollout.error:
        raise SystemExit(rollout.error)

    # The same tokens under the training mask: what a trainer would see.
    layout, sampled = collate([rollout])
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    with torch.no_grad():
        gap = float((score(model, layout) - sampled).abs().max())
    print(f"largest |vLLM - training| log-prob of {len(sampled)} tokens: {gap:.1e}")
    return gap, use


if __name__ == "__main__":
    main()
