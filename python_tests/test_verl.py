"""The parts of the verl plugin that run without verl. What needs verl is in on_verl/."""

from __future__ import annotations

import copy
import random
import runpy
import uuid
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from agent_models import make_tokenizer  # noqa: E402

from mem1_kernels import BlockPlan, Trajectory, keep_last, mem1, pack, unroll  # noqa: E402
from mem1_kernels.agent import tags  # noqa: E402
from mem1_kernels.agent.environment import Step  # noqa: E402
from mem1_kernels.agent.tasks import VOCABULARY, ChainTask, TableEnvironment  # noqa: E402
from mem1_kernels.agent.world import World  # noqa: E402
from mem1_kernels.hf import patched  # noqa: E402
from mem1_kernels.rollout import Generation, HFEngine  # noqa: E402
from mem1_kernels.testing import turns  # noqa: E402
from mem1_kernels.verl import episode, figures, plugin, refused  # noqa: E402
from mem1_kernels.verl.episode import RemoteEngine, Reply, Request, first_stop, play  # noqa: E402
from mem1_kernels.verl.layout import (  # noqa: E402
    causal,
    decode_runs,
    encode_runs,
    pack_samples,
)
from mem1_kernels.verl.sessions import Job, Sessions  # noqa: E402
from mem1_kernels.verl.settings import Settings, task_of  # noqa: E402


class Talk(TableEnvironment):
    """Talks for four turns whatever it is told."""

    def reset(self, task: Any) -> list[int]:
        self.left, self.chance = 4, random.Random(task.seed)
        return super().reset(task)

    def step(self, turn: Any) -> Step:
        self.left -= 1
        if not self.left:
            return Step([], 0.5, True, {"em": [0.0, 1.0]})
        return Step(self.chance.choices(range(15, 50), k=self.chance.randint(1, 9)))


TALK = World(ChainTask.sample, Talk)
ROW = {"extra_info": {"size": 2, "seed": 7, "unused": None}}
SETTINGS = Settings("test_verl:TALK", max_new_tokens=8)


class Words:
    """A tokenizer as far as episodes in token ids need one."""

    eos_token_id = 1

    def __len__(self) -> int:
        return VOCABULARY


@pytest.fixture
def model() -> Any:
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return transformers.Qwen2ForCausalLM(config).eval()


class Server:
    """A replica in this process: sessions, or the whole context in a session of its own."""

    def __init__(self, model: Any, rows: int = 4) -> None:
        self.model = model
        self.name = "one"
        with patched(model):
            self.sessions = Sessions(model, rows, torch.Generator().manual_seed(0))
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Reply:
        self.requests.append(request)
        if request.close:
            self.sessions.close(self.name)
            return Reply([], [])
        name = self.name if request.operations else uuid.uuid4().hex
        operations = request.operations or [("read", request.context)]
        job = Job(
            deque(operations),
            request.max_tokens,
            lambda ids: ids[-1] in request.stop_ids,
            request.temperature,
        )
        with patched(self.model):
            self.sessions.begin(name, job)
            while self.sessions.step():
                pass
        if not request.operations:
            self.sessions.close(name)
        assert job.reply is not None
        return Reply(job.reply.token_ids, job.reply.log_probs, 3)


def trained_log_probs(model: Any, samples: list[episode.Played], share: bool) -> list[Any]:
    """What verl would read for each sample's response, after one pass over all of them."""
    decoded = [decode_runs(sample.runs) for sample in samples]
    packed = pack_samples(decoded, [sample.prompt_ids for sample in samples], share=share)
    ids = torch.tensor([i for s in samples for i in s.prompt_ids + s.response_ids])
    with torch.no_grad(), patched(model):
        logits = model(
            ids[packed.source][None],
            position_ids=packed.position_ids[None],
            plan=BlockPlan.from_expiry(packed.expiry),
            logits_to_keep=packed.rows,
        ).logits[0]
    log_probs = torch.log_softmax(logits, 1)
    read = log_probs[:-1].gather(1, ids[1:, None])[:, 0]
    out, begin = [], 0
    for sample in samples:
        stop = begin + len(sample.prompt_ids) + len(sample.response_ids)
        out.append(read[begin + len(sample.prompt_ids) - 1 : stop - 1])
        begin = stop
    return out


