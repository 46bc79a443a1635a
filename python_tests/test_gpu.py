"""What only a GPU can show: the Triton kernels compiled, the plan without a sync, HF models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_exactness import largest_difference, make_model
from test_exactness import run as roll_out

from mem1_kernels import BlockPlan, fold, mem1, trajectory_attention, visible
from mem1_kernels.hf import patched
from mem1_kernels.ppo.config import read_config
from mem1_kernels.ppo.trainer import train
from mem1_kernels.testing import assert_within_budget, plain_attention, random_expiry, turns

pytestmark = pytest.mark.gpu
RESULTS = ("out", "lse", "grad_query", "grad_key", "grad_value")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def make_inputs(batch, tokens, heads, kv_heads, head_dim, dtype):
    def normal(count):
        return torch.randn(batch, tokens, count, head_dim, device="cuda").to(dtype)

    grad_lse = torch.randn(batch, heads, tokens, device="cuda")
    return normal(heads), normal(kv_heads), normal(kv_heads), normal(heads), grad_lse


def run(inputs, plan, **options):
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, lse = trajectory_attention(*leaves, plan=plan, return_lse=True, **options)
    gradients = torch.autograd.grad([out, lse], leaves, list(inputs[3:]))
    return out.detach(), lse.detach(), *gradients


def check(inputs, expiry, floor=None, softcap=None):
    results = run(inputs, BlockPlan.from_expiry(expiry, floor), softcap=softcap)
    arguments = (*inputs[:3], expiry, floor, *inputs[3:])
    plain = plain_attention(*arguments, softcap=softcap)
    exact = plain_attention(*arguments, softcap=softcap, dtype=torch.float64)
    for name, got in zip(RESULTS, results, strict=True):
        assert_within_budget(name, got, getattr(plain, name), getattr(exact, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 192, 256])
def test_head_dims(dtype, head_dim):
    expiry = turns(150, 4, 30, 10, 120).expiry.cuda()
    check(make_inputs(2, len(expiry), 4, 2, head_dim, dtype), expiry)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 255, 1000])
@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
def test_random_expiry_floor_and_softcap(tokens, dtype):
    expiry = random_expiry(tokens, torch.Generator().manual_seed(tokens), batch=3).cuda()
    floor = torch.randint(0, tokens, expiry.shape, device="cuda")
    inputs = make_inputs(3, tokens, 6, 2, 64, dtype)
    check(inputs, expiry)
    check(inputs, expiry, floor, softcap=10.0)


def test_split_prompt_columns_and_determinism():
    expiry = turns(256, 40, 40, 16, 200).expiry.cuda()
    plan = BlockPlan.from_expiry(expiry)
    assert int(plan.named()["col_slots"].max()) > 1
    inputs = make_inputs(1, len(expiry), 4, 2, 64, torch.bfloat16)
    check(inputs, expiry)
    first, second = run(inputs, plan), run(inputs, plan)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_poison_in_padding_stays_there():
    tokens, dead = 500, 40
    token = torch.arange(tokens, device="cuda", dtype=torch.int32)
    expiry = torch.full_like(token, tokens)
    expiry[:dead], expiry[-dead:] = token[:dead], token[-dead:]
    expiry[dead:-dead] = tokens - dead
    inputs = make_inputs(1, tokens, 4, 2, 128, torch.bfloat16)
    for x in inputs[:4]:
        x[:, :dead], x[:, -dead:] = float("nan"), float("inf")
    inputs[4][:, :, :dead], inputs[4][:, :, -dead:] = float("nan"), float("nan")
    check(inputs, expiry)


def test_plan_is_the_cpu_plan_and_needs_no_sync():
    expiry = random_expiry(5000, torch.Generator().manual_seed(0), batch=2)
    floor = torch.randint(0, 5000, expiry.shape)
    want = BlockPlan.from_expiry(expiry, floor)
    device_expiry, device_floor = expiry.cuda(), floor.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = BlockPlan.from_expiry(device_expiry, device_floor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got.lists.cpu(), want.lists)


def test_forward_and_backward_need_no_sync():
    expiry = turns(300, 6, 40, 16, 300).expiry.cuda()
    plan = BlockPlan.from_expiry(expiry)
    inputs = make_inputs(1, len(expiry), 4, 2, 64, torch.bfloat16)
    run(inputs, plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_two_to_the_31():
    """One tensor of more than 2^31 elements: a 32-bit offset would read another token."""
    tokens, heads = 70_000, 256
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GB of device memory")
    expiry = torch.arange(1, tokens + 1, device="cuda") + 63
    query, key, value = (
        torch.randn(1, tokens, heads, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)
    )
    assert query.numel() > 2**31
    out = trajectory_attention(query, key, value, expiry)
    tail = slice(tokens - 500, tokens)
    exact = plain_attention(
        *(x[:, tail, -1:] for x in (query, key, value)),
        torch.arange(1, 501, device="cuda") + 63,
        None,
        torch.zeros_like(query[:, tail, -1:]),
        dtype=torch.float64,
    )
    torch.testing.assert_close(
        out[:, tail, -1:][:, 64:].double(), exact.out[:, 64:], atol=2e-2, rtol=0
    )


def test_compiled_training_step_matches_eager():
    def loss(query, key, value, plan):
        return trajectory_attention(query * 2, key, value, plan=plan).float().square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for tokens in (400, 700):
        expiry = random_expiry(tokens, torch.Generator().manual_seed(tokens)).cuda()
        plan = BlockPlan.from_expiry(expiry)
        leaves = [x.requires_grad_() for x in make_inputs(1, tokens, 4, 2, 64, torch.float32)[:3]]
        got = torch.autograd.grad(compiled(*leaves, plan), leaves)
        want = torch.autograd.grad(loss(*leaves, plan), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_patched_model_equals_the_dense_mask(family):
    model = make_model(family).cuda()
    layout = turns(40, 5, 12, 6, 30)
    ids = torch.randint(0, 60, (1, layout.num_tokens), device="cuda")
    positions = layout.position_ids[None].cuda()
    mask = visible(layout.expiry)
    distance = layout.position_ids[:, None] - layout.position_ids[None, :]
    masks = {"full_attention": mask, "sliding_attention": mask & (distance < 24)}
    masks = {kind: allowed[None, None].cuda() for kind, allowed in masks.items()}
    dense = masks if family == "gemma3" else masks["full_attention"]
    with torch.no_grad():
        want = model(ids, position_ids=positions, attention_mask=dense).logits
        with patched(model):
            plan = BlockPlan.of(layout.to("cuda"))
            got = model(ids, position_ids=positions, plan=plan).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("positions", ["kept", "reprefill"])
@pytest.mark.parametrize("policy", [mem1, fold])
def test_rollout_equals_training(family, positions, policy):
    model = make_model(family).cuda()
    rollouts = roll_out(
        model, positions=positions, retention=policy, depth=lambda turn: turn.number % 3
    )
    assert largest_difference(model, rollouts) <= 2e-5


def test_a_run_of_the_trainer(tmp_path):
    config = read_config(
        Path(__file__).parents[1] / "configs" / "chain.toml",
        out=str(tmp_path / "run"),
        trackers="",
        eval_every=0,
        steps=2,
        sft_steps=30,
        episodes=32,
        minibatch=16,
        rollout_batch=32,
    )
    run = train(config, progress=False)
    assert next(run.policy.parameters()).is_cuda
    assert max(record["log_prob_gap"] for record in run.history) < 1e-3
