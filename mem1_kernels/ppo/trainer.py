"""PPO for MEM1 agents, one file from the task to the curve, to be read from top to bottom.

One step: play episodes on a pruned cache, keeping the log-prob of every token as it was sampled;
pack them into rows of at most `token_budget` tokens, one plan a row; score them under the policy,
the reference and the critic; hold the trainer's log-probs against the sampled ones; estimate
advantages; update in minibatches. GRPO, RLOO and REINFORCE++ differ in the advantages only.

Under `accelerate launch` (DDP or FSDP2) every process plays its share of the episodes and then
holds all of them, which are a few megabytes of ids; the rows are dealt out, and every mean is over
the whole minibatch. So the figures do not depend on the number of processes. Nor do they depend on
what ran before: every random number of step n comes from (seed, n), so a checkpoint is the
weights, the optimizer and n.

Left out: asynchronous rollouts, sending weights to a server, reward models, tensor and context
parallelism, FSDP1 and DeepSpeed.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import random
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from mem1_kernels.agent.agent import MemoryEfficientAgent
from mem1_kernels.agent.engine import Engine, HFEngine
from mem1_kernels.agent.qa import QATask, RetrievalQA, compose, load_questions
from mem1_kernels.agent.retrieval import BM25, RetrievalServer
from mem1_kernels.agent.tasks import (
    VOCABULARY,
    ChainTask,
    LookupTask,
    TableEnvironment,
    TableTask,
    Teacher,
)
from mem1_kernels.block_plan import BlockPlan
from mem1_kernels.hf import is_patched, patch, unpatch
from mem1_kernels.ppo import (
    approx_kl,
    clip_fraction,
    explained_variance,
    gae,
    grpo_advantages,
    kl_estimate,
    kl_penalised_rewards,
    log_prob_gap,
    on_every_token,
    on_last_token,
    policy_loss,
    reinforce_pp_advantages,
    rloo_advantages,
    token_log_probs,
    truncated_importance_weights,
    value_loss,
    whiten,
)
from mem1_kernels.ppo.config import TOLERANCE, Config, retention_of
from mem1_kernels.ppo.report import Log
from mem1_kernels.retention import Retention, Segment
from mem1_kernels.rollout import Rollout, collate
from mem1_kernels.trajectory import Layout, Trajectory, pack, unroll

logger = logging.getLogger(__name__)

UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass
class World:
    """What is to be learned. Make your own to train on another environment.

    Args:
        draw: (size, random) -> a task, such as `environment.reset` takes.
        make: makes one environment; its `tags` say how turns are written.
        demonstrate: (task, random) -> segments with ids, and the reward: the teacher of the warm
            start. None: there is none.
        draw_eval: like draw, for evaluation.
        tokenizer: a Hugging Face tokenizer if environments speak text, None if they speak ids.
    """

    draw: Callable[[int, random.Random], Any]
    make: Callable[[], Any]
    demonstrate: Callable[[Any, random.Random], tuple[list[Segment], float]] | None = None
    draw_eval: Callable[[int, random.Random], Any] | None = None
    tokenizer: Any = None


def make_world(config: Config) -> World:
    """The world that `config.task` names."""
    if config.task in ("chain", "lookup"):
        task_class = ChainTask if config.task == "chain" else LookupTask

        def demonstrate(task: TableTask, rng: random.Random) -> tuple[list[Segment], float]:
            return Teacher(config.sft_keep, rng).play(task)

        evaluated = config.eval_sizes if config.eval_every else ()
        for name, sizes in (("sizes", config.sizes), ("eval_sizes", evaluated)):
            for size in sizes:
                try:
                    task_class.sample(size, random.Random(0))
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return World(task_class.sample, TableEnvironment, demonstrate)
    from transformers import AutoTokenizer

    if config.task == "factbook":
        from mem1_kernels.agent.factbook import Factbook

        book = Factbook()
        questions = [question for hops in (1, 2) for question in book.questions(hops)]
        random.Random(0).shuffle(questions)
        held_out, questions = questions[: len(questions) // 10], questions[len(questions) // 10 :]
        retriever: Any = BM25(book.passages)
    else:
        questions = load_questions(config.data)
        held_out = load_questions(config.eval_data) if config.eval_data else questions
        remote = config.corpus.startswith(("http://", "https://"))
        retriever = RetrievalServer(config.corpus) if remote else BM25.from_jsonl(config.corpus)

    def drawer(questions: list, sizes: Sequence[int]) -> Callable[[int, random.Random], QATask]:
        pool = cache(lambda size: compose(questions, size, seed=config.seed))
        for size in sizes:
            pool(size)  # too few questions for one raise now
        return lambda size, rng: rng.choice(pool(size))

    return World(
        drawer(questions, config.sizes),
        lambda: RetrievalQA(retriever, topk=config.topk),
        draw_eval=drawer(held_out, config.eval_sizes if config.eval_every else ()),
        tokenizer=AutoTokenizer.from_pretrained(config.model),
    )


def end_processes() -> None:
    """Ends the process group of a launch, if there is one, once `train` has returned."""
    gc.collect()  # a DDP wrapper that outlives its process group can hang in gloo
    PartialState().destroy_process_group()


def seed_of(config: Config, label: str, number: int) -> int:
    """A seed for one part of the run."""
    return zlib.crc32(f"{config.seed}/{label}/{number}".encode())


def draw_tasks(config: Config, world: World, step: int) -> list[Any]:
    """The tasks of one step, one a group of episodes."""
    rng = random.Random(f"{config.seed}/tasks/{step}")
    count = config.episodes // config.group_size
    return [world.draw(rng.choice(config.sizes), rng) for _ in range(count)]


def make_policy(config: Config) -> Any:
    """The causal LM that is trained, patched, with LoRA adapters if asked for.

    Raises:
        ImportError: adapters are asked for, but peft is not installed.
    """
    import transformers

    torch.manual_seed(config.seed)
    if config.model == "tiny":
        shape = transformers.Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.05,
            tie_word_embeddings=False,
        )
        policy: Any = transformers.Qwen2ForCausalLM(shape).to(getattr(torch, config.dtype))
    else:
        policy = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=getattr(torch, config.dtype)
        )
    if config.lora_rank:
        try:
            import peft
        except ImportError as error:
            raise ImportError(
                "lora_rank: peft is not installed (`pip install mem1-kernels[lora]`)"
            ) from error
        adapters = peft.LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear"
        )
        policy = peft.get_peft_model(policy, adapters)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return patch(policy)


Attend = Callable[[Any, Layout, BlockPlan], Tensor]
"""(model, layout, plan) -> last hidden states `[tokens, width]`, each token seeing what the
layout says. There is one right implementation, `attend`; `bench/mask_ablation.py` has wrong ones.
"""


def attend(model: Any, layout: Layout, plan: BlockPlan) -> Tensor:
    """One masked forward pass over a packed row."""
    assert layout.token_ids is not None
    return model.get_decoder()(
        input_ids=layout.token_ids[None],
        position_ids=layout.position_ids[None],
        plan=plan,
        use_cache=False,
    ).last_hidden_state[0]


class ActorCritic(nn.Module):
    """Policy and critic as one module, so that one wrapper (DDP, FSDP2) serves both.

    Args:
        policy: a patched causal LM.
        critic: "head" reads the policy's hidden states, "detached" does without training them,
            "model" is a second decoder with a head, "none" gives no values.
        temperature: of the distribution that the log-probs are of.
    """

    def __init__(
        self, policy: Any, critic: str, temperature: float = 1.0, attend: Attend = attend
    ) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.attend = attend
        self.detach = critic == "detached"
        self.critic_model = None
        if critic == "model":
            self.critic_model = patch(deepcopy(unpatch(policy).get_decoder()))
            patch(policy)
        width = policy.config.get_text_config().hidden_size
        self.value_head = None if critic == "none" else nn.Linear(width, 1)
        if self.value_head is not None:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        self._no_split_modules = policy._no_split_modules  # what FSDP2 wraps, layer by layer
        head = policy.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(f"policy: expected a plain linear LM head, got {type(head).__name__}")

    def forward(self, layout: Layout, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probs and entropies of a row's generated tokens, and the values before them.

        Each is fp32 `[generated]`, in packed order; values are None without a critic.
        """
        assert is_patched(self.policy), "an unpatched model would drop the plan without a word"
        assert layout.token_ids is not None
        before = layout.predecessor[layout.loss_mask]
        hidden = self.attend(self.policy, layout, plan)[before]
        head = self.policy.get_output_embeddings()
        text_config = self.policy.config.get_text_config()
        log_probs, entropy = token_log_probs(
            hidden,
            head.weight,
            layout.token_ids[layout.loss_mask],
            bias=head.bias,
            temperature=self.temperature,
            softcap=getattr(text_config, "final_logit_softcapping", None),
            return_entropy=True,
        )
        if self.value_head is None:
            return log_probs, entropy, None
        if self.critic_model is not None:
            hidden = self.attend(self.critic_model, layout, plan)[before]
        elif self.detach:
            hidden = hidden.detach()
        weight, bias = self.value_head.weight.float(), self.value_head.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            values = nn.functional.linear(hidden.float(), weight, bias)[:, 0]
        return log_probs, entropy, values