class TestLayout:
    @pytest.mark.parametrize(
        "layout",
        [
            turns(20, 4, 5, 3, 9),
            unroll(Trajectory(turns(20, 4, 5, 3, 9).segments, keep_last(1))),
            unroll(Trajectory(turns(20, 4, 5, 3, 9).segments, mem1)),
        ],
    )
    def test_runs_say_all_of_a_layout(self, layout: Any) -> None:
        runs = encode_runs(layout)
        sample = decode_runs(runs)
        assert torch.equal(sample.expiry, layout.expiry.long())
        assert torch.equal(sample.position_ids, layout.position_ids)
        trained = layout.loss_mask
        assert torch.equal(sample.predecessor[trained], layout.predecessor[trained])
        assert len(runs) < layout.num_tokens / 3

    def test_refuses_what_runs_cannot_say(self) -> None:
        layout = turns(20, 4, 5, 3, 9)
        with pytest.raises(ValueError, match="without a floor"):
            encode_runs(layout.replaced(floor=torch.zeros_like(layout.expiry)))

    def test_packs_as_the_package_does(self) -> None:
        """Against `pack`, for two groups with a prompt each and one sample alone."""
        segments = [list(turns(20, 4, 5, 3, 9).segments), list(turns(20, 3, 2, 7, 4).segments)]
        layouts = [Trajectory(part) for part in segments]
        order = [layouts[0], layouts[1], layouts[0]]
        prompts = [[1] * 20, [1] * 20, [2] * 20]
        packed = pack_samples([decode_runs(encode_runs(x)) for x in order], prompts)
        expected = pack([[layouts[0], layouts[1]], layouts[0]])
        assert packed.shared == 20
        assert torch.equal(packed.expiry.int(), expected.expiry)
        assert torch.equal(packed.position_ids, expected.position_ids)
        assert torch.equal(packed.source, expected.source)

    def test_a_prompt_of_which_something_is_dropped_is_not_shared(self) -> None:
        one = decode_runs([(2, 4, 0, -1), (3, 5, 2, 1)])
        packed = pack_samples([one, one], [[5, 6, 7], [5, 6, 7]])
        assert packed.shared == 0 and packed.reads_in_order
        assert packed.expiry.tolist() == [4, 4, 5, 5, 5, 9, 9, 10, 10, 10]

    def test_members_apart_read_their_own_rows(self) -> None:
        packed = pack_samples([causal(3), causal(4), causal(3)], [[5], [6], [5]])
        assert packed.source.tolist() == [0, 1, 2, 8, 9, 3, 4, 5, 6]
        assert packed.rows.tolist() == [0, 1, 2, 5, 6, 7, 8, 0, 3, 4]


