"""What an endpoint says about batches: one call of its method for many requests."""

from typing import Literal

import msgspec

from snowdrop.domain.require import require

BATCH_SIZE_MAX = 4_096
BATCH_WAIT_MS_MAX = 10_000.0
BATCHES_IN_FLIGHT_MAX = 64


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """How requests to one endpoint are put together. The method takes a list for each parameter and gives a list.

    At most `size_max` requests go into one call, and at most `in_flight_max` calls run at a time in a replica.
    `wait_ms_max` is the longest that a request may be held back for others to come; how long it really is follows
    from how fast requests arrive and what a batch costs, and it is nothing where that would gain nothing. When a
    call raises, each request of it gets the error (`on_error="each"`), or the batch is halved until the requests
    that fail stand alone (`on_error="split"`, for methods that may run twice on the same request).
    """

    size_max: int = 32
    wait_ms_max: float = 5.0
    in_flight_max: int = 1
    on_error: Literal["each", "split"] = "each"

    def __post_init__(self) -> None:
        for field, value in (("size_max", self.size_max), ("in_flight_max", self.in_flight_max)):
            require(
                type(value) is int, f"batch.{field}", "a whole number"
            )  # msgspec checks types only when it decodes
        require(type(self.wait_ms_max) in {int, float}, "batch.wait_ms_max", "a number of milliseconds")
        require(1 <= self.size_max <= BATCH_SIZE_MAX, "batch.size_max", f"1 to {BATCH_SIZE_MAX:,}")
        require(
            0 <= self.wait_ms_max <= BATCH_WAIT_MS_MAX, "batch.wait_ms_max", f"0 to {BATCH_WAIT_MS_MAX:,.0f} ms"
        )
        require(
            1 <= self.in_flight_max <= BATCHES_IN_FLIGHT_MAX,
            "batch.in_flight_max",
            f"1 to {BATCHES_IN_FLIGHT_MAX}",
        )
        require(self.on_error in {"each", "split"}, "batch.on_error", '"each" or "split"')
