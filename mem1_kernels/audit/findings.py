"""What an audit finds, in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mem1_kernels.audit.batch import Batch, BatchRow
from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.hf import patched
from mem1_kernels.hf.cache import rope_limit
from mem1_kernels.ppo.actor_critic import ActorCritic
from mem1_kernels.trajectory import Layout, pack
from mem1_kernels.tree import pack_tree


@dataclass(frozen=True)
class Gap:
    """Sampled log-probs against those of a forward pass.

    Args:
        tokens: how many are compared.
        mean, largest: of |difference|, in nats.
        outside: share of the importance ratios that lie outside the clip range.
    """

    tokens: int
    mean: float
    largest: float
    outside: float


@dataclass(frozen=True)
class Findings:
    """What an audit found.

    Args:
        rows, tokens, loss_tokens: how many there are.
        leaking_tokens: tokens in the loss whose prediction sees, under a plain causal mask, tokens
            that were gone in the rollout; leaked_pairs: how many such (query, key) pairs.
        moved_tokens: tokens whose position in the rollout was not their index in the row.
        causal: the gap to a plain causal pass over each row. None: no log-probs were recorded.
        exact: the gap to the pass that the evictions and positions describe; None: likewise.
        drifted_rows: rows whose ids change when their text is tokenized again; drift: the first of
            them and its first changed token. None: no tokenizer, or no ids to begin with.
        tree_tokens: tokens left when common prefixes are stored once.
        flops, tree_flops: of a forward and a backward pass over the rows apart, and as a tree.
            None: not known for this model.
    """

    rows: int
    tokens: int
    loss_tokens: int
    leaking_tokens: int
    leaked_pairs: int
    moved_tokens: int
    causal: Gap | None
    exact: Gap | None
    drifted_rows: int | None
    drift: str | None
    tree_tokens: int
    flops: float | None
    tree_flops: float | None


def audit(
    model: Any,
    batch: Batch,
    *,
    tokenizer: Any = None,
    clip: float = 0.2,
    temperature: float = 1.0,
    tokens: int = 16384,
) -> Findings:
    """Compares what a rollout recorded with what a trainer computes.

    Args:
        model: a transformers causal LM, the policy that sampled the batch. Its dropout is set to 0.
        batch: from `read_batch`.
        tokenizer: of the model; for the drift.
        clip: ratios outside 1 - clip to 1 + clip count.
        temperature: that of the recorded log-probs.
        tokens: of one forward pass, at most; a longer row has a pass of its own.

    Raises:
        ValueError: clip, temperature or tokens out of range, an id outside the model's vocabulary,
            positions past those where its RoPE changes, or a model whose logits `mem1_kernels.ppo`
            cannot compute; names it.
    """
    if not 0 < clip < 1:
        raise ValueError(f"clip: expected more than 0 and less than 1, got {clip}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    rows = batch.rows
    _check_ids(model, rows)
    leaks = [_leaks(row) for row in rows]
    moved = [
        0 if x.position_ids is None else int((x.position_ids != torch.arange(len(x.tokens))).sum())
        for x in rows
    ]
    causal = exact = None
    known = [row for row in rows if row.tokens.log_probs is not None and row.tokens.loss_mask.any()]
    if known:
        passes = [_causal(row) for row in known]
        differences = _differences(model, known, passes, temperature, tokens)
        causal = _gap(differences, clip)
        exact = causal
        changed = [row.expiry is not None or row.position_ids is not None for row in known]
        if any(changed):
            again = [row for row, other in zip(known, changed, strict=True) if other]
            passes = [_exact(row) for row in again]
            found = iter(_differences(model, again, passes, temperature, tokens))
            exact = _gap(
                [
                    next(found) if other else old
                    for old, other in zip(differences, changed, strict=True)
                ],
                clip,
            )
    drifted, drift = _drift(rows, tokenizer) if batch.has_ids and tokenizer else (None, None)
    flops, tree_tokens, tree_flops = _work(model, rows)
    return Findings(
        rows=len(rows),
        tokens=sum(len(row.tokens) for row in rows),
        loss_tokens=sum(int(row.tokens.loss_mask.sum()) for row in rows),
        leaking_tokens=sum(leaking for leaking, _ in leaks),
        leaked_pairs=sum(pairs for _, pairs in leaks),
        moved_tokens=sum(moved),
        causal=causal,
        exact=exact,
        drifted_rows=drifted,
        drift=drift,
        tree_tokens=tree_tokens,
        flops=flops,
        tree_flops=tree_flops,
    )


def _check_ids(model: Any, rows: Sequence[BatchRow]) -> None:
    size, limit = model.get_input_embeddings().num_embeddings, rope_limit(model)
    for row in rows:
        if (most := int(row.tokens.token_ids.max())) >= size:
            raise ValueError(f"{row.where}: token_ids: expected ids below {size}, got {most}")
        last = len(row.tokens) - 1 if row.position_ids is None else int(row.position_ids.max())
        if limit is not None and last >= limit:
            raise ValueError(
                f"{row.where}: expected positions below {limit}, where this model's RoPE changes, "
                f"got {last}"
            )


def _leaks(row: BatchRow) -> tuple[int, int]:
    """Tokens in the loss that see what was gone, and the pairs, under a plain causal mask."""
    if row.expiry is None:
        return 0, 0
    count = len(row.tokens)
    ends = torch.bincount(row.expiry.long(), minlength=count + 1)[:count]
    gone = ends.cumsum(0)[row.tokens.loss_mask.nonzero().flatten() - 1]
    return int((gone > 0).sum()), int(gone.sum())


def _causal(row: BatchRow) -> Layout:
    """The row as a trainer runs it that knows no evictions: causal, at positions 0, 1, 2, ..."""
    return pack_tree([row.tokens])


def _exact(row: BatchRow) -> Layout:
    """The row as it was sampled."""
    layout = _causal(row)
    expiry = layout.expiry if row.expiry is None else row.expiry
    positions = layout.position_ids if row.position_ids is None else row.position_ids
    return layout.replaced(expiry=expiry, position_ids=positions)


@torch.no_grad()
def _differences(
    model: Any, rows: Sequence[BatchRow], layouts: Sequence[Layout], temperature: float, most: int
) -> list[Tensor]:
    """Of each row: computed minus sampled log-probs of its tokens in the loss, float64."""
    device, was_training = next(model.parameters()).device, model.training
    found: list[Tensor] = []
    with patched(model):
        scorer = ActorCritic(model, "none", temperature).eval()
        for part in _parts(layouts, most):
            layout = pack(part).to(device)
            computed, _, _ = scorer(layout, BlockPlan.of(layout))
            counts = [int(one.loss_mask.sum()) for one in part]
            for values in computed.double().cpu().split(counts):
                tokens = rows[len(found)].tokens
                assert tokens.log_probs is not None
                found.append(values - tokens.log_probs[tokens.loss_mask].double())
    model.train(was_training)
    return found


def _parts(layouts: Sequence[Layout], most: int) -> Iterator[list[Layout]]:
    """Layouts in order, as many at once as hold at most so many tokens."""
    part: list[Layout] = []
    for layout in layouts:
        if part and sum(x.num_tokens for x in part) + layout.num_tokens > most:
            yield part
            part = []
        part.append(layout)
    yield part


def _gap(differences: Sequence[Tensor], clip: float) -> Gap:
    difference = torch.cat(list(differences))
    ratio = difference.exp()
    inside = (ratio >= 1 - clip) & (ratio <= 1 + clip)  # a NaN is outside
    size = difference.abs()
    return Gap(len(size), float(size.mean()), float(size.max()), float((~inside).double().mean()))


def _drift(rows: Sequence[BatchRow], tokenizer: Any) -> tuple[int, str | None]:
    """How many rows change, and where the first of them does."""
    count, first = 0, None
    for row in rows:
        ids = row.tokens.token_ids.tolist()
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        again = tokenizer.encode(text, add_special_tokens=False)
        if again != ids:
            count += 1
            same = [a == b for a, b in zip(ids, again, strict=False)]
            token = same.index(False) if False in same else len(same)
            first = first or f"{row.where}, token {token}"
    return count, first


def _work(model: Any, rows: Sequence[BatchRow]) -> tuple[float | None, int, float | None]:
    """FLOP of the rows apart, tokens of a tree, and its FLOP.

    Forward and backward: 6 per parameter of a matrix and token, the head only for tokens in the
    loss; 14 x heads x head_dim per visible pair and layer. A row with evictions shares nothing: its
    keys hold what its own tokens saw.
    """
    plain = [row.tokens for row in rows if row.expiry is None and row.position_ids is None]
    own = [row.tokens for row in rows if row.expiry is not None or row.position_ids is not None]
    tree = pack_tree(plain) if plain else None
    alone = sum(map(len, own))
    tree_tokens = alone + (0 if tree is None else tree.num_tokens)
    config = model.config.get_text_config(decoder=True)
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        return None, tree_tokens, None  # experts: which of them a token uses is not in the shapes
    head = model.get_output_embeddings()
    matrices = sum(
        part.weight.numel()
        for part in model.modules()
        if isinstance(part, nn.Linear) and part is not head
    )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    per_pair = 14 * heads * head_dim * config.num_hidden_layers

    def causal(tokens: Sequence[Any]) -> int:
        return sum(len(row) * (len(row) + 1) // 2 for row in tokens)

    in_loss = sum(int(row.loss_mask.sum()) for row in plain)
    rest = 6 * head.weight.numel() * sum(int(row.loss_mask.sum()) for row in own)
    rest += 6 * matrices * alone + per_pair * causal(own)
    flops = rest + 6 * matrices * sum(map(len, plain)) + per_pair * causal(plain)
    flops += 6 * head.weight.numel() * in_loss
    tree_flops = rest
    if tree is not None:
        tree_flops += 6 * matrices * tree.num_tokens + per_pair * tree.visible_pairs
        tree_flops += 6 * head.weight.numel() * int(tree.loss_mask.sum())
    return float(flops), tree_tokens, float(tree_flops)