class TestEpisode:
    @pytest.mark.parametrize("positions", ["kept", "reprefill"])
    @pytest.mark.parametrize("retention", ["mem1", "keep_last(1)", "keep_all"])
    def test_what_is_sampled_is_what_is_trained(
        self, model: Any, positions: Any, retention: str
    ) -> None:
        server = Server(model)
        settings = Settings("test_verl:TALK", max_new_tokens=8, retention=retention)
        samples = []
        for seed in range(3):
            engine = RemoteEngine(server, positions, Words(), room=400)
            row = {"extra_info": {"size": 2, "seed": seed}}
            samples.append(play(settings, row, engine, 1.0))
            samples.append(copy.deepcopy(samples[-1]))  # the same prompt twice
        for share in (False, True):
            for sample, trained in zip(
                samples, trained_log_probs(model, samples, share), strict=True
            ):
                mask = torch.tensor(sample.response_mask).bool()
                assert sample.turns == 4 and mask[-1] and sample.reward == 0.5 and not sample.error
                gap = (torch.tensor(sample.log_probs) - trained)[mask].abs().max()
                assert gap < 2e-5
        assert samples[0].scores == {"em": 0.5} and samples[0].steps == [3] * 4
        assert not server.sessions.row_of  # all were closed

    def test_the_causal_mask_is_told_apart(self, model: Any) -> None:
        sample = play(SETTINGS, ROW, RemoteEngine(Server(model), "kept", Words(), 400), 1.0)
        tokens = len(sample.prompt_ids) + len(sample.response_ids)
        mask = torch.tensor(sample.response_mask).bool()
        sample.runs = [(tokens, tokens, 0, -1)]
        (trained,) = trained_log_probs(model, [sample], share=False)
        gaps = figures.gap_metrics(torch.tensor(sample.log_probs)[mask], trained[mask])
        with pytest.raises(ValueError, match="do not see the same tokens"):
            figures.check_gap(gaps, *SETTINGS.tolerances("float32", "fp32"))

    @pytest.mark.parametrize("positions", ["kept", "reprefill"])
    def test_ends_where_there_is_no_room(self, model: Any, positions: Any) -> None:
        for room in range(1, 60, 7):
            engine = RemoteEngine(Server(model), positions, Words(), room)
            sample = play(SETTINGS, ROW, engine, 1.0)
            assert len(sample.response_ids) <= room
            assert sample.turns == 4 or "no room for another turn" in sample.error
            assert sample.response_mask[-1] == 1

    def test_ends_where_the_server_fails(self, model: Any) -> None:
        for works in range(3):
            server = Server(model)

            def write(request: Request, server: Server = server, works: int = works) -> Reply:
                if len(server.requests) == works and not request.close:
                    raise RuntimeError("connection lost")
                return server(request)

            sample = play(SETTINGS, ROW, RemoteEngine(write, "kept", Words(), 400), 1.0)
            assert sample.failed and "connection lost" in sample.error
            assert sample.turns == works
            # It ends with a token of the policy, or is one masked token.
            assert sample.response_mask[-1] == (works > 0)
            assert decode_runs(sample.runs).num_tokens == 2 or works
            assert not server.sessions.row_of

    @pytest.mark.parametrize(
        ("settings", "row", "message"),
        [
            (SETTINGS, {"extra_info": {}}, "extra_info: expected questions, task"),
            (Settings("test_verl:nothing"), ROW, "cannot be imported"),
            (Settings("chain", retention="fold"), ROW, "depth"),
            (Settings("chain", tags="MEM1"), ROW, "tags: expected none for TableEnvironment"),
        ],
    )
    def test_what_cannot_begin_is_a_masked_sample(
        self, settings: Settings, row: Any, message: str
    ) -> None:
        def write(request: Request) -> Reply:
            raise AssertionError("nothing is to be written")

        sample = play(settings, row, RemoteEngine(write, "kept", Words(), 400), 1.0)
        assert sample.failed and message in sample.error
        assert (sample.response_ids, sample.response_mask) == ([1], [0])
        assert decode_runs(sample.runs).num_tokens == 2

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            (Reply([], []), "expected 1 to 8 tokens, got 0"),
            (Reply([20] * 9, [0.0] * 9), "expected 1 to 8 tokens, got 9"),
            (Reply([20], []), "a log-prob for each of 1 tokens, got 0"),
        ],
    )
    def test_replies_that_cannot_be_used(self, reply: Reply, message: str) -> None:
        engine = RemoteEngine(lambda request: reply, "reprefill", Words(), 400)
        assert message in play(SETTINGS, ROW, engine, 1.0).error

    def test_a_server_that_writes_on_behind_a_stop(self) -> None:
        class Letters:
            def decode(self, ids: list[int]) -> str:
                return "".join(map(chr, ids))

        ids = [ord(letter) for letter in "one</a>two</a>"]
        assert first_stop(ids, (), ("</a>", "</b>"), Letters()) == 7
        assert first_stop(ids, (ord("e"),), ("</a>",), Letters()) == 3
        assert first_stop(ids, (), ("</b>",), Letters()) is None

    @pytest.mark.parametrize("positions", ["kept", "reprefill"])
    def test_an_episode_in_text_under_the_tags_of_a_row(
        self, tmp_path: Any, positions: Any
    ) -> None:
        """Of a server that knows no stop strings; what it writes behind a stop does not count."""
        pytest.importorskip("bm25s")
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text('{"id": "1", "contents": "Chad\\nIts capital is N\'Djamena."}\n')
        tokenizer = make_tokenizer()
        script = [
            "<IS>look</IS><query>capital Chad</query> and on",
            "<IS>found</IS><answer>N'Djamena</answer><answer>Paris</answer>",
        ]
        requests: list[Request] = []

        def write(request: Request) -> Reply:
            if request.close:
                return Reply([], [])
            requests.append(request)
            ids = tokenizer.encode(script[len(requests) - 1], add_special_tokens=False)
            return Reply(ids, [-0.5] * len(ids))

        row = {
            "extra_info": {
                "questions": ["What is the capital of Chad?"],
                "golden_answers": [["N'Djamena"]],
                "tags": "PAPER",
                "retention": "keep_last(1)",
            }
        }
        settings = Settings("qa", corpus=str(corpus), max_new_tokens=200)
        sample = play(settings, row, RemoteEngine(write, positions, tokenizer, 2000), 1.0)
        assert (sample.reward, sample.turns, sample.error) == (1.0, 2, "")
        assert set(requests[0].stop_strings) == {"</query>", "</answer>"}
        text = tokenizer.decode(sample.response_ids)
        assert text.endswith("<answer>N'Djamena</answer>") and "and on" not in text
        written = [i for i, m in zip(sample.response_ids, sample.response_mask, strict=True) if m]
        assert tokenizer.decode(written).count("</query>") == 1
        assert "Its capital is" not in tokenizer.decode(written)
        if positions == "kept":
            assert [kind for kind, _ in requests[1].operations] == ["read", "drop"]
            assert requests[0].opens and not requests[1].opens
        else:
            assert requests[1].context[: len(sample.prompt_ids)] == sample.prompt_ids


