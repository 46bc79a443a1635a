"""What a patched model needs beside its plan: right labels and the layout's position_ids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from test_hf import LAYOUTS, TINY, assert_close, build, ids_for, trajectory  # noqa: E402

from mem1_kernels import (  # noqa: E402
    BlockPlan,
    Layout,
    Segment,
    Trajectory,
    hf,
    keep_last,
    mem1,
    mem1_release,
    pack,
    unroll,
)


@pytest.fixture
def model() -> Any:
    return hf.patch(build("qwen2").eval())


def with_ids(seed: int, policy: Any = mem1) -> Trajectory:
    counted = trajectory(seed, policy)
    ids = ids_for(counted.num_tokens)[0]
    return Trajectory(
        [
            Segment(segment.role, ids[span.start : span.stop], segment.turn, segment.depth)
            for segment, span in zip(counted.segments, counted.spans, strict=True)
        ],
        policy,
    )


def run(model: Any, layout: Layout, **options: Any) -> Any:
    options = {"plan": BlockPlan.of(layout), **options}
    return model(layout.token_ids[None], position_ids=layout.position_ids[None], **options)


def by_predecessor(model: Any, layout: Layout) -> Tensor:
    logits = run(model, layout).logits[0]
    target = layout.loss_mask.nonzero().flatten()
    return torch.nn.functional.cross_entropy(
        logits[layout.predecessor[target]], layout.token_ids[target]
    )


def labels_of(layout: Layout) -> Tensor:
    return layout.token_ids.masked_fill(~layout.loss_mask, -100)[None]


class TestLabels:
    """`labels=` are moved by one, so they may only stand where a token follows its neighbour."""

    WRONG = "labels: the loss takes each token to be predicted by the token before it"

    @pytest.mark.parametrize("form", ["line", "keep_last", "packed", "moved"])
    def test_tokens_that_follow_each_other(self, model: Any, form: str) -> None:
        line = with_ids(1)
        layout = {
            "line": line,
            "keep_last": with_ids(1, keep_last(1)),
            "packed": pack([line, with_ids(2)]),
            "moved": line.replaced(position_ids=line.position_ids + 7),
        }[form]
        right = by_predecessor(model, layout)
        assert_close(run(model, layout, labels=labels_of(layout)).loss, right)
        shifted = layout.shift_labels()[None]
        assert_close(run(model, layout, labels=shifted, shift_labels=shifted).loss, right)

    @pytest.mark.parametrize("known", [True, False])
    @pytest.mark.parametrize("form", ["tree", "unrolled"])
    def test_branches(self, model: Any, form: str, known: bool) -> None:
        line = with_ids(1, keep_last(1)) if form == "unrolled" else with_ids(1)
        layout = pack([[line, with_ids(1, keep_last(2))]]) if form == "tree" else unroll(line)
        plan = BlockPlan.of(layout) if known else BlockPlan.from_expiry(layout.expiry)
        labels, position_ids = labels_of(layout), layout.position_ids[None]
        with pytest.raises(ValueError, match=f"{self.WRONG}.* at token .*layout.predecessor"):
            run(model, layout, labels=labels, plan=plan)
        with pytest.raises(ValueError, match=self.WRONG):
            model(layout.token_ids[None], None, position_ids, None, None, labels, plan=plan)
        with pytest.raises(ValueError, match="layout: token 5 predicts the first token of several"):
            layout.shift_labels()

    def test_branches_that_begin_outside_the_loss(self, model: Any) -> None:
        """The branches of an unrolled trajectory repeat older segments first."""
        layout = unroll(with_ids(1))
        starts = (layout.predecessor != torch.arange(layout.num_tokens) - 1).nonzero().flatten()
        assert len(starts) > 1 and not layout.loss_mask[starts[1:]].any()
        right = by_predecessor(model, layout)
        shifted = layout.shift_labels()[None]
        assert_close(run(model, layout, labels=shifted, shift_labels=shifted).loss, right)
        with pytest.raises(ValueError, match=self.WRONG):
            run(model, layout, labels=layout.token_ids[None])

    @pytest.mark.parametrize("known", [True, False])
    def test_the_first_token_of_a_document(self, model: Any, known: bool) -> None:
        layout = pack([with_ids(1), with_ids(2)])
        plan = BlockPlan.of(layout) if known else BlockPlan.from_expiry(layout.expiry)
        start = int((layout.document == 1).nonzero()[0])
        with pytest.raises(ValueError, match=f"{self.WRONG}.* at token {start} of row 0"):
            run(model, layout, labels=layout.token_ids[None], plan=plan)
        ignoring = layout.token_ids.clone()[None]
        ignoring[0, start] = -1
        with pytest.raises(ValueError, match=self.WRONG):
            run(model, layout, labels=ignoring, plan=plan)
        assert run(model, layout, labels=ignoring, plan=plan, ignore_index=-1).loss > 0

    def test_a_floor(self, model: Any) -> None:
        layout = with_ids(1, mem1_release)
        assert run(model, layout, labels=labels_of(layout)).loss > 0
        plan = BlockPlan.from_expiry(layout.expiry, layout.floor)
        with pytest.raises(ValueError, match=self.WRONG):
            run(model, layout, labels=layout.token_ids[None], plan=plan)

    def test_heads_that_do_not_shift(self) -> None:
        torch.manual_seed(3)
        config = transformers.Qwen2Config(**TINY, num_labels=3)
        model = hf.patch(transformers.Qwen2ForTokenClassification(config).eval())
        layout = unroll(with_ids(1))
        labels = layout.loss_mask.long()[None]
        out = run(model, layout, labels=labels)
        assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[0], labels[0]))

    def test_sizes_and_rows(self, model: Any) -> None:
        layout = with_ids(1)
        with pytest.raises(ValueError, match="labels: expected .* tokens, got 3"):
            run(model, layout, labels=torch.zeros(1, 3, dtype=torch.int64))
        plan = BlockPlan.from_expiry(torch.tensor([[6] * 6, [3] * 3 + [6] * 3]))
        ids = ids_for(6, batch=2)
        labels = ids.clone()
        with pytest.raises(ValueError, match=f"{self.WRONG}.* at token 3 of row 1"):
            model(ids, plan=plan, labels=labels)
        labels[1, 3] = -100
        assert model(ids, plan=plan, labels=labels).loss > 0

    def test_without_a_plan(self, model: Any) -> None:
        ids = ids_for(12)
        got = model(ids, labels=ids).loss
        assert_close(got, hf.unpatch(model)(ids, labels=ids).loss)

    def test_peft(self) -> None:
        peft = pytest.importorskip("peft")
        layout = unroll(with_ids(1))
        lora = peft.LoraConfig(target_modules=["q_proj"])
        adapted = peft.get_peft_model(hf.patch(build("qwen2")), lora)
        arguments = {"position_ids": layout.position_ids[None], "plan": BlockPlan.of(layout)}
        ids = layout.token_ids[None]
        with pytest.raises(ValueError, match=self.WRONG):
            adapted(input_ids=ids, labels=ids, **arguments)


class TestPositionIds:
    NEEDED = "position_ids: expected those of the layout of this plan"

    @pytest.mark.parametrize("form", ["kept", "tree", "unrolled", "moved"])
    def test_are_needed(self, model: Any, form: str) -> None:
        line = trajectory(1)
        moved = line.replaced(position_ids=line.position_ids + (line.position_ids > 6))
        layout = moved if form == "moved" else LAYOUTS[form]
        ids, plan = ids_for(layout.num_tokens), BlockPlan.of(layout)
        for call in (model, model.model):
            for options in ({"plan": plan}, {"plan": plan.to("cpu"), "position_ids": None}):
                with pytest.raises(ValueError, match=self.NEEDED):
                    call(ids, **options)
            call(ids, None, layout.position_ids[None], plan=plan)
        with pytest.raises(ValueError, match=self.NEEDED):
            model(inputs_embeds=model.model.embed_tokens(ids), plan=plan)

    def test_are_not_needed_where_they_count_from_0(self, model: Any) -> None:
        layout = with_ids(1)
        with torch.no_grad():
            given = run(model, layout).logits
            plain = model(layout.token_ids[None], plan=BlockPlan.of(layout)).logits
        assert torch.equal(plain, given)

    @pytest.mark.parametrize(
        ("position_ids", "error", "message"),
        [
            (torch.arange(12), ValueError, r"position_ids: expected \[1, 12\], got \[12\]"),
            (torch.arange(13)[None], ValueError, r"expected \[1, 12\], got \[1, 13\]"),
            (torch.arange(12).expand(2, -1), ValueError, r"expected \[1, 12\], got \[2, 12\]"),
            (torch.zeros(1, 12), TypeError, "position_ids: expected integers, got torch.float32"),
            (torch.zeros(1, 12).bool(), TypeError, "position_ids: expected integers, got torch.b"),
            ([list(range(12))], TypeError, "position_ids: expected a tensor, got list"),
        ],
    )
    def test_of_another_kind(
        self, model: Any, position_ids: Any, error: type[Exception], message: str
    ) -> None:
        plan = BlockPlan.from_expiry(torch.full((12,), 12))
        with pytest.raises(error, match=message):
            model(ids_for(12), position_ids=position_ids, plan=plan)


def test_a_compiled_loss_checks_its_labels() -> None:
    model = hf.patch(build("qwen2", num_hidden_layers=1).eval())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    layout = with_ids(1)
    expected = by_predecessor(model, layout)
    with torch.no_grad():
        got = run(compiled, layout, labels=labels_of(layout), use_cache=False).loss
        assert_close(got, expected)
        shifted = layout.shift_labels()[None]
        options = {"labels": shifted, "shift_labels": shifted, "use_cache": False}
        assert_close(run(compiled, layout, **options).loss, expected)
        tree = unroll(with_ids(1, keep_last(1)))
        with pytest.raises(RuntimeError, match="labels: the loss takes each token"):
            run(compiled, tree, labels=labels_of(tree), use_cache=False)
    torch._dynamo.reset()


def test_a_loss_that_does_not_read_shift_labels() -> None:
    class OwnLoss(transformers.Qwen2ForCausalLM):  # as ModernBertDecoder in transformers 5.9
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
            out = self.model(input_ids, **options)
            logits = self.lm_head(out.last_hidden_state)
            out.loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
            return out

    model = hf.patch(OwnLoss(build("qwen2").config))
    layout = with_ids(1)
    assert run(model, layout, labels=labels_of(layout)).loss > 0
    shifted = layout.shift_labels()[None]
    with pytest.raises(ValueError, match="shift_labels: the loss of OwnLoss does not read them"):
        run(model, layout, labels=shifted, shift_labels=shifted)


def trained(seed: int, weights: bool = True) -> Trajectory:
    """A trajectory with trained infos, untrained actions, and weights."""
    changes = {"info": {"trainable": True, "weight": 0.25}, "action": {"trainable": False}}
    changes["state"] = {"weight": 2.0}
    segments = []
    for segment in with_ids(seed).segments:
        change = dict(changes.get(segment.role, {}))
        if not weights:
            change.pop("weight", None)
        segments.append(replace(segment, **change))
    return Trajectory(segments)


@pytest.mark.parametrize("num_items", [None, 37])
def test_a_collated_batch_of_weights_has_the_weighted_loss(model, num_items):
    members = [trained(1), trained(2)]
    batch = hf.TrajectoryCollator()([{"segments": list(t.segments)} for t in members])
    layout = pack(members)
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    output = model(**batch, **options)
    target = layout.loss_mask.nonzero().flatten()
    logits = output.logits[0][layout.predecessor[target]].double()
    each = torch.nn.functional.cross_entropy(logits, layout.token_ids[target], reduction="none")
    weights = layout.weights[target].double()
    assert set(weights.tolist()) == {0.25, 2.0}
    want = (each * weights).sum() / (weights.sum() if num_items is None else num_items)
    assert_close(output.loss.double(), want)
    parameters = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(output.loss, parameters, retain_graph=True)
    for mine, slow in zip(got, torch.autograd.grad(want, parameters), strict=True):
        assert_close(mine, slow)
    plain = {name: value for name, value in batch.items() if name != "loss_weights"}
    assert (model(**plain, **options).loss - output.loss).abs() > 1e-3


def test_what_is_trained_without_weights_goes_into_the_labels_alone(model):
    member = trained(3, weights=False)
    batch = hf.TrajectoryCollator()([{"segments": list(member.segments)}])
    assert "loss_weights" not in batch
    assert (batch["shift_labels"] >= 0).sum() == member.loss_mask.sum()
    assert_close(model(**batch).loss, by_predecessor(model, member))


def test_segments_of_transcripts_and_of_data_sets_say_the_same():
    member = trained(4)
    batch = hf.TrajectoryCollator()([{"segments": list(member.segments)}])
    names = ("trainable", "weight", "name")
    lists = [
        [s.role, s.turn, s.ids, s.depth, {n: getattr(s, n) for n in names}] for s in member.segments
    ]
    rows = [
        {"role": s.role, "turn": s.turn, "ids": s.ids, "trainable": s.trainable, "weight": s.weight}
        for s in member.segments
    ]
    for segments in (lists, rows):
        other = hf.TrajectoryCollator()([{"segments": segments}])
        for name in ("input_ids", "shift_labels", "loss_weights"):
            assert torch.equal(batch[name], other[name])
    for wrong in ([*lists[0][:4], {"wieght": 2.0}], {**rows[0], "wieght": 2.0}):
        with pytest.raises(TypeError, match="segments: expected"):
            hf.TrajectoryCollator()([{"segments": [wrong, *rows[1:]]}])


def test_loss_weights_that_do_not_fit(model):
    batch = hf.TrajectoryCollator()([{"segments": list(trained(1).segments)}])
    weights = batch.pop("loss_weights")
    for wrong, error, message in (
        (weights[:, 1:], ValueError, "loss_weights: expected .* like shift_labels, got"),
        (weights.long(), TypeError, "loss_weights: expected a floating point tensor, got"),
        (1.0, TypeError, "loss_weights: expected a floating point tensor, got float"),
    ):
        with pytest.raises(error, match=message):
            model(**batch, loss_weights=wrong)
    with pytest.raises(ValueError, match="loss_weights: expected shift_labels beside them"):
        model(batch["input_ids"], loss_weights=weights)
