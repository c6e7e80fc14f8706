"""What the queues hold: a deployment's replicas, its line and its counters; a lease; a waiting request."""

from __future__ import annotations

import math
from collections import deque

import msgspec

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import ReplicaId
from snowdrop.gateway.effects import DeploymentKey, Now, TicketKey, deadline_came, waited_too_long
from snowdrop.gateway.slots import Gauges, ReplicaSlots
from snowdrop.gateway.slottimes import SlotTimes
from snowdrop.gateway.traffic import Traffic, lost_pins
from snowdrop.gateway.words import phase_of, reason_of
from snowdrop.policy.admission import come_back_s, spread_s
from snowdrop.policy.queueing import Line, Standing, priority_of, rules_of
from snowdrop.policy.waiting import Outlook, percent, slot_time_s, start_left_s, turn_s
from snowdrop.wire.control import DeploymentLoad, DeploymentRoute, Parked
from snowdrop.wire.slots import Acquire, Outcome, WaitNews

DRAIN_RATE_HALF_LIFE_S = 5.0
NEWS_EVERY_S = 1.0
"""How often a worker hears of a request that wants to know; it counts down by itself in between."""
OUTLOOK_S = 0.05
"""A forecast holds for so long: thousands may come in that time."""
PROMISES_MAX = 10_000
"""Refused requests whose time to come back is remembered, so that not all are told the same."""


class Lease(msgspec.Struct):
    """A slot that is out: who has it (`worker`), for which of its requests, since when.

    For a call that a service made for one of its own requests, `parent` is that one's lease and `depth` how many
    such calls lie inside of each other.
    """

    worker: str
    key: DeploymentKey
    replica: ReplicaSlots
    ticket: TicketKey
    deployment: Deployment
    granted_s: float
    parent: int = 0
    depth: int = 0


class Waiting(msgspec.Struct):
    """A request in the line. `reason`, `position` and `expected_s` are as they were when it began to wait.

    At `deadline_s` it has waited as long as it may, or (`is_callers`) its caller's own deadline has come.
    """

    worker: str
    request: Acquire
    deadline_s: float
    since_s: float
    since_unix_ns: int
    priority: int
    reason: str
    position: int
    expected_s: float | None
    news_due_s: float = 0.0
    pin: str = ""
    is_callers: bool = False

    @property
    def ticket(self) -> TicketKey:
        return (self.worker, self.request.ticket)


