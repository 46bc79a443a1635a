"""The PPO functions against slow, obvious versions; poison under the mask; credit by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mem1_kernels.ppo import (
    approx_kl,
    clip_fraction,
    explained_variance,
    gae,
    grpo_advantages,
    kl_estimate,
    kl_penalised_rewards,
    log_prob_gap,
    masked_mean,
    on_every_token,
    on_last_token,
    policy_loss,
    reinforce_pp_advantages,
    rloo_advantages,
    token_log_probs,
    truncated_importance_weights,
    value_loss,
    whiten,
)

NAN = float("nan")


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_log_probs(hidden, weight, targets, bias=None, temperature=1.0, softcap=None):
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, targets[..., None]).squeeze(-1), entropy


def head_case(tokens=(2, 9), width=5, vocabulary=11, dtype=torch.float64):
    hidden = rand(*tokens, width, seed=1).to(dtype)
    weight, bias = rand(vocabulary, width, seed=2).to(dtype), rand(vocabulary, seed=3).to(dtype)
    targets = torch.randint(vocabulary, tokens, generator=torch.Generator().manual_seed(4))
    return hidden, weight, bias, targets


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 1.5},
    {"temperature": 1.3, "softcap": 2.0},
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk", [1, 4, 18, None])
def test_log_probs_and_gradients_equal_the_full_logits(options, with_bias, chunk):
    hidden, weight, bias, targets = head_case()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)[: 3 if with_bias else 2]]
    expected = slow_log_probs(hidden, weight, targets, bias if with_bias else None, **options)
    got = token_log_probs(
        hidden,
        weight,
        targets,
        bias=bias if with_bias else None,
        chunk=chunk,
        return_entropy=True,
        **options,
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    cotangents = (rand(2, 9, seed=5), rand(2, 9, seed=6))
    torch.testing.assert_close(
        torch.autograd.grad(got, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("return_entropy", [False, True])
def test_log_probs_gradcheck(options, return_entropy):
    hidden, weight, bias, targets = head_case(tokens=(5,), width=3, vocabulary=4)
    mask = torch.tensor([True, False, True, True, True])

    def run(hidden, weight, bias):
        return token_log_probs(
            hidden,
            weight,
            targets,
            bias=bias,
            mask=mask,
            chunk=2,
            return_entropy=return_entropy,
            **options,
        )

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (hidden, weight, bias)])


def test_entropy_alone_and_frozen_head_have_the_right_gradients():
    hidden, weight, _, targets = head_case()
    hidden.requires_grad_()
    _, expected = slow_log_probs(hidden, weight, targets)
    _, got = token_log_probs(hidden, weight, targets, chunk=4, return_entropy=True)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), hidden), torch.autograd.grad(expected.sum(), hidden)
    )


def test_a_forbidden_token_has_no_part_in_entropy_or_gradient():
    hidden, weight, bias, targets = head_case(vocabulary=6)
    targets = targets % 5
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    bias[5] = -math.inf
    expected = slow_log_probs(hidden, weight[:5], targets, bias[:5])
    got = token_log_probs(hidden, weight, targets, bias=bias, return_entropy=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(sum(x.sum() for x in got), leaves),
        torch.autograd.grad(sum(x.sum() for x in expected), leaves),
    )


def test_poison_under_the_mask_reaches_neither_value_nor_gradient():
    hidden, weight, bias, targets = head_case()
    mask = rand(2, 9, seed=7) > 0
    expected = slow_log_probs(hidden, weight, targets, bias)
    poisoned = hidden.masked_fill(~mask[..., None], NAN).requires_grad_()
    weight.requires_grad_()
    log_probs, entropy = token_log_probs(
        poisoned,
        weight,
        targets.masked_fill(~mask, -100),
        bias=bias,
        mask=mask,
        chunk=3,
        return_entropy=True,
    )
    torch.testing.assert_close(log_probs, expected[0] * mask)
    torch.testing.assert_close(entropy, expected[1] * mask)
    cotangent = rand(2, 9, seed=8).masked_fill(~mask, NAN)
    grads = torch.autograd.grad((log_probs, entropy), (poisoned, weight), (cotangent, cotangent))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][~mask] == 0).all() and (grads[0][mask] != 0).any()


def test_an_empty_mask_still_has_a_graph():
    hidden, weight, _, targets = head_case()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    log_probs = token_log_probs(hidden, weight, targets, mask=torch.zeros(2, 9, dtype=torch.bool))
    assert (log_probs == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(log_probs.sum(), leaves))


class Largest(TorchDispatchMode):
    """The most elements in any tensor an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_full_logits_never_exist():
    tokens, width, vocabulary, chunk = 512, 4, 64, 8
    hidden = rand(tokens, width).requires_grad_()
    weight = rand(vocabulary, width, seed=1).requires_grad_()
    targets = torch.arange(tokens) % vocabulary
    with Largest() as largest:
        results = token_log_probs(hidden, weight, targets, chunk=chunk, return_entropy=True)
        sum(x.sum() for x in results).backward()
    assert largest.elements <= tokens * width < tokens * vocabulary
    with Largest() as largest:
        slow_log_probs(hidden, weight, targets)
    assert largest.elements == tokens * vocabulary


NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_keeps_the_error_budget(dtype, device):
    case = head_case(tokens=(64,), width=128, vocabulary=1000, dtype=dtype)
    hidden, weight, bias, targets = (t.to(device) for t in case)
    hidden, weight = hidden / 8, weight / 8
    cotangents = [rand(64, seed=s).float().to(device) for s in (5, 6)]

    def run(function, cast):
        leaves = [t.detach().to(cast).requires_grad_() for t in (hidden, weight, bias)]
        outs = function(*leaves[:2], targets, bias=leaves[2])
        outs_grad = torch.autograd.grad(outs, leaves, [c.to(outs[0]) for c in cotangents])
        return [*outs, *outs_grad]

    def ours(*args, **kwargs):
        return token_log_probs(*args, **kwargs, chunk=24, return_entropy=True)

    def plain(hidden, weight, targets, bias):
        log_p = torch.log_softmax(F.linear(hidden, weight, bias).float(), -1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    exact = run(slow_log_probs, torch.float64)
    got, reference = run(ours, dtype), run(plain, dtype)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert all(g.dtype == dtype for g in got[2:])
    for ours_, plain_, exact_ in zip(got, reference, exact, strict=True):
        rounding = torch.finfo(ours_.dtype).eps * exact_.abs().max()
        budget = 2 * (plain_.double() - exact_).abs().max() + rounding
        assert (ours_.double() - exact_).abs().max() <= budget
    if dtype != torch.float32:  # fp32 logits, not rounded ones
        assert (got[0] - exact[0]).abs().max() < 1e-5 < (reference[0] - exact[0]).abs().max()


def test_autocast_rounds_the_operands_and_nothing_else():
    hidden, weight, _, targets = head_case(tokens=(32,), width=16, dtype=torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_log_probs(hidden, weight, targets)
        grads = torch.autograd.grad(got.sum(), leaves)
    expected = token_log_probs(hidden.bfloat16().float(), weight.bfloat16().float(), targets)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected.sum(), leaves), rtol=2**-7, atol=1e-6
    )
    assert all(g.dtype == torch.float32 for g in grads)
    hidden, weight, _, targets = head_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_log_probs(hidden, weight, targets)
    torch.testing.assert_close(got, slow_log_probs(hidden, weight, targets)[0])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.zeros(11, 4)}, ValueError, r"weight: expected \[V, D\].*\(11, 4\)"),
        ({"targets": torch.zeros(9, dtype=torch.long)}, ValueError, r"targets: .*\(2, 9\).*\(9,\)"),
        ({"targets": torch.zeros(2, 9)}, TypeError, "targets: expected int32 or int64"),
        ({"targets": torch.full((2, 9), 11)}, ValueError, r"targets: .*\[0, 11\).*got 11"),
        ({"targets": torch.full((2, 9), -100)}, ValueError, "targets: .*got -100"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \(11,\), got \(5,\)"),
        ({"mask": torch.ones(2, 9)}, TypeError, "mask: expected torch.bool"),
        ({"mask": torch.ones(2, 8).bool()}, ValueError, r"mask: .*\(2, 9\).*\(2, 8\)"),
        ({"hidden": torch.zeros(2, 9, 5, dtype=torch.long)}, TypeError, "hidden: "),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
        ({"softcap": -1.0}, ValueError, "softcap: expected a positive"),
        ({"chunk": 0}, ValueError, "chunk: expected a positive"),
        ({"weight": torch.zeros(11, 5, device="meta")}, ValueError, "weight: .*device"),
    ],
)
def test_log_prob_errors(change, error, match):
    hidden, weight, _, targets = head_case()
    given_ = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(error, match=match):
        token_log_probs(**given_)


