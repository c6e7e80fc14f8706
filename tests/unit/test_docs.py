"""Pages that are made from the code agree with it."""

from __future__ import annotations

import importlib.util
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
