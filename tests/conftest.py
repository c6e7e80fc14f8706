"""Fixtures shared by all tests."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine makes inputs slowly, and examples late; neither is a failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def no_mount_outlives_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A mount that a failed test leaves keeps its directory from being removed, by this run and by later ones."""
    base = f"{tmp_path_factory.getbasetemp()}/"
    yield
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for place in reversed(places):
        if place.startswith(base):
            subprocess.run(["umount", "--lazy", place], check=False)  # without root it may not
