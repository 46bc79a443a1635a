"""What the keys of the result files are called wherever people read them."""

from __future__ import annotations

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

LAYOUTS = {
    "qa": "MEM1-QA: turns of 556",
    "turns500": "turns of 500",
    "turns1000": "turns of 1,000",
    "turns2000": "turns of 2,000",
    "documents": "packed documents",
    "tree": "8 branches behind one prompt",
    "causal": "causal",
}
LAYOUT_MEANING = {
    "qa": "a prompt of 300 tokens, then turns of 556 (state 40, action 16, observation 500): the "
    "shape of the released MEM1 question answering; two turns are visible at a time",
    "turns500": "a prompt of 500 tokens, then turns of 500 (state 100, action 20, observation 380)",
    "turns1000": "a prompt of 1,000 tokens, then turns of 1,000 (state 200, action 50, "
    "observation 750)",
    "turns2000": "a prompt of 2,000 tokens, then turns of 2,000 (state 300, action 100, "
    "observation 1,600)",
    "documents": "causal documents of 512 to 4,096 tokens behind each other",
    "tree": "a GRPO group: a prompt of a quarter of the tokens, then 8 branches that see it but "
    "not each other",
    "causal": "every token sees all before it; nothing expires",
}
PASSES = {
    "plan": "plan (once per batch)",
    "forward": "forward",
    "backward": "backward",
    "all": "plan, forward and backward",
}
IMPLEMENTATIONS = {
    "ours": "ours",
    "sdpa_dense": "SDPA, dense mask",
    "sdpa_causal": "SDPA, causal",
    "cudnn_causal": "cuDNN, causal",
    "flex": "FlexAttention",
    "flash_attn_causal": "FlashAttention-2, causal",
    "fa4_causal": "FlashAttention-4, causal",
}
MODELS = {
    "qwen2.5-7b": "28 layers, 4 key-value heads (28 query heads), head_dim 128",
    "qwen2.5-14b": "48 layers, 8 key-value heads (40 query heads), head_dim 128",
}
PLAN_WAYS = {
    "torch": "plain torch, tiles x tiles",
    "flex": "FlexAttention, create_block_mask",
}
PRUNE_LAYOUTS = {
    "mem1": "state boundary: 556 dropped, 56 move",
    "all move": "as many dropped as survive",
}
PRUNE_WAYS = {
    "prune": "ours: prune_kv_, in place",
    "ordered": "ours, ordered=True",
    "rotated": "ours, with rotation of keys",
    "triton": "ours, by Triton",
    "index_select": "index_select",
    "gather": "gather",
    "cat": "cat of slices",
    "copy": "plain copy of the moved bytes",
}
PAGED_WAYS = {
    "paged": "ours: prune_paged_kv_",
    "dense_moves": "plain copy of what a dense prune moves",
}
ATTEND_WAYS = {
    "attend": "ours: cached_attention",
    "sdpa": "SDPA, padded to the longest row",
    "rows": "SDPA, one call per row",
    "flex": "FlexAttention",
    "flash": "flash-attn, kvcache",
    "flashinfer": "FlashInfer, paged decode",
}
ROLLOUT_WAYS = {
    "pruned": "ours: pruned cache",
    "reprefill": "live text sent again",
    "full": "full context, our kernels",
    "hf full": "full context, transformers",
}
TREES = {
    "group8_1k": "8 answers behind 1,000 tokens",
    "group8_4k": "8 answers behind 4,000 tokens",
    "group16_1k": "16 answers behind 1,000 tokens",
    "group16_8k": "16 answers behind 8,000 tokens",
    "tau": "20 turns and 8 retries",
    "mem1_16": "MEM1, 16 turns, text sent again",
    "mem1_100": "MEM1, 100 turns, text sent again",
    "small": "a small one, for tests",
}
TREE_WAYS = {
    "ours": "ours: one tree",
    "packed": "ours, nothing shared",
    "apart": "SDPA, row by row",
    "dense": "SDPA, dense mask of the tree",
    "flex": "FlexAttention, the tree",
}
TREE_PASSES = {"forward": "log-probs", "step": "log-probs and gradients"}
MASKS = {
    "exact": "exact",
    "release": "the released trainer's, as meant",
    "as released": "the released trainer's, as applied",
}
WARM_STARTS = {
    "exact": "exact warm start, PPO under the mask",
    "own": "warm start too under the mask",
}
TRITON_PASSES = {"fwd": "forward", "dkdv": "dK, dV", "dq": "dQ"}
