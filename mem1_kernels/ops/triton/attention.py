"""Launchers of the trajectory attention kernels: what `mem1::trajectory_attention_*` is on CUDA.

They take what the operators take, allocate, choose a configuration and launch. Nothing is read
back from the device.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from mem1_kernels.block_plan import BLOCK as TILE
from mem1_kernels.block_plan import MIN_CHUNK
from mem1_kernels.ops.triton import attention_configs as configs
from mem1_kernels.ops.triton import attention_kernels as kernels

# For every launch: the kernels count on y * post - m being one instruction.
FUSED = {"enable_fp_fusion": True}


@functools.cache
def _generation(device: torch.device) -> int:
    """Compute capability, major; under the interpreter, on the CPU, the H100's."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def _config(pass_name: str, query: Tensor) -> configs.Config:
    return configs.select(
        pass_name, _generation(query.device), query.shape[3], query.element_size()
    )


def _blocks(config: configs.Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PART": config.part}


def _options(config: configs.Config) -> dict[str, Any]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, **FUSED}


def _shape(head_dim: int, chunks: tuple[int, int]) -> dict[str, Any]:
    return {"TILE": TILE, "HEAD_DIM": head_dim, "D0": chunks[0], "D1": chunks[1]}


def _in_reach(x: Tensor) -> Tensor:
    """x [batch, tokens, heads, head_dim], or a copy where 32-bit offsets are too short for it.

    Inside a tile of 128 rows, and from head to head, the kernels add unsigned 32-bit offsets.
    """
    _, token_stride, head_stride, last = x.stride()
    widest = max(TILE * token_stride + x.shape[3], head_stride)
    return x if last == 1 and widest < 2**32 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Those of batch, tokens and heads; 0 for a dimension of size 1, whose stride says nothing."""
    dims = range(3)
    return [x.stride(dim) if x.shape[dim] > 1 else 0 for x in tensors for dim in dims]


def _alignment(strides: list[int]) -> int:
    """The largest power of two up to 16 that divides them all."""
    return math.gcd(16, *strides)


def _grid(lanes: int, blocks: int) -> tuple[int, int]:
    """Lanes (batch and head) by blocks of tokens.

    Raises:
        ValueError: more blocks than the second dimension of a grid has.
    """
    if blocks > 65535:
        raise ValueError(f"tokens: expected at most 65,535 blocks of a GPU kernel, got {blocks}")
    return lanes, blocks


def _flags(
    query: Tensor, key: Tensor, floor: Tensor | None, softcap: float, align: int
) -> dict[str, Any]:
    return {
        "GROUP": query.shape[2] // key.shape[2],
        "ALIGN": align,
        "HAS_FLOOR": floor is not None,
        "HAS_SOFTCAP": softcap != 0.0,
    }


def _score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """(pre, post) with score in log2 units = post * (q.k, or tanh(pre * q.k) under a softcap)."""
    if softcap:
        return scale / softcap, softcap * math.log2(math.e)
    assert scale > 0, f"scale: expected a number > 0, got {scale}"
    return 1.0, scale * math.log2(math.e)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    expiry: Tensor,
    floor: Tensor | None,
    rows: list[Tensor],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`mem1::trajectory_attention_fwd`: output (contiguous, query's dtype) and LSE (fp32)."""
    batch, tokens, heads, head_dim = query.shape
    out = query.new_empty(batch, tokens, heads, head_dim)
    lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    query, key, value = (_in_reach(x) for x in (query, key, value))
    strides = _strides(query, key, value)
    config = _config("fwd", query)
    grid = _grid(batch * heads, -(-tokens // TILE) * (TILE // config.block_m))
    kernels._fwd_kernel[grid](
        query,
        key,
        value,
        out,
        lse,
        expiry,
        floor,
        *rows,
        *strides,
        heads,
        tokens,
        int(expiry.shape[0] > 1),
        *_score_factors(scale, softcap),
        **_flags(query, key, floor, softcap, _alignment(strides)),
        **_shape(head_dim, configs.head_chunks(head_dim)),
        **_blocks(config),
        PIPELINED=config.pipelined,
        **_options(config),
    )
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    expiry: Tensor,
    floor: Tensor | None,
    rows: list[Tensor],
    columns: list[Tensor],
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mem1::trajectory_attention_bwd`: gradients of query, key, value (contiguous, their dtype).

    Each is written once, or summed in a fixed order: two runs agree bit for bit. Besides the
    gradients this takes 8 bytes per query and head, and above 1,024 tokens 8 bytes per key, kv head
    and dimension for the pieces of split columns (whose number only the device knows).
    """
    batch, tokens, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    n = -(-tokens // TILE)
    query, key, value, grad_out = (_in_reach(x) for x in (query, key, value, grad_out))
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    _, col_offsets, col_partial, col_tiles, *items, col_first_slot, col_slots = columns
    grad_query = query.new_empty(batch, tokens, heads, head_dim)
    grad_key, grad_value = (key.new_empty(batch, tokens, kv_heads, head_dim) for _ in range(2))
    lse2, delta = (lse.new_empty(batch, heads, n * TILE) for _ in range(2))
    slots = n if n > MIN_CHUNK else 0
    work = [lse.new_empty(batch, kv_heads, slots, TILE, head_dim) for _ in range(2)]
    plan_step = int(expiry.shape[0] > 1)
    pre, post = _score_factors(scale, softcap)
    shape = _shape(head_dim, configs.head_chunks(head_dim))
    inputs = (query, key, value, grad_out)
    strides = _strides(*inputs)
    align = _alignment(strides)
    flags = _flags(query, key, floor, softcap, align)

    def preprocess() -> None:
        """The LSE to base 2, and delta, for both passes."""
        config = _config("preprocess", query)
        kernels._bwd_preprocess_kernel[_grid(batch * heads, n * (TILE // config.block_m))](
            out,
            grad_out,
            lse,
            grad_lse,
            lse2,
            delta,
            *strides[9:],
            heads,
            tokens,
            HAS_GRAD_LSE=grad_lse is not None,
            ALIGN=align,
            **shape,
            BLOCK_M=config.block_m,
            **_options(config),
        )

    def keys_and_values() -> None:
        """dK and dV, or the pieces of those whose column is split."""
        config = _config("dkdv", query)
        chunks, accumulated = configs.dkdv_chunks(head_dim)
        for chunk in accumulated:
            kernels._bwd_dkdv_kernel[_grid(batch * kv_heads, 2 * n * (TILE // config.block_n))](
                *inputs,
                lse2,
                delta,
                grad_key,
                grad_value,
                *work,
                expiry,
                floor,
                col_offsets,
                col_partial,
                col_tiles,
                *items,
                *strides,
                heads,
                tokens,
                plan_step,
                pre,
                post,
                scale,
                **flags,
                **_shape(head_dim, chunks),
                CHUNK=chunk,
                **_blocks(config),
                **_options(config),
            )

    def split_columns() -> None:
        """The sums of the pieces, in a fixed order."""
        config = _config("sum", query)
        kernels._bwd_sum_kernel[_grid(batch * kv_heads, n * (TILE // config.block_n))](
            *work,
            grad_key,
            grad_value,
            col_first_slot,
            col_slots,
            kv_heads,
            tokens,
            plan_step,
            **shape,
            BLOCK_N=config.block_n,
            **_options(config),
        )

    def queries() -> None:
        """dQ."""
        config = _config("dq", query)
        kernels._bwd_dq_kernel[_grid(batch * heads, n * (TILE // config.block_m))](
            *inputs,
            lse2,
            delta,
            grad_query,
            expiry,
            floor,
            *rows,
            *strides,
            heads,
            tokens,
            plan_step,
            pre,
            post,
            scale,
            **flags,
            **shape,
            **_blocks(config),
            **_options(config),
        )

    preprocess()
    keys_and_values()
    if slots:
        split_columns()
    queries()
    return grad_query, grad_key, grad_value
