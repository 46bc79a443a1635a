"""Packed rows and the passes over them: what they hold, what they train, what they refuse."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from ppo_runs import played, small
from torch.distributed.fsdp import MixedPrecisionPolicy

from mem1_kernels import BlockPlan, Segment, Trajectory, keep_all, keep_last, mem1
from mem1_kernels.hf import patch
from mem1_kernels.ppo.actor_critic import ActorCritic, attend, logit_transform
from mem1_kernels.ppo.batch import fill
from mem1_kernels.ppo.learner import Learner, check_accelerator, make_policy
from mem1_kernels.ppo.report import Stopwatch
from mem1_kernels.ppo.update import score_rows
from mem1_kernels.rollout import score
from python_tests.talking_processes import make_accelerator

Accelerator = pytest.importorskip("accelerate").Accelerator


@pytest.mark.parametrize("positions", ["kept", "reprefill"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_rows_hold_every_generated_token_once_and_score_it_as_alone(
    tmp_path, positions, group_size
):
    config = small(tmp_path, positions=positions, group_size=group_size, token_budget=150)
    learner, batch, rows = played(config)
    where = torch.cat([row.where for row in rows])
    assert torch.equal(where.sort().values, torch.arange(len(batch.sampled)))
    log_probs, _ = score_rows(learner, rows, batch.sampled, Stopwatch(where.device))
    alone = [
        score(learner.module.policy, e.layout).detach()[e.layout.loss_mask] for e in batch.rollouts
    ]
    assert (log_probs - torch.cat(alone)).abs().max() < 2e-5
    assert (log_probs - batch.sampled).abs().max() < 2e-5
    assert len(rows) > 1
    longest = max(e.layout.num_tokens for e in batch.rollouts)
    assert all(row.layout.num_tokens <= max(150, longest) for row in rows)
    for row in rows:
        numbers = batch.trajectory[row.where].unique_consecutive().tolist()
        assert len(numbers) == len(set(numbers)) == int(row.layout.document.max()) + 1


def test_a_group_shares_its_prompt_in_a_row(tmp_path):
    config = small(tmp_path, group_size=4, token_budget=4096)
    _, batch, (row,) = played(config)
    whole = sum(e.trajectory.num_tokens for e in batch.rollouts)
    prompt = batch.rollouts[0].trajectory.spans[0].stop
    assert row.layout.num_tokens == whole - 2 * 3 * prompt  # two tasks, four episodes each


def test_the_wrong_pairing_is_refused(tmp_path):
    config = small(tmp_path)
    learner, batch, _ = played(config)
    device = batch.sampled.device
    with pytest.raises(ValueError, match="their positions are 'kept', the trainer's 'reprefill'"):
        batch.rows([0], replace(config, positions="reprefill"), mem1, device)
    for wrong in (keep_all, keep_last(2)):
        with pytest.raises(ValueError, match=f"pruned by 'mem1', but .* by '{wrong.__name__[:9]}"):
            batch.rows([0], config, wrong, device)


def test_fill_keeps_to_its_budget():
    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.randint(1, 20) for _ in range(rng.randint(1, 30))]
        bins = fill(sizes, 16)
        assert sorted(item for members in bins for item in members) == list(range(len(sizes)))
        for members in bins:
            assert len(members) == 1 or sum(sizes[item] for item in members) <= 16
        assert sum(sum(sizes[i] for i in members) <= 8 for members in bins) <= 1


def test_only_adapters_are_trained_and_the_reference_is_the_model_after_the_warm_start(tmp_path):
    learner, batch, rows = played(small(tmp_path, lora_rank=4))
    assert all("lora_" in name for name in learner.trained)
    watch = Stopwatch(batch.sampled.device)
    before = score_rows(learner, rows, batch.sampled, watch)[0]
    with torch.no_grad():
        for parameter in learner.trained.values():
            parameter.add_(0.05)
    moved = score_rows(learner, rows, batch.sampled, watch)[0]
    assert (moved - before).abs().max() > 0.01
    with learner.as_reference():
        assert torch.equal(score_rows(learner, rows, batch.sampled, watch)[0], before)
    assert torch.equal(score_rows(learner, rows, batch.sampled, watch)[0], moved)


@pytest.mark.parametrize("critic", ["none", "head", "detached", "model"])
def test_what_the_value_loss_trains(tmp_path, critic):
    config = small(tmp_path, sft_steps=0)
    _, batch, rows = played(config)
    module = ActorCritic(make_policy(config), critic)
    if critic == "none":
        assert module(rows[0].layout, rows[0].plan)[2] is None
        return
    torch.nn.init.normal_(module.value_head.weight)
    _, _, values = module(rows[0].layout, rows[0].plan)
    values.sum().backward()
    assert module.value_head.weight.grad is not None
    trains_policy = any(p.grad is not None for p in module.policy.parameters())
    assert trains_policy == (critic == "head")
    if critic == "model":
        assert all(p.grad is not None for p in module.critic_model.parameters())


# the log-probs of many models

SMALL = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # wide, so that logits are
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
MODELS = {
    "Qwen2": {},
    "Qwen2 tied": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Llama": {},
    "Mistral": {},
    "Mixtral": {"num_local_experts": 4},
    "Phi": {"resid_pdrop": 0.1},
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
    "Starcoder2": {"use_bias": True},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "Gemma3": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "VaultGemma": {"head_dim": 16, "final_logit_softcapping": 5.0},
    "NanoChat": {},
    "Granite": {"logits_scaling": 8.0},
    "GraniteMoe": {"logits_scaling": 3.0, "num_local_experts": 4},
    "HyperCLOVAX": {"logits_scaling": 2.0},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.3},
    "MiniCPM3": LATENT | {"v_head_dim": 16, "num_key_value_heads": 4, "dim_model_base": 16},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "GPT2": {},
    "GPTNeoX": {"hidden_dropout": 0.1},
}
SCALED = {"Granite": 1 / 8, "HyperCLOVAX": 2.0, "Cohere": 0.25, "MiniCPM3": 0.25, "Qwen2": 1.0}


def build(name: str, **changes):
    """A tiny model of a family that this transformers has, not patched."""
    family = name.split()[0]
    config = getattr(transformers, f"{family}TextConfig", None)
    config = config or getattr(transformers, f"{family}Config", None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(3)
    shape = config(**{**SMALL, **MODELS[name], **changes})
    return getattr(transformers, family + suffix)(shape)


def short_layout() -> Trajectory:
    segments = [Segment("prompt", [5, 9, 11, 4])]
    for turn in range(3):
        segments += [
            Segment("state", [20 + turn, 21, 22], turn),
            Segment("action", [30 + turn, 31], turn),
            Segment("info", [40, 41 + turn, 42, 43], turn),
        ]
    return Trajectory(segments)


def check_log_probs(model, temperature: float) -> None:
    """ActorCritic in training against the model's own logits: log-probs, and their gradients."""
    layout = short_layout()
    module = ActorCritic(model, "head", temperature).train()
    found = module(layout, BlockPlan.of(layout))[0]
    weight = torch.linspace(-1, 1, len(found))
    (found * weight).sum().backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = score(model.eval(), layout, temperature=temperature)[layout.loss_mask]
    (expected * weight).sum().backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert (found - expected).abs().max() < 2e-5
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = gradient.abs().max().clamp(min=1e-3)
        assert (mine[name] - gradient).abs().max() < 1e-3 * largest, name


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_are_those_of_the_models_own_logits(name):
    model = patch(build(name))
    check_log_probs(model, temperature=1.3)
    if name in SCALED:
        assert logit_transform(model).scale == pytest.approx(SCALED[name], rel=1e-9)


