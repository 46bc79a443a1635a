"""TrajectoryCache: a KV cache of ragged rows that is pruned in place; each slot has an expiry."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from mem1_kernels.hf.decoder import (
    decoder_of,
    other_layers,
    root_of,
    rope_limit,
    stack_of,
    table_of,
)
from mem1_kernels.mask import saturated
from mem1_kernels.ops.kv_cache import append_kv_, cached_attention, prune_kv_
from mem1_kernels.ops.rope import Rope

NEVER = torch.iinfo(torch.int32).max
"""The expiry of a slot that is never dropped."""

FIRST_CAPACITY = 256
"""Slots per row at the start, without a given capacity."""


@dataclass
class _Expected:
    """What `expect` announced for the next forward pass."""

    counts: Tensor  # int32 [batch], on the host
    expiry: Tensor  # int32 [batch]
    packed: bool


@dataclass
class _Tokens:
    """Which tokens of a forward pass over `[1 or batch, tokens]` each row takes."""

    width: int  # the most tokens of a row, padding included
    counts: Tensor | None  # int32 [batch]; None: `width` each
    expiry: Tensor  # int32 [batch]
    # Where a row's tokens lie in the flattened pass, int64 [batch, width], first its own, then
    # padding; and where the pass's tokens lie in this. None: in the order of the pass.
    source: Tensor | None = None
    place: Tensor | None = None

    def by_row(self, x: Tensor, batch: int) -> Tensor:
        """`[1 or batch, tokens, ...]` of the pass as `[batch, width, ...]`."""
        if self.source is not None:
            return x.flatten(0, 1)[self.source]
        return x if len(x) == batch else x[0].unflatten(0, (batch, self.width))

    def as_pass(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """`[batch, width, ...]` as `[1 or batch, tokens, ...]` of the pass."""
        if self.place is not None:
            return x.flatten(0, 1)[self.place].unflatten(0, tuple(shape))
        return x if len(x) == shape[0] else x.flatten(0, 1)[None]


@dataclass
class _Step:
    """One forward pass: which of its tokens each row takes, and where they go."""

    tokens: _Tokens
    lengths: Tensor  # int32 [batch], including the new tokens
    next_position: Tensor  # int64 [batch]
    updated: set[int] = field(default_factory=set)
    attended: set[int] = field(default_factory=set)


class TrajectoryCache(Cache):
    """A KV cache of ragged rows, pruned in place: the past_key_values of a patched model.

    Row `b` uses slots `0 .. lengths[b] - 1`. Their order does not matter: a token from the end
    moves into the slot of a dropped one. Each slot keeps its token's position and expiry, so
    sliding-window layers go by positions. The model need not know which tokens were dropped. New
    tokens get the positions after the newest one, dropped or not (default), or `position_ids`.

    A forward pass appends its tokens to every row, with two exceptions. Padding in a 2D attention
    mask, on either side, is left out; the mask is `[batch, get_seq_length() + new tokens]`, and its
    older columns are not read. After `expect(counts)` row `b` takes its first `counts[b]` tokens,
    or, with `packed=True`, the pass is one row of all rows' tokens, without padding.

    `generate()` continues from a pruned cache. Give it the new tokens only, a mask as above, and
    position_ids. It feeds padding to rows that stopped early, so drop that before the next turn:
    `cache.prune_(keep=cache.position_ids < end[:, None])`.

    Args:
        model: the transformers model that will use it, or a module that wraps it.
        batch_size: the number of rows.
        capacity: slots per row. None: it starts small and doubles when a row is full.
        ordered: keep the slots' order when pruning (more moves).
        rope: the model's rotation (`rope_of`). With it each prune that drops slots of a row moves
            the rest to positions 0, 1, 2, ..., and the next token follows them.

    Attributes:
        lengths: int32 `[batch]`, the tokens that each row holds.
        position_ids: int32 `[batch, capacity]`, of each slot's token.
        expiry: int32 `[batch, capacity]`: `prune_(now)` drops the slots with `expiry <= now`. A new
            slot never expires (default) or gets what `expect` says; you may write to it.

    The attributes are other tensors after the cache has grown. The contents of slots from
    `lengths[b]` on are undefined.

    Raises:
        TypeError: batch_size or capacity is no integer, or ordered no bool.
        ValueError: batch_size or capacity < 1, or a model that `patch` does not take or that has
            layers of other kinds than full and sliding-window attention.

    A forward pass raises a ValueError before it writes anything for rows or tokens that do not fit,
    positions that do not rise, positions past the model's table of position embeddings or past
    those where its RoPE changes, and a full cache of fixed capacity.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> from mem1_kernels.hf import patched
    >>> model = Qwen2ForCausalLM(Qwen2Config(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=2, num_key_value_heads=1))
    >>> cache = TrajectoryCache(model, batch_size=2)
    >>> with torch.no_grad(), patched(model):
    ...     cache.expect([4, 2])
    ...     _ = model(torch.ones(2, 4, dtype=torch.int64), past_key_values=cache)
    ...     cache.prune_(keep=cache.position_ids != 1)
    ...     _ = model(torch.ones(2, 1, dtype=torch.int64), past_key_values=cache)
    >>> cache.lengths.tolist(), cache.position_ids[:, :4].tolist()[0], cache.peak_context
    ([4, 2], [0, 3, 2, 4], 4)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        batch_size: int,
        capacity: int | None = None,
        ordered: bool = False,
        rope: Rope | None = None,
    ) -> None:
        batch_size = _at_least_one("batch_size", batch_size)
        capacity = None if capacity is None else _at_least_one("capacity", capacity)
        if not isinstance(ordered, bool):
            raise TypeError(f"ordered: expected a bool, got {ordered!r}")
        if rope is not None and not isinstance(rope, Rope):
            raise TypeError(f"rope: expected a Rope, got {type(rope).__name__}")
        root = root_of(model)
        config: Any = root.config.get_text_config(decoder=True)
        if other := other_layers(config):
            raise ValueError(f"model: has layers that a KV cache alone cannot serve: {other}")
        self._rope_limit = rope_limit(root)
        self._table = table_of(stack_of(decoder_of(root)))
        super().__init__(layers=[])
        self.ordered = ordered
        self.rope = rope
        self.fixed_capacity = capacity is not None
        self.device = next(model.parameters()).device
        self._batch_size = batch_size
        self._num_layers = config.num_hidden_layers
        self._step: _Step | None = None
        self._committed = False  # some forward pass came to its end
        self._expected: _Expected | None = None
        with torch.inference_mode(False):
            self.keys: dict[int, Tensor] = {}
            self.values: dict[int, Tensor] = {}
            self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
            self.position_ids = self.lengths.new_zeros(batch_size, capacity or FIRST_CAPACITY)
            self.expiry = torch.full_like(self.position_ids, NEVER)
            self._next_position = self.lengths.long()
            self._peak = self.lengths.amax()
        self._seen: int | None = 0

    def __len__(self) -> int:
        return self._num_layers

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return self._batch_size

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.position_ids.shape[1]

    @property
    def tokens(self) -> int:
        """The number of tokens held, over all rows. Reads the device."""
        return int(self.lengths.sum())

    @property
    def peak_context(self) -> int:
        """The most tokens that any one row held at once. Reads the device."""
        return int(self._peak)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, for keys, values, positions and expiries."""
        tensors = [*self.keys.values(), *self.values.values(), self.position_ids, self.expiry]
        return sum(x.numel() * x.element_size() for x in tensors)

    def expect(
        self,
        counts: Sequence[int] | Tensor,
        *,
        expiry: int | Sequence[int] | Tensor = NEVER,
        packed: bool = False,
    ) -> None:
        """Announces the next forward pass: row `b` takes the first `counts[b]` of its tokens.

        It holds until a pass has begun, also when slots are pruned before that.

        Args:
            counts: `[batch]`, 0 or more each. They are read on the host: prefer a list or a CPU
                tensor.
            expiry: of the new slots: one for all, or `[batch]`.
            packed: the pass is `[1, sum of counts]`: first row 0's tokens, then row 1's, and so on,
                so that rows of different counts compute no padding.

        Raises:
            TypeError: numbers that are not integers, or packed no bool.
            ValueError: another number of rows, or a negative count.
        """
        if not isinstance(packed, bool):
            raise TypeError(f"packed: expected a bool, got {packed!r}")
        on_host = self._per_row("counts", counts, device=torch.device("cpu"))
        if min(on_host.tolist()) < 0:
            raise ValueError(f"counts: expected 0 or more, got {on_host.tolist()}")
        self._expected = _Expected(on_host, self._per_row("expiry", expiry), packed)

    def prune_(
        self,
        now: int | Sequence[int] | Tensor | None = None,
        *,
        keep: Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Drops slots of all layers in place: those with `expiry <= now`, or those not in `keep`.

        Args:
            now: one time for all rows, or one per row.
            keep: bool `[rows, capacity]`; slots from `lengths` on are ignored.
            rows: which rows `now` or `keep` is for, in that order (default: all). The other rows
                keep all their slots.

        Raises:
            TypeError: keep is not boolean, or now or rows are no integers.
            ValueError: not exactly one of now and keep, another shape, or rows that do not exist or
                are named twice. Nothing is written then.
        """
        named = range(self.batch_size) if rows is None else _integers("rows", rows)
        unknown = [row for row in named if not 0 <= row < self.batch_size]
        if unknown or len(set(named)) < len(named):
            raise ValueError(
                f"rows: expected different ones of 0 to {self.batch_size - 1}, got {list(named)}"
            )
        if (now is None) == (keep is None):
            raise ValueError("keep: expected either now or keep, got both or none")
        index = torch.tensor(list(named), dtype=torch.int64, device=self.device)
        if keep is None:
            times = self._per_row("now", cast(Any, now), len(named)).clamp(max=NEVER - 1)
            alive = self.expiry[index] > times[:, None]
        else:
            if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
                got = getattr(keep, "dtype", type(keep).__name__)
                raise TypeError(f"keep: expected a bool tensor, got {got}")
            if list(keep.shape) != [len(named), self.capacity]:
                expected = [len(named), self.capacity]
                raise ValueError(
                    f"keep: expected {expected} (rows, capacity), got {list(keep.shape)}"
                )
            alive = keep.to(self.device)
        if rows is not None:
            alive = torch.ones_like(self.position_ids, dtype=torch.bool).index_copy(0, index, alive)
        self._step, self._seen = None, None
        if not self.keys:
            return
        delta, next_position = None, self._next_position
        if self.rope is not None:
            delta, next_position = self._closed_gaps(alive)
        positions = self.position_ids if delta is None else self.position_ids + delta
        prune_kv_(
            list(self.keys.values()),
            list(self.values.values()),
            self.lengths,
            alive,
            slots=[positions, self.expiry],
            ordered=self.ordered,
            position_delta=delta,
            rope=self.rope,
        )
        self.position_ids.copy_(positions)
        self._next_position.copy_(next_position)

    def _closed_gaps(self, alive: Tensor) -> tuple[Tensor, Tensor]:
        """By how many the slots in `alive` move to the positions 0, 1, 2, ..., int32
        `[batch, capacity]`, 0 in a row that drops nothing; and each row's next position."""
        held = torch.arange(self.capacity, device=self.device) < self.lengths[:, None]
        kept = alive & held
        order = torch.where(kept, self.position_ids, NEVER).argsort(1).argsort(1)
        moves = kept & (kept != held).any(1, keepdim=True)
        delta = torch.where(moves, order.int() - self.position_ids, 0).contiguous()
        count = kept.sum(1)
        closed = moves.any(1) | (count == 0)
        return delta, torch.where(closed, count, self._next_position)

    def reset(self) -> None:
        """Empties all rows and forgets their positions and peak; the memory stays allocated."""
        self._step, self._expected, self._seen = None, None, 0
        self._committed = False
        for x in (self.lengths, self._next_position, self._peak):
            x.zero_()

    # What transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of older columns that an attention mask must have: the longest row after a
        prune, plus all tokens fed since, including padding."""
        if self._seen is None:
            self._seen = int(self.lengths.max())
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """`update` returns the new tokens only; they come after all those seen."""
        return query_length, self.get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The fixed capacity, or -1."""
        return self.capacity if self.fixed_capacity else -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length`, for older transformers."""
        return self.get_max_length()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values as they are; the patched attention appends them."""
        if self._step is None:
            raise ValueError(
                "past_key_values: a TrajectoryCache needs a patched model; this one is not, "
                "or its layers were called one by one"
            )
        self._step.updated.add(layer_idx)
        return key_states, value_states

    def _unsupported(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "past_key_values: a TrajectoryCache supports greedy and sampled decoding, not beams, "
            "assisted decoding, offloading or repeated rows"
        )

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _unsupported
    activate_past_recording = early_initialization = offload = prefetch = _unsupported

    # What a patched model does with it in a forward pass

    def begin(
        self, shape: Sequence[int], attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        """Prepares a forward pass over `[batch, tokens]`, before its layers run.

        Returns:
            The pass's position_ids, `[batch, tokens]`; 0 for padding.

        Raises:
            TypeError, ValueError: tokens, rows, a mask or position_ids that do not fit (see the
                class). Nothing is written then.
        """
        self._step = None
        if shape[1] == 0:
            raise ValueError(
                "input_ids: expected at least one new token, got none (give generate() the new "
                "tokens only and an attention_mask of cached + new columns)"
            )
        tokens = self._taken(shape, attention_mask, self._expected)
        width, counts = tokens.width, tokens.counts
        taken = torch.full_like(self.lengths, width) if counts is None else counts
        column = torch.arange(width, device=self.device)
        if position_ids is None:
            positions = self._next_position[:, None] + column
        else:
            check_position_ids(position_ids, shape[1], shape[0])
            positions = tokens.by_row(position_ids.to(self.device).expand(*shape), self.batch_size)
            self._check_positions(positions, taken)
        positions = torch.where(column < taken[:, None], positions, 0)  # padding: in every table
        position_ids = tokens.as_pass(positions, shape)
        if self._table is not None:
            self._table.check(shape[1], 0, None, position_ids)
        limit = self._rope_limit
        if limit is not None and (highest := int(position_ids.max())) >= limit:
            raise ValueError(
                f"position_ids: expected less than {limit}, from where this model's RoPE (dynamic "
                f"or longrope) rotates keys differently than the cached ones, got {highest}"
            )
        lengths = self.lengths + taken
        self._make_room(width, lengths)

        # Which of the new tokens goes into each slot, if one does.
        coming = torch.arange(self.capacity, device=self.device) - self.lengths[:, None]
        fresh = (coming >= 0) & (coming < taken[:, None])
        coming = coming.clamp(0, width - 1).long()
        self.position_ids.copy_(torch.where(fresh, positions.gather(1, coming), self.position_ids))
        self.expiry.copy_(torch.where(fresh, tokens.expiry[:, None], self.expiry))
        last = positions.gather(1, (taken[:, None].long() - 1).clamp(min=0))[:, 0]
        next_position = torch.where(taken > 0, last + 1, self._next_position)
        self._step = _Step(tokens, lengths, next_position)
        self._expected = None
        return position_ids

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """Appends the new keys and values of one layer, then computes attention.

        Args:
            query, key, value: `[batch, heads, tokens, head_dim]`, after RoPE.

        Returns:
            `[batch, tokens, heads, head_dim]`, 0 for padding.
        """
        step = cast(_Step, self._step)
        if layer in step.attended:
            raise ValueError(f"model: layer {layer} calls its attention twice; the cache has one")
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        tokens, shape = step.tokens, query.transpose(1, 2).shape[:2]
        query, key, value = (
            tokens.by_row(x.transpose(1, 2), self.batch_size) for x in (query, key, value)
        )
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if layer not in self.keys:
            if self._committed:
                raise ValueError(
                    f"past_key_values: it holds tokens of layers {sorted(self.keys)}, and layer "
                    f"{layer} has none there: it belongs to another model"
                )
            self.keys[layer], self.values[layer] = self._allocate(key), self._allocate(value)
        keys, values = self.keys[layer], self.values[layer]
        append_kv_(key, value, keys, values, self.lengths, counts=tokens.counts)
        out = cached_attention(
            query,
            keys,
            values,
            step.lengths,
            counts=tokens.counts,
            scale=scale,
            softcap=softcap,
            window=window,
            position_ids=self.position_ids if window is not None else None,
        )
        step.attended.add(layer)
        return tokens.as_pass(cast(Tensor, out), shape)

    def commit(self) -> None:
        """Ends a forward pass, after its layers ran: its tokens now belong to their rows."""
        step = cast(_Step, self._step)
        if missing := sorted((step.updated | self.keys.keys()) - step.attended):
            raise ValueError(f"model: the attention of layers {missing} does not reach the cache")
        self._committed = True
        self._seen = self.get_seq_length() + step.tokens.width
        self.lengths.copy_(step.lengths)
        self._next_position.copy_(step.next_position)
        self._peak.copy_(torch.maximum(self._peak, self.lengths.amax()))
        self._step = None

    def _taken(
        self, shape: Sequence[int], attention_mask: Tensor | None, expected: _Expected | None
    ) -> _Tokens:
        """Who takes what of a forward pass over `shape`."""
        rows, tokens = shape
        if expected is not None and attention_mask is not None:
            raise ValueError(
                "attention_mask: expected None after expect(), which says the same; got both"
            )
        if expected is not None and expected.packed:
            return self._packed(shape, expected)
        if rows != self.batch_size:
            raise ValueError(f"input_ids: the cache has {self.batch_size} rows, got {rows}")
        if expected is not None:
            if (most := int(expected.counts.max())) > tokens:
                raise ValueError(f"input_ids: expect() announced {most} tokens, got {tokens}")
            return _Tokens(tokens, expected.counts.to(self.device), expected.expiry)
        never = torch.full_like(self.lengths, NEVER)
        if attention_mask is None:
            return _Tokens(tokens, None, never)
        expected_shape = [self.batch_size, self.get_seq_length() + tokens]
        if list(attention_mask.shape) != expected_shape:
            raise ValueError(
                f"attention_mask: expected {expected_shape} (batch, cached + new tokens), "
                f"got {list(attention_mask.shape)}"
            )
        new = attention_mask[:, -tokens:].to(device=self.device, dtype=torch.bool)
        if tokens > 1 and bool(new.all()):
            return _Tokens(tokens, None, never)
        counts = new.sum(1, dtype=torch.int32)
        if tokens == 1:
            return _Tokens(tokens, counts, never)
        order = (~new).int().argsort(dim=1, stable=True)
        first = torch.arange(rows, device=self.device)[:, None] * tokens
        place = (first + order.argsort(1)).flatten()
        return _Tokens(tokens, counts, never, first + order, place)

    def _packed(self, shape: Sequence[int], expected: _Expected) -> _Tokens:
        """Who takes what of a pass in which the rows' tokens lie behind each other."""
        counts, width = expected.counts, int(expected.counts.max())
        total = int(counts.sum())
        if list(shape) != [1, total]:
            raise ValueError(
                f"input_ids: expected [1, {total}] (1, what expect() announced), got {list(shape)}"
            )
        if total == width * self.batch_size:
            return _Tokens(width, None, expected.expiry)
        ends = counts.cumsum(0)
        column = torch.arange(width)
        source = ((ends - counts)[:, None] + column).clamp(max=total - 1)
        place = (column < counts[:, None]).flatten().nonzero()[:, 0]
        on_device = [x.to(self.device) for x in (counts, source, place)]
        return _Tokens(width, on_device[0], expected.expiry, *on_device[1:])

    def _make_room(self, tokens: int, lengths: Tensor) -> None:
        """Grows the cache unless its rows have room for `lengths`."""
        if self.get_seq_length() + tokens <= self.capacity:
            return
        needed = int(lengths.max())
        if needed <= self.capacity:
            return
        if self.fixed_capacity:
            raise ValueError(f"capacity: {needed} tokens do not fit in {self.capacity} slots")
        capacity = max(needed, 2 * self.capacity)
        with torch.inference_mode(False):
            for store in (self.keys, self.values):
                for layer, old in store.items():
                    store[layer] = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                    store[layer][:, :, : old.shape[2]] = old
            more = capacity - self.capacity
            self.position_ids = nn.functional.pad(self.position_ids, (0, more))
            self.expiry = nn.functional.pad(self.expiry, (0, more), value=NEVER)

    def _allocate(self, like: Tensor) -> Tensor:
        batch, kv_heads, _, head_dim = like.shape
        with torch.inference_mode(False):
            return torch.empty(
                batch, kv_heads, self.capacity, head_dim, dtype=like.dtype, device=like.device
            )

    def _check_positions(self, positions: Tensor, taken: Tensor) -> None:
        """`positions` `[batch, tokens]`, of which each row takes the first ones, must rise."""
        slot = torch.arange(self.capacity, device=self.device)
        held = torch.where(slot < self.lengths[:, None], self.position_ids, -1).amax(
            1, keepdim=True
        )
        before = torch.cat([held.long(), positions[:, :-1]], 1)
        column = torch.arange(positions.shape[1], device=self.device)
        rises = (positions > before) & (positions < NEVER) | (column >= taken[:, None])
        message = "position_ids: expected them to rise behind those that the cache holds"
        if rises.is_cuda:
            torch._assert_async(rises.all(), message)
        elif not bool(rises.all()):
            row, token = (int(i) for i in (~rises).nonzero()[0])
            raise ValueError(
                f"{message} (up to {int(held[row])} in row {row}), got {int(positions[row, token])}"
            )

    def _per_row(
        self,
        name: str,
        value: int | Sequence[int] | Tensor,
        rows: int | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """int32 `[rows]` on the cache's device, from one value for all rows or one per row."""
        rows = self.batch_size if rows is None else rows
        if isinstance(value, (list, tuple)) and any(isinstance(x, bool) for x in value):
            raise TypeError(f"{name}: expected integers, got {value!r}")
        try:
            values = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected integers ({error})") from None
        if values.dtype.is_floating_point or values.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, got {values.dtype}")
        if values.dim() and list(values.shape) != [rows]:
            raise ValueError(f"{name}: expected [{rows}], got {list(values.shape)}")
        return saturated(values).to(device or self.device).expand(rows).contiguous()


def check_position_ids(position_ids: object, tokens: int, batch: int, planes: bool = False) -> None:
    """Raises TypeError or ValueError unless they are integers `[1 or batch, tokens]`, with `planes`
    also several of those (multimodal models count time, height and width)."""
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"position_ids: expected a tensor, got {type(position_ids).__name__}")
    shape = list(position_ids.shape)
    fits = len(shape) == 2 or (planes and len(shape) == 3)
    if not fits or shape[-1] != tokens or shape[-2] not in (1, batch):
        raise ValueError(f"position_ids: expected [{batch}, {tokens}], got {shape}")
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"position_ids: expected integers, got {position_ids.dtype}")


def _at_least_one(name: str, value: object) -> int:
    """`value` as an int."""
    try:
        (number,) = _integers(name, [value])
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    return number


def _integers(name: str, values: Any) -> list[int]:
    """`values` as ints."""
    try:
        numbers = [None if isinstance(x, bool) else operator.index(x) for x in values]
    except TypeError:
        numbers = [None]
    if None in numbers:
        raise TypeError(f"{name}: expected integers, got {values!r}")
    return cast("list[int]", numbers)
