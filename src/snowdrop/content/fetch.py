"""The fetch engine: one bounded set of threads that carries chunks for all artefacts of the node.

Threads spend their time in reads and hashes, which hold no interpreter lock. Each takes the next run of the next
artefact in turn, so that a large model does not hold up a small one. What a fill no longer wants is not begun,
and a read from the origin that is under way ends early. The gate says how much the origin is asked at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from functools import partial

from snowdrop.content.fill import Fill
from snowdrop.content.gate import OriginGate
from snowdrop.content.placement import READ_BYTES_MAX
from snowdrop.content.runs import Outcome, Run, is_heavy
from snowdrop.content.source import Tier
from snowdrop.domain.cancel import CANCEL_FLAG
from snowdrop.domain.errors import SnowdropError
from snowdrop.policy.prefetch import SMALL_RUN_BYTES

QUIET_LOOK_S = 0.05
"""Besides the end of a run, a fill that nobody wants any more makes the engine quiet, which nobody announces."""
JOIN_S_MAX = 10.0
"""How long closing waits for reads that are under way."""
LOCAL_THREADS = 2
"""Threads that the origin never has: one that does not answer holds up nothing that is on the node."""

log = logging.getLogger("snowdrop.content")


class FetchEngine:
    """Use `lock` around every call to a fill, and `kick` after one that made something due."""

    def __init__(self, threads_max: int, gate: OriginGate) -> None:
        lock = threading.RLock()
        self.lock = threading.Condition(lock)
        self._quiet = threading.Condition(lock)
        self.bytes_read: Counter[Tier] = Counter()
        """Plaintext bytes brought, by tier, since the start."""
        self.gate = gate
        self._threads_max = threads_max
        self._threads: list[threading.Thread] = []
        self._fills: list[Fill] = []
        self._active: Counter[Tier] = Counter()
        self._heavy = 0
        self.is_closed = False

    def start(self) -> None:
        for number in range(self._threads_max + LOCAL_THREADS):
            thread = threading.Thread(target=self._work, name=f"fetch {number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def kick(self, fill: Fill) -> None:
        """Something of `fill` may be due now."""
        with self.lock:
            if fill not in self._fills:
                self._fills.append(fill)
            # One thread: if it finds work it wakes the next one. All at once would only get in each other's way.
            self.lock.notify()

    @property
    def is_busy(self) -> bool:
        return self._active.total() > 0

    def wait_quiet(self) -> None:
        """Blocks until nothing is under way and nothing is due."""
        with self.lock:
            while self.is_busy or any(fill.is_due for fill in self._fills):
                self._quiet.wait(QUIET_LOOK_S)

    def close(self) -> bool:
        """Begins nothing new and waits for what is under way; False if a read does not end. Blocks."""
        with self.lock:
            self.is_closed = True
            self.lock.notify_all()
        deadline_s = time.monotonic() + JOIN_S_MAX
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # --- a thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        memory = _Scratch()
        while True:
            with self.lock:
                found = self._next()
                while found is None:
                    if self.is_closed:
                        return
                    # A tenant at its bandwidth holds no thread; its turn comes with time, not with an event.
                    self.lock.wait(self.gate.look_again_s(fill.tenant for fill in self._fills if fill.is_due))
                    found = self._next()
                self.lock.notify()
            fill, run = found
            self._carry(fill, run, memory)

    def _next(self) -> tuple[Fill, Run] | None:
        if self.is_closed:
            return None
        self._fills = [fill for fill in self._fills if fill.is_busy]
        for index, fill in enumerate(self._fills):
            run = fill.next_run(partial(self._has_room, fill), self.gate.run_bytes_max)
            if run is not None:
                if run.source.tier == "origin":
                    self.gate.spend(fill.tenant, run.length)
                # Its turn comes again after all others.
                self._fills.append(self._fills.pop(index))
                self._active[run.source.tier] += 1
                self._heavy += is_heavy(run)
                return fill, run
        return None

    def _has_room(self, fill: Fill, tier: Tier, run_bytes_max: int, spare: int) -> bool:
        """Whether one more run may be read from `tier`; `spare` is what an origin may still be asked at once."""
        if tier != "origin":
            return True
        if spare <= 0 or self._active["origin"] >= self._threads_max:
            return False
        # Small ones share no bandwidth worth mentioning: the first tensor need not wait for headers.
        return self.gate.may_read(fill.tenant, self._heavy if run_bytes_max > SMALL_RUN_BYTES else 0)

    def _carry(self, fill: Fill, run: Run, memory: _Scratch) -> None:
        token = CANCEL_FLAG.set(_GivenUp(self, fill))
        try:
            outcome = fill.carry(run, memory.take)
        except Exception as error:  # noqa: BLE001 -- a bug met by one run must not end the thread for all
            outcome = Outcome(list(range(run.first, run.first + run.count)), _unforeseen(error))
            fill.set_aside(run, outcome.bad)  # or it would be asked for the same again, without end
        finally:
            CANCEL_FLAG.reset(token)
        with self.lock:
            self._active[run.source.tier] -= 1
            self._heavy -= is_heavy(run)
            self.bytes_read[run.source.tier] += run.length if not outcome.bad else 0
            fill.finish(run, outcome)
            if not self.is_busy:
                self._quiet.notify_all()
        fill.wake()
        fill.on_progress()


class _GivenUp:
    """Whether nobody wants what is being read for a fill, for a read that takes long to end by itself."""

    def __init__(self, engine: FetchEngine, fill: Fill) -> None:
        self._engine = engine
        self._fill = fill

    def is_set(self) -> bool:
        return self._engine.is_closed or not self._fill.is_wanted


def _unforeseen(error: Exception) -> SnowdropError:
    log.error("a fetch failed in an unforeseen way", exc_info=error)
    return SnowdropError(
        f"internal error of the data plane: {type(error).__name__}: {error}",
        where="fetch",
        next_step="please report it with the agent's log",
    )


class _Scratch:
    """One thread's memory for runs that cannot be read in place. Made when first needed."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    def take(self, length: int) -> memoryview:
        if len(self._memory) < length:
            self._memory = memoryview(bytearray(max(length, READ_BYTES_MAX)))
        return self._memory[:length]
