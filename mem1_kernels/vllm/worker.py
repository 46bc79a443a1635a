"""The workers' side: moves the slots that the scheduler lists, and lets positions count on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from mem1_kernels.ops.move_slots import move_slots_
from mem1_kernels.vllm.layout import packed_offsets
from mem1_kernels.vllm.scheduler import StepMoves
from mem1_kernels.vllm.slots import in_order
from mem1_kernels.vllm.support import Unsupported, refuse, rope_rows


class _Runner:
    """What is added to a model runner of either kind.

    Attributes:
        position_offsets: by request: what its positions are ahead of its slots.
        slot_offsets: where a packed page's elements lie (see `move_slots_`), or None.
    """

    position_offsets: dict[str, int]
    slot_offsets: Tensor | None

    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        self.position_offsets = {}
        check_layers(self.vllm_config, self.get_model())
        pages = self.kv_caches
        shapes = {(x.shape[0], x.shape[2]) for x in pages if x.dim() == 4}
        if not pages or any(x.dim() != 4 for x in pages) or len(shapes) != 1:
            got = [list(x.shape) for x in pages]
            raise Unsupported(f"expected layers [pages, heads, page_size, 2 * head_dim], got {got}")
        if len({x.data_ptr() for x in pages}) != len(pages):
            raise Unsupported("the engine cannot drop tokens with layers that share a KV cache")
        packed = pages[0].device.type == "cpu"
        self.slot_offsets = packed_offsets(pages[0], self.cache_config) if packed else None

    def before_step(self: Any, scheduler_output: Any) -> None:
        """Moves slots before blocks are zeroed, copied or written: those freed may be in use."""
        step: StepMoves = getattr(scheduler_output, "mem1", None) or StepMoves()
        for sources, destinations in in_order(step.moves):
            device = self.kv_caches[0].device
            move_slots_(
                self.kv_caches,
                torch.from_numpy(sources).to(device),
                torch.from_numpy(destinations).to(device),
                offsets=self.slot_offsets,
            )
        for name in scheduler_output.finished_req_ids:
            self.position_offsets.pop(name, None)
        self.position_offsets.update(step.offsets)

    def ahead(self: Any, req_ids: Sequence[str], counts: np.ndarray) -> Tensor | None:
        """What each scheduled token's position is ahead of its slot, int64; None: nothing."""
        if not self.position_offsets:
            return None
        offsets = np.array([self.position_offsets.get(name, 0) for name in req_ids], np.int64)
        return torch.from_numpy(offsets.repeat(counts)) if offsets.any() else None


class RunnerV1(_Runner):
    """For model runner V1, on CPUs and GPUs."""

    def _update_states(self: Any, scheduler_output: Any) -> Any:
        self.before_step(scheduler_output)
        updated = super()._update_states(scheduler_output)  # type: ignore[misc]
        if self.device.type == "cpu":
            generators = self.input_batch.generators
            for index, generator in generators.items():
                if type(generator) is torch.Generator:
                    generators[index] = _CPUGenerator.like(generator)
            for name, index in self.input_batch.req_id_to_index.items():
                if index in generators:
                    self.requests[name].generator = generators[index]
        return updated

    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        # After it: slots and lengths are indices, only RoPE counts on.
        ahead = self.ahead(self.input_batch.req_ids, num_scheduled_tokens)
        if ahead is not None:
            self.positions[: len(ahead)] += ahead.to(self.positions.device)
        return prepared


class RunnerV2(_Runner):
    """For model runner V2. Written from its source, and never run: see `support.UNTESTED`."""

    def finish_requests(self: Any, scheduler_output: Any) -> None:
        self.before_step(scheduler_output)  # the first thing of a step
        super().finish_requests(scheduler_output)  # type: ignore[misc]

    def prepare_attn(self: Any, input_batch: Any) -> Any:
        prepared = super().prepare_attn(input_batch)  # type: ignore[misc]
        ahead = self.ahead(input_batch.req_ids, input_batch.num_scheduled_tokens)
        if ahead is not None:
            input_batch.positions[: len(ahead)] += ahead.to(input_batch.positions.device)
        return prepared


class _CPUGenerator(torch.Generator):
    """A generator of a request on the CPU.

    vLLM takes back the number that it drew for a token of a prompt's first part by moving the
    generator's offset, which one on the CPU does not have: there the number stays drawn.
    """

    @classmethod
    def like(cls, generator: torch.Generator) -> _CPUGenerator:
        made = cls()
        made.set_state(generator.get_state())
        return made

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self


def check_layers(config: Any, model: torch.nn.Module) -> None:
    """Raises Unsupported for layers whose scores depend on more than the rotated keys."""
    problems = set()
    layers = config.compilation_config.static_forward_context
    for layer in layers.values():
        impl = getattr(layer, "impl", None)
        if getattr(impl, "alibi_slopes", None) is not None:
            problems.add("ALiBi")
        window = getattr(impl, "sliding_window", None)
        if window not in (None, -1, (-1, -1)):
            problems.add(f"sliding windows ({window})")
    needed = rope_rows(config)
    for name, module in model.named_modules():
        table = getattr(module, "cos_sin_cache", None)
        if isinstance(table, Tensor) and table.shape[0] < needed:
            problems.add(f"a RoPE table of {table.shape[0]} rows for {needed} positions ({name})")
    refuse(sorted(problems))


def _with(worker: Any) -> None:
    """Gives a worker's model runner what is above."""
    runner = worker.model_runner
    added = RunnerV2 if worker.use_v2_model_runner else RunnerV1
    kind = type(runner)
    runner.__class__ = type(f"Session{kind.__name__}", (added, kind), {})


class SessionCPUWorker(CPUWorker):
    """vLLM's CPU worker for sessions whose tokens are dropped in place."""

    def init_device(self) -> None:
        super().init_device()
        _with(self)


class SessionGPUWorker(Worker):
    """vLLM's GPU worker for such sessions. Never run: see `support.UNTESTED`."""

    def init_device(self) -> None:
        super().init_device()
        _with(self)
