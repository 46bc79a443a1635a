"""The oracle: every op in plain torch, written to be read. Runs in fp64 on the CPU.

Dense, so memory grows with tokens squared. The kernels never import this file, nor this file them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mem1_kernels.mask import visible


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled scores `[batch, heads, queries, keys]` before cap and mask."""
    group = query.shape[2] // key.shape[2]
    return torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(group, 2)) * scale


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _cap_slope(scores: Tensor, softcap: float) -> Tensor:
    """The derivative of `_capped`: 1 / cosh(x)^2, which 1 - tanh(x)^2 loses to cancellation.

    It is 0 from where tanh(x) is rounded to 1.
    """
    x = scores / softcap
    decay = torch.exp(-2 * x.abs())
    return (4 * decay / (1 + decay) ** 2).masked_fill(torch.tanh(x).abs() == 1, 0)


def _clean(x: Tensor, dead: Tensor) -> Tensor:
    """`x` `[batch, tokens, heads, head_dim]`, the rows of dead tokens `[P, tokens]` set to 0."""
    return x.masked_fill(dead[:, :, None, None], 0)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Output and LSE under `mask` `[P, 1, queries, keys]`, in the dtype of the inputs."""
    scores = _capped(_scores(query, key, scale), softcap).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(3)
    probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    value = value.repeat_interleave(query.shape[2] // value.shape[2], 2)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, value), lse


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    floor: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Masked attention: output `[batch, tokens, heads, head_dim]`, LSE `[batch, heads, tokens]`.

    expiry, floor: `[P, tokens]`, P in {1, batch}. A row that sees nothing: output 0, LSE -inf.
    """
    compute = _compute_dtype(query.dtype)
    mask = visible(expiry, floor)[:, None]
    never_seen = ~mask.any(2)[:, 0]
    q = _clean(query.to(compute), ~mask.any(3)[:, 0])
    k, v = (_clean(x.to(compute), never_seen) for x in (key, value))
    out, lse = _attend(q, k, v, mask, scale, softcap)
    return out.to(query.dtype).contiguous(), lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    expiry: Tensor,
    floor: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for query, key, value in closed form.

    With P the probabilities, D = rowsum(out * grad_out) and g the gradient of the LSE:
    dV = P^T dO, dS = P * (dO V^T - D + g), dQ = scale * dS K, dK = scale * dS^T Q
    (FlashAttention-2, arXiv 2307.08691, section 3.1.2; g enters with d lse / d S = P).
    """
    compute = _compute_dtype(query.dtype)
    kv_heads = key.shape[2]
    group = query.shape[2] // kv_heads
    mask = visible(expiry, floor)[:, None]
    blind, never_seen = ~mask.any(3)[:, 0], ~mask.any(2)[:, 0]
    q, d_out, o = (_clean(x.to(compute), blind) for x in (query, grad_out, out))
    k, v = (_clean(x.to(compute), never_seen) for x in (key, value))
    raw = _scores(q, k, scale)
    scores = _capped(raw, softcap)
    log_z = lse.to(compute).masked_fill(blind[:, None], 0)[..., None]
    p = torch.exp(scores.masked_fill(~mask, -torch.inf) - log_z)
    d_p = torch.einsum("bqhd,bkhd->bhqk", d_out, v.repeat_interleave(group, 2))
    delta = (o * d_out).sum(3).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse.to(compute).masked_fill(blind[:, None], 0)
    d_scores = p * (d_p - delta[..., None])
    if softcap:
        d_scores = d_scores * _cap_slope(raw, softcap)
    d_q = scale * torch.einsum("bhqk,bkhd->bqhd", d_scores, k.repeat_interleave(group, 2))
    d_k = scale * torch.einsum("bhqk,bqhd->bkhd", d_scores, q)
    d_v = torch.einsum("bhqk,bqhd->bkhd", p, d_out)
    d_k, d_v = (g.unflatten(2, (kv_heads, group)).sum(3) for g in (d_k, d_v))
    return (
        d_q.to(query.dtype).contiguous(),
        d_k.to(key.dtype).contiguous(),
        d_v.to(value.dtype).contiguous(),
    )


def _check_range(name: str, x: Tensor, low: int | Tensor, high: int | Tensor, meaning: str) -> None:
    """Raises ValueError unless low <= x <= high in every batch row."""
    wrong = (x < low) | (x > high)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        least, most = (int(y[row]) if isinstance(y, Tensor) else y for y in (low, high))
        raise ValueError(
            f"{name}: expected {least} to {most} ({meaning}) in row {row}, got {int(x[row])}"
        )


def append_kv_(
    keys: Tensor,
    values: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
) -> None:
    """Token `t < counts[b]` of row `b` goes to slot `lengths[b] + t` of the caches, in place."""
    new_tokens, capacity = keys.shape[2], key_cache.shape[2]
    if counts is None:
        counts = torch.full_like(lengths, new_tokens)
    _check_range("counts", counts, 0, new_tokens, "the new tokens")
    _check_range("lengths", lengths, 0, capacity - counts, "what the capacity leaves room for")
    for row, (start, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        key_cache[row, :, start : start + count] = keys[row, :, :count]
        value_cache[row, :, start : start + count] = values[row, :, :count]


def cached_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    position_ids: Tensor | None,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over ragged caches: output and LSE as `attention_forward`.

    Query `i < counts[b]` stands in slot `lengths[b] - counts[b] + i` and sees the slots up to its
    own; with position_ids only those with `position of its slot - position_ids[slot] < window`.
    """
    batch, new_tokens = query.shape[:2]
    capacity = key_cache.shape[2]
    _check_range("lengths", lengths, 0, capacity, "the capacity")
    if counts is None:
        counts = new_tokens * (lengths > 0)
    _check_range("counts", counts, 0, new_tokens, "the new tokens")
    _check_range("lengths", lengths, counts, capacity, "the new tokens and the capacity")

    compute = _compute_dtype(query.dtype)
    token = torch.arange(new_tokens, device=query.device)
    slot = torch.arange(capacity, device=query.device)
    blind = token >= counts[:, None]
    own = ((lengths - counts)[:, None] + token).clamp(max=max(capacity - 1, 0))
    mask = (slot <= own[:, :, None]) & ~blind[:, :, None]
    if position_ids is not None:
        position_ids = position_ids.long()
        least = torch.iinfo(torch.int64).min  # a difference below it is below all positions
        nearest = position_ids.gather(1, own.long()).clamp(min=least + window - 1) - (window - 1)
        mask &= position_ids[:, None] >= nearest[:, :, None]
    dead = slot >= lengths[:, None]
    q = _clean(query.to(compute), blind)
    k, v = (_clean(x.transpose(1, 2).to(compute), dead) for x in (key_cache, value_cache))
    out, lse = _attend(q, k, v, mask[:, None], scale, softcap)
    return out.to(query.dtype).contiguous(), lse


