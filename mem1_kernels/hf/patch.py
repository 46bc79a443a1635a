"""One transformers model patched to run under a plan or over a TrajectoryCache, and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import causal_mask_function, sdpa_mask

from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.hf.cache import TrajectoryCache, other_layers
from mem1_kernels.mask import windowed
from mem1_kernels.ops.attention import trajectory_attention

NAME = "mem1"
"""The name under which transformers knows this attention."""

_STATE = "_mem1_patch"

# Keywords of the model and its loss that pass through every attention function unread.
_NOT_OURS = frozenset(
    {
        "cache_position",
        "ignore_index",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model) -> Model:
    """Makes every attention layer of `model` run `trajectory_attention`.

    Afterwards the model takes one keyword more: `model(input_ids, position_ids=…, plan=…)` with
    `BlockPlan.of(layout)` and the layout's `position_ids`, each of one row for the whole batch or
    of one row per batch row. A 2D `attention_mask` beside a plan hides padding from it.
    Sliding-window layers apply their window to positions. Without a plan the model is causal as
    before. PEFT, checkpointing, autocast, DDP and torch.compile (after patching) go on working. A
    `TrajectoryCache` serves as past_key_values, of the forward pass and of `generate()`.

    Args:
        model: a transformers causal model on the attention interface (transformers >= 5.9), with
            any head, or a module that wraps one. Of a multimodal model the text decoder is patched.

    Returns:
        The same model. Nothing but this model changes (and models built on the very same config
        object, by which transformers chooses the attention); `unpatch` undoes it exactly.

    Raises:
        ValueError: no transformers model in it, or several, or one that is patched already, or
            whose config object is another patched model's; an encoder or encoder-decoder; a model
            whose attention cannot be replaced.

    A forward pass of a patched model raises on what it cannot honour: 4D masks, dropout, attention
    sinks, bidirectional attention, a plan beside cached tokens, under a plan layers of another kind
    than attention or a model that keeps it from them, attention weights as output, and any keyword
    that no part of the model knows. An unpatched model swallows a plan without a word:
    transformers offers no place to notice it.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> model = Qwen2ForCausalLM(Qwen2Config(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1))
    >>> plan = BlockPlan.from_expiry(torch.tensor([5, 3, 3, 5, 5]))
    >>> patch(model)(torch.ones(1, 5, dtype=torch.int64), plan=plan).logits.shape
    torch.Size([1, 5, 32])
    >>> unpatch(model).config._attn_implementation
    'sdpa'
    """
    root = _root(model)
    if is_patched(model):
        raise ValueError(f"model: this {type(root).__name__} is patched already")
    decoder = _decoder(root)
    if decoder.config._attn_implementation == NAME:
        raise ValueError(
            f"model: the config of this {type(root).__name__} says {NAME!r} already: another model "
            "with the same config object is patched"
        )
    _register()
    before = [(config, config._attn_implementation) for config in _configs(root)]
    decoder.set_attn_implementation(NAME)
    guards = [
        module.register_forward_pre_hook(_check_implementation, with_kwargs=True)
        for module in root.modules()
        if isinstance(module, PreTrainedModel) and module.config is decoder.config
    ]
    layers = decoder.base_model
    guards.append(layers.register_forward_pre_hook(_open_cache, with_kwargs=True))
    guards.append(layers.register_forward_hook(_close_cache, with_kwargs=True))
    setattr(root, _STATE, _Patch(before, guards))
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`: the model is what it was, to the bit.

    Args:
        model: the patched model, or a module that wraps it by now.

    Raises:
        ValueError: the model is not patched.
    """
    root = _root(model)
    if not is_patched(model):
        raise ValueError(f"model: this {type(root).__name__} is not patched")
    state = getattr(root, _STATE)
    delattr(root, _STATE)
    for guard in state.guards:
        guard.remove()
    for config, implementation in state.before:
        config._attn_implementation_internal = implementation
    return model


