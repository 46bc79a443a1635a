"""Tests of the loaded kernel. LOCAL_KERNELS="mem1/mem1-kernels=<folder>" makes them use a build."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import kernels
import pytest
import torch
import torch.nn.functional as F

mem1_kernels = kernels.get_kernel("mem1/mem1-kernels", version=0)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trajectory():
    segments = [mem1_kernels.Segment("prompt", 40)]
    for turn in (1, 2, 3):
        for role, tokens in (("state", 20), ("action", 10), ("info", 70)):
            segments.append(mem1_kernels.Segment(role, tokens, turn))
    return mem1_kernels.Trajectory(segments).to(DEVICE)


def heads(count: int, tokens: int) -> torch.Tensor:
    return torch.randn(1, tokens, count, 32, device=DEVICE, requires_grad=True)


def dense(query, key, value, mask):
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask, enable_gqa=True
    )
    return out.transpose(1, 2)


def written_out(query, key, value, mask):
    """Attention through the weights exp(score - lse), as kernels compute it, in plain torch."""
    group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(group, 2) for x in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[3] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.exp(scores - scores.logsumexp(3, keepdim=True))
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.kernels_ci
def test_attention_is_that_under_the_dense_mask():
    layout = trajectory()
    inputs = [heads(count, layout.num_tokens) for count in (4, 2, 2)]
    grad_out = torch.randn_like(inputs[0])
    plan = mem1_kernels.BlockPlan.of(layout)
    mask = mem1_kernels.visible(layout.expiry, layout.floor)

    def results(attention, dtype, **options):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = attention(*leaves, **options)
        return [out, *torch.autograd.grad(out, leaves, grad_out.to(dtype))]

    got = results(mem1_kernels.trajectory_attention, torch.float32, plan=plan)
    plain = results(written_out, torch.float32, mask=mask)
    exact = results(written_out, torch.float64, mask=mask)
    # No more than twice the error of plain torch and one rounding of the largest value: how near
    # two fp32 computations are to each other depends on the machine.
    for name, ours, theirs, truth in zip("oqkv", got, plain, exact, strict=True):
        error, allowed = ((x - truth).abs().max() for x in (ours, theirs))
        allowed = 2 * allowed + torch.finfo(ours.dtype).eps * truth.abs().max()
        assert error <= allowed, f"{name}: error {error:.3e} > allowed {allowed:.3e}"


@pytest.mark.kernels_ci
def test_cache_prunes_appends_and_attends():
    keys, values = (torch.randn(2, 2, 64, 32, device=DEVICE) for _ in range(2))
    keep = torch.rand(2, 64, device=DEVICE) < 0.5
    lengths = torch.tensor([50, 30], dtype=torch.int32, device=DEVICE)
    alive = [keep[row, : lengths[row]].nonzero()[:, 0] for row in range(2)]
    expected = [keys[row][:, alive[row]] for row in range(2)]
    mem1_kernels.prune_kv_([keys], [values], lengths, keep, ordered=True)
    for row in range(2):
        torch.testing.assert_close(keys[row, :, : lengths[row]], expected[row], rtol=0, atol=0)
    new = torch.randn(2, 2, 1, 32, device=DEVICE)
    mem1_kernels.append_kv_(new, new, keys, values, lengths)
    lengths += 1
    query = torch.randn(2, 1, 4, 32, device=DEVICE)
    out = mem1_kernels.cached_attention(query, keys, values, lengths)
    for row in range(2):
        seen = slice(0, int(lengths[row]))
        expected_row = dense(
            query[row : row + 1],
            keys[row : row + 1, :, seen].transpose(1, 2),
            values[row : row + 1, :, seen].transpose(1, 2),
            None,
        )
        torch.testing.assert_close(out[row : row + 1], expected_row)


@pytest.mark.kernels_ci
def test_transformers_attention_without_a_plan_warns_that_it_is_causal():
    layout = trajectory()
    query, key, value = (heads(4, layout.num_tokens).transpose(1, 2) for _ in range(3))
    layer, plan = SimpleNamespace(is_causal=True), mem1_kernels.BlockPlan.of(layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned, weights = mem1_kernels.flash_attn_forward(
            layer, query, key, value, None, plan=plan
        )
    assert weights is None
    mask = mem1_kernels.visible(layout.expiry, layout.floor)
    inputs = [x.transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(planned, dense(*inputs, mask))
    with pytest.warns(UserWarning, match="no plan, so attention is merely causal"):
        causal, _ = mem1_kernels.flash_attn_forward(layer, query, key, value, None)
    torch.testing.assert_close(causal, dense(*inputs, torch.ones_like(mask).tril()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: expected None, got \[1, 3\]"),
        ({"dropout": 0.1}, "attention_dropout: expected 0"),
        ({"sliding_window": 8}, "sliding_window: SimpleNamespace has 8; expected none"),
        ({"key": torch.zeros(1, 2, 5, 32)}, "past_key_values: expected none, got 2 cached tokens"),
        ({"module": SimpleNamespace(is_causal=False)}, "is not causal"),
    ],
)
def test_transformers_attention_raises_on_what_it_cannot_honour(changes, message):
    x = torch.zeros(1, 2, 3, 32)
    arguments = {"module": SimpleNamespace(), "query": x, "key": x, "value": x}
    with pytest.raises(ValueError, match=message):
        mem1_kernels.flash_attn_forward(**{**arguments, "attention_mask": None, **changes})