def slow_gae(rewards, values, mask, ids, gamma, lam):
    """One Python loop from the end of each row, over the tokens of one trajectory at a time."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(mask.shape[0]):
        for name in set(ids[row].tolist()):
            next_value = next_advantage = 0.0
            for t in reversed(range(mask.shape[1])):
                if not mask[row, t] or ids[row, t] != name:
                    continue
                delta = rewards[row, t] + gamma * next_value - values[row, t]
                next_advantage = delta + gamma * lam * next_advantage
                next_value = values[row, t]
                advantages[row, t] = next_advantage
                returns[row, t] = next_advantage + next_value
    return advantages, returns


def test_credit_by_hand_over_four_turns():
    # prompt, then four turns of two generated tokens, three info tokens after each but the last
    turn, info = [True, True], [False, False, False]
    mask = torch.tensor([False, False, *turn, *info, *turn, *info, *turn, *info, *turn])
    values = torch.full((19,), NAN)
    values[mask] = torch.tensor([0.5, 0.5, 0.25, 0.5, 0.75, 0.5, 0.25, 0.5])
    rewards = on_last_token(torch.ones(1), mask)
    assert rewards.nonzero().tolist() == [[18]]

    # gamma = lambda = 1: every token is credited with the whole reward less its value
    advantages, returns = gae(rewards, values, mask)
    assert advantages[mask].tolist() == [0.5, 0.5, 0.75, 0.5, 0.25, 0.5, 0.75, 0.5]
    assert returns[mask].tolist() == [1.0] * 8
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()

    # lambda = 0: r + V(next generated token) - V; the step over an observation is one step
    advantages, _ = gae(rewards, values, mask, lam=0.0)
    assert advantages[mask].tolist() == [0.0, -0.25, 0.25, 0.25, -0.25, -0.25, 0.25, 0.5]

    # gamma = lambda = 1/2: deltas r + V'/2 - V, then A = delta + A'/4, by hand from the end
    deltas = [-0.25, -0.375, 0.0, -0.125, -0.5, -0.375, 0.0, 0.5]
    expected = [0.0] * 8
    running = 0.0
    for t in reversed(range(8)):
        running = deltas[t] + running / 4
        expected[t] = running
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages[mask].tolist() == pytest.approx(expected, abs=1e-7)
    assert expected[5:] == [-0.34375, 0.125, 0.5]


@st.composite
def packed_batches(draw):
    rows = draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    density = draw(st.sampled_from([0.1, 0.5, 1.0]))
    mask = torch.rand(rows, tokens, generator=generator) < density
    mask[0, draw(st.integers(0, tokens - 1))] = True
    # ids rise in jumps, or are interleaved; unique to their row
    ids = torch.randint(0, 3, (rows, tokens), generator=generator)
    if draw(st.booleans()):
        ids = ids.sort(-1).values
    ids = ids - 7 + 5 * torch.arange(rows)[:, None]
    return mask, ids, seed


@settings(max_examples=60, deadline=None)
@given(
    packed_batches(),
    st.sampled_from([(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.0, 1.0), (1.0, 0.0), (0.5, 1.0)]),
)
def test_gae_equals_the_loop(batch, gamma_lam):
    mask, ids, seed = batch
    gamma, lam = gamma_lam
    rewards, values = rand(*mask.shape, seed=seed), rand(*mask.shape, seed=seed + 1)
    expected = slow_gae(rewards, values, mask, ids, gamma, lam)
    poisoned = [x.masked_fill(~mask, NAN) for x in (rewards, values)]
    wild = ids.masked_fill(~mask, 10**9)
    got = gae(*poisoned, mask, wild, gamma=gamma, lam=lam)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # one packed row of the same tokens
    flat = gae(*(x.reshape(-1) for x in (*poisoned, mask, wild)), gamma=gamma, lam=lam)
    torch.testing.assert_close([x.reshape(mask.shape) for x in flat], list(expected))


def test_gae_without_ids_takes_each_row_as_a_trajectory():
    mask = rand(4, 30) > -0.5
    rewards, values = rand(4, 30, seed=1), rand(4, 30, seed=2)
    rows = torch.arange(4)[:, None].expand(4, 30)
    torch.testing.assert_close(
        gae(rewards, values, mask, gamma=0.9, lam=0.8),
        slow_gae(rewards, values, mask, rows, 0.9, 0.8),
    )


def test_a_nan_value_stays_in_its_trajectory():
    values = torch.tensor([0.0, 0.0, NAN, 0.0, 0.0])
    ids = torch.tensor([0, 0, 1, 1, 2])
    advantages, _ = gae(torch.ones(5), values, torch.ones(5).bool(), ids)
    assert advantages.isnan().tolist() == [False, False, True, False, False]


def test_gae_over_a_hundred_thousand_tokens_is_exact():
    tokens = 100_000
    mask = torch.ones(tokens, dtype=torch.bool)
    advantages, returns = gae(torch.ones(tokens), torch.full((tokens,), 0.25), mask)
    assert returns.tolist() == [float(tokens - t) for t in range(tokens)]
    assert torch.equal(advantages, returns - 0.25)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gae_of_low_precision_values_is_fp32(dtype):
    mask = torch.ones(1, 50, dtype=torch.bool)
    rewards, values = rand(1, 50).to(dtype), rand(1, 50, seed=1).to(dtype)
    expected = slow_gae(rewards.double(), values.double(), mask, torch.zeros(1, 50), 0.9, 0.9)
    got = gae(rewards, values, mask, gamma=0.9, lam=0.9)
    assert got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(got, tuple(x.float() for x in expected))


def test_scores_on_last_and_on_every_token():
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, False, False]])
    ids = torch.tensor([[2, 2, 2, 0, 0], [1, 1, 1, 9, 9]])
    scores = torch.tensor([0.5, -1.0, 2.0])
    assert on_last_token(scores, mask, ids).tolist() == [[0, 2, 0, 0.5, 0], [0, 0, -1, 0, 0]]
    assert on_every_token(scores, mask, ids).tolist() == [[2, 2, 0, 0.5, 0], [0, -1, -1, 0, 0]]
    assert on_last_token(scores[:2], mask).tolist() == [[0, 0, 0, 0.5, 0], [0, 0, -1, 0, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_score_that_is_not_finite_is_named(bad, dtype):
    """It would make every advantage of its group NaN."""
    scores = torch.tensor([1.0, 0.0, bad, 1.0, bad], dtype=dtype)
    groups = torch.tensor([0, 0, 1, 1, 1])
    mask, ids = torch.ones(5, dtype=torch.bool), torch.arange(5)
    message = f"scores: expected finite numbers, got {bad} for trajectory 2"
    for call in (
        lambda: grpo_advantages(scores, groups),
        lambda: grpo_advantages(scores, groups, scale=False),
        lambda: rloo_advantages(scores, groups),
        lambda: on_last_token(scores, mask, ids),
        lambda: on_every_token(scores, mask, ids),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_credit_errors():
    mask, x = torch.ones(4, dtype=torch.bool), torch.zeros(4)
    ids = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="mask: expected at least one True"):
        gae(x, x, ~mask)
    with pytest.raises(ValueError, match=r"values: expected the shape of mask \(4,\), got \(3,\)"):
        gae(x, x[:3], mask)
    with pytest.raises(TypeError, match=r"mask: expected torch\.bool, got torch\.float32"):
        gae(x, x, x)
    with pytest.raises(TypeError, match="rewards: expected a floating point"):
        gae(ids, x, mask)
    with pytest.raises(TypeError, match="trajectory_ids: expected int32 or int64"):
        gae(x, x, mask, x)
    with pytest.raises(ValueError, match="trajectory_ids: expected the shape"):
        gae(x, x, mask, ids[:3])
    with pytest.raises(ValueError, match="got id 0 in rows 0 and 1"):
        gae(x.view(2, 2), x.view(2, 2), mask.view(2, 2), torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"gamma: expected a number in \[0, 1\], got 1\.5"):
        gae(x, x, mask, gamma=1.5)
    with pytest.raises(ValueError, match="lam: "):
        gae(x, x, mask, lam=NAN)
    with pytest.raises(ValueError, match=r"mask: expected \[tokens\] or \[rows, tokens\]"):
        gae(x.view(1, 2, 2), x.view(1, 2, 2), mask.view(1, 2, 2))
    with pytest.raises(ValueError, match=r"ids without a score: \[1\]"):
        on_last_token(x[:1], mask, ids)
    with pytest.raises(ValueError, match=r"without a generated token: \[2\]"):
        on_every_token(x[:3], mask, ids)
    with pytest.raises(ValueError, match=r"ids without a score: \[-1\]"):
        on_last_token(x[:1], mask, ids - 1)
    with pytest.raises(ValueError, match=r"without a generated token: \[1\]"):
        on_last_token(x[:2], mask & (ids == 0), ids)


def test_group_advantages_equal_the_slow_versions():
    ids = torch.tensor([3, -1, 3, 8, -1, 3, 8, 8, 8])
    scores = rand(9)
    grpo, rloo = torch.zeros(9, dtype=scores.dtype), torch.zeros(9, dtype=scores.dtype)
    for i in range(9):
        group = [j for j in range(9) if ids[j] == ids[i]]
        members = scores[group]
        grpo[i] = (scores[i] - members.mean()) / (members.std() + 1e-6)
        others = [float(scores[j]) for j in group if j != i]
        rloo[i] = scores[i] - sum(others) / len(others)
    torch.testing.assert_close(grpo_advantages(scores, ids), grpo)
    torch.testing.assert_close(rloo_advantages(scores, ids.int()), rloo)
    unscaled = grpo_advantages(scores, ids, scale=False)
    torch.testing.assert_close(
        unscaled, torch.stack([scores[i] - scores[ids == ids[i]].mean() for i in range(9)])
    )


@pytest.mark.parametrize("function", [grpo_advantages, rloo_advantages])
def test_a_group_of_equal_scores_gets_exactly_nothing(function):
    scores = torch.full((3,), 0.1)
    assert function(scores, torch.zeros(3, dtype=torch.long)).abs().max() < 1e-9
    assert function(scores.bfloat16(), torch.zeros(3, dtype=torch.long)).dtype == torch.float32


@pytest.mark.parametrize("function", [grpo_advantages, rloo_advantages])
def test_group_errors(function):
    with pytest.raises(ValueError, match=r"at least two trajectories in each group.*group 4"):
        function(torch.zeros(3), torch.tensor([1, 1, 4]))
    with pytest.raises(ValueError, match="group_ids: expected the shape"):
        function(torch.zeros(3), torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="group_ids: expected int32 or int64"):
        function(torch.zeros(2), torch.zeros(2))
    with pytest.raises(TypeError, match="scores: expected a floating point"):
        function(torch.tensor([1, 2]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"scores: expected \[trajectories\]"):
        function(torch.zeros(0), torch.zeros(0, dtype=torch.long))


def test_reinforce_pp_equals_the_loop():
    mask = rand(3, 20) > -0.3
    rewards = rand(3, 20, seed=1)
    expected = torch.zeros(3, 20, dtype=rewards.dtype)
    for row in range(3):
        running = 0.0
        for t in reversed(range(20)):
            if mask[row, t]:
                running = rewards[row, t] + 0.9 * running
                expected[row, t] = running
    inside = expected[mask]
    expected[mask] = (inside - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt()
    got = reinforce_pp_advantages(rewards.masked_fill(~mask, NAN), mask, gamma=0.9)
    torch.testing.assert_close(got, expected)


def test_kl_penalised_rewards():
    mask = torch.tensor([True, False, True])
    rewards, new, ref = torch.tensor([[0.0, NAN, 1.0], [-1.0, NAN, -2.0], [-1.5, NAN, -1.0]])
    got = kl_penalised_rewards(rewards, new, ref, mask, coef=0.1)
    torch.testing.assert_close(got, torch.tensor([-0.05, 0.0, 1.1]))
    got = kl_penalised_rewards(rewards, new, ref, mask, coef=0.1, kind="k2")
    torch.testing.assert_close(got, torch.tensor([-0.0125, 0.0, 0.95]))
    with pytest.raises(ValueError, match="coef: expected a number >= 0"):
        kl_penalised_rewards(rewards, new, ref, mask, coef=-0.1)


def loss_case(tokens=200, seed=0, spread=0.4):
    mask = rand(tokens, seed=seed) > 0
    old = -rand(tokens, seed=seed + 1).abs()
    new = old + spread * rand(tokens, seed=seed + 2)
    return new, old, rand(tokens, seed=seed + 3), mask


@pytest.mark.parametrize("dual_clip", [None, 1.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss_equals_the_loop(dual_clip, weighted):
    new, old, advantages, mask = loss_case()
    weights = rand(200, seed=9).abs() if weighted else None
    total, clipped, active = 0.0, 0, 0
    gradient = torch.zeros(200, dtype=new.dtype)
    for i in mask.nonzero().flatten().tolist():
        a, w = float(advantages[i]), float(weights[i]) if weighted else 1.0
        r = math.exp(new[i] - old[i])
        loss = max(-a * r, -a * min(max(r, 0.8), 1.2))
        cut = loss != -a * r
        clipped += cut
        if dual_clip is not None and a < 0 and loss > -dual_clip * a:
            loss, cut = -dual_clip * a, True
        active += not cut
        gradient[i] = 0.0 if cut else -w * a * r / 50
        total += w * loss / 50
    assert 0 < clipped < int(mask.sum()) and active > 0

    new.requires_grad_()
    got = policy_loss(
        new, old, advantages, mask, denominator=50, dual_clip=dual_clip, weights=weights
    )
    assert got.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, new)[0], gradient)
    fraction = clip_fraction(new, old, advantages, mask)
    assert float(fraction) == pytest.approx(clipped / int(mask.sum()), rel=1e-6)


def test_the_first_update_is_the_policy_gradient():
    _, old, advantages, mask = loss_case()
    new = old.clone().requires_grad_()
    loss = policy_loss(new, old, advantages, mask, denominator=int(mask.sum()))
    expected = -(advantages * mask) / mask.sum()
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], expected)


def test_an_absurd_log_ratio_gives_no_nan():
    new = torch.tensor([0.0, 0.0, -500.0, 0.0], requires_grad=True)
    old = torch.tensor([-500.0, -500.0, 0.0, 0.0])
    loss = policy_loss(
        new, old, torch.tensor([1.0, 0.0, -1.0, 1.0]), torch.ones(4).bool(), denominator=4
    )
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.isfinite() and gradient.tolist() == [0, 0, 0, -0.25]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_value_loss_equals_the_loop(clip):
    new, old, returns, mask = loss_case(spread=1.0)
    total, cut = 0.0, 0
    for i in mask.nonzero().flatten().tolist():
        v, o, target = float(new[i]), float(old[i]), float(returns[i])
        losses = [(v - target) ** 2]
        if clip is not None:
            losses.append((min(max(v, o - clip), o + clip) - target) ** 2)
            cut += losses[1] > losses[0]
        total += 0.5 * max(losses) / 80
    new.requires_grad_()
    got = value_loss(new, old, returns, mask, denominator=80, clip=clip)
    assert got.item() == pytest.approx(total, rel=1e-12)
    assert (cut > 0) == (clip is not None)
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, old, returns, mask, denominator=80, clip=clip), new
    )


def test_kl_estimators():
    # in expectation over pi: k1 and k3 are the KL exactly; k2's gradient is the KL's gradient
    logits = rand(7, seed=1).requires_grad_()
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(rand(7, seed=2), -1)
    p, everywhere = log_p.exp(), torch.ones(7, dtype=torch.bool)
    kl = (p * (log_p - log_q)).sum()
    for kind in ("k1", "k3"):
        expectation = (p * kl_estimate(log_p, log_q, everywhere, kind=kind)).sum()
        torch.testing.assert_close(expectation, kl)
    k2 = kl_estimate(log_p, log_q, everywhere, kind="k2")
    torch.testing.assert_close(
        torch.autograd.grad((p.detach() * k2).sum(), logits, retain_graph=True),
        torch.autograd.grad(kl, logits, retain_graph=True),
    )
    k3 = kl_estimate(log_p, log_q, everywhere)
    assert (k3 >= 0).all()
    torch.testing.assert_close(k3, (log_q - log_p).exp() - 1 - (log_q - log_p))
    for kind in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(
            lambda a, b, kind=kind: kl_estimate(a, b, everywhere, kind=kind),
            (log_p.detach().requires_grad_(), log_q.requires_grad_()),
        )
    with pytest.raises(ValueError, match="kind: expected 'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(log_p, log_q, everywhere, kind="k4")


def test_k3_of_nearly_equal_policies_does_not_cancel():
    d = torch.tensor([1e-4], dtype=torch.float32)
    got = kl_estimate(d, torch.zeros(1), torch.ones(1).bool())
    assert float(got) == pytest.approx(0.5e-8, rel=1e-2)


def test_truncated_importance_weights():
    old, behaviour, _, mask = loss_case(spread=1.0)
    got = truncated_importance_weights(
        old.clone().requires_grad_(), behaviour.masked_fill(~mask, NAN), mask, cap=1.5
    )
    expected = [
        min(math.exp(o - b), 1.5) if m else 0.0
        for o, b, m in zip(old, behaviour, mask, strict=True)
    ]
    assert got.tolist() == pytest.approx(expected) and not got.requires_grad
    assert 1.5 in expected
    with pytest.raises(ValueError, match="cap: expected a positive number"):
        truncated_importance_weights(old, behaviour, mask, cap=0.0)


def test_cutting_the_batch_by_token_budget_changes_nothing():
    new, old, advantages, mask = loss_case()
    entropy, values = rand(200, seed=11), rand(200, seed=12)
    leaves = [t.requires_grad_() for t in (new, entropy, values)]
    tokens = int(mask.sum())

    def loss(part):
        n, o, a, m, e, v = (t[part] for t in (new, old, advantages, mask, entropy, values))
        return (
            policy_loss(n, o, a, m, denominator=tokens)
            + 0.5 * value_loss(v, o, a, m, denominator=tokens)
            - 0.01 * masked_mean(e, m, denominator=tokens)
            + 0.02 * masked_mean(kl_estimate(n, o, m), m, denominator=tokens)
        )

    whole = loss(slice(None))
    # cuts of very different token counts, one of them empty
    parts = [slice(0, 7), slice(7, 60), slice(60, 60), slice(60, 199), slice(199, 200)]
    pieces = [loss(part) for part in parts]
    torch.testing.assert_close(sum(pieces), whole)
    torch.testing.assert_close(
        torch.autograd.grad(sum(pieces), leaves), torch.autograd.grad(whole, leaves)
    )


LOSSES = {
    "policy_loss": lambda a, b, c, m: policy_loss(a, b, c, m, denominator=3),
    "policy_loss dual weights": lambda a, b, c, m: policy_loss(
        a, b, c, m, denominator=3, dual_clip=2.0, weights=c
    ),
    "value_loss": lambda a, b, c, m: value_loss(a, b, c, m, denominator=3),
    "value_loss plain": lambda a, b, c, m: value_loss(a, b, c, m, denominator=3, clip=None),
    "masked_mean": lambda a, b, c, m: masked_mean(a, m),
    "k1": lambda a, b, c, m: masked_mean(kl_estimate(a, b, m, kind="k1"), m),
    "k2": lambda a, b, c, m: masked_mean(kl_estimate(a, b, m, kind="k2"), m),
    "k3": lambda a, b, c, m: masked_mean(kl_estimate(a, b, m, kind="k3"), m),
}
CONSTANTS = {
    "clip_fraction": clip_fraction,
    "approx_kl": lambda a, b, c, m: approx_kl(a, b, m),
    "log_prob_gap": lambda a, b, c, m: torch.stack(log_prob_gap(a, b, m)),
    "explained_variance": lambda a, b, c, m: explained_variance(a, b, m),
    "whiten": lambda a, b, c, m: whiten(a, m),
    "truncated_importance_weights": lambda a, b, c, m: truncated_importance_weights(a, b, m),
    "kl_penalised_rewards": lambda a, b, c, m: kl_penalised_rewards(a, b, c, m, coef=0.1),
    "gae": lambda a, b, c, m: torch.stack(gae(a, b, m, gamma=0.9, lam=0.9)),
    "reinforce_pp": lambda a, b, c, m: reinforce_pp_advantages(a, m),
}


@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", [*LOSSES, *CONSTANTS])
def test_what_the_mask_hides_does_not_matter(name, poison):
    function = LOSSES.get(name) or CONSTANTS[name]
    a, b, c, mask = (t.float() if t.is_floating_point() else t for t in loss_case(tokens=40))
    a.requires_grad_()
    poisoned = [x.detach().masked_fill(~mask, poison) for x in (a, b, c)]
    poisoned[0].requires_grad_()
    clean, dirty = function(a, b, c, mask), function(*poisoned, mask)
    assert dirty.isfinite().all() and torch.equal(clean, dirty)
    if name in CONSTANTS:
        assert not dirty.requires_grad
        return
    (expected,) = torch.autograd.grad(clean, a)
    (got,) = torch.autograd.grad(dirty, poisoned[0])
    assert torch.equal(got, expected) and (got[~mask] == 0).all() and (got[mask] != 0).any()


@pytest.mark.parametrize("name", [*LOSSES, *CONSTANTS])
def test_bf16_inputs_are_computed_in_fp32(name):
    function = LOSSES.get(name) or CONSTANTS[name]
    a, b, c, mask = (t.bfloat16() if t.is_floating_point() else t for t in loss_case(tokens=40))
    got = function(a, b, c, mask)
    assert torch.equal(got, function(a.float(), b.float(), c.float(), mask))
    assert got.dtype == (torch.float64 if name == "explained_variance" else torch.float32)


@pytest.mark.parametrize("name", [name for name in LOSSES if "_loss" in name])
def test_constants_of_a_loss_get_no_gradient(name):
    a, b, c, mask = loss_case(tokens=40)
    leaves = [t.requires_grad_() for t in (a, b, c)]
    grads = torch.autograd.grad(LOSSES[name](a, b, c, mask), leaves, allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None


def test_loss_errors():
    new, old, advantages, mask = loss_case(tokens=4)
    empty = torch.zeros(4, dtype=torch.bool)
    arguments = (new, old, advantages, mask)
    for bad in (0, -1.0, math.inf, NAN):
        with pytest.raises(ValueError, match="denominator: expected a positive finite"):
            policy_loss(*arguments, denominator=bad)
        with pytest.raises(ValueError, match="denominator: expected a positive finite"):
            value_loss(*arguments, denominator=bad)
    for bad in (0.0, 1.0, NAN):
        with pytest.raises(ValueError, match="clip: expected a number between 0 and 1"):
            policy_loss(*arguments, denominator=1, clip=bad)
        with pytest.raises(ValueError, match="clip: expected a number between 0 and 1"):
            clip_fraction(*arguments, clip=bad)
    with pytest.raises(ValueError, match="dual_clip: expected a number above 1"):
        policy_loss(*arguments, denominator=1, dual_clip=1.0)
    with pytest.raises(ValueError, match="clip: expected a positive number or None"):
        value_loss(*arguments, denominator=1, clip=0.0)
    with pytest.raises(ValueError, match=r"weights: expected the shape of mask \(4,\), got \(1,\)"):
        policy_loss(*arguments, denominator=1, weights=torch.ones(1))
    with pytest.raises(TypeError, match=r"mask: expected torch\.bool"):
        policy_loss(new, old, advantages, mask.long(), denominator=1)
    with pytest.raises(ValueError, match="old_log_probs: expected the device"):
        policy_loss(new, old.to("meta"), advantages, mask, denominator=1)
    for statistic in (
        lambda: masked_mean(new, empty),
        lambda: whiten(new, empty),
        lambda: explained_variance(new, old, empty),
        lambda: clip_fraction(new, old, advantages, empty),
        lambda: approx_kl(new, old, empty),
        lambda: log_prob_gap(new, old, empty),
        lambda: reinforce_pp_advantages(new, empty),
    ):
        with pytest.raises(ValueError, match="mask: expected at least one True entry"):
            statistic()
    assert float(policy_loss(new, old, advantages, empty, denominator=3)) == 0.0


class TwoProcesses:
    """An all-reduce for one process, knowing what the other one contributes."""

    def __init__(self, other, in_place):
        self.contributions, self.in_place = iter(other), in_place

    def __call__(self, tensor):
        total = tensor + next(self.contributions)
        if not self.in_place:
            return total
        tensor.copy_(total)
        return None


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("shift_mean", [False, True])
def test_whitening_over_processes_equals_one_process(in_place, shift_mean):
    x, mask = rand(2, 30), rand(2, 30, seed=1) > 0
    inside = x[mask]
    std = (inside.var(correction=0) + 1e-8).sqrt()
    expected = ((x - inside.mean()) / std + (0 if shift_mean else inside.mean())) * mask
    whole = whiten(x, mask, shift_mean=shift_mean)
    torch.testing.assert_close(whole, expected)

    def contributions(row):
        inside_row = x[row][mask[row]]
        count = torch.tensor([len(inside_row), inside_row.sum()], dtype=torch.float64)
        return [count, (inside_row - inside.mean()).square().sum()]

    for row in (0, 1):
        hook = TwoProcesses(contributions(1 - row), in_place)
        got = whiten(x[row], mask[row], shift_mean=shift_mean, all_reduce=hook)
        torch.testing.assert_close(got, expected[row])

    # a process without a generated token takes part all the same
    nothing = torch.zeros(30, dtype=torch.bool)
    hook = TwoProcesses(contributions(1), in_place)
    assert (whiten(x[0], nothing, shift_mean=shift_mean, all_reduce=hook) == 0).all()


def test_equal_advantages_whiten_to_zero():
    assert (whiten(torch.full((5,), 0.1), torch.ones(5).bool()).abs() < 1e-6).all()


def test_statistics_equal_the_slow_versions():
    new, old, returns, mask = loss_case()
    d = (new - old)[mask]
    assert float(approx_kl(new, old, mask)) == pytest.approx(float((d.exp() - 1 - d).mean()))
    largest, mean = log_prob_gap(new, old, mask)
    assert float(largest) == float(d.abs().max())
    assert float(mean) == pytest.approx(float(d.abs().mean()))
    expected = 1 - (returns - new)[mask].var() / returns[mask].var()
    assert float(explained_variance(new, returns, mask)) == pytest.approx(float(expected))
    assert float(explained_variance(returns, returns, mask)) == 1.0
    assert explained_variance(new, torch.ones_like(new), mask).isnan()
    assert log_prob_gap(new.masked_fill(mask, NAN), old, mask)[0].isnan()


def test_statistics_add_up_over_micro_batches():
    new, old, advantages, mask = loss_case()
    tokens = int(mask.sum())
    for whole, part in (
        (
            approx_kl(new, old, mask),
            lambda s: approx_kl(new[s], old[s], mask[s], denominator=tokens),
        ),
        (
            clip_fraction(new, old, advantages, mask),
            lambda s: clip_fraction(new[s], old[s], advantages[s], mask[s], denominator=tokens),
        ),
    ):
        torch.testing.assert_close(part(slice(0, 33)) + part(slice(33, None)), whole)
