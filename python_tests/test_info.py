"""`python -m mem1_kernels.info`, and the package without its extension and without triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mem1_kernels
from mem1_kernels import info
from mem1_kernels.ops import _library

ROOT = Path(__file__).resolve().parents[1]

# None in sys.modules is how an import system says "there is no such module".
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys({missing!r}))
import torch
from mem1_kernels import BlockPlan, info, trajectory_attention
from mem1_kernels.ops import reference
torch.manual_seed(0)
query, key = torch.randn(1, 300, 4, 16, requires_grad=True), torch.randn(1, 300, 2, 16)
expiry = torch.arange(300, dtype=torch.int32).add(70).clamp(max=300)
out, lse = trajectory_attention(query, key, key, expiry, return_lse=True)
(gradient,) = torch.autograd.grad(out.square().sum() + lse.sum(), query)
assert out.shape == query.shape and gradient.isfinite().all()
expected, expected_lse = reference.attention_forward(
    query, key, key, torch.atleast_2d(expiry), None, 0.25, 0.0
)
torch.testing.assert_close((out, lse), (expected, expected_lse))
assert not set({missing!r}) & {{name for name, module in sys.modules.items() if module}}
print(info.report())
"""


# An extension that is found at {path!r} and does not load.
BROKEN = """
import importlib.machinery, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "mem1_kernels._C":
            return importlib.machinery.ModuleSpec(name, self, origin={path!r})
    def create_module(self, spec):
        raise ImportError("undefined symbol: _ZN3c10")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
from mem1_kernels import info
print(info.report())
"""


def test_module_prints_the_report():
    result = subprocess.run(
        [sys.executable, "-m", "mem1_kernels.info"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert f"torch         {torch.__version__}" in result.stdout
    assert f"mem1_kernels  {mem1_kernels.__version__}" in result.stdout


def test_every_op_is_served_on_both_devices():
    for op, by_device in info.operators().items():
        assert by_device.keys() == {"CPU", "CUDA"}, op


def test_report_names_every_op_and_device():
    report = info.report()
    for op, _ in _library.implementations:
        assert f"op {op}\n" in report
    for index in range(torch.cuda.device_count()):
        assert f"cuda:{index}" in report


@pytest.mark.parametrize(
    "missing", [["mem1_kernels._C"], ["triton"], ["mem1_kernels._C", "triton"]], ids="-".join
)
def test_package_works_without(missing):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = result.stdout
    if "mem1_kernels._C" in missing:
        assert "extension _C\n  not loaded    no extension built" in report
        assert "mem1_kernels._C (" not in report
    if "triton" in missing:
        assert "CUDA          Triton" not in report


def import_with(path: Path) -> subprocess.CompletedProcess[str]:
    """Imports the package where the extension is the file at `path`, which does not load."""
    return subprocess.run(
        [sys.executable, "-c", BROKEN.format(path=str(path))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def marked(tmp_path: Path, version: str) -> Path:
    """A file that says, as a compiled module does, which torch it was built against."""
    path = tmp_path / "_C.so"
    path.write_bytes(b"\x7fELF\0mem1_kernels._C is built against torch " + version.encode() + b"\0")
    return path


@pytest.mark.parametrize("built", ["1.0.0", "2.1.0", "99.0.0"])
def test_extension_for_another_torch_is_left_alone_with_a_warning(tmp_path, built):
    result = import_with(marked(tmp_path, built))
    assert result.returncode == 0, result.stderr
    message = (
        f"RuntimeWarning: mem1_kernels._C was built against torch {built} and is not loaded under "
        f"torch {torch.__version__}: CPU ops run in plain torch. To build it again: in a clone"
    )
    assert message in result.stderr
    assert (
        f"extension _C\n  not loaded    extension built for torch {built}; to build it: in a"
        in (result.stdout)
    )
    assert f"CPU           plain torch (extension built for torch {built})" in result.stdout


def test_extension_for_a_patch_release_of_this_torch_is_loaded(tmp_path):
    release = ".".join(torch.__version__.split(".")[:2]) + ".99"
    result = import_with(marked(tmp_path, release))
    assert "undefined symbol: _ZN3c10" in result.stderr, "expected an attempt to load it"


def test_extension_that_does_not_load_says_to_build_it_again(tmp_path):
    result = import_with(marked(tmp_path, torch.__version__))
    assert result.returncode != 0
    assert "ImportError: undefined symbol" in result.stderr
    message = f"mem1_kernels._C does not load under torch {torch.__version__}; build it again: in a"
    assert f"ImportError: {message}" in result.stderr


def test_extension_that_does_not_say_what_it_was_built_for_is_an_error(tmp_path):
    path = tmp_path / "_C.so"
    path.write_bytes(b"\x7fELF")
    result = import_with(path)
    assert result.returncode != 0
    assert f"ImportError: {path} does not say which torch it was built against" in result.stderr
