"""The table of a replica's stages."""

import pytest

from snowdrop.domain.errors import ErrorBody
from snowdrop.replica.stages import (
    DrainAsked,
    Exit,
    FinishRequests,
    ImportDone,
    Lifecycle,
    RequestsDone,
    RunShutdown,
    RunStartup,
    ShutdownDone,
    StageRaised,
    StartupDone,
    TellDrained,
    TellFailed,
    TellImported,
    TellReady,
)

ERROR = ErrorBody(kind="user_code", message="ValueError: no")


def test_an_ordered_life() -> None:
    life = Lifecycle()
    assert life.handle(ImportDone()) == (TellImported(), RunStartup())
    assert life.handle(StartupDone()) == (TellReady(),)
    assert life.handle(DrainAsked(drain_s_max=3)) == (FinishRequests(drain_s_max=3),)
    assert life.handle(DrainAsked(drain_s_max=1)) == ()
    assert life.handle(RequestsDone()) == (RunShutdown(),)
    assert life.handle(ShutdownDone()) == (TellDrained(), Exit(code=0))


@pytest.mark.parametrize("events", [[], [ImportDone()]])
def test_a_stage_that_raises_ends_the_life(events: list[ImportDone]) -> None:
    life = Lifecycle()
    for event in events:
        life.handle(event)
    stage = "startup" if events else "import"
    assert life.handle(StageRaised(error=ERROR)) == (TellFailed(stage=stage, error=ERROR), Exit(code=1))
    assert life.handle(DrainAsked(drain_s_max=1)) == ()


def test_an_unknown_step_tells_its_history() -> None:
    life = Lifecycle()
    life.handle(ImportDone())
    with pytest.raises(RuntimeError, match=r"RequestsDone in stage startup; history: import \(ImportDone\)"):
        life.handle(RequestsDone())
