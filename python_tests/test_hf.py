"""Patched transformers models against the same models in eager under dense additive masks."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")

from mem1_kernels import (  # noqa: E402
    BlockPlan,
    Layout,
    Segment,
    Trajectory,
    fold,
    hf,
    keep_last,
    mem1,
    mem1_release,
    pack,
    unroll,
    visible,
)
from mem1_kernels.mask import windowed  # noqa: E402
from mem1_kernels.testing import turns  # noqa: E402

VOCABULARY = 48
WINDOW = 9
# Wide initial weights, so that attention is far from uniform and a wrong mask shows.
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOTH = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2-window": ("Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": True, **BOTH}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 24}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {"head_dim": 16, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 20, **BOTH},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 16, "query_pre_attn_scalar": 20, **BOTH},
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "phi": ("PhiConfig", "PhiForCausalLM", {}),
}
WINDOWED = ("qwen2-window", "mistral", "gemma2", "gemma3")


def build(family: str, **changes: Any) -> Any:
    config_name, model_name, own = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**TINY, **own, **changes})
    torch.manual_seed(3)
    model = getattr(transformers, model_name)(config)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # older transformers default to sdpa: no softcap
    return model


def ids_for(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(7))


def plan_of(layout: Layout) -> BlockPlan:
    return BlockPlan.of(layout)


def additive(mask: Tensor) -> Tensor:
    """`[batch, tokens, tokens]` bool as what eager attention adds to its scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None]


def dense_logits(model: Any, ids: Tensor, position_ids: Tensor, mask: Tensor) -> Tensor:
    """The unpatched model in eager; windows cut the mask by the distance of positions."""
    near = position_ids[:, :, None] - position_ids[:, None, :] < WINDOW
    kinds = getattr(model.config, "layer_types", None)
    by_kind = {"full_attention": additive(mask), "sliding_attention": additive(mask & near)}
    if model.config.model_type == "mistral":
        attention_mask: Any = by_kind["sliding_attention"]
    elif kinds and "sliding_attention" in kinds:
        attention_mask = by_kind
    else:
        attention_mask = by_kind["full_attention"]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(
            ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).logits
    finally:
        model.set_attn_implementation(before)


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    model.zero_grad()
    (logits * direction).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(got: Tensor, expected: Tensor, bound: float = 2e-5) -> None:
    error = (got - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert error <= bound, f"differs by {error:.3e}"


def trajectory(seed: int, policy: Callable[..., Any] = mem1) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    segments = [Segment("prompt", 6)]
    for turn in range(1, 5):
        sizes = torch.randint(1, 8, (3,), generator=generator).tolist()
        depth = turn % 2 if policy is fold else 0
        segments += [
            Segment(role, size, turn, depth)
            for role, size in zip(("state", "action", "info"), sizes, strict=True)
        ]
    return Trajectory(segments, policy)


LAYOUTS: dict[str, Layout] = {
    "kept": pack([trajectory(1), trajectory(2, keep_last(2)), trajectory(3, fold)]),
    "tree": pack([[trajectory(1), trajectory(2)], trajectory(3)]),
    "unrolled": pack([unroll(trajectory(1)), unroll(trajectory(2))]),
    "released": trajectory(1, mem1_release),
    "tiles": turns(20, 4, 15, 9, 60),
}


class TestWindowed:
    @pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 64, 1000])
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_equals_the_dense_mask_over_positions(self, name: str, window: int) -> None:
        layout = LAYOUTS[name]
        position = layout.position_ids
        expected = visible(layout.expiry, layout.floor)
        expected &= position[:, None] - position[None, :] < window
        expiry, floor = windowed(layout.expiry, layout.floor, position, window)
        assert expiry.dtype == floor.dtype == torch.int32
        assert torch.equal(visible(expiry, floor), expected)

    @pytest.mark.parametrize("seed", range(40))
    def test_random_trees_with_jumping_positions(self, seed: int) -> None:
        expiry, position = random_tree(torch.Generator().manual_seed(seed))
        expected = visible(expiry) & (position[:, None] - position[None, :] < 6)
        assert torch.equal(visible(*windowed(expiry, None, position, 6)), expected)

    def test_rows_of_different_layouts_and_positions(self) -> None:
        expiry = torch.tensor([[6, 6, 6, 6, 6, 6], [3, 3, 3, 6, 6, 6], [6, 1, 2, 6, 6, 6]])
        position = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 9, 10]])
        got = visible(*windowed(expiry, None, position, 2))
        near = position[:, :, None] - position[:, None, :] < 2
        dead = expiry <= torch.arange(6)
        expected = visible(expiry) & near
        assert torch.equal(got[~dead], expected[~dead])
        shared = visible(*windowed(expiry[0], None, position[[0, 0]] * torch.tensor([[1], [2]]), 2))
        assert torch.equal(shared[0], expected[0])
        assert torch.equal(shared[1], torch.eye(6, dtype=torch.bool))

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"window": 0}, ValueError, "window: expected at least 1 token, got 0"),
            ({"position_ids": torch.zeros(4)}, TypeError, "position_ids: expected an int32 or"),
            ({"position_ids": [0, 1, 2, 3]}, TypeError, "position_ids: expected an int32 or"),
            ({"position_ids": torch.arange(5)}, ValueError, "expected 4 tokens in 1 or 1 rows"),
            ({"position_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, "rising positions"),
        ],
    )
    def test_errors(self, changes: dict, error: type[Exception], message: str) -> None:
        arguments = {"position_ids": torch.arange(4), "window": 2, **changes}
        with pytest.raises(error, match=message):
            windowed(torch.full((4,), 4), None, **arguments)

    def test_operator(self) -> None:
        expiry, position = random_tree(torch.Generator().manual_seed(0))
        torch.library.opcheck(
            torch.ops.mem1.window_floor.default, (expiry[None], position[None], 4)
        )