class TestSessions:
    def test_equal_to_the_engine(self, model: Any) -> None:
        """Rows side by side, greedily, against `HFEngine`, which does one batch at a time."""
        tasks = [ChainTask.sample(2, random.Random(seed)) for seed in range(3)]
        server = Server(model)
        for task in tasks:
            environment = Talk()
            prompt = environment.reset(task)

            def respond(turns: Any, environment: Talk = environment) -> list[list[int] | None]:
                step = environment.step(None)
                return [None if step.done else list(step.observation)]

            generation = Generation(max_new_tokens=6, temperature=0.0)
            (expected,) = HFEngine(model).run([prompt], respond, generation)
            environment.reset(task)
            engine = RemoteEngine(server, "kept", Words(), room=400)
            (got,) = engine.run([prompt], respond, generation)
            assert [turn.token_ids for turn in got.turns] == [
                turn.token_ids for turn in expected.turns
            ]
            assert got.peak_context == expected.peak_context

    def test_side_by_side(self, model: Any) -> None:
        """Jobs of different lengths, one of which comes late, write what each writes alone."""
        prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]

        def job(prompt: list[int], count: int) -> Job:
            return Job(deque([("read", prompt)]), count, lambda ids: False, 0.0)

        alone = []
        for prompt, count in zip(prompts, (6, 3, 5), strict=True):
            server = Server(model, rows=1)
            only = job(prompt, count)
            with patched(model):
                server.sessions.begin("x", only)
                while server.sessions.step():
                    pass
            alone.append(only.reply)
        sessions = Server(model, rows=3).sessions
        jobs = [job(prompt, count) for prompt, count in zip(prompts, (6, 3, 5), strict=True)]
        with patched(model):
            sessions.begin("a", jobs[0])
            sessions.step()
            sessions.begin("b", jobs[1])
            sessions.begin("c", jobs[2])
            while sessions.step():
                pass
        for one, expected in zip(jobs, alone, strict=True):
            assert one.reply is not None and expected is not None
            assert one.reply.token_ids == expected.token_ids
            torch.testing.assert_close(
                torch.tensor(one.reply.log_probs), torch.tensor(expected.log_probs)
            )

    def test_errors(self, model: Any) -> None:
        sessions = Server(model, rows=1).sessions
        sessions.begin("a", Job(deque([("read", [5])]), 1, lambda ids: False, 0.0))
        with pytest.raises(ValueError, match="'a' is writing already"):
            sessions.begin("a", Job(deque(), 1, lambda ids: False, 0.0))
        with pytest.raises(ValueError, match="expected at most 1 at once"):
            sessions.begin("b", Job(deque(), 1, lambda ids: False, 0.0))


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "environment: expected one"),
            ({"environment": "chess"}, "environment: expected chain, .* got 'chess'"),
            ({"environment": "chain", "turns": 3}, "there is no option 'turns'"),
            ({"environment": "chain", "positions": "compact"}, "got 'compact'"),
            ({"environment": "chain", "max_turns": 0}, "max_turns: expected at least 1, got 0"),
            ({"environment": "chain", "max_turns": "3"}, "max_turns: expected an integer"),
            ({"environment": "chain", "tolerance_max": 0}, "tolerance_max: expected a number"),
            ({"environment": "chain", "retention": "none"}, "retention: expected"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            Settings.read(options)

    def test_a_row_comes_before_the_config(self) -> None:
        row = {"retention": "keep_all", "extra_info": {"environment": "lookup", "tags": None}}
        settings = Settings("chain").of_row(row)
        assert (settings.environment, settings.retention) == ("lookup", "keep_all")

    def test_positions_of_a_backend(self) -> None:
        assert Settings("chain").form("mem1") == "kept"
        assert Settings("chain").form("vllm") == "reprefill"
        assert Settings("chain", positions="reprefill").form("mem1") == "reprefill"
        with pytest.raises(ValueError, match="'kept' needs a rollout that keeps its KV cache"):
            Settings("chain", positions="kept").form("sglang")

    def test_questions_of_a_row_under_other_tags(self, tmp_path: Any) -> None:
        pytest.importorskip("bm25s")
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text('{"id": "1", "contents": "Chad\\nIts capital is N\'Djamena."}\n')
        world = Settings("qa", corpus=str(corpus), tags="PAPER").world()
        assert world.make().tags == tags.PAPER
        row = {"extra_info": {"questions": ["Capital of Chad?"], "golden_answers": [["N'Djamena"]]}}
        assert task_of(row, world).golden_answers == (("N'Djamena",),)
        with pytest.raises(ValueError, match="'qa' draws none"):
            task_of({"extra_info": {"size": 1, "seed": 0}}, world)


def config_with(path: str, value: Any) -> dict[str, Any]:
    """A config of verl, as far as it is looked at, with one item changed."""
    config: dict[str, Any] = {
        "actor_rollout_ref": {
            "model": {"use_remove_padding": True},
            "actor": {"strategy": "fsdp2"},
            "rollout": {
                "name": "mem1",
                "agent": {"default_agent_loop": "mem1"},
                "custom": {"mem1": {"environment": "chain"}},
            },
        },
        "critic": {"strategy": "fsdp2", "model": {}},
        "algorithm": {"adv_estimator": "gae"},
        "trainer": {"use_v1": True},
        "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"VERL_ENGINE_VENDOR": "mem1"}}}},
    }
    *parents, name = path.split(".")
    part = config
    for parent in parents:
        part = part.setdefault(parent, {})
    part[name] = value
    return config


class TestRefused:
    def test_a_config_that_fits(self) -> None:
        assert refused.check_config(config_with("x", 1), {}).environment == "chain"

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("actor_rollout_ref.rollout.agent.default_agent_loop", "tool_agent"),
            ("actor_rollout_ref.model.use_fused_kernels", True),
            ("critic.model.use_fused_kernels", True),
            ("actor_rollout_ref.model.use_remove_padding", False),
            ("critic.model.use_remove_padding", False),
            ("actor_rollout_ref.actor.strategy", "megatron"),
            ("critic.strategy", "megatron"),
            ("actor_rollout_ref.rollout.top_p", 0.9),
            ("actor_rollout_ref.rollout.top_k", 50),
            ("actor_rollout_ref.rollout.calculate_log_probs", False),
            ("actor_rollout_ref.rollout.tensor_model_parallel_size", 2),
            ("algorithm.rollout_correction.bypass_mode", True),
            ("trainer.v1.trainer_mode", "separate_async"),
            ("trainer.use_v1", False),
        ],
    )
    def test_by_name_and_reason(self, path: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"^{path}: expected .*, got .*: .+"):
            refused.check_config(config_with(path, value), {})

    def test_every_item_refuses_something(self) -> None:
        for item in refused.ITEMS:
            assert not item.holds("nonsense") and item.reason, item.path

    def test_no_critic_no_matter(self) -> None:
        config = config_with("critic.model.use_fused_kernels", True)
        config["algorithm"]["adv_estimator"] = "grpo"
        refused.check_config(config, {})

    def test_parallel_servers_of_other_rollouts(self) -> None:
        config = config_with("actor_rollout_ref.rollout.tensor_model_parallel_size", 2)
        config["actor_rollout_ref"]["rollout"]["name"] = "vllm"
        refused.check_config(config, {})

    def test_engines_of_verl(self) -> None:
        path = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_ENGINE_VENDOR"
        refused.check_config(config_with(path, None), {"VERL_ENGINE_VENDOR": "mem1"})
        with pytest.raises(ValueError, match=f"VERL_ENGINE_VENDOR: expected 'mem1' .*{path}=mem1"):
            refused.check_config(config_with(path, None), {})


