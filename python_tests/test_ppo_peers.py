"""Our losses and advantages beside those of verl, TRL and OpenRLHF, on the same random numbers.

A trainer that is not installed is skipped by its name. Where they differ on purpose, the test says
how: verl whitens by the sample's variance, ours is the population's. In float64 the agreement is
held to its rounding; what a trainer casts to float32, to that of float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from mem1_kernels.ppo import (
    gae,
    grpo_advantages,
    kl_estimate,
    kl_penalised_rewards,
    on_every_token,
    on_last_token,
    policy_loss,
    reinforce_pp_advantages,
    rloo_advantages,
    truncated_importance_weights,
    value_loss,
    whiten,
)

ROWS, TOKENS, GROUP = 12, 50, 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6}


class Numbers(NamedTuple):
    """A batch of padded rows; `mask` has holes where observations stand, and padding behind."""

    new: Tensor
    old: Tensor
    reference: Tensor
    sampled: Tensor
    advantages: Tensor
    values: Tensor
    old_values: Tensor
    returns: Tensor
    scores: Tensor
    mask: Tensor


def numbers(dtype: torch.dtype, *, holes: bool = True) -> Numbers:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    lengths = torch.randint(5, TOKENS, (ROWS,), generator=random)
    mask = torch.arange(TOKENS) < lengths[:, None]
    if holes:
        mask &= torch.rand(ROWS, TOKENS, generator=random) < 0.6
        mask[:, 0] = True
    old = -normal(ROWS, TOKENS).abs()
    near = [old + 0.5 * normal(ROWS, TOKENS) for _ in range(3)]
    rest = [normal(ROWS, TOKENS) for _ in range(4)]
    return Numbers(near[0], old, *near[1:], *rest, normal(ROWS), mask)


GROUPS = torch.arange(ROWS) // GROUP
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


def agree(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> None:
    """Compares values (at the mask), to the rounding of the coarser dtype."""
    bound = max(TOLERANCE[ours.dtype], TOLERANCE[theirs.dtype])
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=bound, atol=bound)


def agree_with_gradient(ours, theirs, at: Tensor) -> None:
    """Compares two losses, functions of one tensor, and their gradients."""
    found = []
    for loss in (ours, theirs):
        point = at.clone().requires_grad_()
        value = loss(point)
        found.append((value.detach(), torch.autograd.grad(value, point)[0]))
    agree(found[0][0], found[1][0])
    agree(found[0][1], found[1][1])


def per_token(n: Numbers, rewards: Tensor) -> Tensor:
    """Rewards of each token: a KL penalty, and the score on the last one."""
    return kl_penalised_rewards(rewards, n.old, n.reference, n.mask, coef=0.1)


def sample_deviation(mask: Tensor) -> float:
    """The population's deviation over the sample's, which verl whitens by."""
    count = int(mask.sum())
    return math.sqrt((count - 1) / count)


# verl


@pytest.fixture(scope="module")
def verl() -> ModuleType:
    reason = "verl is not installed"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("verl.trainer.ppo.core_algos", reason=reason)


class Options(SimpleNamespace):
    def get(self, name: str, default: object) -> object:
        return getattr(self, name, default)


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_the_policy_loss_of_verl(verl, dtype, dual_clip, weighted):
    n = numbers(dtype)
    weights = None
    if weighted:
        weights = truncated_importance_weights(n.old, n.sampled, n.mask, cap=1.5)
        agree(weights, (n.old - n.sampled).exp().clamp(max=1.5), n.mask)
    options = Options(
        clip_ratio=0.2,
        clip_ratio_low=None,
        clip_ratio_high=None,
        clip_ratio_c=dual_clip or 1e9,
        global_batch_info={},
    )

    def ours(new):
        return policy_loss(
            new,
            n.old,
            n.advantages,
            n.mask,
            denominator=float(n.mask.sum()),
            clip=0.2,
            dual_clip=dual_clip,
            weights=weights,
        )

    def theirs(new):
        return verl.compute_policy_loss_vanilla(
            n.old, new, n.advantages, n.mask.to(dtype), config=options, rollout_is_weights=weights
        )[0]

    agree_with_gradient(ours, theirs, n.new)


@DTYPES
def test_the_value_loss_of_verl(verl, dtype):
    n = numbers(dtype)

    def ours(values):
        return value_loss(
            values, n.old_values, n.returns, n.mask, denominator=float(n.mask.sum()), clip=0.5
        )

    def theirs(values):
        return verl.compute_value_loss(values, n.returns, n.old_values, n.mask.to(dtype), 0.5)[0]

    agree_with_gradient(ours, theirs, n.values)


@DTYPES
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_of_verl(verl, dtype, kind):
    n = numbers(dtype)

    def ours(new):
        return kl_estimate(new, n.reference, n.mask, kind=kind).sum()

    def theirs(new):
        return (verl.kl_penalty(new, n.reference, kind) * n.mask).sum()

    agree_with_gradient(ours, theirs, n.new)


@DTYPES
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 1.0)])
def test_the_gae_of_verl(verl, dtype, gamma, lam):
    """Across the holes of observations too; its advantages are whitened."""
    n = numbers(dtype)
    rewards = per_token(n, on_last_token(n.scores, n.mask))
    advantages, returns = gae(rewards, n.values, n.mask, gamma=gamma, lam=lam)
    whitened, theirs = verl.compute_gae_advantage_return(
        rewards, n.values, n.mask.to(dtype), gamma, lam
    )
    agree(returns, theirs, n.mask)
    agree(advantages, theirs - n.values, n.mask)
    agree(whiten(advantages, n.mask) * sample_deviation(n.mask), whitened, n.mask)


@DTYPES
@pytest.mark.parametrize("scale", [True, False])
def test_the_grpo_of_verl(verl, dtype, scale):
    n = numbers(dtype)
    ours = on_every_token(grpo_advantages(n.scores, GROUPS, scale=scale), n.mask)
    theirs, _ = verl.compute_grpo_outcome_advantage(
        on_last_token(n.scores, n.mask),
        n.mask.to(dtype),
        GROUPS.numpy(),
        norm_adv_by_std_in_grpo=scale,
    )
    agree(ours, theirs)


@DTYPES
def test_the_rloo_of_verl(verl, dtype):
    n = numbers(dtype)
    ours = on_every_token(rloo_advantages(n.scores, GROUPS), n.mask)
    rewards = on_last_token(n.scores, n.mask)
    theirs, _ = verl.compute_rloo_outcome_advantage(rewards, n.mask.to(dtype), GROUPS.numpy())
    agree(ours, theirs)


@DTYPES
@pytest.mark.parametrize("gamma", [1.0, 0.95])
def test_the_reinforce_pp_of_verl(verl, dtype, gamma):
    n = numbers(dtype)
    rewards = per_token(n, on_last_token(n.scores, n.mask))
    ours = reinforce_pp_advantages(rewards, n.mask, gamma=gamma)
    theirs, _ = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards, n.mask.to(dtype), config=SimpleNamespace(gamma=gamma)
    )
    agree(ours * sample_deviation(n.mask), theirs)


# TRL


@pytest.fixture(scope="module")
def trl() -> ModuleType:
    pytest.importorskip("trl", reason="TRL is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("trl.trainer.grpo_trainer")


@DTYPES
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_grpo_loss_of_trl(trl, dtype, beta):
    """Its `bnpo` is a mean over tokens, as ours; advantages per row or per token, a KL (k3)."""
    n = numbers(dtype)
    advantages = on_every_token(grpo_advantages(n.scores, GROUPS), n.mask)
    count = float(n.mask.sum())

    def ours(new):
        loss = policy_loss(new, n.old, advantages, n.mask, denominator=count, clip=0.2)
        distance = kl_estimate(new, n.reference, n.mask, kind="k3")
        return loss + beta * distance.sum() / count

    trainer = MagicMock(
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
    )
    trainer.accelerator.gather = lambda x: x
    trainer.accelerator.reduce = lambda x, reduction: x
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)

    def theirs(new):
        trainer._get_per_token_logps_and_entropies.return_value = (new, torch.zeros_like(new), None)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": n.mask.to(dtype),
            "advantages": grpo_advantages(n.scores, GROUPS),
            "old_per_token_logps": n.old,
            "ref_per_token_logps": n.reference,
        }
        return trl.GRPOTrainer._compute_loss(trainer, None, inputs)

    agree_with_gradient(ours, theirs, n.new)


# OpenRLHF


@pytest.fixture(scope="module")
def openrlhf() -> Iterator[SimpleNamespace]:
    """Its loss and its advantages, without the packages beside them that need a GPU."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or spec.origin is None:
        pytest.skip("OpenRLHF is not installed")
    root = Path(spec.origin).parent
    with pytest.MonkeyPatch.context() as patch:
        for name in ("models", "trainer", "trainer.ppo_utils", "trainer.ray", "utils"):
            package = ModuleType(f"openrlhf.{name}")
            package.__path__ = [str(root / name.replace(".", "/"))]
            patch.setitem(sys.modules, package.__name__, package)
        for name in ("deepspeed", "ray", "openrlhf.trainer.ray.launcher", "openrlhf.utils.utils"):
            patch.setitem(sys.modules, name, MagicMock())
        modules = {
            name: importlib.import_module(f"openrlhf.{path}")
            for name, path in (
                ("loss", "models.loss"),
                ("utils", "models.utils"),
                ("maker", "trainer.ppo_utils.experience_maker"),
            )
        }
        yield SimpleNamespace(**modules)
        for name in [name for name in sys.modules if name.startswith("openrlhf")]:
            del sys.modules[name]