def random_tree(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A depth-first tree whose positions rise along every path, not always by one."""

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    expiry: list[int] = []
    position: list[int] = []

    def grow(start: int, depth: int) -> None:
        begin, here = len(expiry), start
        for _ in range(draw(7)):
            position.append(here)
            expiry.append(0)
            here += 1 + (draw(4) if draw(5) == 0 else 0)
        own = len(expiry)
        for _ in range(draw(4) if depth < 3 else 0):
            grow(here + draw(2), depth + 1)
        expiry[begin:own] = [len(expiry)] * (own - begin)

    while len(expiry) < 40:
        grow(0, 0)
    return torch.tensor(expiry), torch.tensor(position)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["kept", "tree"])
def test_logits_and_gradients_equal_the_dense_mask(family: str, name: str) -> None:
    model, layout = build(family), LAYOUTS[name]
    ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
    expected = dense_logits(model, ids, position_ids, visible(layout.expiry, layout.floor)[None])
    expected_gradients = gradients(model, expected)
    with hf.patched(model):
        got = model(ids, position_ids=position_ids, plan=plan_of(layout)).logits
        got_gradients = gradients(model, got)
        causal = model(ids, attention_mask=torch.ones_like(ids), position_ids=position_ids).logits
    assert (causal - expected).abs().max() > 0.1, "the mask must matter"
    assert_close(got, expected)
    assert got_gradients.keys() == expected_gradients.keys()
    for parameter, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert_close(got_gradients[parameter] / scale, gradient / scale, 5e-5)


@pytest.mark.parametrize("name", ["unrolled", "released", "tiles"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3"])
def test_other_layouts(family: str, name: str) -> None:
    model, layout = build(family), LAYOUTS[name]
    ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
    with torch.no_grad():
        mask = visible(layout.expiry, layout.floor)[None]
        expected = dense_logits(model, ids, position_ids, mask)
        with hf.patched(model):
            got = model(ids, position_ids=position_ids, plan=plan_of(layout)).logits
    assert_close(got, expected)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize("form", ["documents", "group", "unrolled"])
def test_packed_equals_apart(family: str, form: str) -> None:
    model, members = build(family).eval(), [trajectory(1), trajectory(2)]
    ids = [ids_for(member.num_tokens)[0] + 0 for member in members]
    ids[1][6:] = ids[1][6:].flip(0)  # the prompts agree, what follows them does not
    layouts: list[Layout] = [unroll(m) for m in members] if form == "unrolled" else list(members)
    packed = pack([layouts]) if form == "group" else pack(layouts)
    packed_ids = torch.cat(ids)[packed.source]
    with torch.no_grad(), hf.patched(model):
        together = model(
            packed_ids[None], position_ids=packed.position_ids[None], plan=plan_of(packed)
        ).logits[0]
        shared = 6 if form == "group" else 0
        apart = []
        for number, (layout, own) in enumerate(zip(layouts, ids, strict=True)):
            logits = model(
                own[layout.source][None],
                position_ids=layout.position_ids[None],
                plan=plan_of(layout),
            ).logits[0]
            apart.append(logits[shared if number else 0 :])
    assert_close(together, torch.cat(apart))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_without_a_plan(family: str, side: str) -> None:
    model, ids = build(family).eval(), ids_for(30, batch=2)
    attention_mask = torch.ones_like(ids)
    hole = slice(0, 11) if side == "left" else slice(19, 30)
    attention_mask[0, hole] = 0
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    keep = attention_mask.bool()
    with torch.no_grad():
        expected = model(ids, attention_mask=attention_mask, position_ids=position_ids).logits
        with hf.patched(model):
            got = model(ids, attention_mask=attention_mask, position_ids=position_ids).logits
            changed = ids.masked_fill(~keep, 5)
            again = model(changed, attention_mask=attention_mask, position_ids=position_ids).logits
            alone = model(ids[:1, keep[0]]).logits[0]
    assert not got.isnan().any()
    assert_close(got[keep], expected[keep])
    assert_close(got[0, keep[0]], alone)
    assert torch.equal(got[keep], again[keep])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_beside_a_plan(family: str) -> None:
    model, layout = build(family).eval(), trajectory(1)
    tokens = layout.num_tokens
    ids = ids_for(tokens, batch=2)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, -8:] = 0
    position_ids = layout.position_ids.expand(2, -1)
    with torch.no_grad(), hf.patched(model):
        plan = plan_of(layout)
        got = model(ids, position_ids=position_ids, attention_mask=attention_mask, plan=plan).logits
        whole = model(ids, position_ids=position_ids, plan=plan).logits
    assert_close(got[0], whole[0])
    assert_close(got[1, :-8], whole[1, :-8])
    assert (got[1, -8:] - whole[1, -8:]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_batch_rows_of_different_layouts(family: str) -> None:
    model = build(family).eval()
    layouts = [turns(9, 3, 4, 3, 8), turns(12, 3, 2, 2, 9)]
    tokens = max(layout.num_tokens for layout in layouts)
    ids = ids_for(tokens, batch=2)
    expiry = torch.arange(tokens, dtype=torch.int32).repeat(2, 1)  # padding is seen by nobody
    for row, layout in enumerate(layouts):
        expiry[row, : layout.num_tokens] = layout.expiry
    with torch.no_grad(), hf.patched(model):
        got = model(ids, plan=BlockPlan.from_expiry(expiry)).logits
        for row, layout in enumerate(layouts):
            alone = model(ids[row : row + 1, : layout.num_tokens], plan=plan_of(layout)).logits
            assert_close(got[row, : layout.num_tokens], alone[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen2-window", "gemma3"])
def test_packed_positions_without_a_plan_stay_apart(family: str) -> None:
    """Positions that start again part a row into documents, in transformers as here."""
    model, ids = build(family).eval(), ids_for(50)
    position_ids = torch.cat([torch.arange(20), torch.arange(30)])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=position_ids, use_cache=False).logits
        with hf.patched(model):
            got = model(ids, position_ids=position_ids, use_cache=False).logits
    assert_close(got, expected)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("sampled", [False, True])
def test_generate_goes_on_as_before(family: str, sampled: bool) -> None:
    model, ids = build(family).eval(), ids_for(14, batch=2)
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :5] = 0

    def run() -> Any:
        torch.manual_seed(0)
        return model.generate(
            ids,
            attention_mask=attention_mask,
            do_sample=sampled,
            max_new_tokens=12,
            output_logits=True,
            return_dict_in_generate=True,
        )

    expected = run()
    with hf.patched(model):
        got = run()
    assert torch.equal(got.sequences, expected.sequences)
    for one, other in zip(got.logits, expected.logits, strict=True):
        assert_close(one, other)


def test_chunked_prefill_and_gradients_through_a_cache() -> None:
    model, ids = build("gemma2"), ids_for(40)
    with hf.patched(model):
        whole = model(ids, use_cache=False).logits
        cache = transformers.DynamicCache(config=model.config)
        first = model(ids[:, :25], past_key_values=cache).logits
        second = model(ids[:, 25:], past_key_values=cache).logits
    assert_close(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_unpatch_restores_the_model_to_the_bit(family: str) -> None:
    model, ids = build(family).eval(), ids_for(40)
    model.set_attn_implementation("eager")
    state = copy.deepcopy(
        {k: v for k, v in vars(model.config).items() if not isinstance(v, torch.dtype)}
    )
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        before = model(ids).logits
        with hf.patched(model) as same:
            assert same is model and hf.is_patched(model)
            assert model.config._attn_implementation == hf.NAME
            model(ids, plan=BlockPlan.from_expiry(torch.full((40,), 40)))
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not hf.is_patched(model) and model.config._attn_implementation == "eager"
    for name, value in state.items():
        assert getattr(model.config, name) == value, name
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
    assert attributes == [set(vars(module)) for module in model.modules()]


def test_patched_restores_after_an_error_and_leaves_an_outer_patch_alone() -> None:
    model = build("qwen2")
    with pytest.raises(ZeroDivisionError), hf.patched(model):
        raise ZeroDivisionError
    assert not hf.is_patched(model)
    with hf.patched(model):
        with hf.patched(model):
            pass
        assert hf.is_patched(model)
    assert not hf.is_patched(model)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM is not patched"):
        hf.unpatch(model)
    hf.patch(model)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM is patched already"):
        hf.patch(model)
    twin = copy.deepcopy(model)
    hf.unpatch(twin)
    assert hf.is_patched(model) and not hf.is_patched(twin)
    assert not twin._forward_pre_hooks and model._forward_pre_hooks


def test_text_decoder_of_a_multimodal_model() -> None:
    text = {**TINY, "head_dim": 16, **BOTH}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    layout = LAYOUTS["tree"]
    ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
    with hf.patched(model), torch.no_grad():
        assert config.text_config._attn_implementation == hf.NAME
        assert config.vision_config._attn_implementation != hf.NAME
        got = model(ids, position_ids=position_ids, plan=plan_of(layout)).logits
        whole = model(ids, attention_mask=torch.ones_like(ids), position_ids=position_ids).logits
        assert (got - whole).abs().max() > 1e-4
        with pytest.raises(ValueError, match="position_ids: expected those of the layout of this"):
            model(ids, plan=plan_of(layout))
        with pytest.raises(ValueError, match="labels: the loss takes each token to be predicted"):
            model(ids, position_ids=position_ids, plan=plan_of(layout), labels=ids)
    assert config.text_config._attn_implementation != hf.NAME


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, layout = build("gemma3").train(), LAYOUTS["kept"]
    ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
    with hf.patched(model):
        plan = plan_of(layout)
        plain = gradients(model, model(ids, position_ids=position_ids, plan=plan).logits)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed = gradients(
            model, model(ids, position_ids=position_ids, plan=plan, use_cache=False).logits
        )
    for name, gradient in plain.items():
        assert_close(checkpointed[name], gradient, 1e-6)


class PlansBuilt(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.mem1.block_plan.default
        return func(*args, **(kwargs or {}))


def test_plans_are_derived_once_a_pass_and_kind_of_layer() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model, ids = build("gemma3", num_hidden_layers=4, layer_types=kinds).train(), ids_for(40)
    model.gradient_checkpointing_enable()
    plan = BlockPlan.from_expiry(torch.full((40,), 40))
    with hf.patched(model):
        for options, expected in (({"plan": plan}, 1), ({}, 2)):
            with PlansBuilt() as built:
                model(ids, use_cache=False, **options).logits.sum().backward()
            assert built.count == expected


def test_peft_lora() -> None:
    peft = pytest.importorskip("peft")
    layout = LAYOUTS["kept"]
    ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = build("qwen2")
    with hf.patched(model):
        adapted = peft.get_peft_model(model, lora)
        assert hf.is_patched(adapted)
        got = adapted(input_ids=ids, position_ids=position_ids, plan=plan_of(layout)).logits
        assert any("lora" in name for name in gradients(adapted, got))
    mask = visible(layout.expiry, layout.floor)[None]
    assert_close(got, dense_logits(adapted.merge_and_unload(), ids, position_ids, mask))


def test_token_classification_head() -> None:
    torch.manual_seed(3)
    model = transformers.Qwen2ForTokenClassification(
        transformers.Qwen2Config(**TINY, num_labels=1)
    ).eval()
    layout = LAYOUTS["kept"]
    ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
    with torch.no_grad():
        mask = visible(layout.expiry, layout.floor)[None]
        expected = dense_logits(model, ids, position_ids, mask)
        with hf.patched(model):
            got = model(ids, position_ids=position_ids, plan=plan_of(layout)).logits
    assert got.shape == (1, layout.num_tokens, 1)
    assert_close(got, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    layout = LAYOUTS["tree"]
    ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
    mask = visible(layout.expiry, layout.floor)[None]
    model = build("qwen3").eval()
    with torch.no_grad():
        exact = dense_logits(model, ids, position_ids, mask)
        if not autocast:
            model = model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            dense = dense_logits(model, ids, position_ids, mask.to(torch.bool))
            with hf.patched(model):
                got = model(ids, position_ids=position_ids, plan=plan_of(layout)).logits
    allowed = 2 * (dense.float() - exact).abs().max()
    assert (got.float() - exact).abs().max() <= allowed + torch.finfo(torch.bfloat16).eps


def test_compiles_whole_and_once_for_all_layouts() -> None:
    model = build("gemma3", num_hidden_layers=1, layer_types=["sliding_attention"])
    hf.patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    # Four tiles or more: below, sizes of a plan's lists coincide and are taken for one.
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layout in (turns(60, 5, 20, 9, 90), turns(80, 7, 13, 20, 99), turns(70, 6, 30, 9, 60)):
            ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
            arguments = {"position_ids": position_ids, "plan": plan_of(layout), "use_cache": False}
            expected = gradients(model, model(ids, **arguments).logits)
            for name, gradient in gradients(model, compiled(ids, **arguments).logits).items():
                assert_close(gradient, expected[name])
    torch._dynamo.reset()


_DDP = """
import datetime, faulthandler, sys
faulthandler.dump_traceback_later(200, exit=True)
import torch, torch.distributed as dist, transformers
sys.path[:0] = [{root!r}, {tests!r}]
from test_hf import build, ids_for, plan_of, LAYOUTS
from mem1_kernels import hf
rank, patience = int(sys.argv[1]), datetime.timedelta(seconds=100)
dist.init_process_group("gloo", {store!r}, timeout=patience, rank=rank, world_size=2)
model = hf.patch(build("qwen2", num_hidden_layers=1))
layouts = [LAYOUTS["kept"], LAYOUTS["tree"]]

def loss(run, layout):
    ids = ids_for(layout.num_tokens)
    out = run(input_ids=ids, position_ids=layout.position_ids[None], plan=plan_of(layout))
    return out.logits.square().mean()

(0.5 * (loss(model, layouts[0]) + loss(model, layouts[1]))).backward()
expected = {{name: p.grad.clone() for name, p in model.named_parameters()}}
model.zero_grad()
parallel = torch.nn.parallel.DistributedDataParallel(model)
loss(parallel, layouts[rank]).backward()
for name, p in model.named_parameters():
    error = (p.grad - expected[name]).abs().max() / expected[name].abs().max()
    assert error <= 1e-5, (name, float(error))
del parallel  # outliving its process group it can hang (pytorch 2.13, gloo)
dist.destroy_process_group()
"""


def test_data_parallel_with_a_plan_a_rank(tmp_path: Any) -> None:
    """Of the op itself too: the gradient of two processes is that of one."""
    tests = os.path.dirname(os.path.abspath(__file__))
    script = _DDP.format(
        root=os.path.dirname(tests), tests=tests, store=f"file://{tmp_path / 'store'}"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()


def test_a_plan_arrives_through_layers_that_fsdp_wraps() -> None:
    """Where FSDP casts a layer's inputs, it hands on copies of every dataclass among them."""
    from torch.distributed.utils import _apply_to_tensors

    def cast(module: Any, args: Any, kwargs: Any) -> Any:
        return tuple(_apply_to_tensors(torch.Tensor.clone, part) for part in (args, kwargs))

    model, layout = hf.patch(build("gemma2")), LAYOUTS["kept"]
    ids = ids_for(layout.num_tokens)
    arguments = {"position_ids": layout.position_ids[None], "plan": plan_of(layout)}
    expected = model(ids, **arguments).logits
    for layer in model.model.layers:
        layer.register_forward_pre_hook(cast, with_kwargs=True)
    assert torch.equal(model(ids, **arguments).logits, expected)


def test_importing_the_package_leaves_transformers_alone() -> None:
    check = (
        "import sys, mem1_kernels; assert 'transformers' not in sys.modules\n"
        "from mem1_kernels import hf\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert hf.NAME not in AttentionInterface(), AttentionMaskInterface()\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=os.path.dirname(__file__) + "/..")


def test_a_pickled_model_runs_where_nobody_patches(tmp_path: Path) -> None:
    model = hf.patch(build("qwen2").eval())
    torch.save((model, model(ids_for(12)).logits), tmp_path / "model.pt")
    check = (
        "import sys, torch\n"
        "model, logits = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(torch.load(sys.argv[2])).logits, logits)\n"
    )
    torch.save(ids_for(12), tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("model.pt", "ids.pt")]
    subprocess.run([sys.executable, "-c", check, *paths], check=True)


UNREACHED = {
    "Nemotron": ({}, "plan: NemotronModel does not hand it to its attention"),
    "Lfm2": (
        {"layer_types": ["conv", "full_attention"]},
        r"plan: expected a model of full and sliding-window .* other kinds: \['conv'\]",
    ),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_a_plan_that_does_not_reach_every_layer_is_refused(name: str) -> None:
    own, message = UNREACHED[name]
    if not getattr(transformers, f"{name}ForCausalLM")._supports_attention_backend:
        pytest.skip("this transformers gives it no attention backend: patch() raises")
    config = getattr(transformers, f"{name}Config")(**{**TINY, "num_hidden_layers": 2, **own})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if not model._supports_attention_backend:
        pytest.skip(f"transformers {transformers.__version__} has no replaceable one in {name}")
    before = model(ids_for(12)).logits
    with hf.patched(model):
        assert_close(model(ids_for(12)).logits, before)
        with pytest.raises(ValueError, match=message):
            model(ids_for(12), plan=BlockPlan.from_expiry(torch.tensor([6] * 6 + [12] * 6)))


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40])
def test_a_window_that_is_wider_than_int32(window: int) -> None:
    model = build("mistral", sliding_window=window).eval()
    ids = ids_for(12)
    want = model(ids, use_cache=False).logits
    with hf.patched(model):
        assert_close(model(ids, use_cache=False).logits, want)
        plan = BlockPlan.from_expiry(torch.full((12,), 12))
        positions = torch.arange(12, dtype=torch.int32)[None]
        assert_close(model(ids, position_ids=positions, plan=plan).logits, want)


class TestRefusals:
    @pytest.fixture
    def model(self) -> Any:
        return hf.patch(build("qwen2").eval())

    @pytest.fixture
    def plan(self) -> BlockPlan:
        return BlockPlan.from_expiry(torch.full((12,), 12))

    def test_misspelt_keyword(self, model: Any, plan: BlockPlan) -> None:
        with pytest.raises(TypeError, match="plna: neither the model nor its patch knows"):
            model(ids_for(12), plna=plan)

    def test_plan_of_another_type_or_size(self, model: Any, plan: BlockPlan) -> None:
        with pytest.raises(TypeError, match="plan: expected a BlockPlan, got Tensor"):
            model(ids_for(12), plan=plan.expiry)
        with pytest.raises(ValueError, match="plan: expected 13 tokens, got 12"):
            model(ids_for(13), plan=plan)
        rows = BlockPlan.from_expiry(torch.full((3, 12), 12))
        with pytest.raises(ValueError, match="plan: expected 12 tokens in 1 or 2 rows"):
            model(ids_for(12, batch=2), plan=rows)

    def test_masks_of_another_kind(self, model: Any, plan: BlockPlan) -> None:
        mask = torch.ones(1, 1, 12, 12)
        with pytest.raises(ValueError, match="attention_mask: expected 2D .*, got 4D"):
            model(ids_for(12), attention_mask=mask)
        with pytest.raises(ValueError, match="attention_mask: expected 2D .*, got 4D"):
            model(ids_for(12), attention_mask=mask, plan=plan)
        with pytest.raises(ValueError, match=r"attention_mask: expected \[1, 12\], got \[1, 11\]"):
            model(ids_for(12), attention_mask=torch.ones(1, 11), use_cache=False)

    def test_attention_weights(self, model: Any) -> None:
        with pytest.raises(ValueError, match="output_attentions: no attention weights"):
            model(ids_for(12), output_attentions=True)

    def test_dropout_only_in_training(self) -> None:
        model = hf.patch(build("qwen2", attention_dropout=0.1))
        model.eval()(ids_for(12))
        with pytest.raises(ValueError, match="attention_dropout: expected 0 .* got 0.1"):
            model.train()(ids_for(12))

    def test_plan_over_a_cache(self, model: Any, plan: BlockPlan) -> None:
        cache = model(ids_for(5)).past_key_values
        with pytest.raises(ValueError, match="plan: .* past_key_values brings 5 more"):
            model(ids_for(12), past_key_values=cache, plan=plan)

    def test_a_cache_from_a_plan(self, model: Any, plan: BlockPlan) -> None:
        """It would hold what the plan dropped, and a later pass would not know."""
        assert model(ids_for(12), plan=plan).past_key_values is None
        with pytest.raises(ValueError, match="use_cache: expected False or None"):
            model(ids_for(12), plan=plan, use_cache=True)

    def test_a_config_of_two_models(self, plan: BlockPlan) -> None:
        one = build("qwen2")
        two = type(one)(one.config)
        with hf.patched(one):
            with pytest.raises(ValueError, match="model: the config .* says 'mem1' already"):
                hf.patch(two)
        with hf.patched(two):
            two(ids_for(12), plan=plan)
        assert one.config._attn_implementation == "sdpa"

    def test_static_cache(self, model: Any) -> None:
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        with pytest.raises(ValueError, match="past_key_values: static caches are not supported"):
            model(ids_for(12), past_key_values=cache)
        with pytest.raises(ValueError, match="past_key_values: static caches are not supported"):
            model.generate(ids_for(12), cache_implementation="static", max_new_tokens=2)

    def test_attention_replaced_after_patch(self, plan: BlockPlan) -> None:
        model = hf.patch(build("qwen2"))
        model.set_attn_implementation("sdpa")
        model(ids_for(12))
        with pytest.raises(ValueError, match="plan: needs attention 'mem1', .* set to 'sdpa'"):
            model(ids_for(12), plan=plan)

    def test_sinks(self) -> None:
        config = transformers.GptOssConfig(
            **TINY, head_dim=16, num_local_experts=2, num_experts_per_tok=1
        )
        model = hf.patch(transformers.GptOssForCausalLM(config).eval())
        with pytest.raises(ValueError, match="s_aux: attention sinks"):
            model(ids_for(12))

    def test_chunked_attention(self) -> None:
        config = transformers.Llama4TextConfig(
            **TINY, head_dim=16, num_local_experts=1, attention_chunk_size=8
        )
        model = hf.patch(transformers.Llama4ForCausalLM(config).eval())
        with pytest.raises(ValueError, match="chunked attention is not supported"):
            model(ids_for(12))

    def test_models_without_causal_attention(self) -> None:
        bidirectional = build("gemma3", use_bidirectional_attention=True)
        with pytest.raises(ValueError, match="model: Gemma3ForCausalLM is not causal"):
            hf.patch(bidirectional)
        encoder = transformers.BertModel(
            transformers.BertConfig(**{**TINY, "num_key_value_heads": 4})
        )
        with pytest.raises(ValueError, match="model: BertModel is not causal"):
            hf.patch(encoder)
        small = {**TINY, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 4}
        t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
            hf.patch(t5)

    def test_models_that_keep_keywords_from_their_attention(self) -> None:
        config = transformers.StableLmConfig(**TINY)
        with pytest.raises(ValueError, match="StableLmForCausalLM does not hand keywords"):
            hf.patch(transformers.StableLmForCausalLM(config))

    def test_what_is_no_single_model(self) -> None:
        with pytest.raises(ValueError, match="model: expected a transformers model, got str"):
            hf.patch("Qwen/Qwen2-7B")
        with pytest.raises(ValueError, match="expected one transformers model, got none"):
            hf.patch(torch.nn.Linear(2, 2))
        two = torch.nn.ModuleList([build("qwen2"), build("llama")])
        with pytest.raises(ValueError, match="got \\['Qwen2ForCausalLM', 'LlamaForCausalLM'\\]"):
            hf.patch(two)

    def test_config_that_asks_for_weights(self) -> None:
        model = build("qwen2")
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with pytest.raises(ValueError, match="output_attentions: the model's config"):
            hf.patch(model)
