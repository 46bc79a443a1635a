"""Where in a transformers model the layers are that read text, and what limits their positions."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel


def root_of(model: nn.Module) -> PreTrainedModel:
    """The one outermost transformers model in `model`.

    Raises:
        ValueError: no transformers model in it, or several.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a transformers model, got {type(model).__name__}")
    outermost = _outermost([x for x in model.modules() if isinstance(x, PreTrainedModel)])
    if len(outermost) != 1:
        names = [type(module).__name__ for module in outermost]
        raise ValueError(f"model: expected one transformers model, got {names or 'none'}")
    return outermost[0]


def decoder_of(root: PreTrainedModel) -> PreTrainedModel:
    """The part of `root` that reads text, causally, through the attention interface.

    Raises:
        ValueError: it has none, or its attention cannot be replaced.
    """
    name = type(root).__name__
    if getattr(root.config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name} is an encoder-decoder; expected a causal decoder")
    config = root.config.get_text_config(decoder=True)
    for module in root.modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            break
    else:
        raise ValueError(f"model: {name} has no text decoder of its own")
    attentions = (getattr(module, "is_causal", True) for module in module.modules())
    if not getattr(config, "is_causal", True) or not all(attentions):
        raise ValueError(f"model: {name} is not causal (is_causal is False)")
    if not module._supports_attention_backend or not module._can_set_attn_implementation():
        raise ValueError(
            f"model: {name} does not hand keywords to a replaceable attention "
            "(_supports_attention_backend)"
        )
    if config.output_attentions:
        raise ValueError("output_attentions: the model's config asks for attention weights")
    return module


def stack_of(decoder: PreTrainedModel) -> PreTrainedModel:
    """The innermost model that holds all layers of `decoder`: every forward pass goes through it.

    It is `decoder.base_model` but for OPT, whose causal LM calls a decoder inside that.
    """
    stack: Any = decoder.base_model
    while True:
        parts = [x for x in stack.modules() if isinstance(x, PreTrainedModel) and x is not stack]
        inner = _outermost([x for x in parts if x.config is stack.config])
        if len(inner) != 1 or not 0 < _layers_in(inner[0]) == _layers_in(stack):
            return stack
        stack = inner[0]


def _outermost(models: list[PreTrainedModel]) -> list[PreTrainedModel]:
    nested = {id(sub) for model in models for sub in model.modules() if sub is not model}
    return [model for model in models if id(model) not in nested]


def _layers_in(model: nn.Module) -> int:
    return sum(hasattr(module, "layer_idx") for module in model.modules())


def other_layers(config: Any) -> list[str]:
    """The model's kinds of layers that are neither full nor sliding-window attention."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return sorted(kinds - {"full_attention", "sliding_attention"})


def rope_limit(model: nn.Module) -> int | None:
    """The position from which the model's RoPE rotates all keys differently; None: no limit.

    "dynamic" and "longrope" frequencies change once a sequence is longer than that.
    """
    limits = []
    for module in model.modules():
        types: Any = getattr(module, "rope_type", None)
        for layer, kind in types.items() if isinstance(types, dict) else [(None, types)]:
            own: Any = getattr(module, "config", None)
            if kind == "longrope":
                parameters = own.rope_parameters if layer is None else own.rope_parameters[layer]
                named = "original_max_position_embeddings"
                limits.append(int(parameters.get(named) or getattr(own, named)))
            elif isinstance(kind, str) and "dynamic" in kind:
                limits.append(int(own.max_position_embeddings))
    return min(limits, default=None)


class PositionTable(NamedTuple):
    """A model's table of position embeddings (GPT-2, OPT, CTRL)."""

    size: int
    skips_padding: bool  # without position_ids the model counts the mask's tokens only (OPT)

    def check(
        self, tokens: int, seen: int, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """Raises ValueError where a forward pass over so many new tokens, behind those seen, needs
        positions that the table lacks. Reads the device."""
        if position_ids is not None:
            highest = int(position_ids.max())
        elif self.skips_padding and attention_mask is not None and attention_mask.dim() == 2:
            highest = int(attention_mask.sum(1).max()) - 1
        else:
            highest = seen + tokens - 1
        if highest >= self.size:
            raise ValueError(
                f"position_ids: expected less than {self.size}, the size of this model's table of "
                f"position embeddings, got {highest}"
            )


def table_of(stack: PreTrainedModel) -> PositionTable | None:
    """The table of position embeddings of a model that has one."""
    for name, module in stack.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (leaf == "wpe" or "position" in leaf):
            offset = int(getattr(module, "offset", 0))
            return PositionTable(module.num_embeddings - offset, type(module) is not nn.Embedding)
    table = getattr(stack, "pos_encoding", None)
    return PositionTable(len(table), False) if isinstance(table, Tensor) else None
