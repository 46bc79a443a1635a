"""What a stranger gets: one version, an sdist and a wheel that install, workflows that can run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml

import mem1_kernels

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "python_tests" / "smoke.py"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """setup.py in a process in which torch is not to be imported."""
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = None\n"
        f"sys.argv = ['setup.py', *{arguments!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    return run([sys.executable, "-c", code])


# --- the version


def test_the_version_is_written_once_and_cited():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    result = run([sys.executable, "setup.py", "--version"])
    assert result.stdout.split()[-1] == mem1_kernels.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mem1_kernels.__version__
    released = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == mem1_kernels.__version__, "the changelog's newest entry"


def test_the_installed_version_is_that_of_the_source():
    try:
        installed = metadata.version("mem1-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("mem1-kernels is not installed, only imported")
    if Path(mem1_kernels.__file__).is_relative_to(ROOT):
        pytest.skip("an editable install keeps the version of the day on which it was made")
    assert installed.split("+")[0] == mem1_kernels.__version__


def test_torch_in_the_version_is_yes_or_no():
    result = run([sys.executable, "setup.py", "egg_info", "-e", "out"], MEM1_TORCH_IN_VERSION="yes")
    assert result.returncode != 0
    assert "MEM1_TORCH_IN_VERSION: expected 0 or 1, got 'yes'" in result.stderr


# --- sdist and wheel


def test_an_sdist_needs_no_torch_and_holds_what_a_build_needs(tmp_path):
    result = without_torch("sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    version = mem1_kernels.__version__
    with tarfile.open(tmp_path / f"mem1_kernels-{version}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    files = run(["git", "ls-files", "csrc", "mem1_kernels", "requirements"]).stdout.split()
    alone = ["setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "CITATION.cff"]
    assert set(files) | {*alone, "CHANGELOG.md"} <= held
    assert not {name for name in held if name.endswith((".so", ".pyc"))}


def test_a_build_without_torch_says_what_to_install():
    result = without_torch("build_ext", "--inplace")
    assert result.returncode != 0
    assert "mem1_kernels builds against the torch you have" in result.stderr
    assert "Install torch, setuptools, ninja and pybind11, and give pip --no-build-isolation." in (
        result.stderr
    )


def test_a_module_that_left_the_source_leaves_the_build_too(tmp_path):
    stale = tmp_path / "mem1_kernels" / "gone.py"
    stale.parent.mkdir()
    stale.touch()
    result = run([sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path)])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "mem1_kernels" / "info.py").exists()
    assert not stale.exists()


def test_the_wheel_installs_and_works(tmp_path):
    """What `make wheel` does. Objects of an earlier build are linked again, not compiled."""
    pytest.importorskip("build")
    if not (ROOT / "build" / f"setup-{sys.implementation.cache_tag}").exists():
        pytest.skip("no objects of setup.py are at hand, and compiling takes minutes")
    result = run([*BUILD, str(tmp_path), "--wheel"], MEM1_TORCH_IN_VERSION="1")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert wheel.name.startswith(f"mem1_kernels-{mem1_kernels.__version__}+torch{minor}-cp3")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = run(["git", "ls-files", "mem1_kernels"]).stdout.split()
    assert set(modules) <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mem1_kernels"}
    result = run([sys.executable, str(SMOKE), str(wheel)])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "agree with the dense mask" in result.stdout


@pytest.mark.slow
def test_the_sdist_compiles_and_works(tmp_path):
    """What `make sdist` does."""
    pytest.importorskip("build")
    result = run([*BUILD, str(tmp_path), "--sdist"])
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    result = run([sys.executable, str(SMOKE), str(sdist)])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "agree with the dense mask" in result.stdout


def test_make_builds_what_the_tests_build():
    for target, kind in (("sdist", "--sdist"), ("wheel", "--wheel")):
        recipe = makefile_targets()[target]
        assert f"python -m build {kind} --no-isolation --outdir dist" in recipe
        assert "python_tests/smoke.py dist/" in recipe


# --- workflows


def makefile_targets() -> dict[str, str]:
    """The recipes of the Makefile's targets."""
    text = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([a-z][\w-]*):[^=\n]*\n((?:\t.*\n)*)", text, re.MULTILINE)
    return dict(rules)


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text())["jobs"]


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_there_is_a_workflow_for_each_purpose():
    assert [path.stem for path in WORKFLOWS] == ["ci", "docs", "gpu", "nightly", "wheels"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_can_run(path):
    workflow = yaml.safe_load(path.read_text())
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as a boolean
    assert triggers.keys() <= {"push", "pull_request", "schedule", "workflow_dispatch"}
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        assert job["timeout-minutes"] <= 120, name
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            for script in re.findall(r"(?:bash|python) ([\w/.]+\.(?:sh|py))", step.get("run", "")):
                assert (ROOT / script).exists(), script


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_pins_its_actions(path):
    lines = [line for line in path.read_text().splitlines() if "uses:" in line]
    assert lines
    for line in lines:
        assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_targets_that_the_makefile_has(path):
    for command in (command for job in jobs(path).values() for command in commands(job)):
        if not command.startswith("make "):
            continue
        for word in command.split()[1:]:
            if "=" in word:
                break
            if word == "docs" and "docs" not in makefile_targets():
                pytest.skip("the Makefile has no target docs")
            assert word in makefile_targets(), f"make {word}"


def test_the_suite_runs_on_every_python_that_the_package_claims():
    claimed = [
        line.split(" :: ")[-1]
        for line in PROJECT["project"]["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    ]
    ci = jobs(ROOT / ".github/workflows/ci.yml")
    assert ci["suite"]["strategy"]["matrix"]["python"] == claimed
    assert (commands(ci["checks"]), commands(ci["suite"])) == (["make check"], ["make test"])
    tags = ["cp" + version.replace(".", "") for version in claimed]
    wheels = jobs(ROOT / ".github/workflows/wheels.yml")["wheels"]["strategy"]["matrix"]
    assert wheels["python"] == tags
    assert PROJECT["tool"]["cibuildwheel"]["build"] == [f"{tag}-*" for tag in tags]
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"


def test_wheels_are_built_for_the_oldest_torch_and_the_pinned_one():
    versions = jobs(ROOT / ".github/workflows/wheels.yml")["wheels"]["strategy"]["matrix"]["torch"]
    (oldest,) = re.findall(
        r"^torch>=([\d.]+)$", "\n".join(PROJECT["project"]["dependencies"]), re.M
    )
    pinned = re.search(r"^torch==([\d.]+)$", (ROOT / "requirements/torch.txt").read_text(), re.M)
    assert {f"{oldest}.0", pinned.group(1)} <= set(versions)


def test_the_gpu_job_is_skipped_without_a_runner():
    (job,) = jobs(ROOT / ".github/workflows/gpu.yml").values()
    assert job["if"] == "vars.GPU_RUNNER != ''"
    assert job["runs-on"] == "${{ vars.GPU_RUNNER }}"


def test_the_nightly_builds_against_the_newest():
    newest = commands(jobs(ROOT / ".github/workflows/nightly.yml")["newest"])
    assert newest == [
        "make setup",
        ".venv/bin/python -m pip install --upgrade torch triton transformers",
        "make clean test",
    ]


def test_issue_forms_have_what_a_form_needs():
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    forms = [yaml.safe_load(path.read_text()) for path in forms if path.stem != "config"]
    assert len(forms) == 2
    for form in forms:
        assert form.keys() == {"name", "description", "labels", "body"}
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["attributes"]["label"] for field in form["body"])
