"""What is imported, by whom and when: the direction of arrows, the public names, the weight."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pliant
from tiny import write_tiny_pack

ROOT = Path(pliant.__file__).parent

# Which folders a folder may use besides itself; "" are the modules directly in the package.
ALLOWED = {
    "": {"", "engine", "memory", "cli"},
    "codec": {""},
    "store": {"", "codec"},
    "memory": {""},
    "engine": {"", "memory", "store", "codec"},
    "pack": {"", "store", "codec", "engine", "memory"},
    "cli": {"", "engine", "memory", "store", "pack", "server"},
    "server": {"", "engine", "memory", "store"},
}
# The plain modules of the package are used by all and use none of the others.
PLAIN = {"errors", "sizes", "_core"}

PUBLIC = [
    "BudgetError",
    "ChecksumError",
    "Depth",
    "EngineError",
    "FormatError",
    "Generation",
    "GenerationResult",
    "Model",
    "ModelError",
    "PackError",
    "Plan",
    "PliantError",
    "Report",
    "Session",
    "SourceError",
    "UsageError",
    "VersionError",
    "__version__",
    "load",
]


def imported(path: Path) -> set[str]:
    """Full names of the modules of pliant that a file imports, anywhere in it."""
    package = ["pliant", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.add(base)
            # `from pliant import _core` names a module, `from pliant import load` does not.
            found |= {f"{base}.{alias.name}" for alias in node.names if base == "pliant"}
    return {name for name in found if name.split(".")[0] == "pliant"}


FILES = sorted(path for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    folder = parts[0] if len(parts) > 1 else ""
    assert folder in ALLOWED, f"{folder} is a new folder: say here what it may use"
    for name in imported(path):
        target = name.split(".")[1:]
        if not target or target[0] in {"__version__", *pliant.__all__}:
            continue  # the public surface
        if target[0] in PLAIN:
            continue
        assert target[0] in ALLOWED[folder] | {folder}, f"{path} imports {name}"
    if folder == "" and path.stem in PLAIN:
        assert imported(path) <= {"pliant.errors"}


def test_the_public_names_are_these() -> None:
    assert pliant.__all__ == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(pliant, name) is not None
    assert set(PUBLIC) <= set(dir(pliant))
    with pytest.raises(AttributeError):
        pliant.nonsense  # noqa: B018


def run(code: str, *arguments: str) -> dict[str, object]:
    """Run code in a new interpreter; it prints one JSON object."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_importing_pliant_imports_next_to_nothing() -> None:
    code = """if True:
        import sys
        before = set(sys.modules)
        import pliant
        new = sorted(set(sys.modules) - before)
        print('{"new": ["' + '", "'.join(new) + '"]}')
    """
    new = run(code)["new"]
    assert isinstance(new, list)
    assert [name for name in new if name.startswith("pliant")] == ["pliant"]
    assert not {"numpy", "dataclasses", "inspect", "argparse", "json"}.intersection(new)


def test_loading_and_answering_imports_nothing_large(tmp_path: Path) -> None:
    path = write_tiny_pack(tmp_path / "tiny.pack", least=1)
    code = """if True:
        import json, sys
        import pliant
        with pliant.load(sys.argv[1], memory="300MiB") as model:
            text = "".join(model.chat([{"role": "user", "content": "hi"}], max_tokens=4))
            model.report()
        print(json.dumps({"modules": sorted(sys.modules)}))
    """
    modules = set(run(code, str(path))["modules"])  # type: ignore[call-overload]
    heavy = ["torch", "transformers", "tokenizers", "safetensors", "gguf", "rich", "matplotlib"]
    heavy += ["asyncio", "urllib.request", "multiprocessing", "sqlite3", "pliant.pack"]
    assert not modules.intersection(heavy)
    assert {"numpy", "jinja2", "pliant._core"} <= modules


def test_the_command_imports_only_its_own_module(tmp_path: Path) -> None:
    path = write_tiny_pack(tmp_path / "tiny.pack", least=1)
    code = """if True:
        import contextlib, io, json, sys
        from pliant.cli.main import main
        with contextlib.redirect_stdout(io.StringIO()):
            code = main(["run", sys.argv[1], "-p", "hi", "--max-tokens", "2"])
        print(json.dumps({"code": code, "modules": sorted(sys.modules)}))
    """
    found = run(code, str(path))
    assert found["code"] == 0
    modules = set(found["modules"])  # type: ignore[call-overload]
    assert not modules.intersection(["pliant.cli.eval", "pliant.cli.pack", "rich", "torch"])