@DTYPES
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_the_policy_loss_of_openrlhf(openrlhf, dtype, dual_clip):
    n = numbers(dtype)
    module = openrlhf.loss.PolicyLoss(0.2, 0.2, dual_clip=dual_clip)

    def ours(new):
        return policy_loss(
            new,
            n.old,
            n.advantages,
            n.mask,
            denominator=float(n.mask.sum()),
            dual_clip=dual_clip,
        )

    def theirs(new):
        return module(new, n.old, n.advantages, action_mask=n.mask)[0]

    agree_with_gradient(ours, theirs, n.new)


@DTYPES
@pytest.mark.parametrize("clip", [0.5, None])
def test_the_value_loss_of_openrlhf(openrlhf, dtype, clip):
    n = numbers(dtype)
    module = openrlhf.loss.ValueLoss(clip)

    def ours(values):
        count = float(n.mask.sum())
        return value_loss(values, n.old_values, n.returns, n.mask, denominator=count, clip=clip)

    def theirs(values):
        return module(values, n.old_values, n.returns, action_mask=n.mask)

    agree_with_gradient(ours, theirs, n.values)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_kl_of_openrlhf(openrlhf, kind):
    n = numbers(torch.float32)

    def ours(new):
        return kl_estimate(new, n.reference, n.mask, kind=kind).sum()

    def theirs(new):
        return (
            openrlhf.utils.compute_approx_kl(new, n.reference, kl_estimator=kind) * n.mask
        ).sum()

    agree_with_gradient(ours, theirs, n.new)


