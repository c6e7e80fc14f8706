"""Pages that are made from the code agree with it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import msgspec

from snowdrop.cli.settings_file import flatten
from snowdrop.domain.errors import error_kinds
from snowdrop.domain.settings import Settings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_states_is_the_table() -> None:
    generator = load(DOCS / "generate_states.py")
    assert generator.PAGE.read_text() == generator.render(), "run docs/generate_states.py"


def test_every_setting_is_documented() -> None:
    page = (DOCS / "reference" / "settings.md").read_text()
    missing = [name for name in flatten(msgspec.to_builtins(Settings())) if f"`{name}`" not in page]
    assert not missing


def test_every_error_kind_is_documented() -> None:
    page = (DOCS / "reference" / "http.md").read_text()
    assert not [kind for kind in error_kinds() if f"`{kind}`" not in page]


def test_the_tests_that_hold_the_invariants_exist() -> None:
    page = (DOCS / "invariants.md").read_text()
    written = "\n".join(path.read_text() for path in (DOCS.parent / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 20
    assert not [name for name in sorted(named) if f"def {name}(" not in written]
    files = set(re.findall(r"`((?:unit|property|contract|e2e)/test_\w+\.py)`", page))
    assert not [name for name in sorted(files) if not (DOCS.parent / "tests" / name).exists()]
