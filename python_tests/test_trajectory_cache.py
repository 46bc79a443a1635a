"""Decoding over a TrajectoryCache against whole forward passes and transformers' own caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from mem1_kernels import (  # noqa: E402
    BlockPlan,
    Segment,
    Trajectory,
    fold,
    keep_all,
    keep_last,
    mem1,
)
from mem1_kernels.hf import TrajectoryCache, cache, patch, patched  # noqa: E402
from mem1_kernels.hf.patch import cache_keyword  # noqa: E402

VOCABULARY = 48
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
    "eos_token_id": None,
}
BOTH = {
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 9}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"attn_logit_softcapping": 3.0, **BOTH}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", BOTH),
}


def build(family: str = "qwen2", **changes: Any) -> Any:
    config_name, model_name, own = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**TINY, **own, **changes})
    torch.manual_seed(3)
    model = getattr(transformers, model_name)(config).eval().requires_grad_(False)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    return model


def draw(*shape: int, seed: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, expected: Tensor, bound: float = 2e-5) -> None:
    error = (got - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert error <= bound, f"differs by {error:.3e}"


def held_positions(past: TrajectoryCache) -> list[list[int]]:
    return [
        sorted(row[:length].tolist())
        for row, length in zip(past.position_ids, past.lengths.tolist(), strict=True)
    ]


def poison(past: TrajectoryCache) -> None:
    """NaN wherever no token lies."""
    dead = torch.arange(past.capacity) >= past.lengths[:, None]
    for store in (past.keys, past.values):
        for buffer in store.values():
            buffer.masked_fill_(dead[:, None, :, None], torch.nan)


def whole(model: Any, ids: Tensor, expiry: Tensor | None = None, **options: Any) -> Tensor:
    """Logits of one row's tokens in a single pass, under a plan if an expiry is given."""
    plan = None if expiry is None else BlockPlan.from_expiry(expiry)
    return model(ids[None], plan=plan, use_cache=False, **options).logits[0]


def trajectory(seed: int, policy: Callable[..., Any], turns: int = 4) -> Trajectory:
    generator = torch.Generator().manual_seed(seed)
    segments = [Segment("prompt", draw(3 + seed, seed=seed))]
    for turn in range(1, turns + 1):
        for role in ("state", "action", "info"):
            size = int(torch.randint(0, 8, (), generator=generator))
            depth = turn % 2 if policy is fold else 0
            segments.append(Segment(role, draw(size, seed=100 * seed + turn), turn, depth))
    return Trajectory(segments, policy)


