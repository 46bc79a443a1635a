"""Every causal LM class of transformers, tiny: exact under a plan and over a cache, or an error.

The references need no mask: a tree's branch is a plain pass over the prompt and that branch. The
table in docs/models.md is what `python python_tests/test_model_classes.py > docs/models.md` prints.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from mem1_kernels import BlockPlan, Segment, Trajectory, hf, pack, unroll  # noqa: E402

TABLE = Path(__file__).parents[1] / "docs" / "models.md"
VOCABULARY, WINDOW, LARGEST = 48, 9, 20_000_000

# Whatever a configuration calls its sizes. Windows and top-k are shorter than the sequences, so
# that a model which silently loses them is found out.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "d_inner"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("ffn_hidden_size",), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "moe_num_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 1),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "max_window_layers"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("window_size", "attention_chunk_size", "keep_window_size"), WINDOW),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop"), 0.0),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("attention_probs_dropout_prob",), 0.0),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "v_head_dim": 32,
    "rotary_dim": 8,
    "n_routed_experts": 4,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LATENT = {"num_key_value_heads": 4}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": 2 * _BOTH["layer_types"],
}
_CONV = {"layer_types": ["conv", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("AXK1", "AXK2", "DeepseekV2", "DeepseekV3", "DeepseekV32"), _LATENT),
    **dict.fromkeys(("Glm4MoeLite", "GlmMoeDsa", "MiniCPM3", "Youtu", "Dots3Note"), _LATENT),
    **dict.fromkeys(("Gemma3n", "Gemma4", "Gemma4Unified"), _SHARED),
    **dict.fromkeys(("Lfm2", "Lfm2Moe"), _CONV),
    "Qwen2": {"use_sliding_window": True, **_BOTH},
    "GPTNeo": {"attention_types": [[["global", "local"], 1]]},
    "Mamba2": {"num_heads": 8},
    "MiMoV2Flash": {"v_head_dim": 16},
    "MiniMaxM3VL": {"layer_types": ["minimax_m3_sparse", "full_attention"]},
    "Xmod": {"default_language": "en_XX"},
    "Zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}

CLASSES = sorted(
    {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([names] if isinstance(names, str) else names)
        if hasattr(transformers, name)
    }
)


class NotTried(Exception):
    """No tiny model of the class can be made."""


def build(name: str) -> Any:
    """A tiny model of the class, in eval mode, on the CPU."""
    made = getattr(transformers, name)
    kind = made.config_class
    known = {p for base in kind.__mro__ for p in getattr(base, "__annotations__", {})}
    known |= set(inspect.signature(kind.__init__).parameters) | set(kind.attribute_map)
    family = re.sub("(ForCausalLM|LMHeadModel|ModelWithLMHead)$", "", name)
    changes = {**{k: v for k, v in SIZES.items() if k in known}, **OWN.get(family, {})}
    try:
        config = kind(**changes)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in made(config).parameters())
        if count > LARGEST:
            raise NotTried(f"{count / 1e6:.0f} M parameters")
        torch.manual_seed(3)
        model = made(config).eval().requires_grad_(False)
        with torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.int64), use_cache=False)
    except Exception as error:  # no error of ours: nothing is patched yet
        raise NotTried(f"{type(error).__name__}: {error}") from None
    return model


def differs(got: Tensor, want: Tensor) -> str | None:
    error = (got - want).abs().max().item() / max(1.0, want.abs().max().item())
    return None if error <= 2e-5 else f"WRONG by {error:.1e}"


def attempt(check: Any) -> str:
    """ "exact", the message of an error that names an argument, or what is wrong."""
    try:
        return check() or "exact"
    except (ValueError, TypeError) as error:
        named = re.match(r"[a-z_0-9]+: ", str(error))
        return str(error) if named else f"WRONG: {type(error).__name__} without a name: {error}"
    except Exception as error:
        return f"WRONG: {type(error).__name__}: {error}"


def turn(number: int) -> list[Segment]:
    drawn = torch.randint(3, VOCABULARY, (14,), generator=torch.Generator().manual_seed(number))
    return [Segment("action", drawn[:5], number), Segment("info", drawn[5:], number)]


LINE = Trajectory([Segment("prompt", torch.arange(3, 14)), *turn(1), *turn(2), *turn(3)])
TREE = unroll(LINE)


def verdicts(model: Any) -> tuple[str, str, str]:
    """(without a plan, under a plan, over a TrajectoryCache)."""
    ids = LINE.token_ids[None]
    branches = [(TREE.position_ids == 11).nonzero().flatten().tolist()]
    starts = [*branches[0], TREE.num_tokens]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        parts, prompt = [], TREE.token_ids[:11]
        for begin, end in zip(starts, starts[1:], strict=False):
            path = torch.cat([prompt, TREE.token_ids[begin:end]])[None]
            parts.append(model(path, use_cache=False).logits[:, 11 if parts else 0 :])
        tree = torch.cat(parts, 1)
        try:
            hf.patch(model)
        except ValueError as error:
            return (f"patch: {error}",) * 3

        def without() -> str | None:
            return differs(model(ids, use_cache=False).logits, plain)

        def under() -> str | None:
            predicted = TREE.shift_labels()[None]
            out = model(
                TREE.token_ids[None],
                position_ids=TREE.position_ids[None],
                plan=BlockPlan.of(TREE),
                use_cache=False,
                labels=predicted,
                shift_labels=predicted,
            )
            loss = torch.nn.functional.cross_entropy(tree[0], predicted[0])
            return differs(out.logits, tree) or differs(out.loss, loss)

        def over() -> str | None:
            cache, parts, drawn = hf.TrajectoryCache(model, batch_size=1), [], 0
            for span in LINE.spans:
                cache.prune_(span.start)
                cache.expect([span.stop - span.start], expiry=int(LINE.expiry[span.start]))
                part = ids[:, span.start : span.stop]
                parts.append(model(part, past_key_values=cache, use_cache=True).logits)
            whole = model(ids, plan=BlockPlan.of(LINE), use_cache=False).logits
            if wrong := differs(torch.cat(parts, 1), whole):
                return wrong
            cache.reset()
            drawn = model.generate(
                ids[:, :20],
                past_key_values=cache,
                max_new_tokens=4,
                do_sample=False,
                eos_token_id=VOCABULARY - 1,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logits = torch.stack(drawn.logits, 1)
            again = model(drawn.sequences[:, :-1], use_cache=False).logits[:, 19:]
            return differs(logits, again)

        return attempt(without), attempt(under), attempt(over)


@pytest.mark.parametrize("name", CLASSES)
def test_exact_or_refused_by_name(name: str) -> None:
    try:
        model = build(name)
    except NotTried as error:
        pytest.skip(str(error))
    found = verdicts(model)
    assert not [verdict for verdict in found if verdict.startswith("WRONG")], found
    lines = TABLE.read_text().splitlines()
    if f"transformers {transformers.__version__}" in lines[2]:
        assert row(name, found) in lines


SIZES_OF_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4}
SIZES_OF_GPT2 |= {"n_positions": 40, "initializer_range": 0.1, "attn_pdrop": 0.0}
WITH_TABLES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": SIZES_OF_GPT2,
    "GPTBigCodeForCausalLM": SIZES_OF_GPT2,
    "CTRLLMHeadModel": {**SIZES_OF_GPT2, "dff": 64},
    "OPTForCausalLM": {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "ffn_dim": 64,
        "word_embed_proj_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "init_std": 0.1,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    },
}


def ids_for(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", WITH_TABLES)
class TestPositionTables:
    """Models whose table of position embeddings has 40 rows."""

    LIMIT = "position_ids: expected less than 40, the size of this model's table .*, got 40"

    @pytest.fixture
    def model(self, name: str) -> Any:
        made = getattr(transformers, name)
        if not made._supports_attention_backend:
            pytest.skip("this transformers gives it no attention backend: patch() raises")
        torch.manual_seed(3)
        return made(made.config_class(**WITH_TABLES[name])).eval().requires_grad_(False)

    def test_more_tokens_than_positions(self, model: Any) -> None:
        """A tree longer than the table, whose branches fit."""
        layout = pack([[Trajectory([Segment("prompt", 20), Segment("action", 20, 1)])] * 3])
        ids, position_ids = ids_for(layout.num_tokens), layout.position_ids[None]
        assert layout.num_tokens == 80
        alone = model(torch.cat([ids[:, :20], ids[:, -20:]], 1), use_cache=False).logits
        with hf.patched(model):
            got = model(ids, position_ids=position_ids, plan=BlockPlan.of(layout)).logits
        assert differs(got[:, -20:], alone[:, -20:]) is None

    @pytest.mark.parametrize("planned", [True, False])
    def test_too_far(self, model: Any, planned: bool) -> None:
        ids = ids_for(41)
        plan = BlockPlan.from_expiry(torch.full((41,), 41)) if planned else None
        with hf.patched(model):
            for position_ids in (None, torch.arange(41)[None]):
                with pytest.raises(ValueError, match=self.LIMIT):
                    model(ids, position_ids=position_ids, plan=plan)
            past = model(ids[:, :40]).past_key_values
            with pytest.raises(ValueError, match=self.LIMIT):
                model(ids[:, :1], past_key_values=past)

    def test_over_a_cache(self, model: Any) -> None:
        """Of two rows, the longer one meets the end of the table."""
        ids = ids_for(40, batch=2)
        with torch.no_grad(), hf.patched(model):
            want = model(ids, use_cache=False).logits
            past = hf.TrajectoryCache(model, batch_size=2)
            past.expect([36, 20])
            model(ids[:, :36], past_key_values=past)
            past.expect([4, 1])
            rows = torch.stack([ids[0, 36:], ids[1, 20:24]])
            got = model(rows, past_key_values=past).logits
            assert differs(got[0], want[0, 36:]) is None
            assert differs(got[1, 0], want[1, 20]) is None
            with pytest.raises(ValueError, match=self.LIMIT):
                model(ids[:, :1], past_key_values=past)
            assert past.lengths.tolist() == [40, 21]
            past.expect([0, 3])  # the full row writes nothing more; the other one goes on
            got = model(ids[:, 21:24], past_key_values=past).logits
            assert differs(got[1], want[1, 21:24]) is None

    def test_padding(self, name: str, model: Any) -> None:
        """OPT counts the tokens of the mask; for the others the caller does."""
        ids = ids_for(44, batch=2)
        mask = torch.ones_like(ids)
        mask[:, :6] = 0
        counted = (
            {} if name == "OPTForCausalLM" else {"position_ids": (mask.cumsum(1) - 1).clamp(0)}
        )
        want = model(ids, attention_mask=mask, **counted).logits
        with hf.patched(model):
            got = model(ids, attention_mask=mask, **counted).logits
            if counted:
                with pytest.raises(ValueError, match="position_ids: expected less than 40, .* 43"):
                    model(ids, attention_mask=mask)
        assert differs(got[:, 6:], want[:, 6:]) is None


@pytest.mark.parametrize("name", ["DogeForCausalLM", "DeepseekV32ForCausalLM"])
def test_a_model_that_computes_with_its_mask(name: str) -> None:
    if name not in CLASSES:
        pytest.skip("this transformers does not know it")
    model = hf.patch(build(name))
    family = name.removesuffix("ForCausalLM")
    with pytest.raises(ValueError, match=f"attention_mask: {family} computes with its mask"):
        model(ids_for(12), use_cache=False)


def test_keys_and_values_of_two_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "v_head_dim", 24)
    model = hf.patch(build("DeepseekV3ForCausalLM"))
    message = "model: DeepseekV3Attention has keys of head_dim 32 and values of head_dim 24"
    with pytest.raises(ValueError, match=message):
        model(ids_for(12))


def row(name: str, found: tuple[str, str, str]) -> str:
    """The class's line in the table."""
    if found[0].startswith("patch: "):
        reason = found[0].removeprefix("patch: model: ").removeprefix(f"{name} ")
        return f"| {name} | `patch` raises: {reason} | |"
    reasons = [
        verdict if verdict == "exact" else f"raises: {verdict.replace('|', '/')}"
        for verdict in found[1:]
    ]
    return f"| {name} | {reasons[0]} | {reasons[1]} |"


def main() -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    rows, untried = [], []
    for name in CLASSES:
        try:
            rows.append(row(name, verdicts(build(name))))
        except NotTried:
            untried.append(name)
    rows.sort(key=lambda line: (line.count("exact") != 2, "`patch` raises" in line))
    print("# Models")
    print()
    print(f"Every causal LM class of transformers {transformers.__version__}, as a tiny random")
    print("model: what it does under a plan, and over a `TrajectoryCache`. `exact`: equal, within")
    print("2e-5, to its own passes without this package. Written by")
    print("`python python_tests/test_model_classes.py > docs/models.md` and held by that test.")
    print("\n| class | under a plan | over a `TrajectoryCache` |\n|---|---|---|")
    print("\n".join(rows))
    print(f"\nNot tried, as no tiny model of them is made here: {', '.join(untried)}.")


if __name__ == "__main__":
    sys.exit(main())
