"""The rollout `mem1`: replicas of a transformers model whose KV caches are pruned in place.

One replica per training process, on its device, in a process of its own. An episode stays with its
replica (verl routes by request id) and has a session there; a request without a session sends the
whole context. Weights come over Ray's object store, in buckets.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any
from uuid import uuid4

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor
from transformers import AutoModelForCausalLM
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.device import get_device_name, get_resource_name
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

from mem1_kernels.hf import patch
from mem1_kernels.verl.episode import first_stop
from mem1_kernels.verl.sessions import Job, Sessions


class Mem1Server:
    """A model, its sessions, and a loop that goes on while there are jobs.

    Args:
        config: the rollout's.
        model_config: of the model, which is loaded from its path.
        replica_rank: which replica it is; it seeds the samples.
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        self.config = config
        model_config = omega_conf_to_dataclass(model_config)
        self.device = torch.device(get_device_name())
        dtype = PrecisionType.to_dtype(config.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_config.local_path,
            dtype=dtype,
            trust_remote_code=model_config.trust_remote_code,
            attn_implementation="sdpa",
        )
        self.model = patch(model).to(self.device).eval()
        self.tokenizer = model_config.tokenizer
        self.generator = torch.Generator(self.device).manual_seed(config.seed + replica_rank)
        self.room = asyncio.Semaphore(config.max_num_seqs)
        self.sessions: Sessions | None = None
        self.waiting: dict[str, tuple[Job, asyncio.Future]] = {}
        self.loop: asyncio.Task | None = None
        self.step: int | None = None
        self.adapted: Any = None  # the same model behind a LoRA adapter
        self.missing: set[str] = set()

    async def generate(
        self,
        request_id: str,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        session: dict[str, Any] | None = None,
        image_data: Any = None,
        video_data: Any = None,
    ) -> TokenOutput:
        """One turn: of a session, or of the context in `prompt_ids`."""
        if image_data or video_data:
            raise ValueError("image_data: expected none, as the replica knows token ids only")
        name = uuid4().hex if session is None else session["id"]
        if session is not None and session["close"]:
            self._close(name)
            return TokenOutput(token_ids=[], log_probs=[])
        operations = [("read", prompt_ids)] if session is None else session["operations"]
        job = Job(
            deque(operations),
            sampling_params["max_tokens"],
            self._stops(sampling_params),
            sampling_params["temperature"],
        )
        await self._begin(name, job, opens=session is None or session["opens"])
        done = asyncio.get_running_loop().create_future()
        self.waiting[name] = job, done
        if self.loop is None or self.loop.done():
            self.loop = asyncio.create_task(self._go_on())
        await done
        if session is None:
            self._close(name)
        assert job.reply is not None
        return TokenOutput(
            token_ids=job.reply.token_ids,
            log_probs=job.reply.log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": self.step},
        )

    async def _begin(self, name: str, job: Job, opens: bool) -> None:
        """Hands a job to its session; one that opens waits for a free row."""
        if opens:
            await self.room.acquire()
        elif self.sessions is None or name not in self.sessions.row_of:
            raise ValueError(f"session {name!r} is not there any more")
        if self.sessions is None:
            self.sessions = Sessions(self.model, self.config.max_num_seqs, self.generator)
        self.sessions.begin(name, job)

    def _close(self, name: str) -> None:
        if self.sessions is not None and name in self.sessions.row_of:
            self.sessions.close(name)
            self.room.release()

    def _stops(self, sampling_params: dict[str, Any]) -> Any:
        ids, texts = set(sampling_params["stop_token_ids"]), sampling_params.get("stop") or []
        reach = max((len(text.encode()) for text in texts), default=0)

        def stops(written: list[int]) -> bool:
            if written[-1] in ids:
                return True
            tail = written[-reach:] if reach else []
            return bool(tail) and first_stop(tail, (), texts, self.tokenizer) is not None

        return stops

    async def _go_on(self) -> None:
        """Steps until nothing is left to write; what it raises ends every episode that waits."""
        try:
            while self.sessions is not None and self.sessions.step():
                for name in [n for n, (job, _) in self.waiting.items() if job.reply]:
                    self.waiting.pop(name)[1].set_result(None)
                await asyncio.sleep(0)  # requests come in
        except Exception as error:
            self._forget(error)

    async def load(
        self, weights: dict[str, Tensor], step: int | None, first: bool, last: bool
    ) -> None:
        """Takes a bucket of the model's weights.

        Raises:
            ValueError: names that the model does not have, or, at the end, names that did not come.
        """
        own = self.model.state_dict()
        if first:
            self.missing = set(own)
        if unknown := sorted(weights.keys() - own.keys()):
            raise ValueError(f"weights: the model has no {unknown[0]!r}")
        for name, value in weights.items():
            own[name].copy_(value)
        pointers = {own[name].data_ptr() for name in weights}
        self.missing -= {name for name in self.missing if own[name].data_ptr() in pointers}
        if last and self.missing:
            raise ValueError(f"weights: expected {sorted(self.missing)[0]!r} too")
        if last:
            self.step = step

    async def adapt(
        self, weights: dict[str, Tensor], peft_config: dict[str, Any], step: int | None
    ) -> None:
        """Takes the weights of a LoRA adapter; the model itself stays as it was loaded."""
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        if self.adapted is None:
            self.adapted = get_peft_model(self.model, LoraConfig(**peft_config)).eval()
        loaded: Any = set_peft_model_state_dict(self.adapted, weights)
        if loaded.unexpected_keys:
            raise ValueError(f"weights: the adapter has no {loaded.unexpected_keys[0]!r}")
        self.step = step

    async def wake_up(self) -> None:
        """The model's memory is needed again."""
        self.model.to(self.device)

    async def sleep(self) -> None:
        """Gives back what the caches and the model hold of the device."""
        self._forget()
        if self.device.type != "cpu":
            self.model.to("cpu")
            get_platform().empty_cache()

    def _forget(self, error: Exception | None = None) -> None:
        """Ends all sessions; turns that are being written end with the error."""
        for _, done in self.waiting.values():
            done.set_exception(error or RuntimeError("rollout: the sessions were ended"))
        self.waiting.clear()
        if self.sessions is not None:
            for name in list(self.sessions.row_of):
                self._close(name)
        self.sessions = None

    async def clear_kv_cache(self) -> None:
        """Ends all sessions."""
        self._forget()

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Not for a trainer in mode `sync`, which waits for all episodes."""
        raise RuntimeError("rollout: the replica 'mem1' aborts no requests")

    async def resume_generation(self) -> None:
        """Nothing was stopped."""

    async def release_kv_cache(self) -> None:
        """As `clear_kv_cache`."""
        self._forget()

    async def resume_kv_cache(self) -> None:
        """The cache is made again when it is needed."""

    async def start_profile(self, **options: Any) -> None:
        """There is no profile of the replica."""

    async def stop_profile(self) -> None:
        """There is no profile of the replica."""


class Mem1Replica(RolloutReplica):
    """Starts the server of one training process, beside it."""

    async def launch_servers(self) -> None:
        (worker,) = self.workers
        node, accelerator = await worker.__ray_call__.remote(_whereabouts)
        platform = get_platform()
        variables = dict.fromkeys(platform.ray_noset_envvars(), "1")
        server = (
            ray.remote(Mem1Server)
            .options(
                name=_name(self.replica_rank),
                num_cpus=0,
                max_concurrency=self.max_concurrency,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
                runtime_env={
                    "env_vars": {**variables, platform.visible_devices_envvar(): accelerator}
                },
            )
            .remote(self.config, self.model_config, self.replica_rank)
        )
        await server.wake_up.remote()
        self.servers.append(server)
        self._server_handle, self._server_address = server, _name(self.replica_rank)


def _whereabouts(worker: Any) -> tuple[str, str]:
    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_accelerator_ids()[get_resource_name()][0]


def _name(replica_rank: int) -> str:
    return f"mem1_server_{replica_rank}"


class ServerAdapter(BaseRollout):
    """What sends the weights of one training process to its replica."""

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        self.replica_rank = int(os.environ["RANK"]) if replica_rank == -1 else replica_rank

    @property
    def server(self) -> Any:
        """The replica's server."""
        return ray.get_actor(_name(self.replica_rank))

    async def resume(self, tags: list[str]) -> None:
        if "weights" in tags:
            await self.server.wake_up.remote()

    async def release(self) -> None:
        await self.server.sleep.remote()

    async def update_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        peft_config: dict[str, Any] | None = None,
        base_sync_done: bool = True,
        **options: Any,
    ) -> None:
        if wire_format != "named_tensors":
            raise ValueError(f"wire_format: expected 'named_tensors', got {wire_format!r}")
        if peft_config is None:
            size = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
            for bucket, first, last in _buckets(weights, size):
                await self.server.load.remote(bucket, global_steps, first, last)
            return
        held = {name: value.detach().cpu() for name, value in weights}
        if base_sync_done:  # else: the frozen model, which the replica has from its files
            await self.server.adapt.remote(held, peft_config, global_steps)


def _buckets(
    weights: Iterable[tuple[str, Tensor]], size: int
) -> Iterator[tuple[dict[str, Tensor], bool, bool]]:
    """(weights, whether they are the first, the last), each of about `size` bytes."""
    bucket: dict[str, Tensor] = {}
    held, first = 0, True
    for name, value in weights:
        if held + value.nbytes > size and bucket:
            yield bucket, first, False
            bucket, held, first = {}, 0, False
        bucket[name] = value.detach().cpu().clone()
        held += value.nbytes
    yield bucket, first, True