@pytest.mark.parametrize("name", ["Granite", "Cohere", "Gemma2", "OPT", "Qwen2 tied"])
def test_log_probs_of_adapted_models(name):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    check_log_probs(patch(peft.get_peft_model(build(name), lora)), temperature=1.0)


@pytest.mark.parametrize("name", ["Granite", "MiniCPM3", "Gemma2"])
def test_the_scale_of_a_bfloat16_model(name):
    exact = logit_transform(patch(build(name)))
    rounded = logit_transform(patch(build(name).bfloat16()))
    assert rounded.scale == pytest.approx(exact.scale, rel=1e-3)
    assert rounded.softcap == exact.softcap


class Changed(transformers.Qwen2ForCausalLM):
    """Does something to what its head reads, and to its logits."""

    def forward(self, input_ids, **options):
        hidden = self.before(self.model(input_ids=input_ids, **options).last_hidden_state)
        logits = self.after(self.lm_head(hidden))
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def same(x):
    return x


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (same, lambda z: z[..., :-4], r"one logit for each output .*\[1, 16, 48\], got .* 44\]"),
        (same, lambda z: z.index_fill(-1, torch.tensor([7]), -1e9), "changes the output x"),
        (same, lambda z: z - 3, "changes the output x"),
        (same, lambda z: -z, "changes the output x"),
        (same, lambda z: z.clamp(-30, 30), "changes the output x"),
        (same, lambda z: z.log_softmax(-1), "changes the output x"),
        (same, lambda z: z / z.norm(dim=-1, keepdim=True), "changes the output x"),
        (lambda h: h.relu(), same, "changes its decoder's hidden states"),
        (lambda h: h * torch.linspace(1, 2, 64), same, "changes its decoder's hidden states"),
        (lambda h: h + 1, same, "changes its decoder's hidden states"),
        (lambda h: torch.dropout(h, 0.5, True), same, "changes its decoder's hidden states"),
        (lambda h: h[:, :-1], same, "one logit for each output"),
    ],
)
def test_a_head_that_the_log_probs_cannot_follow_is_refused(before, after, said):
    model = Changed(transformers.Qwen2Config(**SMALL))
    model.before, model.after = same, same
    patch(model)
    assert logit_transform(model) == (1.0, None)
    model.before, model.after = before, after
    with pytest.raises(ValueError, match=f"policy: .*{said}") as error:
        ActorCritic(model, "none")
    assert "Changed" in str(error.value)


