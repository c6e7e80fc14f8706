"""The shape of the code: sizes, and a place in the docs for every folder."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "snowdrop"
MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60


def modules() -> list[Path]:
    found = sorted(SOURCE.rglob("*.py"))
    assert len(found) > 50
    return found


def test_modules_are_short() -> None:
    long = {
        str(p.relative_to(SOURCE)): n
        for p in modules()
        if (n := len(p.read_text().splitlines())) >= MODULE_LINES_MAX
    }
    assert not long


def test_functions_are_short() -> None:
    long: list[str] = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines >= FUNCTION_LINES_MAX:
                    long.append(f"{path.relative_to(SOURCE)}:{node.lineno} {node.name} has {lines} lines")
    assert not long


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(p.relative_to(SOURCE))
        for p in modules()
        if p.read_text() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


def test_every_folder_has_its_place_in_the_docs() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = [path for path in SOURCE.iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    assert [folder.name for folder in folders if f"{folder.name}/" not in text] == []


def test_user_code_loads_no_server_and_no_framework() -> None:
    show = "import snowdrop as sd, sys; sd.service, sd.Scale, sd.Model; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "snowdrop" in loaded
    heavy = {"aiohttp", "uvicorn", "typer", "rich", "torch", "numpy", "snowdrop.gateway", "snowdrop.control"}
    assert not loaded & heavy