class Deployment:
    """One deployment's line, replicas and counters."""

    def __init__(self, route: DeploymentRoute) -> None:
        self.route = route
        self.replicas: dict[ReplicaId, ReplicaSlots] = {}
        self.line: Line[TicketKey, Waiting] = Line(rules_of(route.queue))
        self.curious: dict[TicketKey, Waiting] = {}
        self.arrived = 0
        self.refused = 0
        self.peak = 0
        self.reported = 0
        self.times = SlotTimes()
        self.drained_per_s = 0.0
        self.drained_at_s = 0.0
        self.woken_until_s = 0.0
        self.traffic = Traffic()
        self.parked_since_s = 0.0
        self._reason: str | None = None
        self._outlook: Outlook | None = None
        self._outlook_at_s = 0.0
        self._promises: deque[float] = deque(maxlen=PROMISES_MAX)

    @property
    def in_flight(self) -> int:
        return sum(replica.in_flight for replica in self.replicas.values())

    @property
    def accepting(self) -> int:
        return sum(1 for replica in self.replicas.values() if replica.accepting)

    @property
    def slots(self) -> int:
        return sum(replica.concurrency for replica in self.replicas.values() if replica.accepting)

    @property
    def queued(self) -> int:
        """Those who wait; somebody who woke it and did not wait for it counts as one of them."""
        return len(self.line) or (1 if self.woken_until_s else 0)

    def note_peak(self) -> None:
        self.peak = max(self.peak, self.in_flight + self.queued)

    # --- the line -----------------------------------------------------------------------------------------

    def join(
        self,
        worker: str,
        request: Acquire,
        deadline_s: float,
        now: Now,
        *,
        pin: str = "",
        key_priority_max: int | None = None,
    ) -> Waiting:
        """Puts a request into the line; with a `pin` only that revision may serve it."""
        queue = self.route.queue
        ahead = 0 if request.attempt else len(self.line)
        left_s = request.deadline_left_s
        is_callers = left_s is not None and now.s + left_s <= deadline_s
        waiting = Waiting(
            worker=worker,
            request=request,
            deadline_s=now.s + left_s if left_s is not None and is_callers else deadline_s,
            since_s=now.s,
            since_unix_ns=now.unix_ns,
            priority=priority_of(queue, request.priority, key_priority_max),
            reason=self.reason,
            position=ahead,
            expected_s=self.expected_s(now, ahead),
            pin=pin,
            is_callers=is_callers,
        )
        self.line.join(waiting.ticket, waiting, self._standing(waiting))
        self.traffic.joined(pin)
        if request.progress and queue.progress_first_s is not None:
            self.curious[waiting.ticket] = waiting
        return waiting

    def _standing(self, waiting: Waiting) -> Standing:
        return Standing(
            came_s=waiting.since_s,
            priority=waiting.priority,
            caller=caller_of(waiting.request, by_label=self.route.queue.fair_by == "caller"),
            first=waiting.request.attempt > 0,
            pin=waiting.pin,
        )

    def leave(self, ticket: TicketKey) -> Waiting | None:
        self.curious.pop(ticket, None)
        waiting = self.line.leave(ticket)
        if waiting is not None:
            self.traffic.left(waiting.pin)
        return waiting

    def take(self) -> Waiting | None:
        """Whoever has the turn, and may have a slot that is free, leaves the line."""
        shared = self.traffic.pins or self.traffic.weights
        waiting = self.line.take(self.traffic.closed(self.replicas.values()) if shared else ())
        if waiting is not None:
            self.curious.pop(waiting.ticket, None)
            self.traffic.left(waiting.pin)
        return waiting

    def may_pass(self, pin: str) -> bool:
        """Whether nobody who waits could have the slot that a request of this pin may get."""
        pins = self.traffic.pins
        return pin not in pins if pin else len(self.line) == sum(pins.values())

    def choose(self, pin: str) -> ReplicaSlots | None:
        """The replica for the next request."""
        return self.traffic.choose(self.replicas.values(), pin)

    def end_parking(self, now_s: float) -> list[Waiting]:
        """Who has waited as long as a request may while nothing starts; they leave the line."""
        parked = self.route.parked
        if parked is None:
            return []
        late = [
            waiting
            for waiting in self.line.values()
            if max(waiting.since_s, self.parked_since_s) + parked.wait_s_max <= now_s
        ]
        for waiting in late:
            self.leave(waiting.ticket)
        return late

    def change(self, route: DeploymentRoute, now_s: float) -> list[Waiting]:
        """Another route from now on. Those whose revision it does not know leave the line."""
        if route.parked is not None and self.route.parked is None:
            self.parked_since_s = now_s
        before, self.route = self.route.queue, route
        if route.queue != before:
            self.line.change(rules_of(route.queue), self._standing)
        self.traffic.change(route)
        lost = lost_pins(self.traffic.pins, route)
        gone = [waiting for waiting in self.line.values() if waiting.pin in lost] if lost else []
        for waiting in gone:
            self.leave(waiting.ticket)
        return gone

    def clear(self) -> list[Waiting]:
        self.curious.clear()
        self.woken_until_s = 0.0
        self.traffic.pins.clear()
        return self.line.clear()

    def wake(self, now_s: float) -> None:
        """As a request that does not wait for its answer: it counts as waiting until a replica is ready."""
        if not self.accepting:
            self.woken_until_s = now_s + self.route.queue.wait_s_max
        self.peak = max(self.peak, self.in_flight + self.queued, 1)

    def end_waking(self, now_s: float) -> None:
        if self.woken_until_s and (self.accepting or self.woken_until_s <= now_s):
            self.woken_until_s = 0.0

    # --- leases -------------------------------------------------------------------------------------------

    def given_back(self, lease: Lease, now_s: float, *, done: bool, outcome: Outcome | None = None) -> None:
        """A slot is back."""
        self.times.back(lease.ticket, now_s, done=done, usual_s=self.route.service_s)
        if outcome is not None:
            self.traffic.note(lease.replica.route.revision, outcome)

    # --- forecasts ----------------------------------------------------------------------------------------

    def drain_rate(self, now_s: float) -> float:
        """Requests a second that got a slot lately; it fades while none does."""
        half_lives = max(0.0, now_s - self.drained_at_s) / DRAIN_RATE_HALF_LIFE_S
        return self.drained_per_s * math.exp2(-half_lives)

    def note_drained(self, now_s: float) -> None:
        """Exponentially forgetting rate of requests that left the queue for a slot."""
        elapsed_s = max(now_s - self.drained_at_s, 1e-3)
        keep = 0.5 ** (elapsed_s / DRAIN_RATE_HALF_LIFE_S)
        self.drained_per_s = self.drained_per_s * keep + (1 - keep) / elapsed_s
        self.drained_at_s = now_s

    def outlook(self, now: Now) -> Outlook:
        """What it can do now and soon, by what control and this gateway have learned."""
        if self._outlook is None or not 0 <= now.s - self._outlook_at_s < OUTLOOK_S:
            self._outlook, self._outlook_at_s = self._look_out(now), now.s
        return self._outlook

    def _look_out(self, now: Now) -> Outlook:
        route = self.route
        slots = self.slots
        left = (self._start_left_s((now.unix_ns - one.ordered_unix_ns) / 1e9) for one in route.coming)
        coming = sorted(left_s for left_s in left if left_s is not None)
        if not slots and not route.coming and route.parked is not None:
            coming = [max(0.0, (route.parked.next_try_unix_ns - now.unix_ns) / 1e9) + route.start_s]
        elif not slots and not route.coming and route.start_s:
            coming = [route.start_s]  # control is about to order one
        known_s = route.service_s or (self.times.slot_s / self.times.done if self.times.done else 0.0)
        running_s = self.times.running_s(now.s)
        return Outlook(
            slots=slots,
            service_s=slot_time_s(known_s, in_flight=self.in_flight, running_s=running_s),
            drained_per_s=self.drain_rate(now.s),
            coming_s=tuple(coming),
            coming_slots=max(1, route.concurrency),
        )

    def _start_left_s(self, elapsed_s: float) -> float | None:
        return start_left_s(max(0.0, elapsed_s), start_s=self.route.start_s, start_high_s=self.route.start_high_s)

    def expected_s(self, now: Now, ahead: int) -> float | None:
        return turn_s(self.outlook(now), ahead)

    @property
    def phase(self) -> str:
        return phase_of(self.route, ready=self.accepting > 0)

    @property
    def reason(self) -> str:
        """Why a request finds no slot now, in words; the same for all who come until something changes."""
        if self._reason is None:
            self._reason = reason_of(self.route, self.replicas.values())
        return self._reason

    def changed(self) -> None:
        """Its route or the standing of a replica is another one: what was concluded from them is forgotten."""
        self._reason = self._outlook = None

    def news(self, waiting: Waiting, position: int, now: Now) -> WaitNews:
        """What a waiting request is told, and when it is told again."""
        queue = self.route.queue
        waiting.news_due_s = now.s + NEWS_EVERY_S
        expected_s = self.expected_s(now, position)
        return WaitNews(
            ticket=waiting.request.ticket,
            phase=self.phase,
            position=position,
            percent=percent(now.s - waiting.since_s, expected_s),
            expected_s=expected_s,
            first_s=queue.progress_first_s,
            every_s=queue.progress_every_s,
        )

    def too_late(self, waited: Waiting, now: Now) -> ErrorBody:
        """The error of one that has waited as long as it may, or whose caller's own time is over."""
        if waited.is_callers and waited.deadline_s <= now.s:
            return deadline_came(self.route, self.reason).body()
        if self.route.parked is not None:
            return self.unstarted(self.route.parked, now)
        bound_s = waited.deadline_s - waited.since_s
        later_s = come_back_s(self.outlook(now), waiting=len(self.line), wait_s_max=bound_s)
        asked_s = waited.request.wait_s_max
        return waited_too_long(self.route, ready=self.accepting, asked_s=asked_s, retry_after_s=later_s).body()

    def unstarted(self, parked: Parked, now: Now) -> ErrorBody:
        """Why nothing serves; there is no use in coming back before the next try could be ready."""
        left_s = max(0.0, (parked.next_try_unix_ns - now.unix_ns) / 1e9)
        return msgspec.structs.replace(parked.error, retry_after_s=float(math.ceil(left_s + self.route.start_s)))

    def promised(self, now_s: float) -> int:
        """Refused requests that were told a time which has not come yet."""
        while self._promises and self._promises[0] <= now_s:
            self._promises.popleft()
        return len(self._promises)

    def promise(self, told_s: float, now: Now) -> float:
        """Remembers when a refused request comes back; gives the time that it is told, with all others in mind."""
        outlook = self.outlook(now)
        slots = outlook.slots + len(outlook.coming_s) * outlook.coming_slots
        told_s = spread_s(
            told_s,
            self._promises,
            slots=slots,
            length_max=self.route.queue.length_max,
            service_s=outlook.service_s,
            now_s=now.s,
        )
        self._promises.append(now.s + told_s)
        return told_s

    # --- reports ------------------------------------------------------------------------------------------

    def take_load(self, now_s: float) -> DeploymentLoad:
        """What control is told; the peak begins anew."""
        in_flight, queued = self.in_flight, self.queued
        load = DeploymentLoad(
            tenant=self.route.tenant,
            deployment=self.route.deployment,
            in_flight=in_flight,
            queued=queued,
            peak=max(self.peak, in_flight + queued),
            arrived=self.arrived,
            refused=self.refused,
            busy={name: r.in_flight for name, r in self.replicas.items() if r.in_flight},
            done=self.times.done,
            slot_s=self.times.slot_s,
            revisions=self.traffic.loads(),
            pinned=self.traffic.pinned(),
            running_s=self.times.running_s(now_s),
        )
        self.peak = self.reported = in_flight + queued
        return load

    def gauges(self) -> Gauges:
        return Gauges(
            tenant=self.route.tenant,
            deployment=self.route.deployment,
            in_flight=self.in_flight,
            queued=len(self.line),
            ready=self.accepting,
            starting=self.route.starting,
        )


def caller_of(request: Acquire, *, by_label: bool) -> str:
    """Whom the line is fair to: a key, all who have none, a caller from inside; or what the label says."""
    if request.tenant is not None or (by_label and request.label):
        return f"label:{request.label}"
    return f"key:{request.key_sha256 or ''}"