def test_heads_decoders_and_noise_that_are_refused():
    model = Changed(transformers.Qwen2Config(**SMALL))
    model.before, model.after = lambda hidden: hidden * 0.5, same
    assert logit_transform(patch(model)) == (0.5, None)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(48))
    with pytest.raises(ValueError, match="Changed changes .* without a bias .* a multiple"):
        logit_transform(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="plain linear LM head, got Sequential in Changed"):
        logit_transform(model)
    plain = patch(build("Qwen2"))
    plain.get_decoder = lambda: plain.lm_head
    with pytest.raises(ValueError, match=r"get_decoder\(\) of Qwen2ForCausalLM, got Linear"):
        logit_transform(plain)
    noisy = patch(build("Mixtral", router_jitter_noise=0.1))
    with pytest.raises(ValueError, match="MixtralForCausalLM computes other .* in training"):
        ActorCritic(noisy, "head")
    assert noisy.training


def test_no_dropout_of_any_kind_is_left():
    module = ActorCritic(patch(build("OPT", dropout=0.3, layerdrop=0.2)), "model").train()
    layout = short_layout()
    plan = BlockPlan.of(layout)
    first, second = module(layout, plan), module(layout, plan)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# what accelerate may be asked for


def test_dropout_is_off_and_other_accumulation_is_refused(tmp_path, monkeypatch):
    from mem1_kernels.ppo import learner as module

    def with_dropout(config):
        policy = make_policy(config)
        policy.model.layers[0].mlp.add_module("dropout", torch.nn.Dropout(0.5))
        return policy

    monkeypatch.setattr(module, "make_policy", with_dropout)
    learner = Learner(small(tmp_path), Accelerator())
    rates = [m.p for m in learner.module.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.0]
    with pytest.raises(ValueError, match="gradient_accumulation_steps: expected 1, .*, got 4"):
        Learner(small(tmp_path), Accelerator(gradient_accumulation_steps=4))
    with pytest.warns(UserWarning, match="dtype: weights in bfloat16 lose updates"):
        Learner(small(tmp_path, dtype="bfloat16"), Accelerator())


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: .* got True"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: .* got True"),
        ("FSDP_IGNORED_MODULES", "lm_head", "fsdp_ignored_modules: .* got 'lm_head'"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy: .* SIZE_BASED_WRAP"),
        ("FSDP_VERSION", "1", "expected one process, DDP or FSDP2"),
    ],
)
def test_settings_of_fsdp_that_would_not_train_exactly(tmp_path, monkeypatch, setting, value, said):
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(setting, value)
    with pytest.raises(ValueError, match=said):
        Learner(small(tmp_path), make_accelerator("FSDP2", "no"))