_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_bytes(x: Tensor) -> Tensor:
    """`x` as integers of the same size, which every dtype can be copied as."""
    return x.view(_SAME_SIZE[x.element_size()])


def turned(key: Tensor, delta: Tensor, steps: Tensor, interleaved: bool) -> Tensor:
    """Keys `[heads, tokens, rotary_dim]` rotated on by `delta` `[tokens]` positions, in fp64.

    steps: int64 `[rotary_dim / 2]`, in units of 2^-64 turns per position. (RoPE, arXiv 2104.09864.)
    """
    turns = steps.double() / 2.0**64 * delta.double()[:, None]
    angle = 2 * torch.pi * (turns - turns.round())
    cos, sin = angle.cos(), angle.sin()
    key = key.double()
    if interleaved:
        x, y = key[..., 0::2], key[..., 1::2]
        return torch.stack((x * cos - y * sin, x * sin + y * cos), -1).flatten(-2)
    x, y = key.chunk(2, -1)
    return torch.cat((x * cos - y * sin, x * sin + y * cos), -1)


def prune_kv_(
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
    keep: Tensor,
    slots: list[Tensor],
    ordered: bool,
    position_delta: Tensor | None,
    rope_steps: list[Tensor],
    interleaved: bool,
) -> None:
    """Slot `i < n` of each row takes what slot `source[i]` held; n survivors, tails untouched.

    Hole filling: the r-th survivor in a slot >= n fills the r-th hole. Ordered: ascending.
    """
    _check_range("lengths", lengths, 0, keep.shape[1], "the capacity")
    for row, length in enumerate(lengths.tolist()):
        survivors = keep[row, :length].nonzero()[:, 0]
        n = len(survivors)
        source = survivors
        if not ordered:
            source = torch.arange(n, device=keep.device)
            source[~keep[row, :n]] = survivors[survivors >= n]
        for x in (*slots, *values, *keys):
            rows = _as_bytes(x)[row]
            if x.dim() == 2:
                rows[:n] = rows[source]
            else:
                rows[:, :n] = rows[:, source]
        lengths[row] = n
        if position_delta is None:
            continue
        delta = position_delta[row, source]
        turns = delta != 0
        for layer, key in enumerate(keys):
            steps = rope_steps[layer if len(rope_steps) > 1 else 0]
            moving = key[row, :, :n, : 2 * len(steps)]
            moving[:, turns] = turned(moving[:, turns], delta[turns], steps, interleaved).to(
                key.dtype
            )


