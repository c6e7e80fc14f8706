"""What a request asks of the queue by its headers: longest wait, priority, progress, deadline, an answer later.

`Prefer` is RFC 7240: what cannot be understood or done is passed over, and what is done is said in
`Preference-Applied`. Snowdrop's own headers are refused with InvalidInputError when they make no sense.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import msgspec
from aiohttp import hdrs
from multidict import CIMultiDictProxy

from snowdrop.domain.errors import InvalidInputError
from snowdrop.gateway.call import ANY_WAIT, WaitOptions

CALLER_CHARS_MAX = 128
EVENT_STREAM = "text/event-stream"
PRIORITY_MAX = 1_000_000
"""In either direction; what a deployment allows is far less."""


class Preferences(msgspec.Struct, frozen=True, kw_only=True):
    """`applied` are answer headers that say what was done."""

    wait: WaitOptions = ANY_WAIT
    deadline_unix_s: float | None = None
    respond_async: bool = False
    caller: str = ""
    applied: dict[str, str] | None = None


NONE_ASKED = Preferences()


def read_preferences(headers: CIMultiDictProxy[str]) -> Preferences:
    """Reads them; costs next to nothing for a request that asks for nothing."""
    progress = wants_events(headers.get(hdrs.ACCEPT, ""))
    prefer = headers.getall("prefer", None)
    priority = headers.get("snowdrop-priority")
    timeout, deadline = headers.get("snowdrop-timeout"), headers.get("snowdrop-deadline")
    caller = headers.get("snowdrop-caller", "")
    if not (progress or prefer or priority or timeout or deadline or caller):
        return NONE_ASKED
    preferred = parse_prefer(prefer or ())
    wait_s = _wait_s(preferred)
    return Preferences(
        wait=WaitOptions(
            wait_s_max=wait_s,
            priority=_priority(priority) if priority is not None else None,
            progress=progress,
        ),
        deadline_unix_s=_deadline(timeout, deadline),
        respond_async="respond-async" in preferred,
        caller=text_of("snowdrop-caller", caller[:CALLER_CHARS_MAX]),
        applied={"preference-applied": f"wait={preferred['wait']}"} if wait_s is not None else None,
    )


def text_of(name: str, given: str) -> str:
    """A header's value that is kept or passed on as text. Raises InvalidInputError for bytes that are no UTF-8.

    HTTP lets any byte through; one that is no text would break whatever encodes it later, far from its sender.
    """
    if given.isascii():  # nearly always
        return given
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            "the header's value is not UTF-8", where=f"header {name}", next_step="send plain text"
        ) from error
    return given


def wants_events(accept: str) -> bool:
    """Whether the client takes nothing but an event stream, as a browser's EventSource says it.

    One that takes JSON as well may get either: then the answer's status is worth more than early comments.
    """
    if EVENT_STREAM not in accept:  # nearly always
        return False
    types = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return types == {EVENT_STREAM}


def parse_prefer(values: tuple[str, ...] | list[str]) -> Mapping[str, str]:
    """Preferences by name, in lower case; of one that is named twice the first counts (RFC 7240, section 2)."""
    found: dict[str, str] = {}
    for value in values:
        for part in value.split(","):
            name, _, given = part.partition(";")[0].partition("=")
            found.setdefault(name.strip().lower(), given.strip().strip('"'))
    found.pop("", None)
    return found


def _wait_s(preferred: Mapping[str, str]) -> float | None:
    """`wait=N` in whole seconds; anything else is as if it were not there."""
    given = preferred.get("wait", "")
    return float(given) if given.isascii() and given.isdigit() and len(given) <= 9 else None


def _priority(given: str) -> int:
    digits = given.strip().removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 7 or int(digits) > PRIORITY_MAX:
        raise InvalidInputError(
            f"{given[:32]!r} is no priority",
            where="header snowdrop-priority",
            next_step=f"send a whole number between {-PRIORITY_MAX} and {PRIORITY_MAX}",
        )
    return int(given)


def _deadline(timeout: str | None, deadline: str | None) -> float | None:
    """The earlier of both, in unix seconds."""
    bounds: list[float] = []
    for name, given, base_s in (
        ("snowdrop-timeout", timeout, time.time()),
        ("snowdrop-deadline", deadline, 0.0),
    ):
        if given is None:
            continue
        try:
            bound = float(given)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound) or bound < 0:
            raise InvalidInputError(
                f"{given[:32]!r} is no time in seconds", where=f"header {name}", next_step="send a number"
            )
        bounds.append(base_s + bound)
    return min(bounds, default=None)