def reshard(model: nn.Module) -> None:
    """Lets go of parameters that FSDP2 gathered for the last pass; without FSDP2 does nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def exchange(parameters: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Exchanges two sets of values in place, a tensor at a time."""
    for name, parameter in parameters.items():
        held = parameter.clone()
        parameter.copy_(others[name])
        others[name].copy_(held)


class Learner:
    """The model as it is trained: wrapped, with its optimizer, its reference and its engine.

    The reference is a copy of what is trained (all weights, or the adapters), exchanged with it
    while it scores: no second model. The engine, which plays, is the policy itself; where FSDP2
    shards it, it is a copy in one piece, brought up to date before it plays.
    """

    def __init__(self, config: Config, accelerator: Accelerator, attend: Attend) -> None:
        if accelerator.distributed_type in UNSUPPORTED and not accelerator.is_fsdp2:
            raise ValueError(
                "accelerator: expected one process, DDP or FSDP2 (--fsdp_version 2), "
                f"got {accelerator.distributed_type}"
            )
        if accelerator.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f"mixed_precision: expected 'no' or 'bf16', got {accelerator.mixed_precision!r}"
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "gradient_accumulation_steps: expected 1, since `minibatch` and `token_budget` say "
                f"what is accumulated, got {accelerator.gradient_accumulation_steps}"
            )
        if config.dtype == "bfloat16" and not config.lora_rank:
            warnings.warn(
                "dtype: weights in bfloat16 lose updates below 1/256 of them; bf16=true computes "
                "in bfloat16 and keeps the weights in float32",
                stacklevel=2,
            )
        critic = config.critic if config.algorithm == "ppo" else "none"
        module = ActorCritic(make_policy(config), critic, config.temperature, attend)
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # the rollout has none, and its log-probs are those of the update
        policy = [p for p in module.policy.parameters() if p.requires_grad]
        inside = {id(p) for p in policy}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in inside]
        groups = [{"params": policy, "lr": config.lr}]
        groups += [{"params": rest, "lr": config.critic_lr}] if rest else []
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.config = config
        self.accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(module, optimizer)
        self.module: ActorCritic = accelerator.unwrap_model(self.model)
        self.sharded = any(isinstance(m, FSDPModule) for m in self.module.modules())
        reshard(self.module)
        self.trained = {n: p for n, p in self.module.policy.named_parameters() if p.requires_grad}
        self.reference: dict[str, Tensor] = {}
        if config.kl_coef:
            self.reference = {name: p.detach().clone() for name, p in self.trained.items()}
        self.engine = self.module.policy
        if self.sharded:
            computes = "bfloat16" if accelerator.mixed_precision == "bf16" else config.dtype
            copy = replace(config, dtype=computes, gradient_checkpointing=False)
            self.engine = make_policy(copy).to(accelerator.device)

    def learning_rates(self, *rates: float) -> None:
        """Sets the policy's and the critic's learning rates."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate

    @torch.no_grad()
    def settle_reference(self) -> None:
        """The policy of now becomes the reference."""
        reshard(self.module)
        for name, values in self.reference.items():
            values.copy_(self.trained[name])

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """The policy is the reference for the length of a `with` block."""
        reshard(self.module)
        exchange(self.trained, self.reference)
        try:
            yield
        finally:
            reshard(self.module)
            exchange(self.trained, self.reference)

    @torch.no_grad()
    def ready_engine(self) -> Any:
        """The engine with the policy's weights of now."""
        if self.sharded:
            reshard(self.module)
            copies = dict(self.engine.named_parameters())
            for name, parameter in self.module.policy.named_parameters():
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                copies[name].copy_(whole)
        return self.engine

    def clip_gradients(self) -> list[float]:
        """Clips and returns the norm of the policy's gradient, and of the critic's."""
        norms = []
        for group in self.optimizer.param_groups:
            norm = self.accelerator.clip_grad_norm_(group["params"], self.config.max_grad_norm)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        if not all(map(math.isfinite, norms)):
            raise FloatingPointError(f"gradient norm: expected finite numbers, got {norms}")
        return norms


