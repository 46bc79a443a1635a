"""On a real vLLM: shared blocks, full caches, ends of tables, and what is refused.

Run by `make test-vllm`, in an environment that has vLLM.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
import transformers

pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm")

from agent_models import make_tokenizer
from vllm import LLM, SamplingParams
from vllm.inputs.engine import tokens_input
from vllm_models import (
    _OPEN,
    FP32,
    GENERATION,
    PROMPTS,
    differences,
    free_blocks,
    held_blocks,
    load,
    open_engine,
    options,
    save_model,
    scheduler_of,
    world,
)

from mem1_kernels import keep_all, keep_last
from mem1_kernels.agent import BM25, MemoryEfficientAgent, Passage
from mem1_kernels.agent.tasks import VOCABULARY, ChainTask, TableEnvironment
from mem1_kernels.rollout import EngineError
from mem1_kernels.vllm import Unsupported, VLLMEngine, engine_options

BLOCK = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def engine(folder):
    return open_engine(folder)


class Core:
    """vLLM's engine core, driven chunk by chunk."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.core = engine.llm.llm_engine.engine_core
        self.pool = scheduler_of(engine).kv_cache_manager.block_pool

    def blocks(self, name: str):
        manager = scheduler_of(self.engine).kv_cache_manager.coordinator.single_type_managers[0]
        return manager.req_to_blocks[name]

    def send(self, name, ids, new, *, resumable=False, drop=(), asked=None):
        if drop:
            asked = {"drop": [list(span) for span in drop]}
        params = SamplingParams(
            max_tokens=new,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args={"mem1": asked} if asked else None,
        )
        request = self.engine.llm.llm_engine.input_processor.process_inputs(
            name,
            tokens_input(list(ids)),
            params,
            supported_tasks=("generate",),
            resumable=resumable,
        )
        request.external_req_id = name
        self.core.add_request(request)

    def until_done(self, *names):
        """The ids and log-probs of each request's chunk, and its end."""
        heard = {name: ([], [], []) for name in names}
        while not all(ends for _, _, ends in heard.values()):
            for output in self.core.get_output().outputs:
                ids, log_probs, ends = heard[output.request_id]
                ids += output.new_token_ids
                if output.new_logprobs is not None:
                    log_probs += [float(row[0]) for row in output.new_logprobs.logprobs]
                if output.finish_reason is not None:
                    ends.append((str(output.finish_reason), output.stop_reason))
        return heard if len(names) > 1 else heard[names[0]]


@torch.no_grad()
def gap(model, before, ids, log_probs, hidden=None) -> float:
    """The largest difference from a dense forward pass; `hidden`: (from query, keys a to b)."""
    tokens = [*before, *ids]
    visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    if hidden is not None:
        query, begin, end = hidden
        visible[query:, begin:end] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None, None]
    positions = torch.arange(len(tokens))[None]
    logits = model(torch.tensor([tokens]), attention_mask=mask, position_ids=positions).logits[0]
    scored = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    return float((scored[len(before) - 1 :] - torch.tensor(log_probs)).abs().max())


def test_a_block_that_others_read_is_copied_and_never_written(engine, model):
    core = Core(engine)
    before = core.pool.get_num_free_blocks()
    prompt = [(11 * i) % 100 + 20 for i in range(100)]
    core.send("session", prompt, 40, resumable=True)
    written, _, _ = core.until_done("session")
    core.send("session", written[-1:], 1, resumable=True)
    core.until_done("session")

    reader = prompt + written + [30] * 10  # its first four blocks are those of the session
    core.send("reader", reader, 30)
    first = core.core.get_output().outputs
    shared = core.blocks("session")[3].block_id
    assert [block.ref_cnt for block in core.blocks("session")[:4]] == [2, 2, 2, 2]

    info = [40] * 50
    core.send("session", info, 20, resumable=True, drop=[(100, 140)])
    assert core.blocks("session")[3].block_id != shared  # a copy: it will be written
    assert [block.ref_cnt for block in core.blocks("session")[:4]] == [2, 2, 2, 1]
    heard = core.until_done("session", "reader")
    ids, log_probs, _ = heard["session"]
    assert gap(model, prompt + written + info, ids, log_probs, (140, 100, 140)) <= FP32
    ids, log_probs, _ = heard["reader"]
    mine = next(output for output in first if output.request_id == "reader")
    ids = mine.new_token_ids + ids
    log_probs = [float(row[0]) for row in mine.new_logprobs.logprobs] + log_probs
    assert gap(model, reader, ids, log_probs) <= FP32

    later = prompt + written + [50] * 10  # a prefix hit on what the reader left
    core.send("later", later, 10)
    ids, log_probs, _ = core.until_done("later")
    assert gap(model, later, ids, log_probs) <= FP32
    core.core.abort_requests(["session"])
    assert core.pool.get_num_free_blocks() == before


