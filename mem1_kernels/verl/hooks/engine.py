"""Actor, reference and critic of verl's FSDP engines, under the plan that travels with each sample.

`VERL_ENGINE_VENDOR=mem1` in the workers' environment chooses them.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch as replaced

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import (
    FSDPEngineWithLMHead,
    FSDPEngineWithValueHead,
)

from mem1_kernels import BlockPlan
from mem1_kernels.hf import is_patched, patch
from mem1_kernels.verl.layout import PackedSamples, Sample, causal, decode_runs, pack_samples

KEY = "mem1"
"""Where in a sample's `extra_fields` its runs are."""

DEVICES = ["cuda", "cpu"]


class _Planned:
    """What both engines have in common: a patched model, and inputs with a plan."""

    def _build_module(self: Any) -> Any:
        # What is loaded only to be replaced must not need a package of its own.
        self.model_config.hf_config._attn_implementation = "sdpa"
        module = super()._build_module()  # type: ignore[misc]
        group = self.ulysses_parallel_group if self.use_ulysses_sp else None
        return patch(module, sequence_group=group)

    def prepare_model_inputs(self: Any, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        for name, expected in (("use_remove_padding", True), ("use_fused_kernels", False)):
            if tu.get_non_tensor_data(micro_batch, name, default=expected) is not expected:
                raise ValueError(f"{name}: expected {expected}")
        if not is_patched(self.module):
            raise ValueError("engine: its model is not patched, and would drop the plan in silence")
        inputs, outputs = super().prepare_model_inputs(micro_batch)  # type: ignore[misc]
        prompts = [prompt.tolist() for prompt in micro_batch["prompts"].unbind()]
        # verl slices the row before this; and a bucket's padding is behind it.
        share = not self.use_ulysses_sp and not outputs["pad_size"]
        packed = pack_samples(samples_of(micro_batch), prompts, share=share)
        device = inputs["input_ids"].device
        if packed.shared:
            inputs["input_ids"] = inputs["input_ids"][:, packed.source.to(device)]
        elif self.use_ulysses_sp and not packed.reads_in_order:
            raise ValueError(
                "ulysses_sequence_parallel_size: expected 1 for trajectories of which a branch "
                "begins with what the policy wrote, as nothing of older turns was left"
            )
        expiry, positions = padded(packed, outputs["pad_size"])
        inputs["position_ids"] = self._share(positions[None].to(device))
        inputs["plan"] = BlockPlan.from_expiry(expiry.to(device))
        outputs["rows"] = None if packed.reads_in_order else packed.rows.to(device)
        return inputs, outputs

    def _share(self: Any, positions: Tensor) -> Tensor:
        """This process's slice of the row."""
        if not self.use_ulysses_sp:
            return positions
        size = self.ulysses_sequence_parallel_size
        return positions.chunk(size, 1)[self.ulysses_device_mesh["sp"].get_local_rank()]


@EngineRegistry.register("language_model", backend=["fsdp", "fsdp2"], device=DEVICES, vendor="mem1")
class Mem1EngineWithLMHead(_Planned, FSDPEngineWithLMHead):
    """The engine of actor and reference."""

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, outputs = super().prepare_model_inputs(micro_batch)
        if outputs["rows"] is not None:
            # Gathered before the head, so that there is no copy of the logits.
            inputs["logits_to_keep"] = outputs["rows"]
        return inputs, outputs


@EngineRegistry.register("value_model", backend=["fsdp", "fsdp2"], device=DEVICES, vendor="mem1")
class Mem1EngineWithValueHead(_Planned, FSDPEngineWithValueHead):
    """The engine of the critic."""

    def _build_module(self) -> Any:
        with replaced("verl.utils.model.load_valuehead_model", _load_critic):
            return super()._build_module()

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Any]:
        if output_args["rows"] is not None:
            output.logits = output.logits[:, output_args["rows"]]
        return super().prepare_model_outputs(
            output, output_args, micro_batch, logits_processor_func
        )


def _load_critic(
    local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool
) -> Any:
    """verl's own asks for flash_attention_2, whatever the config says."""
    return AutoModelForTokenClassification.from_pretrained(
        local_path, dtype=torch_dtype, config=model_config, trust_remote_code=trust_remote_code
    )


def samples_of(micro_batch: Any) -> list[Sample]:
    """The layouts of a micro-batch's samples, in its order.

    A batch that cannot be divided is filled up with masked samples of 128 tokens, which carry a
    copy of the first sample's fields; they are causal.

    Raises:
        ValueError: a sample without a layout, or one of another length.
    """
    lengths = micro_batch["input_ids"].offsets().diff().tolist()
    masks = micro_batch["response_mask"].unbind()
    samples = []
    for own, length, mask in zip(extra_fields(micro_batch), lengths, masks, strict=True):
        runs = own.get(KEY)
        sample = None if runs is None else decode_runs(runs)
        if not bool(mask.any()) and (sample is None or sample.num_tokens != length):
            sample = causal(length)
        if sample is None:
            raise ValueError(
                f"extra_fields: expected {KEY!r} in every sample, which the agent loop 'mem1' puts "
                "there"
            )
        if sample.num_tokens != length:
            raise ValueError(
                f"extra_fields: expected a layout of {length} tokens, got {sample.num_tokens}"
            )
        samples.append(sample)
    return samples


def extra_fields(batch: Any) -> list[dict[str, Any]]:
    """What the agent loop put into each sample's `extra_fields`."""
    fields = batch["extra_fields"]
    fields = fields.tolist() if hasattr(fields, "tolist") else list(fields)
    return [getattr(own, "data", own) or {} for own in fields]


def padded(packed: PackedSamples, padding: int) -> tuple[Tensor, Tensor]:
    """expiry and position_ids `[tokens + padding]`; nobody sees the padding."""
    tokens = len(packed.source)
    expiry = torch.cat([packed.expiry, torch.arange(tokens, tokens + padding)])
    return expiry.int(), torch.nn.functional.pad(packed.position_ids, (0, padding))