def _check_table(
    block_table: Tensor, lengths: Tensor, page_size: int, pages: int, page_refs: Tensor | None
) -> None:
    """Raises ValueError unless pages in use exist, count their users, and are shared or unique."""
    seen: set[int] = set()
    for row, length in enumerate(lengths.tolist()):
        for page in block_table[row, : -(-length // page_size)].tolist():
            if not 0 <= page < pages:
                raise ValueError(
                    f"block_table: expected pages 0 to {pages - 1} in row {row}, got {page}"
                )
            refs = 1 if page_refs is None else int(page_refs[page])
            if refs < 1:
                raise ValueError(
                    f"page_refs: expected at least 1 for page {page}, which row {row} uses, "
                    f"got {refs}"
                )
            if refs == 1 and page in seen:
                raise ValueError(
                    f"block_table: expected page {page} once, since nothing says that it is "
                    f"shared, got it again in row {row}"
                )
            seen.add(page)


def prune_paged_kv_(
    keys: list[Tensor],
    values: list[Tensor],
    block_table: Tensor,
    lengths: Tensor,
    keep: Tensor,
    page_refs: Tensor | None,
    slots: list[Tensor],
    freed: Tensor,
    freed_counts: Tensor,
) -> None:
    """Whole pages stay, the survivors of the others are hole-filled into as few as hold them.

    keys, values: `[pages, page_size, kv_heads, head_dim]`; slots: `[pages, page_size]`.
    """
    page_size = keys[0].shape[1]
    capacity = min(keep.shape[1], block_table.shape[1] * page_size)
    _check_range("lengths", lengths, 0, capacity, "the capacity")
    _check_table(block_table, lengths, page_size, len(keys[0]), page_refs)
    freed.fill_(-1)
    freed_counts.zero_()
    for row, length in enumerate(lengths.tolist()):
        alive = keep[row, :length].tolist()
        if all(alive):
            continue
        # Page id and which of its tokens survive, by what may be done with the page.
        whole: list[tuple[int, list[bool]]] = []
        partial, dead, shared = whole[:], whole[:], whole[:]
        for first in range(0, length, page_size):
            page, mine = int(block_table[row, first // page_size]), alive[first : first + page_size]
            tokens = mine + [False] * (page_size - len(mine))
            if all(tokens):
                whole.append((page, tokens))
            elif page_refs is not None and page_refs[page] > 1:
                shared.append((page, tokens))
            else:
                (partial if any(tokens) else dead).append((page, tokens))
        packing = partial + dead + shared
        packed = sum(sum(tokens) for _, tokens in packing)
        receivers = -(-packed // page_size)
        if receivers > len(partial) + len(dead):
            freed_counts[row] = -1
            continue
        places = [(page, i, kept) for page, tokens in packing for i, kept in enumerate(tokens)]
        holes = [(page, i) for page, i, kept in places[:packed] if not kept]
        sources = [(page, i) for page, i, kept in places[packed:] if kept]
        for x in map(_as_bytes, (*keys, *values, *slots)):
            for (page, i), (from_page, from_i) in zip(holes, sources, strict=True):
                x[page, i] = x[from_page, from_i]
        table = [page for page, _ in whole + packing]
        used = len(whole) + receivers
        block_table[row, : len(table)] = block_table.new_tensor(table)
        freed[row, : len(table) - used] = block_table.new_tensor(table[used:])
        freed_counts[row] = len(table) - used
        lengths[row] = len(whole) * page_size + packed


def move_slots_(
    pages: list[Tensor], sources: Tensor, destinations: Tensor, offsets: Tensor | None
) -> None:
    """Slot `sources[i]` of every layer goes to `destinations[i]`, byte for byte.

    pages: `[pages, heads, page_size, row]`. offsets: `[page_size, row]`, where a slot's elements
    lie among those of its page and head; None: in their order.
    """
    for x in map(_as_bytes, pages):
        page_size, row = x.shape[2], x.shape[3]
        if offsets is None:
            for source, to in zip(sources.tolist(), destinations.tolist(), strict=True):
                x[to // page_size, :, to % page_size] = x[
                    source // page_size, :, source % page_size
                ]
            continue
        flat = x.view(x.shape[0], x.shape[1], page_size * row)
        for source, to in zip(sources.tolist(), destinations.tolist(), strict=True):
            moved = flat[source // page_size][:, offsets[source % page_size].long()]
            flat[to // page_size][:, offsets[to % page_size].long()] = moved
