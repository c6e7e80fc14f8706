"""The real platform for end-to-end tests: started by the command line, on loopback, in a folder of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e_platform import Platform, short_folder

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def shared_platform() -> Iterator[Platform]:
    """One platform for all tests that harm nothing; each deploys under names of its own."""
    with short_folder() as state, Platform(state) as platform:
        yield platform


@pytest.fixture
def platform(shared_platform: Platform) -> Iterator[Platform]:
    """The shared platform, without what the test deployed afterwards."""
    yield shared_platform
    shared_platform.delete_all()


@pytest.fixture
def own_platform() -> Iterator[Platform]:
    """A platform that the test may break."""
    with short_folder() as state, Platform(state) as platform:
        yield platform