@DTYPES
@pytest.mark.parametrize("estimator", ["gae", "reinforce", "rloo", "group_norm", "dr_grpo"])
def test_the_advantages_of_openrlhf(openrlhf, dtype, estimator):
    """Without holes, since its time goes on over observations, and with its KL in the reward.

    Its GRPO (`group_norm`) adds 1e-9 to the deviation, ours 1e-6 by default.
    """
    n = numbers(dtype, holes=False)
    coef = 0.0 if estimator in ("rloo", "group_norm", "dr_grpo") else 0.1
    experience = SimpleNamespace(
        rewards=n.scores,
        index=list(range(ROWS)),
        info={},
        values=n.values,
        action_mask=n.mask,
        kl=(n.old - n.reference) * n.mask,
    )
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.95, no_std_norm=False)
    grouped = GROUP if estimator in ("rloo", "group_norm", "dr_grpo") else 1
    options = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=grouped),
        reward=SimpleNamespace(
            clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None
        ),
    )
    maker = openrlhf.maker.RemoteExperienceMaker.__new__(openrlhf.maker.RemoteExperienceMaker)
    maker.strategy = SimpleNamespace(args=options)
    maker.advantage_estimator = estimator
    maker.kl_ctl = SimpleNamespace(value=coef)
    maker.compute_advantages_and_returns([experience])

    rewards = kl_penalised_rewards(
        on_last_token(n.scores, n.mask), n.old, n.reference, n.mask, coef=coef
    )
    if estimator == "gae":
        advantages, returns = gae(rewards, n.values, n.mask, gamma=1.0, lam=0.95)
        agree(returns, experience.returns, n.mask)
        ours = whiten(advantages, n.mask)
    elif estimator == "reinforce":
        ours = reinforce_pp_advantages(rewards, n.mask)
    elif estimator == "rloo":
        ours = on_every_token(rloo_advantages(n.scores, GROUPS), n.mask)
    else:
        scale = estimator == "group_norm"
        ours = on_every_token(grpo_advantages(n.scores, GROUPS, scale=scale, eps=1e-9), n.mask)
    theirs = experience.advantages
    if estimator in ("gae", "reinforce"):  # whitened in float32
        theirs = theirs.float()
    agree(ours, theirs, n.mask)
