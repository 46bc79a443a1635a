"""An agent on a server: any OpenAI-compatible one that returns token ids (vLLM, SGLang).

    vllm serve Qwen/Qwen2.5-0.5B-Instruct --port 8000
    python examples/server_engine.py http://127.0.0.1:8000/v1 Qwen/Qwen2.5-0.5B-Instruct

Token ids go out and come back, so what was sampled is what can be trained on. The server's prefix
cache serves what is sent again; what the policy dropped is never sent.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mem1_kernels.agent import BM25, MemoryEfficientAgent, Passage, ServerEngine
from mem1_kernels.rollout import collate, score

CORPUS = BM25(
    [
        Passage("1", "Chad\nIts capital is N'Djamena."),
        Passage("2", "Mali\nIts capital is Bamako."),
    ]
)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("model", help="its name there, and a Hugging Face id or path here")
    parser.add_argument("--turns", type=int, default=6, help="turns of an episode [6]")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens of a turn [256]")
    options = parser.parse_args(arguments)

    engine = ServerEngine(options.url, options.model, AutoTokenizer.from_pretrained(options.model))
    agent = MemoryEfficientAgent(
        None,
        engine=engine,
        environment=CORPUS,
        max_new_tokens=options.new_tokens,
        max_turns=options.turns,
    )
    questions = ["What is the capital of Chad?", "What is the capital of Mali?"]
    result = agent.process("Capitals of Africa.", questions)
    print(result)

    # The same tokens under the training mask: what a trainer would see.
    layout, sampled = collate([result.rollout])
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    with torch.no_grad():
        gap = float((score(model, layout) - sampled).abs().max())
    print(f"largest |server - training| log-prob: {gap:.1e}")
    return gap


if __name__ == "__main__":
    main()