class Episode(NamedTuple):
    """One episode as played; `task` is the number of its task in the step."""

    rollout: Rollout
    task: int
    reward: float
    scores: dict[str, Any]
    failed: bool

    @property
    def dropped_tokens(self) -> int:
        """Tokens that the cache lost before the end."""
        trajectory = self.rollout.trajectory
        return int((trajectory.expiry < trajectory.num_tokens).sum())


def collect(
    config: Config,
    accelerator: Accelerator,
    world: World,
    model: Any,
    tasks: Sequence[Any],
    label: str,
    *,
    retention: Retention,
    temperature: float,
    max_turns: int,
    group_size: int = 1,
    engine: Callable[[Any], Engine] | None = None,
) -> list[Episode]:
    """Plays every task `group_size` times over all processes; all of them return all episodes.

    Batches of `rollout_batch` episodes have a seed of their own, made from `label` and their
    number, so that it does not matter which process plays them.

    Raises:
        RuntimeError: an episode could not begin, or half of them failed.
    """
    numbers = [number for number in range(len(tasks)) for _ in range(group_size)]
    batches = [
        numbers[at : at + config.rollout_batch]
        for at in range(0, len(numbers), config.rollout_batch)
    ]
    played: list[tuple[int, list[Episode]]] = []
    for place in range(accelerator.process_index, len(batches), accelerator.num_processes):
        if engine is None:
            positions = cast(Any, config.positions)
            player: Engine = HFEngine(model, world.tokenizer, positions=positions)
        else:
            player = engine(model)
        agent = MemoryEfficientAgent(
            None,
            engine=player,
            environment=world.make,
            retention=retention,
            max_new_tokens=config.max_new_tokens,
            max_info_tokens=config.max_info_tokens,
            temperature=temperature,
            seed=seed_of(config, label, place),
            workers=config.workers,
            progress=False,
        )
        with accelerator.autocast():
            results = agent.run([tasks[number] for number in batches[place]], max_turns=max_turns)
        episodes = []
        for number, result in zip(batches[place], results, strict=True):
            if result.rollout is None:
                raise RuntimeError(f"an episode could not begin: {result.error}")
            if result.failed:
                logger.warning("an episode of %s failed: %s", label, result.error)
            episodes.append(
                Episode(result.rollout, number, result.reward, result.scores, result.failed)
            )
        played.append((place, episodes))
    if accelerator.num_processes > 1:
        played = gather_episodes(played, retention)
    everyone = [episode for _, batch in sorted(played, key=itemgetter(0)) for episode in batch]
    failed = sum(episode.failed for episode in everyone)
    if failed * 2 >= len(everyone):
        raise RuntimeError(f"{failed} of {len(everyone)} episodes failed; the log says why")
    return everyone


def gather_episodes(
    played: list[tuple[int, list[Episode]]], retention: Retention
) -> list[tuple[int, list[Episode]]]:
    """Every process's episodes; they travel without the retention policy, perhaps a closure."""

    def bare(episode: Episode) -> Episode:
        segments: Any = episode.rollout.trajectory.segments
        return episode._replace(rollout=replace(episode.rollout, trajectory=segments))

    def whole(episode: Episode) -> Episode:
        segments: Any = episode.rollout.trajectory
        trajectory = Trajectory(segments, retention)
        return episode._replace(rollout=replace(episode.rollout, trajectory=trajectory))

    sent = [(place, [bare(episode) for episode in batch]) for place, batch in played]
    return [(place, [whole(episode) for episode in batch]) for place, batch in gather_object(sent)]