class TestPlugin:
    def test_a_failure_is_raised_by_name_where_it_matters(self, monkeypatch: Any) -> None:
        seen = []
        validate = plugin.checked(lambda config, **options: seen.append(options))
        monkeypatch.setattr(plugin, "failure", ImportError("no extension for this torch"))
        with pytest.raises(RuntimeError, match="could not be loaded .*no extension for this torch"):
            validate(config_with("x", 1), use_critic=True)
        assert not seen
        validate({"trainer": {}}, use_critic=True)  # somebody else's run
        assert seen == [{"use_critic": True}]

    def test_a_refused_item_is_raised_before_verl_looks(self) -> None:
        validate = plugin.checked(lambda config: pytest.fail("verl came first"))
        with pytest.raises(ValueError, match="use_fused_kernels"):
            validate(config_with("actor_rollout_ref.model.use_fused_kernels", True))


class TestFigures:
    def test_nan_does_not_pass(self) -> None:
        gaps = figures.gap_metrics(torch.tensor([float("nan")]), torch.tensor([0.0]))
        with pytest.raises(ValueError, match="log-probs of rollout and actor differ"):
            figures.check_gap(gaps, 1.0, 1.0)

    def test_episodes(self) -> None:
        good = {"turns": 3, "peak_context": 20, "tokens": 50, "failed": False, "error": ""}
        bad = {"turns": 1, "peak_context": 5, "tokens": 10, "failed": True, "error": "no shop"}
        good["scores"], bad["scores"] = {"em": 0.5}, {}
        metrics = figures.episode_metrics([good, bad])
        assert metrics["mem1/failed_episodes"] == 1 and metrics["mem1/turns_mean"] == 2
        assert metrics["mem1/em_mean"] == 0.5
        with pytest.raises(RuntimeError, match="every episode of this step failed.*no shop"):
            figures.episode_metrics([bad, bad])


def test_rows_of_the_example(tmp_path: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    path = Path(__file__).parents[1] / "examples/verl/make_data.py"
    main = runpy.run_path(str(path))["main"]
    main([str(tmp_path), "--rows", "5", "--sizes", "2", "3"])
    rows = parquet.read_table(tmp_path / "train.parquet").to_pylist()
    world = Settings("chain").world()
    searches = [task_of(row, world).searches for row in rows]
    assert len(searches) == 5 and set(searches) <= {2, 3}
