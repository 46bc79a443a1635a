"""The documentation: its code runs, its tables are those of the code, and nothing is left out.

`make docs` builds the site from the same files, with all links checked.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import mem1_kernels
from docs import generate
from mem1_kernels import agent, audit, hf, ppo, rollout

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def page_name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


def blocks(path: Path) -> list[tuple[str, str, int]]:
    """(language, code, line) of every block; lines are kept, so that errors point into the page."""
    text = path.read_text()
    return [
        (match[2], textwrap.dedent(match[3]), text.count("\n", 0, match.start(3)))
        for match in BLOCK.finditer(text)
    ]


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_the_code_runs(path, tmp_path, monkeypatch):
    """In one namespace per page: ```python is executed, ```pycon is a doctest, ```py compiles."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "docs"}
    for language, code, line in blocks(path):
        if language in ("python", "py"):
            compiled = compile("\n" * line + code, str(path), "exec")
            if language == "python":
                exec(compiled, names)
        elif language == "pycon":
            parser = doctest.DocTestParser()
            test = parser.get_doctest(code, names, path.name, str(path), line)
            assert test.examples, f"{path.name}:{line}: expected lines that begin with >>>"
            runner = doctest.DocTestRunner(
                optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            said: list[str] = []
            runner.run(test, out=said.append, clear_globs=False)
            assert not said, "".join(said)
            names.update(test.globs)


def nav() -> list[str]:
    """Every page of the site's navigation."""

    def leaves(node) -> list[str]:
        if isinstance(node, str):
            return [node]
        parts = node.values() if isinstance(node, dict) else node
        return [leaf for part in parts for leaf in leaves(part)]

    return leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


def test_every_page_is_in_the_navigation_once():
    assert sorted(nav()) == [page_name(path) for path in PAGES]


@pytest.mark.parametrize("path", [p for p in PAGES if p.stem != "models"], ids=page_name)
def test_lines_of_prose_and_code_are_short(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        link = re.search(r"\]\(|https?://", line)
        if len(line) > 100 and not line.startswith("|") and not link:
            pytest.fail(f"{path.name}:{number}: {len(line)} columns")


@pytest.mark.parametrize("page", generate.TABLES)
def test_the_tables_are_those_of_the_code_and_of_the_results(page):
    text = (DOCS / page).read_text()
    assert text == generate.tabled(page), "run: python -m docs.generate --tables"


def test_every_option_is_in_the_table():
    """Read from the source, apart from what makes the table."""
    tree = ast.parse((ROOT / "mem1_kernels" / "ppo" / "config.py").read_text())
    (config,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    names = [n.target.id for n in config.body if isinstance(n, ast.AnnAssign)]
    assert len(names) > 40
    text = (DOCS / "ppo.md").read_text()
    assert [name for name in names if f"\n| `{name}` |" not in text] == []


@pytest.mark.parametrize("name", ["mem1_kernels", "hf", "rollout", "agent", "ppo", "audit"])
def test_every_public_name_is_in_the_reference(name):
    module = {"mem1_kernels": mem1_kernels, "hf": hf, "rollout": rollout}
    module |= {"agent": agent, "ppo": ppo, "audit": audit}
    pages = "\n".join(path.read_text() for path in PAGES if path.parent.name == "reference")
    shown = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)}
    assert sorted(set(module[name].__all__) - shown) == []


def test_the_reference_names_what_exists():
    for path in PAGES:
        for line in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE):
            module, _, name = line.rpartition(".")
            assert hasattr(importlib.import_module(module), name), f"{path.name}: {line}"


def test_every_picture_is_drawn_by_the_script_and_shown():
    text = "\n".join(path.read_text() for path in PAGES)
    shown = set(re.findall(r"\(images/(\w+)\.png\)", text))
    stored = {path.stem for path in generate.IMAGES.glob("*.png")}
    assert stored == shown == {*generate.PICTURES, "context"}
    assert max(path.stat().st_size for path in generate.IMAGES.glob("*.png")) < 40_000


def test_pictures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "IMAGES", tmp_path / "images")
    names = ["mem1"]
    monkeypatch.setattr(generate, "PICTURES", {name: generate.PICTURES[name] for name in names})
    generate.draw()
    drawn = sorted(path.stem for path in (tmp_path / "images").glob("*.png"))
    assert drawn == ["context", *names]


def test_held_tokens_peak_at_the_peak_context():
    layout = generate.PICTURES["mem1"]()
    assert max(generate.held(layout)) == layout.peak_context


def test_examples_of_docstrings_become_blocks(monkeypatch):
    """The site's own packages are not installed here; of griffe the module needs a base class."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object))
    fenced = importlib.import_module("docs.doctests").fenced
    text = "One line.\n\n>>> f(\n...     1)\n[0.0, 0.0]\n\nMore.\n\n>>> g()\n2"
    assert fenced(text) == (
        "One line.\n\n```pycon\n>>> f(\n...     1)\n[0.0, 0.0]\n```\n\n"
        "More.\n\n```pycon\n>>> g()\n2\n```"
    )
