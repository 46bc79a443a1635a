"""The parts of `mem1_kernels.vllm` that need no vLLM: drops, their order, chunks, and refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mem1_kernels import keep_all, mem1, memento
from mem1_kernels.rollout import Generation
from mem1_kernels.rollout.loop import open_rows, run_turns
from mem1_kernels.vllm.slots import Slots, drop, in_order, read_spans
from mem1_kernels.vllm.support import UNTESTED, Unsupported, check_engine, check_version, rope_rows
from mem1_kernels.vllm.turns import Turns


@given(st.data())
def test_drops_leave_what_the_spans_leave(data):
    """Through several drops and growths, each slot's position is that of its token."""
    slots, held, alive, written = Slots(), 0, [], 0
    for _ in range(data.draw(st.integers(1, 5))):
        grown = data.draw(st.integers(1, 12))
        alive += range(written, written + grown)  # by slot: what it holds
        written, held = written + grown, held + grown
        assert slots.held(held).tolist() == alive
        begin = data.draw(st.integers(0, written - 1))
        end = data.draw(st.integers(begin, written))
        survivors = [x for x in alive if not begin <= x < end]
        if not survivors:
            with pytest.raises(ValueError, match="drop: expected something to survive"):
                drop(slots, held, [(begin, end)])
            continue
        dropped = drop(slots, held, [(begin, end)])
        if len(survivors) == held:
            assert dropped is None
            continue
        alive = [alive[old] for old in dropped.source]
        assert sorted(alive) == sorted(survivors) and len(alive) == len(survivors)
        filled = dropped.source != np.arange(len(survivors))
        assert (dropped.source[filled] >= len(survivors)).all()  # nothing moves without need
        held, slots = len(alive), dropped.slots
        assert slots.offset == written - held


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4), max_size=5))
def test_moves_that_are_joined_do_what_they_do_one_after_the_other(drops):
    moves = []
    for pairs in drops:
        to = {b: a for a, b in pairs}  # no slot twice, none both read and written
        kept = [(a, b) for b, a in to.items() if a not in to]
        moves.append(np.array(kept, np.int64).reshape(-1, 2).T)
    one, other = np.arange(10), np.arange(10)
    for each in moves:
        one[each[1]] = one[each[0]]
    for each in in_order(moves):
        assert len(set(each[1])) == each.shape[1] and not set(each[0]) & set(each[1])
        other[each[1]] = other[each[0]]
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    "bad", [7, "ab", [[1]], [[1, 2, 3]], [["a", 2]], [[3, 1]], [[-1, 1]], [[True, 2]]]
)
def test_spans_are_read_with_care(bad):
    with pytest.raises(ValueError, match="drop: expected pairs"):
        read_spans(bad)


