"""The life of a replica's process as a table: events in, instructions out, no waiting.

import -> startup -> serving -> draining -> shutdown -> done, and `failed` from every stage that runs user code.
The shell (`runtime`) carries the instructions out and feeds back what came of them.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from snowdrop.domain.errors import ErrorBody

EXIT_OK = 0
EXIT_STAGE_FAILED = 1
EXIT_AGENT_GONE = 3


class Stage(StrEnum):
    IMPORT = "import"
    STARTUP = "startup"
    SERVING = "serving"
    DRAINING = "draining"
    SHUTDOWN = "shutdown"
    DONE = "done"
    FAILED = "failed"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to the process."""


class ImportDone(Event, frozen=True, kw_only=True):
    pass


class StartupDone(Event, frozen=True, kw_only=True):
    """`startup` has run and the socket is served."""


class DrainAsked(Event, frozen=True, kw_only=True):
    drain_s_max: float


class RequestsDone(Event, frozen=True, kw_only=True):
    """Nothing is in flight any more, or the drain bound has cut what was."""


class ShutdownDone(Event, frozen=True, kw_only=True):
    pass


class StageRaised(Event, frozen=True, kw_only=True):
    """The stage that was running raised."""

    error: ErrorBody


class Instruction(msgspec.Struct, frozen=True, kw_only=True):
    """Something for the shell to do."""


class TellImported(Instruction, frozen=True, kw_only=True):
    pass


class TellReady(Instruction, frozen=True, kw_only=True):
    pass


class TellFailed(Instruction, frozen=True, kw_only=True):
    stage: str
    error: ErrorBody


class TellDrained(Instruction, frozen=True, kw_only=True):
    pass


class RunStartup(Instruction, frozen=True, kw_only=True):
    pass


class FinishRequests(Instruction, frozen=True, kw_only=True):
    """Accept no more connections, let what is in flight end within the bound, cancel the rest."""

    drain_s_max: float


class RunShutdown(Instruction, frozen=True, kw_only=True):
    pass


class Exit(Instruction, frozen=True, kw_only=True):
    code: int


class IllegalTransitionError(RuntimeError):
    """An event that its stage does not know; the message tells the history that led there."""


_NEXT: dict[tuple[Stage, type[Event]], Stage] = {
    (Stage.IMPORT, ImportDone): Stage.STARTUP,
    (Stage.IMPORT, StageRaised): Stage.FAILED,
    (Stage.IMPORT, DrainAsked): Stage.DONE,
    (Stage.STARTUP, StartupDone): Stage.SERVING,
    (Stage.STARTUP, StageRaised): Stage.FAILED,
    # Nothing was promised to anybody yet: `shutdown` would meet a service that is half made.
    (Stage.STARTUP, DrainAsked): Stage.DONE,
    (Stage.SERVING, DrainAsked): Stage.DRAINING,
    (Stage.DRAINING, DrainAsked): Stage.DRAINING,
    (Stage.DRAINING, RequestsDone): Stage.SHUTDOWN,
    (Stage.SHUTDOWN, DrainAsked): Stage.SHUTDOWN,
    (Stage.SHUTDOWN, ShutdownDone): Stage.DONE,
    (Stage.SHUTDOWN, StageRaised): Stage.FAILED,
    # The end is near and wins over whatever comes late.
    (Stage.DONE, ImportDone): Stage.DONE,
    (Stage.DONE, StartupDone): Stage.DONE,
    (Stage.DONE, StageRaised): Stage.DONE,
    (Stage.DONE, DrainAsked): Stage.DONE,
    (Stage.FAILED, DrainAsked): Stage.FAILED,
}


class Lifecycle:
    """The stage the process is in, and how it came there."""

    def __init__(self) -> None:
        self.stage = Stage.IMPORT
        self._history: list[str] = []

    def handle(self, event: Event) -> tuple[Instruction, ...]:
        """Enters the next stage and says what to do; raises IllegalTransitionError."""
        before = self.stage
        after = _NEXT.get((before, type(event)))
        if after is None:
            told = " -> ".join([*self._history, before]) if self._history else before
            raise IllegalTransitionError(f"{type(event).__name__} in stage {before}; history: {told}")
        self.stage = after
        self._history.append(f"{before} ({type(event).__name__})")
        return _instructions(before, after, event)


def _instructions(before: Stage, after: Stage, event: Event) -> tuple[Instruction, ...]:
    if before in (Stage.DONE, Stage.FAILED):
        return ()
    match event:
        case ImportDone():
            return (TellImported(), RunStartup())
        case StartupDone():
            return (TellReady(),)
        case DrainAsked() if after is Stage.DONE:
            return (TellDrained(), Exit(code=EXIT_OK))
        case DrainAsked() if before is Stage.SERVING:
            return (FinishRequests(drain_s_max=event.drain_s_max),)
        case RequestsDone():
            return (RunShutdown(),)
        case ShutdownDone():
            return (TellDrained(), Exit(code=EXIT_OK))
        case StageRaised():
            return (TellFailed(stage=before.value, error=event.error), Exit(code=EXIT_STAGE_FAILED))
    return ()
