"""Log-probs and values of the trained module, against the logits of many kinds of models."""

from __future__ import annotations

import pytest
import torch
import transformers
from ppo_runs import played, small

from mem1_kernels import BlockPlan, Segment, Trajectory
from mem1_kernels.hf import patch
from mem1_kernels.ppo.actor_critic import ActorCritic, logit_transform
from mem1_kernels.ppo.learner import make_policy
from mem1_kernels.rollout import score

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
        (same, lambda z: z[..., :-4], r"one logit for each output .*\[1, 8, 48\], got .* 44\]"),
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