@pytest.mark.parametrize(("ordered", "packed"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("policy", [mem1, keep_last(2), keep_all, fold])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_by_expiry_equals_the_masked_forward(
    family: str, policy: Callable[..., Any], ordered: bool, packed: bool
) -> None:
    """Row by row the cache holds exactly the keys with `expiry > now`, whatever `now` is."""
    model = build(family)
    rows = [trajectory(seed, policy) for seed in (1, 2, 3)]
    past = TrajectoryCache(model, batch_size=3, ordered=ordered)
    logits: list[list[Tensor]] = [[], [], []]
    with torch.no_grad(), patched(model):
        for spans in zip(*(row.spans for row in rows), strict=True):
            counts = [span.stop - span.start for span in spans]
            width = max(counts)
            if width == 0:
                continue
            past.prune_([span.start for span in spans])
            for number, (row, span) in enumerate(zip(rows, spans, strict=True)):
                alive = row.expiry[: span.start] > span.start
                assert held_positions(past)[number] == alive.nonzero().flatten().tolist()
                if ordered:
                    held = past.position_ids[number, : past.lengths[number]]
                    assert torch.equal(held, held.sort().values)
            poison(past)
            ids = torch.zeros(3, width, dtype=torch.int64)
            expiry = []
            for number, (row, span) in enumerate(zip(rows, spans, strict=True)):
                ids[number, : counts[number]] = row.token_ids[span.start : span.stop]
                expiry.append(int(row.expiry[span.start]) if counts[number] else 0)
            past.expect(counts, expiry=expiry, packed=packed)
            taken = torch.arange(width) < torch.tensor(counts)[:, None]
            if packed:
                out = model(ids[taken][None], past_key_values=past).logits[0].split(counts)
            else:
                out = model(ids, past_key_values=past).logits
            for number, count in enumerate(counts):
                logits[number].append(out[number][:count])
        for row, parts in zip(rows, logits, strict=True):
            assert_close(torch.cat(parts), whole(model, row.token_ids, row.expiry))
        assert past.peak_context <= max(row.peak_context for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_after_a_prune(family: str) -> None:
    model, ids = build(family), draw(2, 30)
    expiry = torch.full((30,), 30)
    expiry[4:12] = 17
    expiry[2] = 25
    with torch.no_grad(), patched(model):
        past = TrajectoryCache(model, batch_size=2)
        steps = [model(ids[:, :15], past_key_values=past).logits]
        past.expiry[:, :15] = expiry[:15]  # everything is still where it was written
        for token in range(15, 30):
            past.prune_(token)
            poison(past)
            steps.append(model(ids[:, token : token + 1], past_key_values=past).logits)
        got = torch.cat(steps, 1)
        for row in range(2):
            assert_close(got[row], whole(model, ids[row], expiry))
    assert past.lengths.tolist() == [21, 21] and past.tokens == 42


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_padding_is_never_stored(family: str, side: str) -> None:
    model = build(family)
    first, second = draw(3, 9), draw(3, 6, seed=8)
    masks = [torch.ones(3, 9), torch.ones(3, 6)]
    for mask, sizes in zip(masks, ([4, 9, 7], [6, 0, 2]), strict=True):
        for row, size in enumerate(sizes):
            if side == "holes":
                mask[row, torch.randperm(mask.shape[1])[size:]] = 0
            elif side == "left":
                mask[row, : mask.shape[1] - size] = 0
            else:
                mask[row, size:] = 0
    with torch.no_grad(), patched(model):
        past = TrajectoryCache(model, batch_size=3)
        one = model(first, attention_mask=masks[0], past_key_values=past).logits
        columns = torch.ones(3, past.get_seq_length())
        two = model(
            second, attention_mask=torch.cat([columns, masks[1]], 1), past_key_values=past
        ).logits
        assert past.lengths.tolist() == [10, 9, 9]
        for row in range(3):
            keep = [mask[row].bool() for mask in masks]
            expected = whole(model, torch.cat([first[row, keep[0]], second[row, keep[1]]]))
            assert_close(torch.cat([one[row, keep[0]], two[row, keep[1]]]), expected)
            assert held_positions(past)[row] == list(range(len(expected)))


def test_positions_count_on_over_drops_by_default() -> None:
    model, ids = build(), draw(2, 12)
    with torch.no_grad(), patched(model):
        past = TrajectoryCache(model, batch_size=2)
        model(ids[:, :8], past_key_values=past)
        past.prune_(keep=past.position_ids < 3)
        model(ids[:, 8:9], past_key_values=past)
        assert held_positions(past) == [[0, 1, 2, 8], [0, 1, 2, 8]]
        past.prune_(keep=past.position_ids < 3)
        position_ids = torch.tensor([[3, 4, 5], [20, 21, 30]])
        got = model(ids[:, 9:], position_ids=position_ids, past_key_values=past).logits
        assert held_positions(past) == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 20, 21, 30]]
        again = torch.cat([ids[:, :3], ids[:, 9:]], 1)
        for row in range(2):
            positions = torch.cat([torch.arange(3), position_ids[row]])[None]
            expected = whole(
                model, again[row], position_ids=positions, attention_mask=torch.ones(1, 6)
            )
            assert_close(got[row], expected[3:])


def test_rows_are_pruned_apart() -> None:
    model, ids = build(), draw(3, 10)
    with torch.no_grad(), patched(model):
        past = TrajectoryCache(model, batch_size=3)
        model(ids, past_key_values=past)
        keep = (past.position_ids < 4)[[1]]
        past.prune_(keep=keep, rows=[1])
        assert past.lengths.tolist() == [10, 4, 10]
        past.expiry[:, :5] = torch.tensor([[3], [5], [7]])
        past.prune_([4, 7], rows=[2, 0])
        assert past.lengths.tolist() == [5, 4, 10]
        past.prune_(5)
        assert past.lengths.tolist() == [5, 0, 10]
        got = model(ids[:, :1], past_key_values=past).logits
        alone = model(ids[1:2, :1], position_ids=torch.tensor([[10]]), use_cache=False).logits
        assert_close(got[1], alone[0])
        past.prune_(keep=torch.zeros_like(past.position_ids, dtype=torch.bool))
        assert past.tokens == 0 and past.get_seq_length() == 0


def test_growing_and_fixed_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("gemma3"), draw(2, 40)
    monkeypatch.setattr(cache, "FIRST_CAPACITY", 4)
    with torch.no_grad(), patched(model):
        expected = model(ids, use_cache=False).logits
        past = TrajectoryCache(model, batch_size=2)
        steps = [
            model(ids[:, begin : begin + 5], past_key_values=past).logits
            for begin in range(0, 40, 5)
        ]
        assert past.capacity == 64  # 4, 8, 16, 32, 64
        assert_close(torch.cat(steps, 1), expected)
        per_slot = 2 * 2 * 2 * 16 * 4 + 8  # layers x (K, V) x heads x head_dim x bytes, two int32
        assert past.nbytes == 2 * past.capacity * per_slot

        small = TrajectoryCache(model, batch_size=2, capacity=30)
        model(ids[:, :25], past_key_values=small)
        held = small.keys[0][:, :, :25]  # behind lies what the memory held before: perhaps NaN
        before = [held.clone(), small.position_ids.clone(), small.lengths.clone()]
        with pytest.raises(ValueError, match="capacity: 31 tokens do not fit in 30 slots"):
            model(ids[:, 25:31], past_key_values=small)
        after = [held, small.position_ids, small.lengths]
        assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
        assert small.get_max_length() == 30 and past.get_max_length() == -1
        small.prune_(keep=small.position_ids < 20)
        assert_close(
            model(ids[:, :10], past_key_values=small, position_ids=torch.arange(25, 35)[None])
            .logits[:, :0]
            .sum(),
            torch.tensor(0.0),
        )
        assert small.lengths.tolist() == [30, 30] and small.peak_context == 30


class TestGenerate:
    @pytest.mark.parametrize("sampled", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_generate_over_a_dynamic_cache(self, family: str, sampled: bool) -> None:
        """Left padding, and rows that stop at different tokens."""
        model, ids = build(family), draw(3, 11)
        attention_mask = torch.ones_like(ids)
        attention_mask[0, :6], attention_mask[2, :2] = 0, 0

        def run(**options: Any) -> Any:
            torch.manual_seed(1)
            return model.generate(
                ids,
                attention_mask=attention_mask,
                do_sample=sampled,
                max_new_tokens=25,
                eos_token_id=list(range(3, 9)),
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )

        expected = run()
        with patched(model):
            past = TrajectoryCache(model, batch_size=3)
            got = run(past_key_values=past)
        assert torch.equal(got.sequences, expected.sequences)
        going = torch.ones(3, dtype=torch.bool)
        for step, (one, other) in enumerate(zip(got.logits, expected.logits, strict=True)):
            assert_close(one[going], other[going])
            going &= ~torch.isin(got.sequences[:, 11 + step], torch.arange(3, 9))
        steps = len(got.logits)
        # The last token is sampled but not fed.
        assert past.lengths.tolist() == [n + steps - 1 for n in attention_mask.sum(1).tolist()]

    @pytest.mark.parametrize("sampled", [False, True])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_goes_on_turn_by_turn_over_a_pruned_cache(self, family: str, sampled: bool) -> None:
        model, prompts = build(family), draw(2, 10)
        torch.manual_seed(2)
        stop, new_tokens = list(range(3, 9)), 12
        attention_mask = torch.ones_like(prompts)
        attention_mask[0, :4] = 0
        texts = [prompts[0, 4:].tolist(), prompts[1].tolist()]
        dropped_at = [[None] * len(text) for text in texts]
        with torch.no_grad(), patched(model):
            past = TrajectoryCache(model, batch_size=2)
            fed, mask = prompts, attention_mask
            logits: list[list[Tensor]] = [[], []]
            for _ in range(3):
                position_ids = torch.stack(
                    [torch.arange(fed.shape[1]) - fed.shape[1] + len(text) for text in texts]
                ).clamp(min=0)
                out = model.generate(
                    fed,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_values=past,
                    do_sample=sampled,
                    max_new_tokens=new_tokens,
                    eos_token_id=stop,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                last = []
                for row, text in enumerate(texts):
                    written = out.sequences[row, fed.shape[1] :].tolist()
                    length = next((i + 1 for i, t in enumerate(written) if t in stop), len(written))
                    logits[row] += [out.logits[step][row] for step in range(length)]
                    begin = len(text)
                    text += written[:length]
                    dropped_at[row] += [None] * length
                    last.append(text[-1])
                    # The next turn drops the odd tokens of this one, but for its last.
                    for token in range(begin, len(text) - 1):
                        if token % 2:
                            dropped_at[row][token] = len(text) - 1
                keep = torch.zeros_like(past.position_ids, dtype=torch.bool)
                for row, text in enumerate(texts):
                    alive = [t for t in range(len(text) - 1) if dropped_at[row][t] is None]
                    keep[row] = torch.isin(past.position_ids[row], torch.tensor(alive))
                past.prune_(keep=keep)
                fed = torch.tensor(last)[:, None]
                mask = torch.ones(2, past.get_seq_length() + 1)
            for row, text in enumerate(texts):
                expiry = torch.tensor([len(text) if t is None else t for t in dropped_at[row]])
                predicted = whole(model, torch.tensor(text), expiry)[
                    len(text) - len(logits[row]) - 1 : -1
                ]
                assert_close(torch.stack(logits[row]), predicted)

    def test_refuses_what_it_cannot_serve(self) -> None:
        model, ids = build(), draw(2, 5)
        with torch.no_grad(), patched(model):
            past = TrajectoryCache(model, batch_size=4)
            with pytest.raises(ValueError, match="not beams"):
                model.generate(ids, past_key_values=past, num_beams=2, max_new_tokens=3)
            past = TrajectoryCache(model, batch_size=2)
            with pytest.raises(ValueError, match="the cache has 2 rows, got 4"):
                model.generate(
                    ids,
                    past_key_values=past,
                    num_return_sequences=2,
                    max_new_tokens=2,
                    do_sample=True,
                )
            model(ids, past_key_values=past)
            past.prune_(keep=past.position_ids % 4 == 0)
            new = draw(2, 2)
            for mask in (None, torch.ones(2, 4)):  # positions would start at 1 and at 2
                with pytest.raises(ValueError, match="expected them to rise|cached . new"):
                    model.generate(new, attention_mask=mask, past_key_values=past, max_new_tokens=2)
            assert past.lengths.tolist() == [2, 2]


def test_a_failed_forward_changes_nothing() -> None:
    model, ids = build(), draw(2, 12)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with torch.no_grad(), patched(model):
        expected = model(ids, use_cache=False).logits[:, 8:]
        past = TrajectoryCache(model, batch_size=2)
        model(ids[:, :8], past_key_values=past)
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        past.expect([2, 1], expiry=3)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 8:], past_key_values=past)
        hook.remove()
        assert past.lengths.tolist() == [8, 8] and past.get_seq_length() == 8
        assert_close(model(ids[:, 8:], past_key_values=past).logits, expected)
        past.prune_(4)
        assert past.lengths.tolist() == [12, 12]


def test_reset_empties_the_rows_and_keeps_the_memory() -> None:
    model, ids = build(), draw(2, 6)
    with torch.no_grad(), patched(model):
        past = TrajectoryCache(model, batch_size=2)
        first = model(ids, past_key_values=past).logits
        bytes_before = past.nbytes
        past.expiry.fill_(0)
        past.reset()
        assert past.tokens == past.peak_context == past.get_seq_length() == 0
        assert torch.equal(model(ids, past_key_values=past).logits, first)
        past.prune_(100)
        assert past.lengths.tolist() == [6, 6] and past.nbytes == bytes_before


def test_inference_mode_leaves_an_ordinary_cache() -> None:
    model, ids = build(), draw(1, 9)
    with patched(model):
        with torch.inference_mode():
            past = TrajectoryCache(model, batch_size=1)
            first = model(ids[:, :5], past_key_values=past).logits
        with torch.no_grad():
            past.prune_(1)
            second = model(ids[:, 5:], past_key_values=past).logits
            expected = model(ids, use_cache=False).logits
    assert_close(torch.cat([first, second], 1), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16(autocast: bool) -> None:
    model, ids = build("gemma3"), draw(2, 20)
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits
        if not autocast:
            model = model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), patched(model):
            own = model(ids, use_cache=False).logits.float()
            past = TrajectoryCache(model, batch_size=2)
            parts = [model(x, past_key_values=past).logits for x in ids.split([13, 1, 6], 1)]
    assert past.keys[0].dtype == torch.bfloat16
    allowed = 2 * (own - exact).abs().max() + torch.finfo(torch.bfloat16).eps
    assert (torch.cat(parts, 1).float() - exact).abs().max() <= allowed


def test_peft_and_bare_decoders() -> None:
    peft = pytest.importorskip("peft")
    model, ids = build(), draw(2, 9)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    with torch.no_grad(), patched(adapted):
        expected = adapted(input_ids=ids, use_cache=False).logits
        past = TrajectoryCache(adapted, batch_size=2)
        parts = [adapted(input_ids=x, past_key_values=past).logits for x in ids.split(5, 1)]
    assert_close(torch.cat(parts, 1), expected)
    bare = build().model
    with torch.no_grad(), patched(bare):
        past = TrajectoryCache(bare, batch_size=2)
        states = [bare(x, past_key_values=past).last_hidden_state for x in ids.split(5, 1)]
        assert_close(torch.cat(states, 1), bare(ids, use_cache=False).last_hidden_state)
        embedded = bare.embed_tokens(ids)
        past.reset()
        out = bare(inputs_embeds=embedded, past_key_values=past).last_hidden_state
        assert_close(out, torch.cat(states, 1))


class TestExpect:
    def test_outlasts_a_prune_and_a_refused_pass(self) -> None:
        model, ids = patch(build()), draw(2, 4)
        past = TrajectoryCache(model, batch_size=2)
        with torch.no_grad():
            model(ids[:, :3], past_key_values=past)
            past.expect([1, 2], expiry=torch.iinfo(torch.int64).max)
            past.prune_(keep=torch.ones_like(past.position_ids, dtype=torch.bool))
            with pytest.raises(ValueError, match="the cache has 2 rows, got 1"):
                model(ids[:1], past_key_values=past)
            model(ids, past_key_values=past)
            assert past.lengths.tolist() == [4, 5]
            model(ids, past_key_values=past)
        assert past.lengths.tolist() == [8, 9]
        past.prune_(100)
        assert past.lengths.tolist() == [8, 9]

    @pytest.mark.parametrize("counts", [[3, 3], [1, 1], [0, 4], [2, 1]])
    def test_packed_takes_positions_and_goes_on_as_rows(self, counts: list[int]) -> None:
        model, ids, more = patch(build()), draw(2, 4), draw(2, 2)
        taken = torch.arange(4) < torch.tensor(counts)[:, None]
        position_ids = torch.tensor([[0, 3, 4, 9], [5, 6, 8, 11]])
        ends, caches = [], []
        for packed in (False, True):
            past = TrajectoryCache(model, batch_size=2)
            past.expect(counts, expiry=[7, 9], packed=packed)
            given = {"input_ids": ids, "position_ids": position_ids}
            if packed:
                given = {name: x[taken][None] for name, x in given.items()}
            else:
                given = {name: x[:, : max(counts)] for name, x in given.items()}
            with torch.no_grad():
                model(past_key_values=past, **given)
                ends.append(model(more, past_key_values=past).logits)
            caches.append(past)
        assert_close(ends[1], ends[0])
        for name in ("lengths", "position_ids", "expiry"):
            assert torch.equal(getattr(caches[1], name), getattr(caches[0], name))
        assert caches[1].get_seq_length() == caches[0].get_seq_length()


class TestRefusals:
    @pytest.fixture
    def model(self) -> Any:
        return patch(build())

    @pytest.fixture
    def past(self, model: Any) -> TrajectoryCache:
        past = TrajectoryCache(model, batch_size=2)
        with torch.no_grad():
            model(draw(2, 6), past_key_values=past)
        return past

    @pytest.fixture(autouse=True)
    def untouched(self, past: TrajectoryCache) -> Any:
        """Whatever is refused leaves the cache as it was."""

        def held() -> list[Tensor]:
            slots = [past.keys[0][:, :, :6], past.values[1][:, :, :6]]
            return [*slots, past.lengths, past.position_ids[:, :6], past.expiry[:, :6]]

        before = [x.clone() for x in held()]
        yield
        assert all(torch.equal(one, two) for one, two in zip(before, held(), strict=True))

    def refuse(self, model: Any, past: TrajectoryCache, match: str, **inputs: Any) -> None:
        inputs = {"input_ids": draw(2, 3), **inputs}
        with torch.no_grad(), pytest.raises(ValueError, match=match):
            model(past_key_values=past, **inputs)

    def test_masks(self, model: Any, past: TrajectoryCache) -> None:
        match = r"attention_mask: expected \[2, 9\] \(batch, cached \+ new tokens\), got \[2, {}\]"
        self.refuse(model, past, match.format(8), attention_mask=torch.ones(2, 8))
        self.refuse(model, past, match.format(3), attention_mask=torch.ones(2, 3))
        past.expect([3, 3])
        self.refuse(model, past, "expected None after expect", attention_mask=torch.ones(2, 9))

    def test_a_mask_from_before_the_prune_is_stale(self, model: Any) -> None:
        past = TrajectoryCache(model, batch_size=2)
        with torch.no_grad():
            model(draw(2, 6), past_key_values=past)
            past.prune_(keep=past.position_ids < 4)
        position_ids = torch.arange(6, 9)[None]
        stale = {"attention_mask": torch.ones(2, 9), "position_ids": position_ids}
        self.refuse(model, past, r"attention_mask: expected \[2, 7\]", **stale)
        assert past.lengths.tolist() == [4, 4]

    def test_positions(self, model: Any, past: TrajectoryCache) -> None:
        match = r"to rise behind those that the cache holds \(up to 5 in row 1\), got 5"
        self.refuse(model, past, match, position_ids=torch.tensor([[6, 7, 8], [5, 6, 7]]))
        match = r"\(up to 5 in row 0\), got 7"
        self.refuse(model, past, match, position_ids=torch.tensor([[6, 7, 7]]))
        match = r"position_ids: expected \[2, 3\], got \[3, 1, 3\]"
        self.refuse(model, past, match, position_ids=torch.ones(3, 1, 3))

    def test_tokens(self, model: Any, past: TrajectoryCache) -> None:
        self.refuse(model, past, "the cache has 2 rows, got 3", input_ids=draw(3, 3))
        self.refuse(model, past, "expected at least one new token", input_ids=draw(2, 0))
        past.expect([4, 1])
        self.refuse(model, past, "expect.. announced 4 tokens, got 3")
        past.expect([4, 1], packed=True)
        match = r"input_ids: expected \[1, 5\] \(1, what expect\(\) announced\), got \[2, 3\]"
        self.refuse(model, past, match)
        self.refuse(model, past, r"\[1, 5\].*, got \[1, 6\]", input_ids=draw(1, 6))
        plan = BlockPlan.from_expiry(torch.full((3,), 3))
        self.refuse(model, past, "plan: a TrajectoryCache keeps its own", plan=plan)

    def test_expect(self, past: TrajectoryCache) -> None:
        with pytest.raises(ValueError, match=r"counts: expected \[2\], got \[3\]"):
            past.expect([1, 2, 3])
        with pytest.raises(ValueError, match=r"counts: expected 0 or more, got \[1, -2\]"):
            past.expect([1, -2])
        with pytest.raises(TypeError, match="counts: expected integers, got torch.float32"):
            past.expect(torch.ones(2))
        with pytest.raises(TypeError, match="counts: expected integers, got .True, 2."):
            past.expect([True, 2])
        with pytest.raises(TypeError, match="packed: expected a bool, got 1"):
            past.expect([1, 2], packed=1)
        with pytest.raises(ValueError, match=r"expiry: expected \[2\], got \[1\]"):
            past.expect([1, 2], expiry=[5])

    def test_prune(self, past: TrajectoryCache) -> None:
        keep = torch.ones_like(past.position_ids, dtype=torch.bool)
        with pytest.raises(ValueError, match="keep: expected either now or keep, got both or none"):
            past.prune_()
        with pytest.raises(ValueError, match="keep: expected either now or keep, got both or none"):
            past.prune_(3, keep=keep)
        with pytest.raises(TypeError, match="keep: expected a bool tensor, got torch.int32"):
            past.prune_(keep=past.position_ids)
        with pytest.raises(TypeError, match="keep: expected a bool tensor, got list"):
            past.prune_(keep=[[True] * 256])
        with pytest.raises(TypeError, match="now: expected integers"):
            past.prune_("3")
        with pytest.raises(ValueError, match=r"keep: expected \[2, 256\] \(rows, capacity\), got"):
            past.prune_(keep=keep[:, :6])
        with pytest.raises(ValueError, match=r"keep: expected \[1, 256\]"):
            past.prune_(keep=keep, rows=[1])
        for wrong in ([True], [1.0], ["1"], 1):
            with pytest.raises(TypeError, match="rows: expected integers"):
                past.prune_(3, rows=wrong)
        for rows in ([2], [-1], [0, 0]):
            with pytest.raises(ValueError, match="rows: expected different ones of 0 to 1, got"):
                past.prune_(3, rows=rows)
        with pytest.raises(ValueError, match=r"now: expected \[2\], got \[3\]"):
            past.prune_([1, 2, 3])

    def test_two_attentions_per_layer(self) -> None:
        if not transformers.DiffLlamaForCausalLM._supports_attention_backend:
            pytest.skip("this transformers gives it no attention backend: patch() raises")
        config = transformers.DiffLlamaConfig(
            vocab_size=60,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = transformers.DiffLlamaForCausalLM(config).eval()
        if not model._supports_attention_backend:
            pytest.skip(f"transformers {transformers.__version__} has no replaceable one in it")
        twice = patch(model)
        with torch.no_grad(), pytest.raises(ValueError, match="layer 0 calls its attention twice"):
            cache = TrajectoryCache(twice, batch_size=1)
            twice(torch.ones(1, 3, dtype=torch.int64), past_key_values=cache)

    def test_another_model(self, model: Any, past: TrajectoryCache) -> None:
        deeper, shallower = (patch(build(num_hidden_layers=n)) for n in (3, 1))
        self.refuse(deeper, past, r"holds tokens of layers \[0, 1\], and layer 2 has none there")
        self.refuse(shallower, past, r"layers \[1\] does not reach the cache")

    def test_numbers_beyond_int32(self, model: Any, past: TrajectoryCache) -> None:
        never = torch.iinfo(torch.int64).max
        past.prune_(never)
        assert past.lengths.tolist() == [6, 6]  # nothing was given an expiry
        self.refuse(
            model, past, "to rise behind those", position_ids=torch.arange(2**31, 2**31 + 3)[None]
        )
        with pytest.raises(TypeError, match="position_ids: expected integers, got torch.float32"):
            model(draw(2, 3), past_key_values=past, position_ids=torch.ones(2, 3))
        past.expect([2**32 + 1, 1])
        self.refuse(model, past, "expect.. announced 2147483647 tokens, got 3")

    def test_models(self, past: TrajectoryCache) -> None:
        plain = build()
        with torch.no_grad(), pytest.raises(ValueError, match="needs a patched model"):
            plain(draw(2, 3), past_key_values=TrajectoryCache(plain, batch_size=2))
        config = transformers.Qwen3NextConfig(**TINY, head_dim=16, num_experts=2)
        with pytest.raises(ValueError, match="cannot serve: \\['linear_attention'\\]"):
            TrajectoryCache(transformers.Qwen3NextForCausalLM(config), batch_size=1)
        with pytest.raises(ValueError, match="StableLmForCausalLM does not hand keywords to a re"):
            TrajectoryCache(
                transformers.StableLmForCausalLM(transformers.StableLmConfig(**TINY)), batch_size=1
            )
        with pytest.raises(ValueError, match="model: expected a transformers model, got str"):
            TrajectoryCache("Qwen/Qwen2-7B", batch_size=1)

    def test_sizes(self) -> None:
        model = build()
        for name in ("batch_size", "capacity"):
            for value in (0, -3):
                with pytest.raises(ValueError, match=f"{name}: expected at least 1, got {value}"):
                    TrajectoryCache(model, **{"batch_size": 2, name: value})
            for wrong in (True, 2.0, "2", torch.ones(2), np.bool_(True)):
                with pytest.raises(TypeError, match=f"{name}: expected an integer, got "):
                    TrajectoryCache(model, **{"batch_size": 2, name: wrong})
        with pytest.raises(TypeError, match="ordered: expected a bool, got 'x'"):
            TrajectoryCache(model, batch_size=2, ordered="x")
        one = TrajectoryCache(model, batch_size=np.int64(2), capacity=torch.tensor(9))
        assert (one.batch_size, one.capacity) == (2, 9) and type(one.batch_size) is int

    def test_gradients(self, model: Any, past: TrajectoryCache) -> None:
        model.requires_grad_(True)
        with pytest.raises(ValueError, match="requires gradients"):
            model(draw(2, 3), past_key_values=past)
        model.requires_grad_(False)

    def test_attention_that_the_cache_does_not_reach(
        self, model: Any, past: TrajectoryCache
    ) -> None:
        attention = model.model.layers[1].self_attn
        inner = attention.forward
        attention.forward = lambda *args, trajectory_cache, **kwargs: inner(*args, **kwargs)
        self.refuse(TrajectoryCacheModel(model), past, r"layers \[1\] does not reach the cache")


class TrajectoryCacheModel:
    """Calls the model with a fresh cache of its own: the refusal comes after its layers ran."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, past_key_values: TrajectoryCache, **inputs: Any) -> Any:
        return self.model(past_key_values=TrajectoryCache(self.model, batch_size=2), **inputs)


@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_its_new_and_its_old_name(keyword: str) -> None:
    """transformers 5.24 calls it `cache`. The model here is given the other name too."""
    model = build()
    decoder, ids = model.model, draw(2, 6)
    own = cache_keyword(decoder)
    forward = decoder.forward
    decoder.forward = lambda *args, **given: forward(
        *args, **{own if name == keyword else name: value for name, value in given.items()}
    )
    with patched(model):
        past = TrajectoryCache(model, batch_size=2)
        out = [
            decoder(part, use_cache=True, **{keyword: past}).last_hidden_state
            for part in ids.split(3, dim=1)
        ]
        assert past.lengths.tolist() == [6, 6]
        with pytest.raises(ValueError, match="plan: a TrajectoryCache keeps its own expiries"):
            decoder(ids, plan=BlockPlan.from_expiry(torch.full((6,), 6)), **{keyword: past})
        assert_close(torch.cat(out, 1), decoder(ids, use_cache=False).last_hidden_state)