@pytest.mark.parametrize(
    ("precision", "given", "said"),
    [
        (
            "bf16",
            MixedPrecisionPolicy(BF16, BF16),
            "expected reduce_dtype torch.float32 .*bfloat16",
        ),
        ("bf16", MixedPrecisionPolicy(BF16, FP32, BF16), "expected output_dtype torch.float32"),
        ("bf16", MixedPrecisionPolicy(), "expected param_dtype torch.bfloat16 .* got None"),
        ("no", MixedPrecisionPolicy(BF16), "expected param_dtype torch.float32 .* 'no'"),
        ("no", MixedPrecisionPolicy(output_dtype=torch.float16), "expected output_dtype"),
        ("bf16", MixedPrecisionPolicy(BF16, BF16, BF16), None),  # what accelerate sets by itself
        ("bf16", MixedPrecisionPolicy(BF16, FP32, FP32), None),
        ("bf16", MixedPrecisionPolicy(BF16), None),
        ("no", MixedPrecisionPolicy(FP32, FP32), None),
        ("no", None, None),
    ],
)
def test_precision_policies_of_fsdp(monkeypatch, precision, given, said):
    monkeypatch.setenv("FSDP_VERSION", "2")
    accelerator = make_accelerator("FSDP2", precision)
    accelerator.state.fsdp_plugin.mixed_precision_policy = given
    if said is not None:
        with pytest.raises(ValueError, match=f"mixed_precision_policy: {said}"):
            check_accelerator(accelerator)
        return
    check_accelerator(accelerator)
    check_accelerator(accelerator)  # of a second run on the same accelerator
    chosen = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert chosen.param_dtype == (BF16 if precision == "bf16" else given and given.param_dtype)
    assert chosen.reduce_dtype == FP32
    assert chosen.output_dtype in (None, FP32)


def test_settings_of_accelerate_that_would_not_train_exactly(tmp_path, monkeypatch):
    rounded = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)
    accelerator = Accelerator(kwargs_handlers=[rounded])
    with pytest.raises(ValueError, match="comm_hook: expected none, as it rounds .*bf16"):
        Learner(small(tmp_path), accelerator)
    plain = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=1)])
    check_accelerator(plain)
    plain.state.parallelism_config = SimpleNamespace(tp_enabled=False, cp_enabled=True)
    with pytest.raises(ValueError, match="expected data parallelism only, got cp"):
        check_accelerator(plain)
    monkeypatch.setenv("FSDP_VERSION", "2")
    config = small(tmp_path, dtype="bfloat16")
    with (
        pytest.warns(UserWarning, match="dtype: weights in bfloat16"),
        pytest.raises(ValueError, match="dtype: expected 'float32' .*under FSDP2.*'bfloat16'"),
    ):
        Learner(config, make_accelerator("FSDP2", "no"))


def test_the_masks_of_the_ablation(tmp_path):
    from bench.mask_ablation import attend_as_released, attend_release, released_layout
    from mem1_kernels import Trajectory, mem1_release, pack, visible

    config = small(tmp_path, token_budget=4096)
    learner, batch, (row,) = played(config)
    policy, layout = learner.module.policy, row.layout
    meant = released_layout(layout)
    order = batch.trajectory[row.where].unique_consecutive().tolist()
    direct = pack([Trajectory(batch.rollouts[n].trajectory.segments, mem1_release) for n in order])
    assert torch.equal(visible(meant.expiry, meant.floor), visible(direct.expiry, direct.floor))

    with torch.no_grad():
        hidden = {f.__name__: f(policy, layout, row.plan) for f in (attend, attend_release)}
        released = attend_as_released(policy, layout, row.plan)
        assert torch.equal(attend(policy, layout, row.plan), hidden["attend"])  # patched again
        assert (hidden["attend"] - hidden["attend_release"]).abs().max() > 0.01
        assert (hidden["attend_release"] - released).abs().max() > 0.01
        last = int((layout.document == 0).nonzero().max())
        layout.token_ids[last] = (layout.token_ids[last] + 1) % 50
        changed = (attend_as_released(policy, layout, row.plan) - released).abs().amax(1)
        assert (changed[layout.document == 0] > 0).all()  # the future is seen
        assert (changed[layout.document > 0] == 0).all()  # other trajectories are not
