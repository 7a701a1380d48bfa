"""The documents against the project: links lead somewhere, folders are listed, examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pliant
from pliant.cli.main import COMMANDS, build_parser
from tiny import write_tiny_pack

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "docs", "examples", "src", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for f in FOLDERS for page in (ROOT / f).rglob("*.md"))])
LINK = re.compile(r"\]\(([^()\s]+)\)")
MAX_DECISION = 40


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def headings(text: str) -> set[str]:
    """Anchors of the headings of a page, made as forges make them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = path if not file else path.parent / file
        assert goal.exists(), f"{name(path)} links to {target}, and it is not there"
        assert goal.resolve().is_relative_to(ROOT.resolve()), f"{target} leads out of the project"
        if anchor:
            assert anchor in headings(goal.read_text(encoding="utf-8")), target


def test_there_are_pages_and_links() -> None:
    assert {"README.md", "docs/architecture.md", "docs/format.md"} <= set(map(name, PAGES))
    assert len(LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))) > 10


def test_every_folder_of_the_source_is_in_the_architecture() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.cpp")]
    files += (ROOT / "src").rglob("*.txt")
    folders = {f"{name(file.parent)}/" for file in files}
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(src/[^`]*)` \|", text, re.MULTILINE))
    assert listed == folders


def test_decisions_are_short_and_counted() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    numbers = [page.name[:5] for page in pages]
    assert all(re.fullmatch(r"\d{4}-", number) for number in numbers)
    assert len(set(numbers)) == len(numbers)
    for page in pages:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= MAX_DECISION, page.name
        assert lines[0].startswith(f"# {page.name[:4]}: ")


def test_shell_examples_have_options_that_exist() -> None:
    lines = [line for block in blocks("README.md", "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("pliant ")]
    assert {command[1] for command in commands} == set(COMMANDS)
    for command in commands:
        build_parser().parse_args(command[1:])
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        wanted = re.findall(r"^make ([a-z]+)", "\n".join(blocks(page, "sh")), re.MULTILINE)
        assert wanted
        assert set(wanted) <= targets


def test_the_python_example_runs(tmp_path: Path) -> None:
    """In a process of its own: the budget in it is that of a whole process."""
    write_tiny_pack(tmp_path / "smollm2.pack", least=1)
    (code,) = blocks("README.md", "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(pliant.__file__).parents[1]),
            "PYTHONIOENCODING": "utf-8",
        },
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(3, 260)" in done.stdout
    assert "'weights': (" in done.stdout