class Session:
    """A session as vLLM has it, whose model writes 100, 101, ...: what it computed, under what."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...]]] = []  # each token, with the positions it saw
        self.live: list[int] = []  # positions
        self.next = 100

    def compute(self, chunk):
        """The ids sampled; of the last one no KV is kept."""
        for start, end in chunk.drop:
            self.live = [x for x in self.live if not start <= x < end]
        assert chunk.token_ids, "vLLM needs at least one token"
        sampled: list[int] = []
        for token in chunk.token_ids:
            self._add(token)
        for _ in range(chunk.max_tokens):
            if sampled:
                self._add(sampled[-1])
            sampled.append(self.next + len(sampled))
        if chunk.writes:
            self.next += len(sampled)
        return sampled

    def _add(self, token):
        self.live.append(len(self.seen))
        self.seen.append((token, tuple(self.live)))


@pytest.mark.parametrize("read", [[7, 8], []], ids=["observations", "empty ones"])
@pytest.mark.parametrize("marks", [False, True])
def test_every_token_sees_what_the_trajectory_says(read, marks):
    """Also where a turn begins right behind a drop, with nothing read since."""
    names = iter(["block", "summary"] * 50)
    mark = (lambda ids: next(names) if len(ids) == 2 else None) if marks else None
    generation = Generation(
        retention=memento if marks else mem1,
        max_turns=4,
        max_new_tokens=5,
        mark=mark,
    )
    (row,) = open_rows([[1, 2, 3]], generation, "kept")
    session, turns = Session(), Turns(row, generation)

    class Backend:
        marks = True

        def drop(self, row, segments):
            turns.drop(segments)

        def read(self, row, token_ids):
            turns.read(token_ids)

        def retire(self, row):
            pass

        def write(self, rows, number):
            turns.begin(number)
            while not turns.done:
                sampled = [session.compute(chunk) for chunk in turns.chunks()][-1]
                turns.heard(sampled, [-1.0] * len(sampled), stopped=False)
            return [turns.written]

    (rollout,) = run_turns([row], Backend(), lambda turns: [read], generation)
    expiry = rollout.trajectory.expiry.tolist()
    ids = rollout.trajectory.token_ids.tolist()
    assert [token for token, _ in session.seen] == ids[: len(session.seen)]
    assert len(session.seen) >= len(ids) - 1 - len(read)
    for index, (_, saw) in enumerate(session.seen):
        assert list(saw) == [k for k in range(index + 1) if expiry[k] > index]


def test_a_turn_cut_by_the_engine_is_an_error():
    generation = Generation(retention=keep_all, max_new_tokens=5)
    (row,) = open_rows([[1]], generation, "reprefill")
    turns = Turns(row, generation)
    turns.begin(1)
    assert [chunk.max_tokens for chunk in turns.chunks()] == [5]
    turns.heard([4, 5], [-1.0, -1.0], stopped=False)
    assert turns.done and "max_model_len" in turns.written.error


class FullAttentionSpec(SimpleNamespace):
    pass


def good_config():
    return SimpleNamespace(
        model_config=SimpleNamespace(
            uses_mrope=False,
            uses_xdrope_dim=0,
            is_encoder_decoder=False,
            is_multimodal_model=False,
            runner_type="generate",
            enable_prompt_embeds=False,
            hf_text_config=SimpleNamespace(max_position_embeddings=64),
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            data_parallel_size=1,
            tensor_parallel_size=1,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        device_config=SimpleNamespace(device_type="cpu"),
        kv_transfer_config=None,
        ec_transfer_config=None,
        kv_events_config=None,
        speculative_config=None,
        lora_config=None,
        use_v2_model_runner=False,
    )


def groups(count=1, **spec):
    spec = {"sliding_window": None, "attention_chunk_size": None, **spec}
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec(**spec))] * count
    )


REFUSED = {
    "model_config.uses_mrope": (True, "M-RoPE"),
    "model_config.uses_xdrope_dim": (3, "XD-RoPE"),
    "model_config.is_encoder_decoder": (True, "encoder-decoder"),
    "model_config.is_multimodal_model": (True, "multimodal"),
    "model_config.runner_type": ("pooling", "the runner 'pooling'"),
    "model_config.enable_prompt_embeds": (True, "prompt embeddings"),
    "parallel_config.pipeline_parallel_size": (2, "pipeline parallelism"),
    "parallel_config.decode_context_parallel_size": (2, "decode context"),
    "parallel_config.prefill_context_parallel_size": (2, "prefill context"),
    "parallel_config.data_parallel_size": (2, "data parallelism"),
    "cache_config.cache_dtype": ("fp8", "the KV cache fp8"),
    "kv_transfer_config": (1, "a KV connector"),
    "ec_transfer_config": (1, "an encoder-cache connector"),
    "kv_events_config": (SimpleNamespace(enable_kv_cache_events=True), "KV cache events"),
    "speculative_config": (1, "speculative decoding"),
    "lora_config": (1, "LoRA"),
}
UNRUN = {
    "device_config.device_type": ("cuda", "vLLM on cuda"),
    "use_v2_model_runner": (True, "Model Runner V2"),
    "scheduler_config.async_scheduling": (True, "asynchronous scheduling"),
    "parallel_config.tensor_parallel_size": (2, "tensor parallelism"),
}


def changed(path, value):
    config = copy.deepcopy(good_config())
    *rooms, name = path.split(".")
    place = config
    for room in rooms:
        place = getattr(place, room)
    setattr(place, name, value)
    return config


def test_what_was_tested_passes():
    check_version("0.32.0+cpu")
    check_engine(good_config(), groups())
    assert rope_rows(good_config()) == 64


@pytest.mark.parametrize("path", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(path, monkeypatch):
    monkeypatch.setenv(UNTESTED, "1")
    value, said = REFUSED[path]
    with pytest.raises(Unsupported, match=said):
        check_engine(changed(path, value), groups())


@pytest.mark.parametrize("path", UNRUN)
def test_what_was_never_run_needs_a_word(path, monkeypatch):
    value, said = UNRUN[path]
    with pytest.raises(Unsupported, match=f"{said}: written, but never run"):
        check_engine(changed(path, value), groups())
    monkeypatch.setenv(UNTESTED, "1")
    check_engine(changed(path, value), groups())


def test_other_caches_and_versions_are_refused():
    with pytest.raises(Unsupported, match="2 attention groups"):
        check_engine(good_config(), groups(2))
    with pytest.raises(Unsupported, match="sliding windows"):
        check_engine(good_config(), groups(sliding_window=64))
    with pytest.raises(Unsupported, match="chunked attention"):
        check_engine(good_config(), groups(attention_chunk_size=64))
    mla = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace())])
    with pytest.raises(Unsupported, match="expected FullAttentionSpec"):
        check_engine(good_config(), mla)
    with pytest.raises(Unsupported, match=r"vLLM 0\.33\.1"):
        check_version("0.33.1")
    with pytest.raises(Unsupported, match="no max_position_embeddings"):
        rope_rows(changed("model_config.hf_text_config", SimpleNamespace()))
