# SPDX-License-Identifier: Apache-2.0
"""Every block of Python and shell in README.md and docs/ runs, page by page, as it stands there.

The blocks of a page run in order in one folder and one namespace. A block titled with a file name
is written to that file. `<!-- blocks: nightly -->` marks a page that takes minutes, and
`<!-- run by tests/... -->` a block that needs another library: the named test runs what it shows.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from commands import run_command

import ksae
from ksae import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?:^<!-- run by (?P<test>\S+) -->\n)?^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n"
    r"(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# What installs, tests or measures for minutes: .ci/run and the tests of `ksae bench` run it.
ELSEWHERE = ("pip install ", "pytest ", "pytest", "ksae demo", "ksae bench ")


class Block(NamedTuple):
    language: str
    title: str | None  # a file to write
    test: str | None  # that runs it
    code: str


def blocks(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text())
    return [Block(m["language"], m["title"], m["test"], m["code"]) for m in found]


def nightly(page: Path) -> bool:
    # The README's Python harvests from a model.
    return "<!-- blocks: nightly -->" in page.read_text() or page.name == "README.md"


def named(page: Path) -> Any:
    marks = [pytest.mark.nightly] if nightly(page) else []
    return pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks)


RUNNABLE = [p for p in PAGES if any(b.language in ("python", "sh", "yaml") for b in blocks(p))]


@pytest.mark.parametrize("page", [named(p) for p in RUNNABLE])
def test_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.title is not None:
            Path(block.title).write_text(block.code)
        elif block.test is not None:
            check_shown(block)
        elif block.language == "python":
            exec(compile(block.code, str(page), "exec"), scope)
        elif block.language == "sh":
            for line in block.code.splitlines():
                for command in line.split("#")[0].split("&&"):
                    shell(command.strip())


def shell(command: str) -> None:
    """Run a command of ours; one that runs elsewhere is checked as far as it can be."""
    if not command:
        return
    if command.startswith(ELSEWHERE):
        extras = re.findall(r"\[([\w,]+)\]", command) if command.startswith("pip") else []
        metadata = (ROOT / "pyproject.toml").read_text()
        for extra in ",".join(extras).split(",") if extras else []:
            assert re.search(rf"^{extra} = \[", metadata, re.MULTILINE), command
        if command.startswith("ksae "):
            check_options(command)
        return
    assert command.startswith("ksae "), f"neither run here nor elsewhere: {command}"
    run_command(command)


def check_shown(block: Block) -> None:
    """The named test exists, and the block uses names and options that are there."""
    assert block.test is not None
    text = (ROOT / block.test).read_text()
    if block.language == "sh":
        for line in filter(None, (each.split("#")[0] for each in block.code.splitlines())):
            check_options(line)
        return
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ksae"):
            for alias in node.names:
                assert re.search(rf"\b{alias.name}\b", text), f"{block.test} lacks {alias.name}"


def check_options(line: str) -> None:
    words = line.split()
    options = {word for word in words[2:] if word.startswith("--")}
    assert words[0] == "ksae" and options <= options_of(words[1]), line


def options_of(command: str) -> set[str]:
    """Of a subcommand of ksae."""
    commands: Any = typer.main.get_command(cli.app.app)
    params = commands.commands[command].params
    return {name for option in params for name in (*option.opts, *option.secondary_opts)}


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in PAGES if p.name != "README.md"}
    assert pages == listed - {"CHANGELOG.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", text):
        if "://" in target:
            continue
        assert (page.parent / target).resolve().exists(), f"{page}: {target}"


def test_metrics_page_names_every_metric():
    from ksae.analysis.evaluate import LM_DEFINITIONS
    from ksae.analysis.metrics import DEFINITIONS

    text = (ROOT / "docs/guides/metrics.md").read_text()
    for name in [*DEFINITIONS, *LM_DEFINITIONS]:
        assert f"| `{name}` |" in text, name


def test_reference_names_what_is_public():
    text = "".join(p.read_text() for p in (ROOT / "docs/reference").glob("*.md"))
    shown = set(re.findall(r"^::: [\w.]+\.(\w+)$", text, re.MULTILINE)) | {"functional"}
    ops = {name for name in ksae.__all__ if hasattr(ksae.functional, name)}
    assert set(ksae.__all__) - ops - {"__version__"} <= shown
    assert "topk_encode" in ops
