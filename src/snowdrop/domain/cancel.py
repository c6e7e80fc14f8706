"""Whether the caller of the running request is gone, for code that runs in a thread and can't be interrupted.

The replica sets the flag of a request; the SDK gives user code `cancelled()`. Both reach it here.
"""

from contextvars import ContextVar
from typing import Protocol


class Flag(Protocol):
    """What `threading.Event` offers and is needed here."""

    def is_set(self) -> bool: ...


CANCEL_FLAG: ContextVar[Flag | None] = ContextVar("snowdrop_cancel_flag", default=None)


def cancelled() -> bool:
    """True once nobody waits for the answer of the running request any more; False outside of a request.

    A synchronous handler is never interrupted: one that runs for long should ask now and then, and return.
    """
    flag = CANCEL_FLAG.get()
    return flag is not None and flag.is_set()
