"""The ops as a Hugging Face hub kernel: generated, loaded beside the package, used by a model."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mem1_kernels
from mem1_kernels import BlockPlan, Segment, Trajectory, pack

ROOT = Path(__file__).resolve().parents[1]
IN_A_MODEL = """
import sys, warnings
from pathlib import Path
import kernels, torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations import hub_kernels
from mem1_kernels import BlockPlan, Segment, Trajectory, unroll
from mem1_kernels.hf import patched

kernel = kernels.get_local_kernel(Path(sys.argv[1]))
# What transformers gets from a repository, whatever version of `kernels` it asks for.
hub_kernels.is_kernels_available = lambda *_: True
hub_kernels.get_kernel = lambda *_, **__: kernel

torch.manual_seed(0)
model = Qwen2ForCausalLM(Qwen2Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2)).eval()
segments = [Segment("prompt", 30)]
for turn in (1, 2, 3):
    segments += [Segment("state", 8, turn), Segment("info", 50, turn)]
trajectory = Trajectory(segments)
for layout in (trajectory, unroll(trajectory)):
    inputs = {
        "input_ids": torch.randint(0, 64, (1, layout.num_tokens)),
        "position_ids": layout.position_ids[None],
    }
    with patched(model):
        expected = model(**inputs, plan=BlockPlan.of(layout)).logits
    causal = model(inputs["input_ids"]).logits
    assert (expected - causal).abs().max() > 1e-2

    model.set_attn_implementation("mem1/mem1-kernels")
    plan = kernel.BlockPlan.from_expiry(layout.expiry, layout.floor)
    whole = torch.ones_like(inputs["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned = model(**inputs, plan=plan, use_cache=False, attention_mask=whole).logits
    torch.testing.assert_close(planned, expected)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        without = model(inputs["input_ids"], use_cache=False).logits
    assert "no plan, so attention is merely causal" in str(caught[0].message)
    torch.testing.assert_close(without, causal)
    try:
        model(**inputs, plan=BlockPlan.of(layout), use_cache=False, attention_mask=whole)
    except TypeError as error:
        assert "plan: expected this kernel's own" in str(error), error
    else:
        raise AssertionError("a plan of the installed package was taken")
    model.set_attn_implementation("sdpa")
print("done")
"""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """hub/build.py as a module."""
    return load(ROOT / "hub" / "build.py")


@pytest.fixture(scope="module")
def project(generator, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "mem1-kernels"
    generator.build(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(project) -> ModuleType:
    kernels = pytest.importorskip("kernels")
    return kernels.get_local_kernel(project)


def test_the_project_is_what_kernel_builder_reads(project):
    for name in ("build.toml", "flake.nix", "CARD.md", "README.md"):
        assert (project / name).exists()
    assert not (project / "build.py").exists()
    assert (project / "torch-ext" / "mem1_kernels" / "__init__.py").exists()
    assert sorted(path.name for path in (project / "benchmarks").iterdir()) == [
        "benchmark_attention.py",
        "benchmark_kv_cache.py",
    ]
    rust = pytest.importorskip("kernels._rust")
    general = rust.Build.open(project).general
    assert general.backends == [rust.Backend.CPU, rust.Backend.CUDA]


def test_variants_have_metadata_and_operators_under_its_id(project):
    variants = sorted((project / "build").iterdir())
    assert [path.name for path in variants] == ["torch-cpu", "torch-cuda"]
    for path in variants:
        backend = path.name.removeprefix("torch-")
        metadata = json.loads((path / "metadata.json").read_text())
        assert metadata["name"] == "mem1-kernels" and metadata["backend"] == {"type": backend}
        assert metadata["id"].startswith(f"_mem1_kernels_{backend}_")
        assert f"torch.ops.{metadata['id']}\n" in (path / "_ops.py").read_text()


def test_no_file_names_the_package_or_an_operator_of_its_own(project):
    allowed = {"matplotlib", "torch", "triton", *sys.stdlib_module_names}
    files = sorted((project / "build" / "torch-cuda").rglob("*.py"))
    assert len(files) > 20
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {x.name.split(".")[0] for x in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None and node.module.split(".")[0] in allowed, path
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("mem1::"), path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import mem1_kernels.mask\n", "a.py:1: expected `from mem1_kernels… import …`"),
        ("x = torch.ops.mem1.prune_kv_\n", "a.py: expected the line 'from __future__ import"),
        ("x = 'mem1::prune'\n", "a.py: cannot rewrite 'mem1::"),
    ],
)
def test_what_cannot_be_rewritten_is_an_error(generator, source, message):
    with pytest.raises(ValueError) as caught:
        generator.rewritten(source, "a.py")
    assert str(caught.value).startswith(message)


def test_an_output_folder_with_other_files_is_left_alone(generator, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new folder or an earlier build"):
        generator.build(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_the_kernel_loads_beside_the_package_and_agrees(kernel):
    assert {*mem1_kernels.__all__, "flash_attn_forward"} <= set(kernel.__all__)
    assert kernel.BlockPlan is not BlockPlan
    segments = [("prompt", 40, 0), ("state", 30, 1), ("info", 150, 1), ("state", 30, 2)]
    layout = pack([Trajectory([Segment(*segment) for segment in segments])] * 2)
    query, key, value = (
        torch.randn(1, layout.num_tokens, heads, 32, requires_grad=True) for heads in (4, 2, 2)
    )
    results = []
    for module in (kernel, mem1_kernels):
        plan = module.BlockPlan.from_expiry(layout.expiry, layout.floor)
        out = module.trajectory_attention(query, key, value, plan=plan)
        results.append([out, *torch.autograd.grad(out.square().sum(), [query, key, value])])
    torch.testing.assert_close(*results)


def test_the_kernel_passes_its_own_tests(kernel, project):
    environment = {**os.environ, "LOCAL_KERNELS": f"mem1/mem1-kernels={project}"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_its_benchmarks_run_and_verify(kernel, project):
    command = pytest.importorskip("kernels.cli.benchmark")
    found = set()
    for script in sorted((project / "benchmarks").glob("benchmark*.py")):
        for benchmark in command.discover_benchmark_classes(script, project):
            results, _ = command.run_benchmark_class(benchmark, 1, 0, str(project), True, "local")
            assert all(result.verified for result in results.values())
            found |= {f"{benchmark.__name__}.{name}" for name in results}
    assert found == {
        "KVCache.decode",
        "KVCache.prune",
        "TrajectoryAttention.forward",
        "TrajectoryAttention.forward_backward",
    }


def test_a_model_on_the_kernel_needs_a_plan(kernel, project):
    hub_kernels = pytest.importorskip("transformers.integrations.hub_kernels")
    if "flash_attn_forward" not in Path(hub_kernels.__file__).read_text():
        pytest.skip("this transformers takes no attention but flash attention from the hub")
    result = subprocess.run(
        [sys.executable, "-c", IN_A_MODEL, str(project)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("done")


@pytest.mark.parametrize("name", ["README.md", "CARD.md"])
def test_its_pages_warn_that_a_plan_is_needed(name):
    text = " ".join((ROOT / "hub" / name).read_text().replace(">", "").split())
    assert "**A plan is needed.** `attn_implementation=" in text
    assert "makes a model merely causal" in text