class Row(NamedTuple):
    """A packed row on the device, its plan, and where its generated tokens lie in the batch."""

    layout: Layout
    plan: BlockPlan
    where: Tensor

    @staticmethod
    def of(layout: Layout, where: Tensor, device: torch.device) -> Row:
        layout = layout.to(device)
        plan = BlockPlan.from_expiry(layout.expiry, layout.floor)
        return Row(layout, plan, where.to(device))


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Deals items of the given sizes into bins of at most `budget`: first fit, largest first.

    An item that is larger than the budget has a bin of its own.

    >>> fill([5, 3, 9, 4], budget=8)
    [[2], [0, 1], [3]]
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        place = next((i for i, left in enumerate(room) if sizes[item] <= left), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(item)
        room[place] -= sizes[item]
    return bins


def check_pairing(rollouts: Sequence[Rollout], retention: Retention) -> None:
    """Raises ValueError unless the trainer's mask is the one that the rollouts were pruned by."""
    for rollout in rollouts:
        mine = rollout.trajectory.retention
        if mine is not retention:
            raise ValueError(
                f"rollouts: pruned by {getattr(mine, '__name__', mine)!r}, but the trainer masks "
                f"by {getattr(retention, '__name__', retention)!r}; that pairing is off-policy"
            )


@dataclass
class Batch:
    """The episodes of a step, and one number for each of their generated tokens.

    Vectors are fp32 `[generated]` on the device, episode after episode, in order of time; but
    `rewards` is `[episodes]`.
    """

    episodes: list[Episode]
    rewards: Tensor
    starts: list[int]
    trajectory: Tensor
    sampled: Tensor
    log_probs: Tensor
    reference: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @staticmethod
    def of(episodes: list[Episode], device: torch.device) -> Batch:
        """A batch whose episodes are played and not yet scored."""
        masks = [episode.rollout.trajectory.loss_mask for episode in episodes]
        sampled = torch.cat(
            [e.rollout.log_probs[mask] for e, mask in zip(episodes, masks, strict=True)]
        ).to(device)
        counts = torch.tensor([int(mask.sum()) for mask in masks])
        return Batch(
            episodes=episodes,
            rewards=torch.tensor([episode.reward for episode in episodes], device=device),
            starts=(counts.cumsum(0) - counts).tolist(),
            trajectory=torch.arange(len(episodes)).repeat_interleave(counts).to(device),
            sampled=sampled,
            **{
                name: torch.zeros_like(sampled)
                for name in ("log_probs", "reference", "values", "advantages", "returns")
            },
        )

    @property
    def mask(self) -> Tensor:
        """True everywhere: the vectors hold generated tokens only."""
        return torch.ones_like(self.sampled, dtype=torch.bool)

    def rows(
        self, chosen: Sequence[int], config: Config, retention: Retention, device: torch.device
    ) -> list[Row]:
        """The chosen episodes in packed rows; episodes of one task share their prompt in a row.

        Raises:
            ValueError: positions or retention of the rollouts are not the trainer's.
        """
        check_pairing([self.episodes[number].rollout for number in chosen], retention)
        layouts = {number: self.episodes[number].rollout.layout for number in chosen}
        groups: dict[int, list[list[int]]] = {}
        sizes: dict[int, list[int]] = {}
        for number in chosen:
            task = self.episodes[number].task
            pieces, size = groups.setdefault(task, [[]]), sizes.setdefault(task, [0])
            prompt = layouts[number].spans[0].stop if pieces[-1] else 0
            if pieces[-1] and size[-1] + layouts[number].num_tokens - prompt > config.token_budget:
                pieces.append([])
                size.append(0)
                prompt = 0
            pieces[-1].append(number)
            size[-1] += layouts[number].num_tokens - prompt
        units = [piece for pieces in groups.values() for piece in pieces]
        counts = [count for size in sizes.values() for count in size]
        rows = []
        for members in fill(counts, config.token_budget):
            layout, _ = collate(
                [[self.episodes[number].rollout for number in units[m]] for m in members],
                positions=cast(Any, config.positions),
            )
            # Of a trajectory's token that was generated: how many were before it in the batch.
            before = [
                self.starts[number]
                + self.episodes[number].rollout.trajectory.loss_mask.cumsum(0)
                - 1
                for member in members
                for number in units[member]
            ]
            where = torch.cat(before)[layout.source][layout.loss_mask]
            rows.append(Row.of(layout, where, device))
        return rows


class Stopwatch:
    """Seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.device = device

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def share(accelerator: Accelerator, rows: Sequence[Row]) -> Iterator[tuple[Row, bool, bool]]:
    """This process's rows as (row, whether it counts, whether it is the last).

    All processes get the same number, as DDP and FSDP2 need; what fills up does not count.
    """
    count = accelerator.num_processes
    rounds = math.ceil(len(rows) / count)
    for number in range(rounds):
        at = number * count + accelerator.process_index
        yield rows[min(at, len(rows) - 1)], at < len(rows), number == rounds - 1


@torch.no_grad()
def score_rows(
    learner: Learner, rows: Sequence[Row], like: Tensor, watch: Stopwatch
) -> tuple[Tensor, Tensor]:
    """Log-probs and values of a batch's generated tokens, on every process."""
    learner.model.eval()
    found = torch.zeros(2, len(like), device=like.device)
    for row, counts, _ in share(learner.accelerator, rows):
        with watch("forward"):
            log_probs, _, values = learner.model(row.layout, row.plan)
        if counts:
            found[0, row.where] = log_probs.float()
            if values is not None:
                found[1, row.where] = values
    found = cast(Tensor, learner.accelerator.reduce(found, "sum"))
    return found[0], found[1]


LossOf = Callable[[Row, Tensor, Tensor, "Tensor | None"], tuple[Tensor, dict[str, Tensor]]]
"""(row, log-probs, entropies, values) -> the row's part of the loss and of each logged figure."""


def train_on(
    learner: Learner, rows: Sequence[Row], loss_of: LossOf, watch: Stopwatch
) -> dict[str, float]:
    """One optimizer step over `rows`, whose losses add up. Returns the figures and the norms."""
    learner.model.train()
    accelerator = learner.accelerator
    totals: dict[str, Tensor] = {}
    for row, counts, last in share(accelerator, rows):
        # Under FSDP2 gradients that are not reduced at once would be held whole.
        together = last or learner.sharded
        with nullcontext() if together else accelerator.no_sync(learner.model):
            with watch("forward"):
                loss, figures = loss_of(row, *learner.model(row.layout, row.plan))
            with watch("backward"):
                # DDP and FSDP2 average gradients over processes; the parts are to be added.
                accelerator.backward(loss * (accelerator.num_processes * counts))
        for name, value in (figures | {"loss": loss}).items():
            totals[name] = totals.get(name, torch.zeros_like(loss)) + value.detach() * counts
    with watch("backward"):
        norms = learner.clip_gradients()
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    sums = cast(Tensor, accelerator.reduce(torch.stack(list(totals.values())), "sum"))
    names = [*totals, "grad_norm", "critic_grad_norm"]
    return dict(zip(names, [*sums.tolist(), *norms], strict=False))


def read_transcripts(path: str) -> list[tuple[list[Segment], float]]:
    """Traces from a JSONL file: `{"segments": [[role, turn, ids], ...], "reward": r}` a line."""
    traces = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            segments = [Segment(role, ids, turn) for role, turn, ids in record["segments"]]
            traces.append((segments, float(record["reward"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: no transcript ({error})") from error
    return traces


def write_transcripts(episodes: Sequence[Episode], path: Path) -> None:
    """Writes what `read_transcripts` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for episode in episodes:
            segments = episode.rollout.trajectory.segments
            record = {"segments": [[s.role, s.turn, s.ids] for s in segments]}
            file.write(json.dumps(record | {"reward": episode.reward}) + "\n")


def warm_start(learner: Learner, world: World, retention: Retention, progress: bool) -> float:
    """Learns from traces, policy and critic, and returns the last loss.

    The policy learns what the traces generate, the critic the reward that they got. A jump of the
    positions behind the prompt lets it see distances that only longer horizons have.
    """
    config, accelerator = learner.config, learner.accelerator
    traces = read_transcripts(config.transcripts) if config.transcripts else []
    if not traces and world.demonstrate is None:
        raise ValueError("transcripts: this task has no teacher; expected a file of traces")
    watch = Stopwatch(accelerator.device)
    bar = tqdm(range(config.sft_steps), "warm start", disable=None if progress else True)
    figures = {"loss": math.nan}
    for step in bar:
        rng = random.Random(f"{config.seed}/sft/{step}")
        layouts, rewards = [], []
        for _ in range(config.sft_batch):
            if traces:
                segments, reward = rng.choice(traces)
            else:
                assert world.demonstrate is not None
                segments, reward = world.demonstrate(world.draw(rng.choice(config.sizes), rng), rng)
            trajectory = Trajectory(segments, retention)
            jump = rng.randint(0, config.sft_jump)
            behind = trajectory.position_ids >= trajectory.spans[0].stop
            moved = trajectory.replaced(position_ids=trajectory.position_ids + jump * behind)
            layouts.append(unroll(trajectory) if config.positions == "reprefill" else moved)
            rewards.append(reward)
        count = sum(int(layout.loss_mask.sum()) for layout in layouts)
        rows: list[Row] = []
        found: list[Tensor] = []
        begin = 0
        for members in fill([layout.num_tokens for layout in layouts], config.token_budget):
            layout = pack([layouts[member] for member in members])
            document = layout.document[layout.loss_mask]
            earned = on_last_token(
                torch.tensor([rewards[member] for member in members]),
                torch.ones_like(document, dtype=torch.bool),
                document,
            )
            nothing, everything = torch.zeros_like(earned), torch.ones_like(document).bool()
            found.append(gae(earned, nothing, everything, document, gamma=config.gamma)[1])
            where = torch.arange(begin, begin + len(document))
            begin += len(document)
            rows.append(Row.of(layout, where, accelerator.device))
        returns = torch.cat(found).to(accelerator.device)

        def loss_of(
            row: Row,
            log_probs: Tensor,
            entropy: Tensor,
            values: Tensor | None,
            count: int = count,
            returns: Tensor = returns,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            loss = -log_probs.sum() / count
            if values is None:
                return loss, {}
            mask = torch.ones_like(values, dtype=torch.bool)
            target = returns[row.where]
            error = value_loss(values, values, target, mask, denominator=count, clip=None)
            return loss + error, {"value_loss": error}

        falling = 1 - 0.9 * step / max(config.sft_steps - 1, 1)
        learner.learning_rates(config.sft_lr * falling, config.critic_lr)
        figures = train_on(learner, rows, loss_of, watch)
        bar.set_postfix(loss=f"{figures['loss']:.4f}")
    learner.optimizer.optimizer.state.clear()
    return figures["loss"]


def check_agreement(batch: Batch, config: Config, dtype: str) -> tuple[float, float]:
    """(largest, mean) |rollout - trainer| log-prob; raises if that is no rounding.

    Raises:
        ValueError: it is more than `log_prob_tolerance`, or than what the dtype brings with it.
    """
    largest, mean = (float(x) for x in log_prob_gap(batch.sampled, batch.log_probs, batch.mask))
    allowed, allowed_mean = TOLERANCE[dtype]
    if config.log_prob_tolerance:
        allowed = allowed_mean = config.log_prob_tolerance
    if not (largest <= allowed and mean <= allowed_mean):
        raise ValueError(
            f"log-probs: rollout and trainer differ by up to {largest:.3g} (mean {mean:.3g}), "
            f"expected at most {allowed:.3g} (mean {allowed_mean:.3g}): they do not compute the "
            "same function, so training would be off-policy"
        )
    return largest, mean


def estimate_advantages(batch: Batch, config: Config) -> dict[str, float]:
    """Fills `advantages` and `returns` as `config.algorithm` says."""
    mask, ids = batch.mask, batch.trajectory
    figures: dict[str, float] = {}
    if config.algorithm in ("grpo", "rloo"):
        task = torch.tensor([episode.task for episode in batch.episodes], device=ids.device)
        relative = grpo_advantages if config.algorithm == "grpo" else rloo_advantages
        batch.advantages = on_every_token(relative(batch.rewards, task), mask, ids)
        return figures
    rewards = on_last_token(batch.rewards, mask, ids)
    if config.kl_coef and config.kl_in == "reward":
        rewards = kl_penalised_rewards(
            rewards,
            batch.log_probs,
            batch.reference,
            mask,
            coef=config.kl_coef,
            kind=cast(Any, config.kl_kind),
        )
    if config.algorithm == "reinforce++":
        batch.advantages = reinforce_pp_advantages(rewards, mask, ids, gamma=config.gamma)
        return figures
    advantages, batch.returns = gae(
        rewards, batch.values, mask, ids, gamma=config.gamma, lam=config.lam
    )
    batch.advantages = whiten(advantages, mask)
    figures["explained_variance"] = float(explained_variance(batch.values, batch.returns, mask))
    return figures


def update(
    learner: Learner, batch: Batch, retention: Retention, step: int, watch: Stopwatch
) -> dict[str, float]:
    """All epochs and minibatches of one step; returns the means of what they report."""
    config, device = learner.config, learner.accelerator.device
    weights = (
        truncated_importance_weights(
            batch.log_probs, batch.sampled, batch.mask, cap=config.importance_cap
        )
        if config.importance_cap
        else None
    )
    groups: dict[int, list[int]] = {}
    for number, episode in enumerate(batch.episodes):
        groups.setdefault(episode.task, []).append(number)
    reports = []
    for epoch in range(config.epochs):
        order = list(groups)
        random.Random(f"{config.seed}/order/{step}/{epoch}").shuffle(order)
        at_once = config.minibatch // config.group_size
        for begin in range(0, len(order), at_once):
            chosen = [number for task in order[begin : begin + at_once] for number in groups[task]]
            rows = batch.rows(chosen, config, retention, device)
            count = sum(len(row.where) for row in rows)

            def loss_of(
                row: Row,
                log_probs: Tensor,
                entropy: Tensor,
                values: Tensor | None,
                count: int = count,
            ) -> tuple[Tensor, dict[str, Tensor]]:
                old, advantages = batch.log_probs[row.where], batch.advantages[row.where]
                mask = torch.ones_like(old, dtype=torch.bool)
                figures = {
                    "policy_loss": policy_loss(
                        log_probs,
                        old,
                        advantages,
                        mask,
                        denominator=count,
                        clip=config.clip,
                        dual_clip=config.dual_clip or None,
                        weights=None if weights is None else weights[row.where],
                    ),
                    "entropy": entropy.sum() / count,
                }
                loss = figures["policy_loss"] - config.entropy_coef * figures["entropy"]
                if config.kl_coef and config.kl_in == "loss":
                    distance = kl_estimate(
                        log_probs, batch.reference[row.where], mask, kind=cast(Any, config.kl_kind)
                    )
                    loss = loss + config.kl_coef * distance.sum() / count
                if values is not None:
                    figures["value_loss"] = value_loss(
                        values,
                        batch.values[row.where],
                        batch.returns[row.where],
                        mask,
                        denominator=count,
                        clip=config.value_clip or None,
                    )
                    loss = loss + figures["value_loss"]
                clipped = clip_fraction(
                    log_probs, old, advantages, mask, clip=config.clip, denominator=count
                )
                moved = approx_kl(log_probs, old, mask, denominator=count)
                return loss, figures | {"clip_fraction": clipped, "approx_kl": moved}

            reports.append(train_on(learner, rows, loss_of, watch))
    return {name: sum(r[name] for r in reports) / len(reports) for name in reports[0]}


def mean_scores(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means by name; an episode that was cut before it was scored counts as 0.

    Of a score with one number an objective it is the mean of their sum, and beside it
    `name_k` is the mean of objective k over the episodes that were scored on it.
    """
    total: dict[str, float] = {}
    single: dict[str, list[float]] = {}
    for episode in episodes:
        for name, value in episode.scores.items():
            parts = [value] if isinstance(value, (int, float)) else list(value)
            total[name] = total.get(name, 0.0) + float(sum(parts))
            for number, one in enumerate(parts if len(parts) > 1 else (), 1):
                single.setdefault(f"{name}_{number}", []).append(float(one))
    means = {name: value / len(episodes) for name, value in total.items()}
    return means | {name: sum(ones) / len(ones) for name, ones in single.items()}


def _beside(record: dict[str, Any], scores: Mapping[str, float]) -> dict[str, Any]:
    """The record with an environment's scores in it, whose names must be others."""
    taken = sorted(record.keys() & scores.keys())
    if taken:
        raise ValueError(f"scores: expected names of their own, got {taken}")
    return record | dict(scores)


def evaluate(
    config: Config,
    engine: Any,
    *,
    world: World | None = None,
    accelerator: Accelerator | None = None,
    sizes: Sequence[int] | None = None,
    retention: Retention | None = None,
) -> list[dict[str, float]]:
    """Plays episodes of each size.

    Args:
        engine: a causal LM.
        sizes: `config.eval_sizes` unless told.
        retention: the config's unless told; `keep_all` shows the agent under full context.

    Returns:
        For each size: size, failed (episodes that a broken tool ended; nothing else counts them),
        reward, peak_context (the most tokens any cache row held), total_tokens and turns (means an
        episode), seconds, and the mean scores.

    Raises:
        RuntimeError: a tool failed in every episode of a size.
        ValueError: a score whose name the table has already.
    """
    world = world or make_world(config)
    accelerator = accelerator or Accelerator(mixed_precision="bf16" if config.bf16 else None)
    table = []
    for size in sizes or config.eval_sizes:
        rng = random.Random(f"{config.seed}/eval/{size}")
        draw = world.draw_eval or world.draw
        started = time.perf_counter()
        episodes = collect(
            config,
            accelerator,
            world,
            engine,
            [draw(size, rng) for _ in range(config.eval_episodes)],
            f"eval/{size}",
            retention=retention or retention_of(config.retention),
            temperature=config.eval_temperature,
            max_turns=max(config.max_turns, size + 1),
        )
        failed = sum(episode.failed for episode in episodes)
        episodes = [episode for episode in episodes if not episode.failed]
        if not episodes:
            raise RuntimeError(f"evaluation, size {size}: a tool failed in every episode")
        rollouts = [episode.rollout for episode in episodes]
        count = len(episodes)
        row = {
            "size": size,
            "failed": failed,
            "reward": sum(episode.reward for episode in episodes) / count,
            "peak_context": max(rollout.peak_context for rollout in rollouts),
            "total_tokens": sum(r.trajectory.num_tokens for r in rollouts) / count,
            "turns": sum(len(rollout.turns) for rollout in rollouts) / count,
            "seconds": time.perf_counter() - started,
        }
        table.append(_beside(row, mean_scores(episodes)))
    return table


def _state(learner: Learner, step: int) -> dict[str, Any]:
    """What a checkpoint holds. Before the first step the optimizer has no state."""
    reshard(learner.module)
    options = StateDictOptions(ignore_frozen_params=True)
    state: dict[str, Any] = {
        "model": get_model_state_dict(learner.model, options=options),
        "reference": learner.reference,
    }
    if step:
        optimizer = learner.optimizer.optimizer
        state["optimizer"] = get_optimizer_state_dict(learner.model, optimizer, options=options)
    return state


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in `out`, by step."""
    found = [(int(path.name[11:]), path) for path in out.glob("checkpoint-" + "[0-9]" * 6)]
    return sorted((step, path) for step, path in found if (path / ".metadata").exists())


def save_checkpoint(learner: Learner, out: Path, step: int) -> None:
    """Writes a checkpoint, after which the next step is `step`, and drops old ones."""
    dcp.save(_state(learner, step), checkpoint_id=str(out / f"checkpoint-{step:06d}"))
    if learner.accelerator.is_main_process:
        for _, path in checkpoints(out)[: -learner.config.keep_checkpoints]:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    learner.accelerator.wait_for_everyone()


def load_checkpoint(learner: Learner, step: int, path: Path) -> None:
    """Brings weights, optimizer and reference back to what they were at `step`."""
    state = _state(learner, step)
    dcp.load(state, checkpoint_id=str(path))
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_model_state_dict(learner.model, state["model"], options=options)
    if step:
        set_optimizer_state_dict(
            learner.model, learner.optimizer.optimizer, state["optimizer"], options=options
        )


@dataclass
class Run:
    """What training leaves: the policy (in one piece), and what was logged, step by step."""

    policy: Any
    history: list[dict[str, Any]]

    @property
    def rewards(self) -> list[float]:
        """Mean reward of each step."""
        return [record["reward"] for record in self.history if "reward" in record]

    @property
    def evaluation(self) -> list[dict[str, float]]:
        """The newest evaluation, one row a size (see `evaluate`)."""
        found = [record["evaluation"] for record in self.history if "evaluation" in record]
        return found[-1] if found else []


def train(
    config: Config,
    *,
    world: World | None = None,
    attend: Attend = attend,
    engine: Callable[[Any], Engine] | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> Run:
    """Warm start, then PPO; writes into `config.out`.

    Args:
        config: the options of the run.
        world: another task than those that `config.task` names.
        attend: another forward pass, for experiments with wrong masks.
        engine: policy -> what plays the steps' episodes, called once a batch of them; it is where
            weights go to a server. Set `positions` to its form, `log_prob_tolerance` to what its
            arithmetic is off by and `importance_cap`, which corrects for that. Unless told the
            policy itself plays.
        accelerator: one that is set up already; made from the environment unless given.
        progress: show progress bars, on a terminal and on the main process. `context` is the most
            tokens that a cache row held and the mean of whole trajectories, `gap` the largest
            difference of rollout's and trainer's log-probs.

    Returns:
        The policy, unpatched, in one piece and on every process, and the history: a record a step
        and one an evaluation, as in metrics.jsonl; after a resume those from before it too.

    Raises:
        ValueError: options or files that do not fit; log-probs of rollout and trainer that differ.
        ImportError: an option needs a package that is not installed.
        RuntimeError: most of a step's episodes failed.
        FloatingPointError: a gradient that is not finite.
    """
    accelerator = accelerator or Accelerator(
        mixed_precision="bf16" if config.bf16 else None,
        log_with=config.trackers.split(",") if config.trackers else None,
        project_dir=config.out,
    )
    progress = progress and accelerator.is_main_process
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    saved = checkpoints(out)
    if saved and not config.resume:
        raise ValueError(f"out: {out} holds checkpoints; set resume, or take another folder")
    world = world or make_world(config)
    retention = retention_of(config.retention)
    learner = Learner(config, accelerator, attend)
    dtype = "bfloat16" if accelerator.mixed_precision == "bf16" else config.dtype
    device = accelerator.device

    first_step = 0
    if saved:
        first_step, path = saved[-1]
        load_checkpoint(learner, first_step, path)
    log = Log(config, accelerator, first_step)
    if not saved:
        if config.sft_steps:
            warm_start(learner, world, retention, progress)
        learner.settle_reference()
        if config.save_every:
            save_checkpoint(learner, out, 0)

    def evaluation(step: int) -> None:
        table = evaluate(config, learner.ready_engine(), world=world, accelerator=accelerator)
        log({"step": step, "evaluation": table})

    bar = tqdm(
        range(first_step, config.steps), config.algorithm, disable=None if progress else True
    )
    for step in bar:
        if config.eval_every and step % config.eval_every == 0:
            evaluation(step)
        torch.manual_seed(seed_of(config, "step", step))
        started = time.perf_counter()
        watch = Stopwatch(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

        with watch("rollout"):
            episodes = collect(
                config,
                accelerator,
                world,
                learner.ready_engine(),
                draw_tasks(config, world, step),
                f"play/{step}",
                retention=retention,
                temperature=config.temperature,
                max_turns=config.max_turns,
                group_size=config.group_size,
                engine=engine,
            )
        # What a broken tool ended is no fault of the policy: it goes, and what is compared with it.
        broken = {episode.task for episode in episodes if episode.failed}
        failed = sum(episode.failed for episode in episodes)
        episodes = [episode for episode in episodes if episode.task not in broken]
        if not episodes:
            raise RuntimeError(f"step {step}: a tool failed in every group of episodes")
        batch = Batch.of(episodes, device)
        rows = batch.rows(range(len(episodes)), config, retention, device)
        batch.log_probs, batch.values = score_rows(learner, rows, batch.sampled, watch)
        largest, mean = check_agreement(batch, config, dtype)
        if config.kl_coef:
            with learner.as_reference():
                batch.reference, _ = score_rows(learner, rows, batch.sampled, watch)
        figures = estimate_advantages(batch, config)
        warming = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        learner.learning_rates(config.lr * warming, config.critic_lr * warming)
        figures |= update(learner, batch, retention, step, watch)

        rollouts = [episode.rollout for episode in episodes]
        turns = sum(len(rollout.turns) for rollout in rollouts)
        tokens = sum(rollout.trajectory.num_tokens for rollout in rollouts)
        seconds = time.perf_counter() - started
        record: dict[str, Any] = {
            "step": step,
            "reward": float(batch.rewards.mean()),
            "reward_std": float(batch.rewards.std(correction=0)),
            **figures,
            "log_prob_gap": largest,
            "log_prob_gap_mean": mean,
            "peak_context": max(rollout.peak_context for rollout in rollouts),
            "total_tokens": tokens / len(episodes),
            "turns": turns / len(episodes),
            "dropped_a_turn": sum(episode.dropped_tokens for episode in episodes) / turns,
            "cut_turns": sum(not t.closed for r in rollouts for t in r.turns) / turns,
            "failed": failed,
            "rows": len(rows),
            "tokens_a_second": tokens / seconds,
            "seconds": seconds,
            **{f"seconds_{name}": value for name, value in watch.seconds.items()},
        }
        if config.kl_coef:
            kl = kl_estimate(batch.log_probs, batch.reference, batch.mask, kind="k3")
            record["kl"] = float(kl.mean())
        if device.type == "cuda":
            record["gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        record = _beside(record, mean_scores(episodes))
        log(record)
        bar.set_postfix(
            reward=f"{record['reward']:.3f}",
            context=f"{record['peak_context']}/{record['total_tokens']:.0f}",
            gap=f"{largest:.0e}",
        )
        if config.save_transcripts and accelerator.is_main_process:
            write_transcripts(episodes, out / "transcripts" / f"{step:06d}.jsonl")
        if config.save_every and (step + 1) % config.save_every == 0:
            save_checkpoint(learner, out, step + 1)

    if config.eval_every:
        evaluation(config.steps)
    log.close()
    policy = unpatch(learner.ready_engine())
    if accelerator.is_main_process:
        policy.save_pretrained(out / "policy")
        if world.tokenizer is not None:
            world.tokenizer.save_pretrained(out / "policy")
    return Run(policy, log.history)
