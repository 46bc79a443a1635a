"""Your own KV cache: the policy that masks training prunes the cache, and the rows are the same.

python examples/kv_cache.py
"""

import torch
from torch import Tensor

from mem1_kernels import (
    BlockPlan,
    Segment,
    Trajectory,
    append_kv_,
    cached_attention,
    keep_last,
    prune_kv_,
    trajectory_attention,
)

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 32, 3


def main() -> float:
    torch.manual_seed(0)
    segments = [Segment("prompt", 30)]
    for turn in range(1, 7):
        segments += [Segment("state", 8, turn), Segment("action", 4, turn)]
        segments += [Segment("info", 50, turn)]
    trajectory = Trajectory(segments, keep_last(2))
    tokens = trajectory.num_tokens

    # What each layer would compute; here they are independent of one another.
    queries = [torch.randn(1, tokens, HEADS, HEAD_DIM) for _ in range(LAYERS)]
    pairs = [torch.randn(2, 1, tokens, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)]

    # Training: one masked pass over the whole trajectory.
    plan = BlockPlan.of(trajectory)
    trained = [trajectory_attention(q, *kv, plan=plan) for q, kv in zip(queries, pairs)]

    # Rollout: a cache that never holds more than the trajectory's peak.
    slots = trajectory.peak_context
    keys = [torch.empty(1, KV_HEADS, slots, HEAD_DIM) for _ in range(LAYERS)]
    values = [torch.empty_like(key) for key in keys]
    expiry = torch.zeros(1, slots, dtype=torch.int32)  # of the token in each slot
    lengths = torch.zeros(1, dtype=torch.int32)  # slots in use
    rolled: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    now = 0
    for segment in segments:
        new = slice(now, now + segment.num_tokens)
        # Drop what has expired: in place, all layers at once, survivors fill the holes.
        prune_kv_(keys, values, lengths, keep=expiry > now, slots=[expiry])
        expiry[0, lengths[0] : lengths[0] + segment.num_tokens] = trajectory.expiry[new]
        for layer in range(LAYERS):
            key, value = (x[:, new].transpose(1, 2) for x in pairs[layer])
            append_kv_(key, value, keys[layer], values[layer], lengths)
            query = queries[layer][:, new]
            row = cached_attention(query, keys[layer], values[layer], lengths + segment.num_tokens)
            rolled[layer].append(row)
        lengths += segment.num_tokens
        now = new.stop
    gap = max(
        float((torch.cat(rows, 1) - whole).abs().max()) for rows, whole in zip(rolled, trained)
    )
    print(f"{tokens} tokens through a cache of {slots} slots; largest difference {gap:.1e}")
    return gap


if __name__ == "__main__":
    main()
