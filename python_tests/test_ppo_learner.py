"""The learner: what it trains, its reference, and what accelerate may be asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from ppo_runs import played, small
from torch.distributed.fsdp import MixedPrecisionPolicy

from mem1_kernels.ppo.learner import Learner, check_accelerator, make_policy
from mem1_kernels.ppo.report import Stopwatch
from mem1_kernels.ppo.update import score_rows
from python_tests.talking_processes import make_accelerator


def test_only_adapters_are_trained_and_the_reference_is_the_model_after_the_warm_start(tmp_path):
    learner, batch, rows = played(small(tmp_path, lora_rank=4))
    assert all("lora_" in name for name in learner.trained)
    watch = Stopwatch(batch.sampled.device)
    before = score_rows(learner, rows, batch.sampled, watch)[0]
    with torch.no_grad():
        for parameter in learner.trained.values():
            parameter.add_(0.05)
    moved = score_rows(learner, rows, batch.sampled, watch)[0]
    assert (moved - before).abs().max() > 0.01
    with learner.as_reference():
        assert torch.equal(score_rows(learner, rows, batch.sampled, watch)[0], before)
    assert torch.equal(score_rows(learner, rows, batch.sampled, watch)[0], moved)


def test_dropout_is_off_and_other_accumulation_is_refused(tmp_path, monkeypatch):
    from mem1_kernels.ppo import learner as module

    def with_dropout(config):
        policy = make_policy(config)
        policy.model.layers[0].mlp.add_module("dropout", torch.nn.Dropout(0.5))
        return policy

    monkeypatch.setattr(module, "make_policy", with_dropout)
    learner = Learner(small(tmp_path), Accelerator())
    rates = [m.p for m in learner.module.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.0]
    with pytest.raises(ValueError, match="gradient_accumulation_steps: expected 1, .*, got 4"):
        Learner(small(tmp_path), Accelerator(gradient_accumulation_steps=4))
    with pytest.warns(UserWarning, match="dtype: weights in bfloat16 lose updates"):
        Learner(small(tmp_path, dtype="bfloat16"), Accelerator())


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: .* got True"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: .* got True"),
        ("FSDP_IGNORED_MODULES", "lm_head", "fsdp_ignored_modules: .* got 'lm_head'"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy: .* SIZE_BASED_WRAP"),
        ("FSDP_VERSION", "1", "expected one process, DDP or FSDP2"),
    ],
)
def test_settings_of_fsdp_that_would_not_train_exactly(tmp_path, monkeypatch, setting, value, said):
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(setting, value)
    with pytest.raises(ValueError, match=said):
        Learner(small(tmp_path), make_accelerator("FSDP2", "no"))


@pytest.mark.parametrize(
    ("precision", "given", "said"),
    [
        (
            "bf16",
            MixedPrecisionPolicy(BF16, BF16),
            "expected reduce_dtype torch.float32 .*bfloat16",
        ),
        ("bf16", MixedPrecisionPolicy(BF16, FP32, BF16), "expected output_dtype torch.float32"),
        ("bf16", MixedPrecisionPolicy(), "expected param_dtype torch.bfloat16 .* got None"),
        ("no", MixedPrecisionPolicy(BF16), "expected param_dtype torch.float32 .* 'no'"),
        ("no", MixedPrecisionPolicy(output_dtype=torch.float16), "expected output_dtype"),
        ("bf16", MixedPrecisionPolicy(BF16, BF16, BF16), None),  # what accelerate sets by itself
        ("bf16", MixedPrecisionPolicy(BF16, FP32, FP32), None),
        ("bf16", MixedPrecisionPolicy(BF16), None),
        ("no", MixedPrecisionPolicy(FP32, FP32), None),
        ("no", None, None),
    ],
)
def test_precision_policies_of_fsdp(monkeypatch, precision, given, said):
    monkeypatch.setenv("FSDP_VERSION", "2")
    accelerator = make_accelerator("FSDP2", precision)
    accelerator.state.fsdp_plugin.mixed_precision_policy = given
    if said is not None:
        with pytest.raises(ValueError, match=f"mixed_precision_policy: {said}"):
            check_accelerator(accelerator)
        return
    check_accelerator(accelerator)
    check_accelerator(accelerator)  # of a second run on the same accelerator
    chosen = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert chosen.param_dtype == (BF16 if precision == "bf16" else given and given.param_dtype)
    assert (chosen.reduce_dtype, chosen.cast_forward_inputs) == (FP32, False)
    assert chosen.output_dtype in (None, FP32)


def test_settings_of_accelerate_that_would_not_train_exactly(tmp_path, monkeypatch):
    rounded = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)
    accelerator = Accelerator(kwargs_handlers=[rounded])
    with pytest.raises(ValueError, match="comm_hook: expected none, as it rounds .*bf16"):
        Learner(small(tmp_path), accelerator)
    plain = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=1)])
    check_accelerator(plain)
    plain.state.parallelism_config = SimpleNamespace(tp_enabled=False, cp_enabled=True)
    with pytest.raises(ValueError, match="expected data parallelism only, got cp"):
        check_accelerator(plain)
    monkeypatch.setenv("FSDP_VERSION", "2")
    config = small(tmp_path, dtype="bfloat16")
    with (
        pytest.warns(UserWarning, match="dtype: weights in bfloat16"),
        pytest.raises(ValueError, match="dtype: expected 'float32' .*under FSDP2.*'bfloat16'"),
    ):
        Learner(config, make_accelerator("FSDP2", "no"))
    with pytest.raises(ValueError, match="bf16: expected an accelerator .*'bf16', got 'no'"):
        Learner(small(tmp_path, bf16=True), make_accelerator("DDP", "no"))
