"""What a training run holds on each GPU: `python -m mem1_kernels.ppo.memory CONFIG.toml`.

An estimate from shapes, phase by phase and item by item, so that one can see what to change. It
leaves out the framework itself (about 2 GB a process) and fragmentation: stay 10 % below the card's
memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mem1_kernels.hf.cache import FIRST_CAPACITY
from mem1_kernels.ppo.config import Config, loading, read_config, retention_of
from mem1_kernels.ppo.logprobs import LOGITS_BUDGET
from mem1_kernels.retention import Segment, placeholder_of
from mem1_kernels.trajectory import Trajectory
from mem1_kernels.tree import unroll

HELD = "held all the time"


def peak_context(config: Config, prompt: int) -> int:
    """Tokens that a cache row holds at most, if every turn is as long as it may be.

    >>> peak_context(Config(max_new_tokens=50, max_info_tokens=500, max_turns=6), prompt=300)
    900
    """
    segments = [Segment("prompt", prompt)]
    for turn in range(config.max_turns):
        segments.append(Segment("state", config.max_new_tokens, turn))
        segments.append(Segment("info", config.max_info_tokens, turn))
    # Nothing is read behind the last turn.
    trajectory = Trajectory(segments[:-1], retention_of(config.retention))
    if config.positions == "reprefill" and placeholder_of(trajectory.retention):
        return unroll(trajectory).peak_context
    return trajectory.peak_context


def cache_slots(peak: int, prompt: int) -> int:
    """Slots per row of a cache that began with the prompt and doubled when it was full."""
    slots = FIRST_CAPACITY
    if prompt > slots:
        slots = max(prompt, 2 * slots)
    while slots < peak:
        slots *= 2
    return slots


def memory_budget(
    shape: Any, config: Config, *, processes: int, prompt: int = 300
) -> dict[str, dict[str, int]]:
    """Bytes per process of a run under FSDP2 (or, with one process, without it).

    Args:
        shape: the model's transformers config.
        config: the run's; read are dtype, bf16, lora_rank, gradient_checkpointing, algorithm,
            critic, kl_coef, token_budget, rollout_batch, retention and the limits of a turn.
        processes: GPUs that share the weights.
        prompt: tokens of an episode's prompt.

    Returns:
        For each phase its items; the first phase, `HELD`, comes on top of every other one.

    >>> from transformers import Qwen2Config
    >>> shape = Qwen2Config(vocab_size=1000, hidden_size=64, num_hidden_layers=2)
    >>> budget = memory_budget(shape, Config(lora_rank=8), processes=1)
    >>> budget[HELD]["Adam's moments"] == 2 * budget["optimizer step"]["gradients"]
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
    decoders = 1 + (config.critic == "model" and config.algorithm == "ppo")

    low = config.dtype == "bfloat16"  # the dtype of the loaded weights
    held = 2 if low else 4
    computed = 2 if config.bf16 or low else 4
    master = 4 if config.bf16 or config.lora_rank else held
    policy = adapters if config.lora_rank else whole
    frozen = decoders * whole if config.lora_rank else 0
    trained = policy + (decoders - 1) * (adapters if config.lora_rank else decoder)
    gradients = master * trained // processes
    tokens, width = config.token_budget, text.hidden_size
    # What a layer computes for each token, or keeps if nothing is computed again.
    working = computed * (12 * width + 4 * text.intermediate_size)
    kept = computed * width if config.gradient_checkpointing else working
    kept *= decoders * tokens * text.num_hidden_layers
    again = working * tokens if config.gradient_checkpointing else 0
    # A chunk in fp32, its part of the entropy, and its gradient in the dtype of the weights.
    logits = (4 + 4 + computed) * min(LOGITS_BUDGET, tokens * text.vocab_size)

    sharded = processes > 1
    gathered = computed * (2 * layer + outside) if sharded else 0
    copies = computed * whole if config.bf16 and not low and not sharded else 0
    # A gradient as it is computed, and in float32 for the sum over the processes.
    grads = 0 if config.lora_rank else computed
    summed = grads + 4 if grads and sharded else grads
    largest = max((p.numel() for p in model.parameters()), default=0)
    rows = config.rollout_batch
    head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
    slot = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * computed
    slots = cache_slots(peak_context(config, prompt), prompt)
    return {
        HELD: {
            "weights": (master * trained + held * frozen) // processes,
            "Adam's moments": 2 * master * trained // processes,
            "reference": master * policy // processes if config.kl_coef else 0,
            "engine, whole": computed * whole if sharded else 0,
            "bfloat16 copies of autocast": copies,
        },
        "rollout": {
            "KV cache": slot * rows * slots,
            "activations of a prefill": working * rows * max(prompt, config.max_info_tokens),
            "logits of a prefill": (4 + computed) * text.vocab_size * rows * rows,
        },
        "backward pass of the head": {
            "layers gathered": gathered,
            "activations of a row": kept,
            "chunk of logits": logits,
            "gradient of the head": (4 + grads) * head if grads else 0,
        },
        # As the gradients of the layers come, their activations go.
        "backward pass of the layers": {
            "gradients": gradients,
            "layers gathered": gathered,
            "activations of a row": max(kept - gradients, 0) + again,
            "gradients of head and layer": grads * head + summed * layer,
        },
        "sum of the gradients outside the layers": {
            "gradients": gradients,
            "weights gathered": computed * outside if sharded else 0,
            "gradients, and in float32": summed * outside if sharded else 0,
        },
        "optimizer step": {
            "gradients": gradients,
            # AdamW goes tensor by tensor over shards, else over all of them at once.
            "square roots": 2 * master * largest // processes if sharded else master * trained,
        },
    }


def most(budget: dict[str, dict[str, int]]) -> int:
    """The bytes of the phase that needs most, with what is held all the time."""
    sums = {phase: sum(items.values()) for phase, items in budget.items()}
    return sums.pop(HELD) + max(sums.values())


def table(budget: dict[str, dict[str, int]]) -> str:
    """A budget as lines of name and GB (10^9 bytes), with the sums."""
    lines = []
    held = sum(budget[HELD].values())
    for phase, items in budget.items():
        total = sum(items.values()) + (0 if phase == HELD else held)
        lines.append(f"{phase:42}{total / 1e9:7.1f}")
        lines += [f"  {name:40}{size / 1e9:7.1f}" for name, size in items.items() if size]
    return "\n".join([*lines, f"{'most':42}{most(budget) / 1e9:7.1f}"])


def _count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {count}")
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the budget of a config."""
    from transformers import AutoConfig

    parser = argparse.ArgumentParser("python -m mem1_kernels.ppo.memory", description=__doc__)
    parser.add_argument("config", help="TOML file of a run, its model named")
    parser.add_argument("--processes", type=_count, default=4, help="GPUs [4]")
    parser.add_argument("--prompt", type=_count, default=300, help="tokens of a prompt [300]")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config)
        if config.model == "tiny":
            raise ValueError("model: expected a Hugging Face id or a path, got 'tiny'")
        with loading("model", config.model):
            shape = AutoConfig.from_pretrained(config.model)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: config: {options.config}: {error.strerror}\n")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    budget = memory_budget(shape, config, processes=options.processes, prompt=options.prompt)
    print(table(budget))


if __name__ == "__main__":
    main()
