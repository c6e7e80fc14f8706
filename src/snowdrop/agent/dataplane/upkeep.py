"""Which part of the upkeep answers which message."""

from __future__ import annotations

from snowdrop.content.upkeep import Upkeep
from snowdrop.domain.errors import UnavailableError
from snowdrop.wire.codec import Message
from snowdrop.wire.dataplane import Completed
from snowdrop.wire.upkeep import (
    AskContent,
    AskStats,
    EvictContent,
    PinContent,
    StatsTold,
    ToUpkeep,
    UnpinContent,
    VerifyContent,
)

UPKEEP_MESSAGES = (AskStats, AskContent, VerifyContent, PinContent, UnpinContent, EvictContent)


async def answer_upkeep(upkeep: Upkeep | None, message: ToUpkeep) -> Message:
    """The answer to one message. Raises what the upkeep raises, UnavailableError where there is none."""
    if upkeep is None:
        raise UnavailableError("this data plane keeps no content of its own", where="data plane")
    match message:
        case AskStats():
            return StatsTold(request=message.request, stats=await upkeep.stats())
        case AskContent():
            return upkeep.content(message)
        case VerifyContent():
            return await upkeep.verify(message)
        case EvictContent():
            return await upkeep.evict(message)
        case PinContent():
            await upkeep.pin(message)
        case UnpinContent():
            await upkeep.unpin(message.manifest)
    return Completed(request=message.request)
