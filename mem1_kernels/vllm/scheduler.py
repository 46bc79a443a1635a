"""Sessions whose tokens are dropped in place, in vLLM's scheduler.

A resumable ("streaming input") request is a session. Its next chunk may carry

    SamplingParams(extra_args={"mem1": {"drop": [[start, end], ...], "stop": ["</tag>", ...]}})

`drop`: positions of the trajectory whose KV leaves the cache before the chunk is computed. What
survives keeps its position, and the chunk's positions go on counting. `stop`: texts that end the
chunk with the token that completes one of them.

A session that cannot go on ends with finish_reason "error" and a stop_reason that says what to
enlarge; the engine and all other requests go on.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from mem1_kernels.vllm.slots import Slots, drop, read_asked
from mem1_kernels.vllm.support import check_engine, check_version, rope_rows

_NEVER = 1 << 40  # more blocks than any request has: the manager caches none of them again


@dataclass
class StepMoves:
    """What the workers do before a step.

    Attributes:
        moves: int64 `[2, moves]` each, (from, to) slots, in order.
        offsets: by request: what its positions are ahead of its slots from now on.
    """

    moves: list[np.ndarray] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)


class SessionScheduler(Scheduler):
    """vLLM's scheduler, with sessions whose tokens are dropped in place.

    All that is added is by request id: `pruned` has the sessions that have dropped something.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_version(vllm.__version__)
        check_engine(self.vllm_config, self.kv_cache_config)
        self.rope_rows = rope_rows(self.vllm_config)
        asked = self.vllm_config.additional_config.get("mem1", {})
        self.stall_seconds = float(asked.get("stall_seconds", 60.0))
        self.pruned: dict[str, Slots] = {}
        self._stops: dict[str, list[str]] = {}  # request -> texts that end its chunk
        self._step = StepMoves()
        self._doomed: dict[str, str] = {}  # request -> why it ends as soon as it can
        self._gone: dict[str, str] = {}  # ended here, and not yet closed by its client
        self._ended: list[tuple[int, EngineCoreOutput]] = []
        self._stalled_since: float | None = None
        self._decode: Any = None

    # A session's next chunk

    def add_request(self, request: Any) -> None:
        why = self._gone.get(request.request_id)
        if why is None:
            if request.request_id not in self.requests and self._asked(request, request):
                self._doomed[request.request_id] = "drop: a new request holds nothing to drop"
            super().add_request(request)
            self._end_doomed()
        elif request.resumable:
            self._tell(request, why)
        else:
            del self._gone[request.request_id]  # its client has closed it

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        try:
            if spans := self._asked(session, update):
                self._drop(session, spans)
        except ValueError as error:
            self._doomed[session.request_id] = str(error)
        super()._update_request_as_session(session, update)
        if why := self._too_long(session):
            self._doomed.setdefault(session.request_id, why)

    def _asked(self, request: Any, update: Any) -> list[tuple[int, int]]:
        """The spans that a chunk of `request` drops; its stops are noted. Bad ones end it."""
        name = request.request_id
        self._stops.pop(name, None)
        try:
            spans, stops = read_asked(update.sampling_params)
            if stops and self.vllm_config.model_config.skip_tokenizer_init:
                raise ValueError("stop: texts need a tokenizer, and skip_tokenizer_init is set")
        except ValueError as error:
            self._doomed[name] = str(error)
            return []
        if stops:
            self._stops[name] = stops
        return spans

    def _too_long(self, session: Any) -> str:
        """Why a session cannot take its chunk, or ""."""
        if session.num_tokens >= self.max_model_len:
            return self._full(session.num_tokens)
        slots = self.pruned.get(session.request_id)
        last = session.num_tokens + session.max_tokens + (slots.offset if slots else 0)
        if last > self.rope_rows:
            return (
                f"the session may reach position {last} of the {self.rope_rows} that the model's "
                "RoPE table holds: positions count on over dropped tokens. Give the engine "
                f'hf_overrides={{"max_position_embeddings": {last}}} or more'
            )
        return ""

    def _full(self, tokens: int) -> str:
        return (
            f"the session holds {tokens} live tokens, and max_model_len={self.max_model_len} is "
            "the most: enlarge it, or drop more"
        )

    def _drop(self, session: Any, spans: list[tuple[int, int]]) -> None:
        """Edits the session's blocks and token lists, and lists the moves for the workers.

        Raises:
            ValueError: spans that do not fit, or no free block for a copy of a shared one.
        """
        name, held = session.request_id, session.num_computed_tokens
        dropped = drop(self.pruned.get(name, Slots()), held, spans)
        if dropped is None:
            return
        moves = self._rearrange(name, dropped.source)
        first = int(dropped.holes[0]) if len(dropped.holes) else len(dropped.source)
        session._block_hasher = None
        del session.block_hashes[first // self.hash_block_size :]
        ids = np.array(session._all_token_ids[:held])[dropped.source].tolist()
        session._all_token_ids[:] = ids
        session._output_token_ids.clear()
        session.prompt_token_ids = list(ids)
        session.num_prompt_tokens = session.num_computed_tokens = len(ids)
        self.pruned[name] = dropped.slots
        self._step.moves.append(moves)
        self._step.offsets[name] = dropped.slots.offset

    def _rearrange(self, name: str, source: np.ndarray) -> np.ndarray:
        """Gives the session the blocks for `source`, and returns the moves, int64 `[2, moves]`.

        A block that would be written and that another request reads is copied, and one that the
        prefix cache knows is forgotten there.
        """
        manager = self.kv_cache_manager.coordinator.single_type_managers[0]
        pool, size = self.kv_cache_manager.block_pool, manager.block_size
        blocks = manager.req_to_blocks[name]
        index = np.arange(len(source))
        filled = index[source != index]
        written = set((filled // size).tolist())
        kept = -(-len(source) // size)
        if len(source) % size:
            written.add(kept - 1)  # the next token goes there
        copied = [number for number in sorted(written) if blocks[number].ref_cnt > 1]
        if len(copied) > pool.get_num_free_blocks():
            raise ValueError(
                f"{len(copied)} blocks are shared with other requests and must be copied, but "
                f"{pool.get_num_free_blocks()} are free: enlarge the KV cache "
                "(kv_cache_memory_bytes), or run fewer sessions at once"
            )
        before = np.array([block.block_id for block in blocks], np.int64)
        to = [filled]
        for number in copied:
            inside = index[number * size : (number + 1) * size]
            to.append(inside[source[inside] == inside])
        for number, block in zip(copied, pool.get_new_blocks(len(copied)), strict=True):
            pool.free_blocks([blocks[number]])
            blocks[number] = block
        for number in written.difference(copied):
            pool._maybe_evict_cached_block(blocks[number])
        after = np.array([block.block_id for block in blocks], np.int64)
        tail = blocks[kept:]
        del blocks[kept:]
        pool.free_blocks(reversed(tail))
        manager.num_cached_block[name] = _NEVER
        moved = np.concatenate(to)
        origin = source[moved]
        return np.stack(
            [
                before[origin // size] * size + origin % size,
                after[moved // size] * size + moved % size,
            ]
        )

    # A step

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._end_doomed()
        output = super().schedule(*args, **kwargs)
        self._end_doomed()
        if output.total_num_scheduled_tokens == 0:
            self._end_stalled()
        else:
            self._stalled_since = None
        output.mem1, self._step = self._step, StepMoves()
        return output

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if request.request_id in self.pruned:
            # What its survivors saw is gone: they cannot be computed again from the live tokens.
            self._doomed[request.request_id] = self._no_blocks("was preempted")

    def _no_blocks(self, what: str) -> str:
        blocks = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        return (
            f"the session {what}: {len(self.requests)} requests share {blocks} KV blocks of "
            f"{self.block_size} tokens. Enlarge the KV cache (kv_cache_memory_bytes), or run fewer "
            "sessions at once"
        )

    def _end_stalled(self) -> None:
        """Ends a session if none can run, and none of those that wait for a tool gives way.

        Idle sessions hold blocks and are never preempted, so vLLM alone would wait for ever.
        """
        busy = self.running or any(r.num_in_flight_tokens for r in self.requests.values())
        waiting = [
            request
            for request in itertools.chain(self.kv_holding_waiting, self.waiting)
            if not self._is_blocked_waiting_status(request.status)
        ]
        if busy or not waiting or self.pause_state != PauseState.UNPAUSED:
            self._stalled_since = None
            return
        now = time.monotonic()
        self._stalled_since = now if self._stalled_since is None else self._stalled_since
        if now - self._stalled_since < self.stall_seconds:
            return
        newest = max(waiting, key=lambda r: (self._holds_kv_blocks(r), r.arrival_time))
        self._doomed[newest.request_id] = self._no_blocks("found no free block")
        self._stalled_since = None
        self._end_doomed()

    def _update_request_with_output(
        self, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        new_token_ids, stopped = super()._update_request_with_output(
            request, new_token_ids, *args, **kwargs
        )
        stops = self._stops.get(request.request_id)
        if not stopped and stops and new_token_ids and (found := self._completed(request, stops)):
            request.status = RequestStatus.FINISHED_STOPPED
            request.stop_reason = found
            stopped = True
        return new_token_ids, stopped

    def _completed(self, request: Any, stops: list[str]) -> str:
        """The stop that the chunk's newest token completes, or ""."""
        if self._decode is None:
            from vllm.tokenizers import cached_tokenizer_from_config

            self._decode = cached_tokenizer_from_config(self.vllm_config.model_config).decode
        # A token holds at least one byte, so this many tokens reach behind the longest stop.
        reach = max(len(stop.encode()) for stop in stops)
        tail = self._decode(request._output_token_ids[-reach:])
        return next((stop for stop in stops if stop in tail), "")

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(*args, **kwargs)
        self._end_doomed()
        for client, output in self._ended:
            there = outputs.setdefault(client, EngineCoreOutputs())
            there.outputs = [*there.outputs, output]
        self._ended = []
        return outputs

    # A session's end

    def _end_doomed(self) -> None:
        for name, why in list(self._doomed.items()):
            del self._doomed[name]
            request = self.requests.get(name)
            if request is None or request.is_finished():
                continue
            self.finish_requests(name, RequestStatus.FINISHED_ERROR)
            if request.resumable:
                self._gone[name] = why
            self._tell(request, why)

    def _tell(self, request: Any, why: str) -> None:
        output = EngineCoreOutput(
            request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=why
        )
        self._ended.append((request.client_index, output))

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        if request_ids is None:
            self._gone.clear()
        else:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        for name in request_ids or ():
            self._gone.pop(name, None)
        return super().finish_requests(request_ids, finished_status)

    def has_requests(self) -> bool:
        return bool(self._ended) or super().has_requests()

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.pruned.pop(request.request_id, None)
        self._stops.pop(request.request_id, None)
        self._step.offsets.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)


class AsyncSessionScheduler(SessionScheduler, AsyncScheduler):
    """The same for asynchronous scheduling. Never run: see `support.UNTESTED`."""


def session_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> SessionScheduler:
    """What `scheduler_cls` names: the scheduler for the engine's way of scheduling."""
    kind = (
        AsyncSessionScheduler if vllm_config.scheduler_config.async_scheduling else SessionScheduler
    )
    return kind(vllm_config, *args, **kwargs)
