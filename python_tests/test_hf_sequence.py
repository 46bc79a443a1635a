"""Ulysses: two processes that share each row, against one that holds it whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers")

from mem1_kernels import hf  # noqa: E402

_PROCESS = """
import datetime, faulthandler, sys
faulthandler.dump_traceback_later(200, exit=True)
import torch, torch.distributed as dist
sys.path[:0] = [{root!r}, {tests!r}]
from test_hf import build, ids_for, plan_of, LAYOUTS
from mem1_kernels import Trajectory, compacted, hf
rank, size = int(sys.argv[1]), {size}
dist.init_process_group("gloo", {store!r}, timeout=datetime.timedelta(seconds=100), rank=rank,
                        world_size=size)
group = dist.group.WORLD
for family, name in {cases!r}:
    model = build(family)
    layout = LAYOUTS[name]
    cut = layout.num_tokens // size * size
    layout = layout.replaced(**{{
        key: getattr(layout, key)[:cut]
        for key in ("expiry", "position_ids", "loss_mask", "predecessor", "document", "source")
    }}, token_ids=None, weights=None, floor=None, spans=())
    ids, plan = ids_for(cut), plan_of(layout)
    share = slice(rank * cut // size, (rank + 1) * cut // size)
    weigh = torch.randn(1, cut, 48, generator=torch.Generator().manual_seed(5))

    hf.patch(model)
    logits = model(ids, position_ids=layout.position_ids[None], plan=plan).logits
    (logits * weigh).sum().backward()
    expected = {{n: p.grad.clone() for n, p in model.named_parameters()}}
    model.zero_grad()
    hf.unpatch(model)

    hf.patch(model, sequence_group=group)
    model.gradient_checkpointing_enable({{"use_reentrant": False}})
    model.train()
    mine = model(ids[:, share], position_ids=layout.position_ids[None, share], plan=plan).logits
    error = (mine - logits[:, share]).abs().max() / logits.abs().max()
    assert error < 1e-5, (family, name, "logits", float(error))
    (mine * weigh[:, share]).sum().backward()
    for n, p in model.named_parameters():
        dist.all_reduce(p.grad)
        error = (p.grad - expected[n]).abs().max() / expected[n].abs().max()
        assert error < 2e-5, (family, name, n, float(error))
    for wrong in ({{}}, {{"plan": plan_of(layout), "attention_mask": torch.ones(1, cut // size)}}):
        try:
            model(ids[:, share], **wrong)
        except ValueError as raised:
            assert ": expected " in str(raised) and "sequence_group" in str(raised), raised
        else:
            raise AssertionError("no error")
dist.destroy_process_group()
"""


def run(tmp_path: Path, size: int, cases: list[tuple[str, str]]) -> None:
    tests = Path(__file__).parent
    script = _PROCESS.format(
        root=str(tests.parent),
        tests=str(tests),
        store=f"file://{tmp_path / 'store'}",
        size=size,
        cases=cases,
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(outputs)


def test_a_row_shared_by_two_processes(tmp_path: Path) -> None:
    """Logits and gradients of a line, a tree, and a model with windows."""
    run(tmp_path, 2, [("qwen2", "kept"), ("qwen2", "tree"), ("gemma2", "kept")])


def test_fewer_key_heads_than_processes(tmp_path: Path) -> None:
    """Four processes, four query heads, two of keys: each head of keys serves two processes."""
    run(tmp_path, 4, [("qwen2", "kept")])


def test_heads_that_cannot_be_shared(monkeypatch: Any) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    with pytest.raises(ValueError, match="sequence_group: .* 3 processes .* got 4"):
        hf.sequence.gather_tokens(torch.zeros(1, 4, 5, 8), object())