def test_a_block_that_was_overwritten_gives_no_prefix_hit(engine, model):
    core = Core(engine)
    prompt = [(13 * i) % 100 + 20 for i in range(100)]
    core.send("alone", prompt, 40, resumable=True)
    written, _, _ = core.until_done("alone")
    core.send("alone", written[-1:], 1, resumable=True)
    core.until_done("alone")
    blocks = [block.block_id for block in core.blocks("alone")[:4]]
    core.send("alone", [40] * 50, 20, resumable=True, drop=[(100, 140)])
    core.until_done("alone")
    assert [block.block_id for block in core.blocks("alone")[:4]] == blocks  # in place
    later = prompt + written + [50] * 10
    core.send("later", later, 10)
    ids, log_probs, _ = core.until_done("later")
    assert gap(model, later, ids, log_probs) <= FP32
    core.core.abort_requests(["alone"])


@pytest.mark.parametrize(
    ("drop", "why"),
    [
        ([(0, 20)], "expected something to survive"),
        ([(5, 40)], "expected positions up to 20"),
        ([(5, 2)], "expected pairs"),
    ],
)
def test_a_bad_drop_ends_its_own_session_only(engine, drop, why):
    core = Core(engine)
    before = core.pool.get_num_free_blocks()
    core.send("bad", range(20, 40), 1, resumable=True)
    core.send("good", range(20, 40), 1, resumable=True)
    core.until_done("bad", "good")
    core.send("bad", [50], 3, resumable=True, drop=drop)
    core.send("good", [50], 3, resumable=True, drop=[(2, 9)])
    heard = core.until_done("bad", "good")
    assert heard["good"][2] == [("length", None)]
    assert heard["bad"][2][0][0] == "error" and why in heard["bad"][2][0][1]
    core.send("bad", [50], 3, resumable=True)  # it says so again
    assert core.until_done("bad")[2][0][0] == "error"
    core.core.abort_requests(["good", "bad"])
    assert core.pool.get_num_free_blocks() == before
    assert scheduler_of(engine)._gone == {} and scheduler_of(engine).pruned == {}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("garbage", "mem1: expected an object"),
        ({"dorp": []}, "mem1: expected an object"),
        ({"stop": [7]}, "stop: expected a list of texts"),
        ({"stop": ["x"]}, "stop: texts need a tokenizer"),
        ({"drop": [[0, 1]]}, "drop: a new request holds nothing"),
    ],
)
def test_what_a_request_asks_cannot_end_the_engine(engine, asked, why):
    """Any client of a server can send `extra_args`."""
    core = Core(engine)
    core.send("plain", [20, 21], 3)
    core.send("odd", [20, 21], 3, asked=asked)
    heard = core.until_done("plain", "odd")
    assert heard["plain"][2] == [("length", None)]
    assert heard["odd"][2][0][0] == "error" and why in heard["odd"][2][0][1]


def test_rows_that_a_full_cache_ends_say_what_to_enlarge_and_the_others_are_exact(folder, model):
    # 24 blocks for 8 rows that need 3 to 5 each.
    engine = open_engine(folder, num_gpu_blocks_override=25)
    before = free_blocks(engine)
    prompts = [[(7 * i + r) % 100 + 20 for i in range(40)] for r in range(8)]
    generation = replace(GENERATION, retention=keep_last(2), max_new_tokens=25, stop_ids=())
    rollouts = engine.run(prompts, world([9] * 8), generation)
    ended = [rollout for rollout in rollouts if rollout.error]
    assert 0 < len(ended) < 8
    assert all("Enlarge the KV cache (kv_cache_memory_bytes)" in rollout.error for rollout in ended)
    assert all(len(r.turns) == 9 for r in rollouts if not r.error)
    written = [rollout for rollout in rollouts if rollout.turns]
    assert float(differences(model, written).max()) <= FP32
    assert free_blocks(engine) == before and held_blocks(engine) == []
    (rollout,) = engine.run(prompts[:1], world([9] * 8), generation)  # the engine lives on
    assert rollout.error == "" and float(differences(model, [rollout]).max()) <= FP32


def test_a_row_that_is_too_long_ends_and_says_so(engine, model):
    generation = replace(GENERATION, retention=keep_all, max_turns=40, stop_ids=())
    rollouts = engine.run([PROMPTS[0], [40] * 300], world([3, 40], 30), generation)
    assert rollouts[0].error == "" and "max_model_len" in rollouts[1].error
    assert float(differences(model, rollouts).max()) <= FP32
    with pytest.raises(EngineError, match="512"):
        engine.run([[40] * 600], world([3]), generation)
    again = VLLMEngine(engine.llm, positions="reprefill")
    rollouts = again.run([PROMPTS[0], [40] * 300], world([3, 40], 30), generation)
    assert rollouts[0].error == "" and rollouts[1].error


