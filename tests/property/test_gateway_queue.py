"""The queue core as a state machine: any order of events keeps the promises in the module's docstring."""

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from platform_helpers import KEY, NAME, replica_route, route
from snowdrop.domain.errors import RevisionFailedError
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.effects import DemandChanged, Deny, Effect, Grant, Idle, Now, Tell
from snowdrop.gateway.queue import QueueCore
from snowdrop.wire.control import DeploymentRoute
from snowdrop.wire.slots import Acquire, Look, Looked

WORKERS = ("w-0", "w-1")
REPLICAS = ("rep-1", "rep-2", "rep-3")
LENGTH_MAX = 4
WAIT_S_MAX = 20.0
REFUSAL = RevisionFailedError("it does not start").body()


class Queue(RuleBasedStateMachine):
    """Keeps a model: which tickets wait (in order), which leases are out, what the table says."""

    def __init__(self) -> None:
        super().__init__()
        self.core = QueueCore(keys_required=False)
        self.now_s = 100.0
        self.tickets = 0
        self.open: dict[tuple[str, int], float] = {}  # waiting, in order of arrival -> deadline
        self.leases: dict[int, tuple[str, int, str]] = {}  # lease -> worker, ticket, replica
        self.answered: set[tuple[str, int]] = set()
        self.gone: set[tuple[str, int]] = set()
        self.table: DeploymentRoute | None = None
        self.idle_said: dict[str, int] = {}
        self.arriving: tuple[str, int] | None = None
        self.again: set[tuple[str, int]] = set()

    # --- helpers ----------------------------------------------------------------------------------------------

    @property
    def now(self) -> Now:
        return Now(self.now_s, int(self.now_s * 1e9))

    def accepting(self) -> dict[str, int]:
        if self.table is None:
            return {}
        return {r.replica: r.concurrency for r in self.table.replicas if r.accepting}

    def in_flight(self, replica: str) -> int:
        return sum(1 for held in self.leases.values() if held[2] == replica)

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Grant):
                self.take_grant(effect)
            elif isinstance(effect, Deny):
                self.take_answer((effect.worker, effect.message.ticket))
                self.open.pop((effect.worker, effect.message.ticket), None)
            elif isinstance(effect, Idle):
                assert effect.replica not in self.accepting(), "an accepting replica was called idle"
                assert self.in_flight(effect.replica) == 0, "called idle with requests in flight"
                self.idle_said[effect.replica] = self.idle_said.get(effect.replica, 0) + 1
            else:
                assert effect == DemandChanged(KEY)

    def take_grant(self, effect: Grant) -> None:
        ticket, message = (effect.worker, effect.message.ticket), effect.message
        self.take_answer(ticket)
        if ticket in self.open:
            assert next(iter(self.open)) == ticket, "not first come first served"
            del self.open[ticket]
        else:
            assert ticket == self.arriving, "granted without having asked"
            assert not self.open, "overtook those who wait"
        assert message.lease not in self.leases
        assert message.replica in self.accepting(), "granted at a replica that takes nothing"
        self.leases[message.lease] = (effect.worker, message.ticket, message.replica)
        assert self.in_flight(message.replica) <= self.accepting()[message.replica]

    def take_answer(self, ticket: tuple[str, int]) -> None:
        assert ticket not in self.answered, "answered twice"
        assert ticket not in self.gone, "answered after it was cancelled"
        self.answered.add(ticket)

    # --- requests ---------------------------------------------------------------------------------------------

    @initialize(concurrency=st.integers(1, 3))
    def first_table(self, concurrency: int) -> None:
        self.routes({"rep-1": True, "rep-2": True}, concurrency, refused=False, whole=True)

    @rule(worker=st.sampled_from(WORKERS), count=st.integers(1, 5))
    def burst(self, worker: str, count: int) -> None:
        for _ in range(count):
            self.arrive(worker)

    def arrive(self, worker: str, *, wait_s_max: float | None = None, waited_s: float = 0.0) -> None:
        """A request; with `waited_s` one that has waited before, whose replica could not be reached."""
        self.tickets += 1
        self.arriving = ticket = (worker, self.tickets)
        waiting = len(self.open)
        request = Acquire(
            ticket=self.tickets,
            key_sha256=None,
            deployment=NAME,
            arrived_unix_ns=int((self.now_s - waited_s) * 1e9),
            wait_s_max=wait_s_max,
            attempt=1 if waited_s else 0,
        )
        effects = self.core.arrive(worker, request, self.now)
        self.take(effects)
        self.arriving = None
        if ticket in self.answered:
            return
        assert effects == [DemandChanged(KEY)]
        assert self.table is not None
        assert self.table.refusal is None
        assert waiting < LENGTH_MAX or waited_s
        bound_s = min(WAIT_S_MAX, wait_s_max if wait_s_max is not None else WAIT_S_MAX)
        self.open[ticket] = self.now_s + max(0.0, bound_s - waited_s)
        if waited_s:
            self.again.add(ticket)
            self.open = dict(sorted(self.open.items(), key=lambda entry: entry[0] not in self.again))

    @rule(worker=st.sampled_from(WORKERS), wait_s_max=st.sampled_from([0.0, 1.0, 10.0, 1e9]))
    def impatient(self, worker: str, wait_s_max: float) -> None:
        self.arrive(worker, wait_s_max=wait_s_max)

    @rule(activate=st.booleans())
    def look(self, activate: bool) -> None:
        request = Look(ticket=0, key_sha256=None, deployment=NAME, activate=activate)
        effects = self.core.look("w-0", request, self.now)
        if self.table is None:
            assert isinstance(effects[0], Deny)
            return
        told = effects[-1]
        assert isinstance(told, Tell)
        assert isinstance(told.message, Looked)
        assert (told.message.queued, told.message.error) == (len(self.open), self.table.refusal)
        assert (effects[0] == DemandChanged(KEY)) == (activate and self.table.refusal is None)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not (self.open or self.leases):
            return
        known = [*self.open, *((worker, ticket) for worker, ticket, _ in self.leases.values())]
        ticket = data.draw(st.sampled_from(known))
        self.open.pop(ticket, None)
        self.leases = {n: held for n, held in self.leases.items() if held[:2] != ticket}
        self.gone.add(ticket)
        self.answered.discard(ticket)
        self.take(self.core.cancel(*ticket, self.now))

    @rule(ticket=st.integers(-5, -1))
    def cancel_what_is_unknown(self, ticket: int) -> None:
        assert self.core.cancel("w-0", ticket, self.now) == []

    @rule(data=st.data(), twice=st.booleans())
    def release(self, data: st.DataObject, twice: bool) -> None:
        if not self.leases:
            return
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        del self.leases[lease]
        self.take(self.core.release(lease, self.now))
        if twice:
            assert self.core.release(lease, self.now) == []

    @rule(data=st.data(), again_after_s=st.sampled_from([0.0, 0.5, 15.0, 30.0]))
    def unreachable(self, data: st.DataObject, again_after_s: float) -> None:
        if not self.leases:
            return
        lease = data.draw(st.sampled_from(sorted(self.leases)))
        worker, _ticket, replica = self.leases.pop(lease)
        named, effects = self.core.unreachable(lease, self.now)
        assert named == replica
        granted = [e.message.replica for e in effects if isinstance(e, Grant)]
        assert replica not in granted, "sent the next request to a replica that was just not there"
        self.take(effects)
        assert self.core.unreachable(lease, self.now) == (None, [])
        if again_after_s and self.table is not None and self.table.refusal is None:
            self.arrive(worker, waited_s=again_after_s)

    @rule(worker=st.sampled_from(WORKERS))
    def worker_gone(self, worker: str) -> None:
        for ticket in [t for t in self.open if t[0] == worker]:
            del self.open[ticket]
            self.gone.add(ticket)
        self.leases = {n: held for n, held in self.leases.items() if held[0] != worker}
        effects = self.core.worker_gone(worker, self.now)
        assert all(e.worker != worker for e in effects if isinstance(e, Grant | Deny))
        self.take(effects)

    @rule(seconds=st.floats(0.01, 15.0))
    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        late = [ticket for ticket, deadline_s in self.open.items() if deadline_s <= self.now_s]
        effects = self.core.tick(self.now)
        denied = [(e.worker, e.message.ticket) for e in effects if isinstance(e, Deny)]
        assert sorted(denied) == sorted(late)
        assert all(e.message.error.kind == "waited_too_long" for e in effects if isinstance(e, Deny))
        self.take(effects)

    # --- the table --------------------------------------------------------------------------------------------

    @rule(
        states=st.tuples(
            *[st.sampled_from(["accepting", "accepting", "draining", "absent", "absent"])] * len(REPLICAS)
        ),
        concurrency=st.integers(1, 3),
        refused=st.integers(0, 7).map(lambda drawn: drawn == 7),
        whole=st.booleans(),
    )
    def new_table(self, states: tuple[str, ...], concurrency: int, refused: bool, whole: bool) -> None:
        listed = {n: s == "accepting" for n, s in zip(REPLICAS, states, strict=True) if s != "absent"}
        self.routes(listed, concurrency, refused=refused, whole=whole)

    def routes(self, accepting: dict[str, bool], concurrency: int, *, refused: bool, whole: bool) -> None:
        listed = {each.replica for each in self.table.replicas} if self.table is not None else set()
        if self.table is not None and self.leases:
            concurrency = self.table.concurrency  # it is the revision's: it does not shrink under its leases
        self.table = route(
            *(replica_route(name, accepting=open_, concurrency=concurrency) for name, open_ in accepting.items()),
            queue=QueueSpec(length_max=LENGTH_MAX, wait_s_max=WAIT_S_MAX),
            refusal=REFUSAL if refused else None,
        )
        self.table = msgspec.structs.replace(self.table, concurrency=concurrency)
        before = set(self.open)
        # One that was out of the table, or is told of by a control that was restarted, may be called idle again.
        kept = {} if whole else {name: count for name, count in self.idle_said.items() if name in listed}
        self.idle_said = {name: count for name, count in kept.items() if accepting.get(name) is False}
        if whole:
            self.take(self.core.set_routes([self.table], [], self.now))
        else:
            self.take(self.core.change_route(KEY, self.table, self.now))
        if refused:
            assert not self.open, "someone still waits for what will not come"
            assert before <= self.answered

    @rule(whole=st.booleans(), really=st.integers(0, 5))
    def removed(self, whole: bool, really: int) -> None:
        if really < 5:
            return
        self.table = None
        self.idle_said = {}
        self.take(self.core.set_routes([], [], self.now) if whole else self.core.change_route(KEY, None, self.now))
        assert not self.open

    # --- promises ---------------------------------------------------------------------------------------------

    @invariant()
    def counts_agree(self) -> None:
        loads = {load.deployment: load for load in self.core.loads(self.now)}
        if self.table is None:
            assert not loads
            return
        listed = {r.replica for r in self.table.replicas}
        deployment = self.core._deployments[KEY]
        if deployment.woken_until_s:
            assert not deployment.accepting, "woken, though it is ready"
        assert loads[NAME].queued == len(self.open) or (loads[NAME].queued == 1 and deployment.woken_until_s)
        assert loads[NAME].in_flight == sum(1 for held in self.leases.values() if held[2] in listed)
        assert loads[NAME].peak >= loads[NAME].in_flight + loads[NAME].queued
        assert self.core.busy == bool(self.leases or self.open)

    @invariant()
    def nobody_waits_beside_a_free_slot(self) -> None:
        if not self.open or self.table is None:
            return
        deployment = self.core._deployments[KEY]
        for name, slots in self.accepting().items():
            free = self.in_flight(name) < slots and deployment.replicas[name].accepting
            assert not free, f"{name} has a free slot"

    @invariant()
    def idle_is_said_exactly_once(self) -> None:
        if self.table is None:
            return
        for each in self.table.replicas:
            if not each.accepting and self.in_flight(each.replica) == 0:
                assert self.idle_said.get(each.replica) == 1
            else:
                assert not self.idle_said.get(each.replica)

    def teardown(self) -> None:
        for lease in list(self.leases):
            if lease in self.leases:
                del self.leases[lease]
                self.take(self.core.release(lease, self.now))
        while self.leases:  # the queue was served meanwhile
            lease = next(iter(self.leases))
            del self.leases[lease]
            self.take(self.core.release(lease, self.now))
        self.now_s += WAIT_S_MAX + 1
        self.take(self.core.tick(self.now))
        while self.leases:
            lease = next(iter(self.leases))
            del self.leases[lease]
            self.take(self.core.release(lease, self.now))
        assert not self.open
        assert not self.core.busy
        assert all(load.in_flight == 0 for load in self.core.loads(self.now))
        assert not self.core._tickets
        assert not any(each.woken_until_s for each in self.core._deployments.values())


Queue.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestQueue = Queue.TestCase
