"""Fixtures shared by all tests."""

import pytest
from hypothesis import HealthCheck, settings

# A busy machine makes inputs slowly, and examples late; neither is a failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