def test_the_end_of_the_rope_table_ends_a_row_in_time(tmp_path, model):
    folder = save_model(tmp_path, max_position_embeddings=512)
    engine = open_engine(folder)
    generation = replace(GENERATION, max_turns=60, max_new_tokens=12, stop_ids=())
    (rollout,) = engine.run([PROMPTS[0]], lambda turns: [[60] * 12], generation)
    assert 'hf_overrides={"max_position_embeddings"' in rollout.error
    assert 480 < rollout.trajectory.num_tokens <= 512
    assert float(differences(load(folder), [rollout]).max()) <= FP32
    longer = open_engine(folder, hf_overrides={"max_position_embeddings": 2048})
    (rollout,) = longer.run([PROMPTS[0]], lambda turns: [[60] * 12], generation)
    assert rollout.error == "" and len(rollout.turns) == 60
    assert float(differences(load(folder), [rollout]).max()) <= FP32


def test_an_environment_that_raises_leaves_no_session(engine):
    before = free_blocks(engine)

    def respond(turns):
        raise KeyError("tool")

    with pytest.raises(KeyError):
        engine.run(PROMPTS, respond, GENERATION)
    assert free_blocks(engine) == before and held_blocks(engine) == []


def test_arguments(engine, folder):
    with pytest.raises(ValueError, match="prompts: expected at most max_num_seqs=8"):
        engine.run([[20]] * 9, world([1] * 9), GENERATION)
    with pytest.raises(ValueError, match="stop_strings: need a tokenizer"):
        engine.run([[20]], world([1]), replace(GENERATION, stop_strings=("x",)))
    with pytest.raises(ValueError, match="positions: expected 'kept' or 'reprefill'"):
        VLLMEngine(engine.llm, positions="compact")
    with pytest.raises(ValueError, match="dtype: expected none beside an LLM"):
        VLLMEngine(engine.llm, dtype="float32")
    plain = LLM(folder, **options(logprobs_mode="processed_logprobs"))
    _OPEN.append(plain)
    with pytest.raises(ValueError, match=r"engine_options\(\), got one with scheduler_cls=None"):
        VLLMEngine(plain)
    assert VLLMEngine(plain, positions="reprefill").run([[20]], world([1]), GENERATION)


def test_what_a_real_vllm_cannot_honour_is_refused_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    config = transformers.MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, sliding_window=64,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="SlidingWindowSpec|sliding windows"):
        LLM(str(tmp_path), **options(**engine_options()))
    monkeypatch.setattr("mem1_kernels.vllm.scheduler.vllm.__version__", "0.33.0")
    with pytest.raises(Unsupported, match=r"vLLM 0\.33\.0: the plug-in was tested with 0\.32\.0"):
        LLM(folder, **options(**engine_options()))


def test_an_agent_on_ids_by_one_word(tmp_path):
    folder = save_model(tmp_path, vocab_size=VOCABULARY)
    engine = open_engine(folder)
    agent = MemoryEfficientAgent(
        None, engine=engine, environment=TableEnvironment(), progress=False, max_new_tokens=8
    )
    results = agent.run([ChainTask.sample(2, Random(seed)) for seed in range(3)], max_turns=4)
    assert [result.failed for result in results] == [False] * 3
    assert all(result.turns for result in results)


def test_an_agent_that_speaks_text_by_one_word(tmp_path, monkeypatch):
    """Turns end at tags that are several tokens, in vLLM's scheduler."""
    folder = save_model(tmp_path, make_tokenizer())
    opened: list[VLLMEngine] = []

    def small(model, tokenizer):
        opened.append(open_engine(model, skip_tokenizer_init=False, max_model_len=2048))
        return opened[-1]

    monkeypatch.setattr("mem1_kernels.vllm.VLLMEngine", small)
    agent = MemoryEfficientAgent(
        folder,
        engine="vllm",
        environment=BM25([Passage("1", "A lake", "It is deep.")]),
        progress=False,
        max_new_tokens=24,
        temperature=1.0,
    )
    result = agent.process(queries=["What is it?"], max_turns=3)
    assert result.turns and result.rollout.positions == "kept"
    assert opened == [agent.engine]
    assert float(differences(load(folder), [result.rollout]).max()) <= FP32
    with pytest.raises(TypeError, match="model: with engine='vllm', expected a folder"):
        _ = MemoryEfficientAgent(load(folder), engine="vllm", environment=TableEnvironment()).engine
