"""What a training run holds on each GPU: `python -m mem1_kernels.ppo.memory CONFIG.toml`.

An estimate from shapes, item by item, so that one can see what to change. It leaves out the
framework itself (about 2 GB a process) and fragmentation: stay 10 % below the card's memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mem1_kernels.ppo.config import Config, read_config
from mem1_kernels.ppo.logprobs import LOGITS_BUDGET


def memory_budget(
    shape: Any, config: Config, *, processes: int, peak_context: int
) -> dict[str, int]:
    """Bytes per process, by item, of a run under FSDP2 (or, with one process, without it).

    Args:
        shape: the model's transformers config.
        config: the run's; read are dtype, bf16, lora_rank, gradient_checkpointing, critic,
            kl_coef, token_budget and rollout_batch.
        processes: GPUs that share the weights.
        peak_context: tokens that an episode's cache row holds at most.

    >>> from transformers import Qwen2Config
    >>> shape = Qwen2Config(vocab_size=1000, hidden_size=64, num_hidden_layers=2)
    >>> budget = memory_budget(shape, Config(lora_rank=8), processes=1, peak_context=100)
    >>> budget["Adam's moments"] == 2 * budget["gradients"]
    True
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    text = shape.get_text_config()
    whole = sum(parameter.numel() for parameter in model.parameters())
    layer = sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    outside = whole - text.num_hidden_layers * layer
    head = model.get_output_embeddings().weight.numel()
    linear = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    adapters = config.lora_rank * sum(m.in_features + m.out_features for m in linear)
    decoder = whole - (0 if text.tie_word_embeddings else head)
    critic = decoder if config.critic == "model" and config.algorithm == "ppo" else 0

    held = 2 if config.dtype == "bfloat16" else 4
    computed = 2 if config.bf16 or held == 2 else 4
    master = 4 if config.bf16 else held
    policy = adapters if config.lora_rank else whole
    frozen = whole if config.lora_rank else 0
    trained = policy + critic
    tokens, width = config.token_budget, text.hidden_size
    head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * computed
    working = tokens * computed * (10 * width + 4 * text.intermediate_size)
    kept = tokens * computed * width * text.num_hidden_layers
    if not config.gradient_checkpointing:
        kept = working * text.num_hidden_layers
    budget = {
        "weights": (master * trained + held * frozen) // processes,
        "gradients": master * trained // processes,
        "Adam's moments": 2 * master * trained // processes,
        "reference": master * policy // processes if config.kl_coef else 0,
        "engine, whole": computed * whole,
        "layers gathered for a pass": computed * (2 * layer + outside),
        "their gradients": 0 if config.lora_rank else computed * (layer + outside) + 4 * head,
        "activations of a row": kept + working,
        "chunk of logits": 3 * 4 * LOGITS_BUDGET,  # fp32, and what is computed from them
        "KV cache of the rollout": cache * config.rollout_batch * peak_context,
    }
    if processes == 1:
        for name in ("engine, whole", "layers gathered for a pass", "their gradients"):
            budget[name] = 0
    return budget


def table(budget: dict[str, int]) -> str:
    """A budget as lines of name and GB (10^9 bytes), with the sum."""
    lines = [f"{name:28}{size / 1e9:7.1f}" for name, size in budget.items() if size]
    return "\n".join([*lines, f"{'sum':28}{sum(budget.values()) / 1e9:7.1f}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the budget of a config."""
    from transformers import AutoConfig

    parser = argparse.ArgumentParser("python -m mem1_kernels.ppo.memory", description=__doc__)
    parser.add_argument("config", help="TOML file of a run, its model named")
    parser.add_argument("--processes", type=int, default=4, help="GPUs [4]")
    parser.add_argument(
        "--peak-context", type=int, default=2048, help="tokens a cache row holds at most [2048]"
    )
    options = parser.parse_args(arguments)
    config = read_config(options.config)
    shape = AutoConfig.from_pretrained(config.model)
    print(
        table(
            memory_budget(
                shape, config, processes=options.processes, peak_context=options.peak_context
            )
        )
    )


if __name__ == "__main__":
    main()