@contextmanager
def patched(model: Model) -> Iterator[Model]:
    """`patch` for the length of a `with` block; leaves a model that is patched already as it is.

    Raises:
        ValueError: as `patch`, but for a patched model.
    """
    if is_patched(model):
        yield model
        return
    patch(model)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch(model)


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` is in force on the model."""
    return hasattr(_root(model), _STATE)


def _register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _make_mask)


@dataclass
class _Patch:
    """What a patched model remembers: what its configs said before, and the hooks it got."""

    before: list[tuple[PreTrainedConfig, str]]
    guards: list[RemovableHandle]

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register()  # unpickled, perhaps, where nobody patches
        self.__dict__.update(state)


def _root(model: nn.Module) -> PreTrainedModel:
    """The one outermost transformers model in `model`."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a transformers model, got {type(model).__name__}")
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner = {id(sub) for module in found for sub in module.modules() if sub is not module}
    outermost = [module for module in found if id(module) not in inner]
    if len(outermost) != 1:
        names = [type(module).__name__ for module in outermost]
        raise ValueError(f"model: expected one transformers model, got {names or 'none'}")
    return outermost[0]


def _decoder(root: PreTrainedModel) -> PreTrainedModel:
    """The part of `root` that reads text, causally, over the attention interface."""
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


def _configs(root: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration in `root` that names an attention implementation."""
    found = [module.config for module in root.modules() if isinstance(module, PreTrainedModel)]
    for config in found:
        parts = (getattr(config, name, None) for name in config.sub_configs)
        found.extend(part for part in parts if part is not None)
    return list({id(config): config for config in found}.values())


def _check_implementation(module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before every forward of a patched model: somebody may have replaced the attention since."""
    current = module.config._attn_implementation
    if current != NAME and kwargs.get("plan") is not None:
        raise ValueError(
            f"plan: needs attention {NAME!r}, but this {type(module).__name__} was set to "
            f"{current!r} after patch(); call unpatch() and patch() again"
        )


def _open_cache(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Before the layers: a TrajectoryCache takes the mask and gives the positions; a pass under a
    plan fills no cache, which would not know what the plan dropped."""
    cache = kwargs.get("past_key_values")
    planned = kwargs.get("plan") is not None
    if planned and cache is None:
        if kwargs.get("use_cache"):
            raise ValueError("use_cache: expected False or None, as a pass under a plan fills none")
        if other := other_layers(module.config):
            raise ValueError(f"plan: this model's layers {other} carry text past any mask")
        return args, {**kwargs, "use_cache": False, "arrival": _Arrival()}
    if not isinstance(cache, TrajectoryCache):
        return None
    if planned:
        raise ValueError("plan: a TrajectoryCache keeps its own expiries; pass only one of the two")
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    position_ids = cache.begin(
        inputs.shape[:2], kwargs.get("attention_mask"), kwargs.get("position_ids")
    )
    changes = {"attention_mask": None, "position_ids": position_ids, "trajectory_cache": cache}
    return args, {**kwargs, **changes}


def _close_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, TrajectoryCache):
        cache.commit()
    arrival = kwargs.get("arrival")
    if arrival is not None and not arrival.seen:
        raise ValueError(f"plan: {type(module).__name__} does not hand it to its attention")


class _Arrival:
    """Travels with the plan of a forward pass, for the attention to say that it has come."""

    seen = False


class _Mask:
    """What stands where transformers expects a mask: made once a forward pass, by layer type.

    Its layers share the plan that the first of them derives.
    """

    def __init__(
        self,
        padding: Tensor | None,
        window: int | None,
        sees_previous: Tensor | None = None,
        cached: Tensor | None = None,
    ) -> None:
        self.padding = padding  # bool [batch, tokens], False on padding
        self.window = window
        self.sees_previous = sees_previous  # bool [1 or batch, tokens]: no document starts here
        self.cached = cached  # bool [batch, 1, queries, keys], where a cache holds older tokens
        self.derived: BlockPlan | None = None

    def plan(self, given: BlockPlan | None, position_ids: Tensor | None, like: Tensor) -> BlockPlan:
        """The plan of this forward pass; `like` is `[batch, heads, tokens, head_dim]`."""
        if self.derived is None:
            if given is None:
                self.derived = BlockPlan.from_expiry(self._causal(like.shape[2], like.device))
            else:
                self.derived = self._narrowed(given, position_ids)
        return self.derived

    def _causal(self, tokens: int, device: torch.device) -> Tensor:
        """expiry `[1 or batch, tokens]` of documents of consecutive positions."""
        index = torch.arange(tokens, dtype=torch.int32, device=device)
        expiry = torch.full((1, tokens), tokens, dtype=torch.int32, device=device)
        if self.sees_previous is not None:
            starts = torch.where(self.sees_previous, tokens, index)
            following = torch.nn.functional.pad(starts[:, 1:], (0, 1), value=tokens)
            expiry = following.flip(1).cummin(1).values.flip(1)
        if self.window is not None:
            expiry = torch.minimum(expiry, index + min(self.window, tokens))
        return expiry if self.padding is None else torch.where(self.padding, expiry, index)

    def _narrowed(self, given: BlockPlan, position_ids: Tensor | None) -> BlockPlan:
        """`given` without padding keys and under this layer type's window."""
        expiry, floor = given.expiry, given.floor
        if self.padding is None and self.window is None:
            return given
        if self.padding is not None:
            index = torch.arange(given.tokens, dtype=torch.int32, device=expiry.device)
            expiry = torch.where(self.padding, expiry, index)
            floor = None if floor is None else floor.expand(expiry.shape)
        if self.window is not None:
            if position_ids is None:
                raise ValueError(
                    "position_ids: a sliding-window layer needs them, but the model hands none to "
                    "its attention"
                )
            expiry, floor = windowed(expiry, floor, position_ids, self.window)
        return BlockPlan.from_expiry(expiry, floor)


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> _Mask:
    """transformers' call for a mask, once a forward pass and layer type."""
    if use_vmap:
        raise ValueError("attention_mask: this model lays a mask of its own over the causal one")
    if isinstance(q_offset, Tensor):
        raise ValueError("past_key_values: static caches are not supported; use a DynamicCache")
    total = q_offset + q_length
    if attention_mask is not None and attention_mask.shape != (batch_size, total):
        raise ValueError(
            f"attention_mask: expected {[batch_size, total]}, got {list(attention_mask.shape)}"
        )
    if kv_offset + kv_length != total:
        raise ValueError("past_key_values: static caches are not supported; use a DynamicCache")
    if kv_length != q_length:
        cached = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            device=device,
            **{**kwargs, "allow_is_causal_skip": False},
        )
        return _Mask(attention_mask, local_size, cached=cached)
    sees_previous = None
    if mask_function is not causal_mask_function:
        # It also cuts at every document of a packed row, and perhaps more; ask it about neighbours.
        row = torch.arange(batch_size, device=device)[:, None]
        index = torch.arange(q_length, device=device)[None]
        previous = (index - 1).clamp(min=0)
        sees_previous = torch.atleast_2d(mask_function(row, 0, index, previous))
        if not torch.compiler.is_compiling() and q_length > 1:
            sees_next = torch.atleast_2d(mask_function(row, 0, previous, index))
            if bool(sees_next[:, 1:].any()):
                raise ValueError("attention_mask: this model asks for bidirectional attention")
    return _Mask(attention_mask, local_size, sees_previous)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Mask | Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    plan: BlockPlan | None = None,
    arrival: _Arrival | None = None,
    trajectory_cache: TrajectoryCache | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' call for attention: `[batch, heads, tokens, head_dim]`, keys after RoPE.

    Returns `[batch, tokens, heads, head_dim]` and no weights.
    """
    _check_call(module, dropout, others)
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask: expected 2D [batch, tokens], got {attention_mask.dim()}D "
            f"{list(attention_mask.shape)}; give the model a plan instead of a dense mask"
        )
    mask = _Mask(None, sliding_window) if attention_mask is None else attention_mask
    if mask.window != sliding_window:
        raise ValueError(
            f"sliding_window: the layer's is {sliding_window} and its mask's {mask.window} "
            "(chunked attention is not supported)"
        )
    if trajectory_cache is not None:
        layer: Any = module.layer_idx
        out = trajectory_cache.attend(
            layer, query, key, value, scale=scaling, softcap=softcap, window=sliding_window
        )
        return out, None
    tokens, keys = query.shape[2], key.shape[2]
    if plan is not None:
        if arrival is not None:
            arrival.seen = True
        if not isinstance(plan, BlockPlan):
            raise TypeError(f"plan: expected a BlockPlan, got {type(plan).__name__}")
        if keys != tokens:
            raise ValueError(
                f"plan: covers the {tokens} tokens of this call; "
                f"past_key_values brings {keys - tokens} more"
            )
        if plan.tokens != tokens:
            raise ValueError(f"plan: expected {tokens} tokens, got {plan.tokens}")
    elif mask.cached is not None:
        return _attend_to_cache(query, key, value, mask.cached, scaling, softcap), None
    elif keys != tokens:
        raise ValueError(f"key: expected {tokens} tokens (self-attention), got {keys}")
    attended = trajectory_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        plan=mask.plan(plan, position_ids, query),
        scale=scaling,
        softcap=softcap,
    )
    return cast(Tensor, attended), None


def _check_call(module: nn.Module, dropout: float, others: dict[str, Any]) -> None:
    if not getattr(module, "is_causal", True):
        raise ValueError(f"model: {type(module).__name__} is not causal (is_causal is False)")
    if dropout:
        raise ValueError(f"attention_dropout: expected 0 (or model.eval()), got {dropout}")
    for name, value in others.items():
        if value is None or name in _NOT_OURS:
            continue
        if name == "output_attentions":
            if value:
                raise ValueError("output_attentions: no attention weights are ever formed")
        elif name == "s_aux":
            raise ValueError("s_aux: attention sinks are not supported")
        else:
            raise TypeError(f"{name}: neither the model nor its patch knows this keyword")


def _attend_to_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Newest tokens over a transformers cache, under a dense mask, as `generate()` does it."""
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous()
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(3, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()
