"""Patches one transformers model to run under a plan or over a TrajectoryCache, and restores it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
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
from mem1_kernels.hf.cache import TrajectoryCache, check_position_ids
from mem1_kernels.hf.decoder import (
    PositionTable,
    decoder_of,
    other_layers,
    root_of,
    stack_of,
    table_of,
)
from mem1_kernels.hf.rotation import angles, find_rope, turn
from mem1_kernels.hf.sequence import gather_position_ids, gather_tokens, scatter_tokens
from mem1_kernels.mask import windowed
from mem1_kernels.ops.attention import trajectory_attention
from mem1_kernels.ops.rope import Rope

NAME = "mem1"
"""The name under which transformers knows this attention."""

_STATE = "_mem1_patch"

# Keywords of the model and its loss that reach every attention function, which does not need them.
_NOT_OURS = frozenset(
    {
        "cache_position",
        "ignore_index",
        "loss_weights",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model, *, sequence_group: dist.ProcessGroup | None = None) -> Model:
    """Makes every attention layer of `model` run `trajectory_attention`.

    The model then takes one keyword more: `model(input_ids, position_ids=..., plan=...)`, with
    `BlockPlan.of(layout)` and the layout's `position_ids`. The plan has one row for the whole batch
    or one per batch row. A 2D `attention_mask` beside a plan hides padding. Sliding-window layers
    apply their window to positions. Without a plan the model is causal as before. PEFT, gradient
    checkpointing, autocast, DDP and torch.compile (after patching) still work. A `TrajectoryCache`
    serves as past_key_values (`cache` since transformers 5.24), in a forward pass and in
    `generate()`.

    The loss of a causal LM moves `labels=` by one token. That is right where each label's token
    follows the token that predicts it: in a trajectory, and in packed ones whose prompts are -100.
    In a tree it is not; go by `predecessor` there:

        logits = model(layout.token_ids[None], position_ids=layout.position_ids[None],
                       plan=BlockPlan.of(layout)).logits[0]
        target = layout.loss_mask.nonzero().flatten()
        loss = cross_entropy(logits[layout.predecessor[target]], layout.token_ids[target])

    or, where no token predicts several, pass `layout.shift_labels()[None]` as both `labels=` and
    `shift_labels=`. Beside these, `loss_weights=` `[batch, tokens]` weighs the loss at each token
    that predicts one: the sum is divided by `num_items_in_batch`, or else by the weights' sum.

    Args:
        model: a transformers causal model on the attention interface (transformers >= 5.9), with
            any head, or a module that wraps one. Of a multimodal model the text decoder is patched.

    Returns:
        The same model. Nothing but this model changes (and models built on the very same config
        object, by which transformers chooses the attention); `unpatch` undoes it exactly.

    Raises:
        ValueError: no transformers model in it, or several, or one that is patched already, or
            whose config object is another patched model's; an encoder or encoder-decoder; a model
            whose attention cannot be replaced. docs/models.md lists the classes.

    A forward pass of a patched model raises a ValueError or TypeError on what it cannot honour:

    - 4D masks, dropout, attention sinks, bidirectional attention, attention weights as output, a
      model that computes with its mask, and any keyword that no part of the model knows;
    - positions past a table of position embeddings (GPT-2, OPT, CTRL);
    - with a plan: cached tokens, layers of other kinds than full and sliding-window attention, a
      model that does not hand the plan to its attention, missing `position_ids` of a layout whose
      positions are others than 0, 1, 2, ..., and `labels` that the shift by one makes wrong;
    - `loss_weights` without `shift_labels`, or of a model whose loss has other parts (experts);
    - with a sequence_group: no plan, an attention mask, labels, or heads that the processes cannot
      share.

    A model that is not patched ignores a plan silently, as transformers does with any keyword.

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
    root = root_of(model)
    if is_patched(model):
        raise ValueError(f"model: this {type(root).__name__} is patched already")
    decoder = decoder_of(root)
    if decoder.config._attn_implementation == NAME:
        raise ValueError(
            f"model: the config of this {type(root).__name__} says {NAME!r} already: another model "
            "with the same config object is patched"
        )
    _register()
    before = [(config, config._attn_implementation) for config in _configs(root)]
    decoder.set_attn_implementation(NAME)
    readers = [
        module
        for module in root.modules()
        if isinstance(module, PreTrainedModel)
        and (module is root or module.config is decoder.config)
    ]
    guards = [
        module.register_forward_pre_hook(
            partial(_check_plan, _names(module), sequence_group), with_kwargs=True
        )
        for module in readers
    ]
    if root.get_output_embeddings() is not None:
        # The common loss_function reads shift_labels; a model that computes its own loss does not.
        calls = inspect.unwrap(type(root).forward).__code__.co_names
        check_labels = partial(_check_labels, _names(root), "loss_function" in calls)
        guards.append(root.register_forward_pre_hook(check_labels, with_kwargs=True))
        guards.append(root.register_forward_hook(_weigh_loss, with_kwargs=True))
    stack = stack_of(decoder)
    open_pass = partial(_open_pass, table_of(stack), _Rotation(), sequence_group)
    guards.append(stack.register_forward_pre_hook(open_pass, with_kwargs=True))
    guards.append(stack.register_forward_hook(_close_pass, with_kwargs=True))
    setattr(root, _STATE, _Patch(before, guards))
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`: the model is what it was, to the bit.

    Args:
        model: the patched model, or a module that wraps it by now.

    Raises:
        ValueError: the model is not patched.
    """
    root = root_of(model)
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
    """`patch` for a `with` block, and `unpatch` after it; a patched model stays as it is.

    Raises:
        ValueError: as `patch`, except for a model that is patched already.
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
    """Whether the model is patched."""
    return hasattr(root_of(model), _STATE)


def rope_of(model: nn.Module) -> Rope:
    """The rotation of the model's queries and keys, as `prune_kv_` takes it, found by feeding it
    one token at several positions.

    Raises:
        ValueError: as `patch`; and a model whose positions are not a rotation by fixed frequencies
            (no RoPE, "dynamic", "longrope").

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> model = Qwen2ForCausalLM(Qwen2Config(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1))
    >>> rope_of(model).inv_freq[0].shape, rope_of(model).layout
    (torch.Size([8]), 'half')
    """
    with patched(model):
        return find_rope(stack_of(decoder_of(root_of(model))))


def _register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _make_mask)


@dataclass
class _Rotation:
    """A patched model's rotation, once a pass has needed it."""

    rope: Rope | None = None


@dataclass
class _Patch:
    """What `unpatch` needs: the attention that the configs named before, and the hooks."""

    before: list[tuple[PreTrainedConfig, str]]
    guards: list[RemovableHandle]

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register()  # it may be unpickled in a process that has not called patch()
        self.__dict__.update(state)


def _configs(root: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration in `root` that names an attention implementation."""
    found = [module.config for module in root.modules() if isinstance(module, PreTrainedModel)]
    for config in found:
        parts = (getattr(config, name, None) for name in config.sub_configs)
        found.extend(part for part in parts if part is not None)
    return list({id(config): config for config in found}.values())


def _names(module: nn.Module) -> list[str]:
    """The names of the arguments of the model's forward, in their order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _inputs(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """input_ids or inputs_embeds of a model's forward: `[batch, tokens, ...]`."""
    ids = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among a model's keywords: `cache` from transformers 5.24 on, which still takes the
    older name `past_key_values`."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def cache_keyword(model: nn.Module) -> str:
    """The name under which a model takes its cache: "cache" or "past_key_values"."""
    return "cache" if "cache" in _names(root_of(model)) else "past_key_values"


def _check_plan(
    names: list[str],
    sequence_group: dist.ProcessGroup | None,
    module: PreTrainedModel,
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    """Before every forward of a patched model under a plan."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    plan = given.get("plan")
    if sequence_group is not None:
        if plan is None:
            raise ValueError("plan: expected one for a model with a sequence_group, got none")
        for name in ("attention_mask", "labels"):
            if given.get(name) is not None:
                raise ValueError(f"{name}: expected None for a model with a sequence_group")
    if plan is None:
        return
    current = module.config.get_text_config(decoder=True)._attn_implementation
    if current != NAME:
        raise ValueError(
            f"plan: needs attention {NAME!r}, but this {type(module).__name__} was set to "
            f"{current!r} after patch(); call unpatch() and patch() again"
        )
    if not isinstance(plan, BlockPlan):
        raise TypeError(f"plan: expected a BlockPlan, got {type(plan).__name__}")
    inputs = _inputs(args, kwargs)
    if inputs is None:
        return  # the model raises
    batch, tokens = inputs.shape[:2]
    slices = 1 if sequence_group is None else dist.get_world_size(sequence_group)
    if plan.tokens != tokens * slices:
        raise ValueError(f"plan: expected {tokens * slices} tokens, got {plan.tokens}")
    position_ids = given.get("position_ids")
    if position_ids is not None:
        check_position_ids(position_ids, tokens, batch, planes=True)
    elif plan.needs_position_ids:
        raise ValueError(
            "position_ids: expected those of the layout of this plan, which are not 0, 1, 2, ..., "
            "got none (pass position_ids=layout.position_ids[None])"
        )


def _check_labels(
    names: list[str],
    reads_shift_labels: bool,
    module: PreTrainedModel,
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    """Before the forward of a patched causal LM: its loss moves `labels` by one, which is wrong for
    each token that is not predicted by the token before it."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    plan, labels = given.get("plan"), given.get("labels")
    if plan is None or labels is None:
        return
    if given.get("shift_labels") is not None:
        if not reads_shift_labels:
            raise ValueError(
                f"shift_labels: the loss of {type(module).__name__} does not read them; gather the "
                "logits by layout.predecessor"
            )
        return
    if labels.shape[-1] != plan.tokens:
        raise ValueError(f"labels: expected {plan.tokens} tokens, got {labels.shape[-1]}")
    index = torch.arange(plan.tokens, device=plan.expiry.device)
    if plan.predecessor is not None:
        follows = plan.predecessor == index - 1
    else:  # only the mask is known: a token that does not see its neighbour may not follow it
        follows = plan.expiry.roll(1, dims=1) > index
        if plan.floor is not None:
            follows &= plan.floor < index
    follows = follows | (index == 0)  # the loss leaves out the first label
    wrong = (labels.to(follows.device) != given.get("ignore_index", -100)) & ~follows
    message = (
        "labels: the loss takes each token to be predicted by the token before it, which does not "
        "hold for this plan"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~wrong.any(), message)
    elif bool(wrong.any()):
        row, token = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{message} at token {token} of row {row}; go by layout.predecessor, or pass "
            "shift_labels=layout.shift_labels()[None] too (see patch)"
        )


def _weigh_loss(
    module: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any
) -> Any | None:
    """After the forward of a patched causal LM: `loss_weights` make its loss the weighted one."""
    weights, labels = kwargs.get("loss_weights"), kwargs.get("shift_labels")
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = getattr(weights, "dtype", type(weights).__name__)
        raise TypeError(f"loss_weights: expected a floating point tensor, got {got}")
    if labels is None:
        raise ValueError("loss_weights: expected shift_labels beside them, got none")
    if weights.shape != labels.shape:
        expected, got = list(labels.shape), list(weights.shape)
        raise ValueError(f"loss_weights: expected {expected} like shift_labels, got {got}")
    if not hasattr(output, "logits") or getattr(output, "aux_loss", None) is not None:
        raise ValueError(
            f"loss_weights: expected an output with logits, and no loss but theirs, of "
            f"{type(module).__name__}; compute the loss from its logits"
        )
    logits = output.logits.float()
    ignored = kwargs.get("ignore_index", -100)
    labels, weights = labels.to(logits.device), weights.to(logits.device)
    weights = weights.float().masked_fill(labels == ignored, 0)
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="none"
    )
    count = kwargs.get("num_items_in_batch")
    output.loss = (each * weights.flatten()).sum() / (weights.sum() if count is None else count)
    return output


def _open_pass(
    table: PositionTable | None,
    rotation: _Rotation,
    sequence_group: dist.ProcessGroup | None,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]] | None:
    """Before the layers: a TrajectoryCache takes the mask and returns the positions. A pass under a
    plan fills no cache: the cache would not know what the plan dropped."""
    cache = _cache_of(kwargs)
    planned = kwargs.get("plan") is not None
    inputs = _inputs(args, kwargs)
    if inputs is None:
        return None  # the model raises
    if isinstance(cache, TrajectoryCache):
        if planned:
            raise ValueError(
                "plan: a TrajectoryCache keeps its own expiries; pass only one of the two"
            )
        position_ids = cache.begin(
            inputs.shape[:2], kwargs.get("attention_mask"), kwargs.get("position_ids")
        )
        changes = {"attention_mask": None, "position_ids": position_ids, "trajectory_cache": cache}
        return args, {**kwargs, **changes}
    if table is not None and not torch.compiler.is_compiling():
        seen = 0 if cache is None else cache.get_seq_length()
        mask = kwargs.get("attention_mask")
        table.check(inputs.shape[1], seen, mask, kwargs.get("position_ids"))
    if not planned or cache is not None:
        return None
    if kwargs.get("use_cache"):
        raise ValueError("use_cache: expected False or None: a pass under a plan fills no cache")
    if other := other_layers(module.config):
        raise ValueError(
            "plan: expected a model of full and sliding-window attention only, but "
            f"{type(module).__name__} has layers of other kinds: {other}"
        )
    arrival = _Arrival(sequence_group)
    if kwargs["plan"].prompt is not None:
        if rotation.rope is None:
            rotation.rope = find_rope(cast(PreTrainedModel, module))
        arrival.rope = rotation.rope
    return args, {**kwargs, "use_cache": False, "arrival": arrival}


def _close_pass(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_of(kwargs)
    if isinstance(cache, TrajectoryCache):
        cache.commit()
    arrival = kwargs.get("arrival")
    if arrival is not None and not arrival.seen:
        raise ValueError(f"plan: {type(module).__name__} does not hand it to its attention")


class _Arrival:
    """Goes through the layers with a plan; `seen` once the plan has reached an attention.

    No dataclass: FSDP hands each layer a copy of those, to cast the tensors in them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group  # that shares the row
        self.seen = False
        self.rope: Rope | None = None  # where the plan is of "compact" positions
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}

    def turned(self, x: Tensor, plan: BlockPlan, layer: int) -> Tensor:
        """`x` `[batch, heads, tokens, head_dim]` at the positions where it meets what is not of the
        prompt."""
        rope, shift = cast(Rope, self.rope), cast(Tensor, plan.shift)
        inv_freq = rope.inv_freq[layer]
        if not len(inv_freq):
            return x  # a layer without RoPE
        if id(inv_freq) not in self.angles:
            self.angles[id(inv_freq)] = angles(shift.to(x.device), inv_freq)
        return turn(x, self.angles[id(inv_freq)], rope.layout)


class _MaskIsRead(ValueError, AttributeError):
    """An AttributeError too, so that `hasattr` of a mask is False."""


class _Mask:
    """What stands where transformers expects a mask: made once per forward pass and kind of layer.

    Its layers share the plan that the first of them derives. It holds no mask: a model that
    computes with its mask (Doge, or DeepSeek's indexer) raises.
    """

    def __init__(
        self,
        padding: Tensor | None,
        window: int | None,
        sees_previous: Tensor | None = None,
        cached: Tensor | None = None,
        config: Any = None,
    ) -> None:
        self.padding = padding  # bool [batch, tokens], False on padding
        self.window = window
        self.sees_previous = sees_previous  # bool [1 or batch, tokens]: no document starts here
        self.cached = cached  # bool [batch, 1, queries, keys], if a cache holds older tokens
        self.config = config  # of the model, for messages
        self.derived: BlockPlan | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, index: Any) -> Any:
        model = type(self.__dict__.get("config")).__name__.removesuffix("Config")
        raise _MaskIsRead(
            f"attention_mask: {model} computes with its mask, but a patched model forms none; "
            "expected a model that only hands it to its attention"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        return next((value for value in args if isinstance(value, cls)), cls(None, None))[0]

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
            if given.shift is not None:
                expiry, floor = windowed(expiry, floor, position_ids + given.shift, self.window)
            else:
                expiry, floor = windowed(expiry, floor, position_ids, self.window)
        narrowed = BlockPlan.from_expiry(expiry, floor)
        if given.prompt is None:
            return narrowed
        return replace(
            narrowed,
            prompt=self._narrowed_prompt(given, position_ids),
            shift=given.shift,
        )

    def _narrowed_prompt(self, given: BlockPlan, position_ids: Tensor | None) -> BlockPlan:
        """The plan of the prompt's keys without padding and under this layer type's window."""
        prompt = cast(BlockPlan, given.prompt)
        expiry, floor = prompt.expiry, cast(Tensor, prompt.floor)
        if self.padding is not None:
            index = torch.arange(given.tokens, dtype=torch.int32, device=expiry.device)
            expiry = torch.where(self.padding, expiry, index)
        if self.window is not None:
            floor = floor + (cast(Tensor, position_ids) - self.window + 1).clamp(min=0)
        rows = torch.broadcast_shapes(expiry.shape, floor.shape)
        return BlockPlan.from_expiry(expiry.expand(rows), floor.expand(rows))


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
    """transformers' call for a mask, once per forward pass and kind of layer."""
    if use_vmap:
        raise ValueError("attention_mask: this model adds a mask of its own to the causal one")
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
        return _Mask(attention_mask, local_size, cached=cached, config=kwargs.get("config"))
    sees_previous = None
    if mask_function is not causal_mask_function:
        # It also cuts between the documents of a packed row, and perhaps elsewhere: evaluate it for
        # neighbours.
        row = torch.arange(batch_size, device=device)[:, None]
        index = torch.arange(q_length, device=device)[None]
        previous = (index - 1).clamp(min=0)
        sees_previous = torch.atleast_2d(mask_function(row, 0, index, previous))
        if not torch.compiler.is_compiling() and q_length > 1:
            sees_next = torch.atleast_2d(mask_function(row, 0, previous, index))
            if bool(sees_next[:, 1:].any()):
                raise ValueError("attention_mask: this model asks for bidirectional attention")
    return _Mask(attention_mask, local_size, sees_previous, config=kwargs.get("config"))


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
    key_probe: dict[int, Tensor] | None = None,
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
    if key.shape[3] != value.shape[3]:
        raise ValueError(
            f"model: {type(module).__name__} has keys of head_dim {key.shape[3]} and values of "
            f"head_dim {value.shape[3]}; expected one head_dim"
        )
    mask = _Mask(None, sliding_window) if attention_mask is None else attention_mask
    if mask.window != sliding_window:
        raise ValueError(
            f"sliding_window: the layer's is {sliding_window} and its mask's {mask.window} "
            "(chunked attention is not supported, nor a layer that leaves its window to the mask)"
        )
    if key_probe is not None:
        key_probe[cast(Any, module).layer_idx] = key
    if trajectory_cache is not None:
        layer: Any = module.layer_idx
        out = trajectory_cache.attend(
            layer, query, key, value, scale=scaling, softcap=softcap, window=sliding_window
        )
        return out, None
    group = None if arrival is None else arrival.group
    if group is not None:
        query, key, value = (gather_tokens(x, group) for x in (query, key, value))
        if mask.window is not None and mask.derived is None and position_ids is not None:
            position_ids = gather_position_ids(position_ids, group)
    tokens, keys = query.shape[2], key.shape[2]
    if plan is not None:
        if arrival is not None:
            arrival.seen = True
        if keys != tokens:
            raise ValueError(
                f"plan: covers the {tokens} tokens of this call; "
                f"past_key_values brings {keys - tokens} more"
            )
    elif mask.cached is not None:
        return _attend_to_cache(query, key, value, mask.cached, scaling, softcap), None
    elif keys != tokens:
        raise ValueError(f"key: expected {tokens} tokens (self-attention), got {keys}")
    out = _attend(
        module, query, key, value, mask.plan(plan, position_ids, query), arrival, scaling, softcap
    )
    return (out if group is None else scatter_tokens(out, group)), None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    arrival: _Arrival | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """Attention under a plan, `[batch, tokens, heads, head_dim]`."""
    prompt_query = None
    if plan.prompt is not None:
        layer = cast(Any, module).layer_idx
        prompt_query = query.transpose(1, 2)
        query, key = (cast(_Arrival, arrival).turned(x, plan, layer) for x in (query, key))
    attended = trajectory_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        plan=plan,
        scale=scaling,
        softcap=softcap,
        prompt_query=prompt_query,
    )
    return cast(Tensor, attended)


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
            raise TypeError(
                f"{name}: neither the model nor its patch knows this keyword; or the attention of "
                f"{type(module).__name__} needs it, and then this model is not supported"
            )


def _attend_to_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """The newest tokens over a transformers cache, under a dense mask, as in `generate()`."""
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
