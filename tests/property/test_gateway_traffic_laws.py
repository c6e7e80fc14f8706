"""Traffic by revision under any order of events: pins are kept, nothing leaks, nobody waits beside a free slot."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from platform_helpers import KEY, NAME, replica_route, route
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import RevisionId
from snowdrop.domain.service import QueueSpec
from snowdrop.gateway.effects import Deny, Effect, Grant, Now
from snowdrop.gateway.queue import QueueCore
from snowdrop.wire.control import DeploymentRoute, Parked, RevisionWeight
from snowdrop.wire.slots import Acquire, Outcome

OLD, NEW = RevisionId("rev-1"), RevisionId("rev-2")
REPLICAS = {"rep-1": OLD, "rep-2": OLD, "rep-3": NEW}
PARKED = Parked(error=ErrorBody(kind="revision_failed", message="boom"), wait_s_max=5.0, next_try_unix_ns=0)

tables = st.tuples(
    st.sets(st.sampled_from(sorted(REPLICAS))), st.sampled_from([None, 0.0, 0.3, 1.0]), st.booleans()
)
events = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(["", "", "rev-1", "rev-2", "candidate"])),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("tick"), st.floats(0.1, 9.0)),
    st.tuples(st.just("table"), tables),
)


def table(replicas: set[str], weight: float | None, parked: bool) -> DeploymentRoute:
    listed = (
        msgspec.structs.replace(replica_route(name, concurrency=2), revision=REPLICAS[name])
        for name in sorted(replicas)
    )
    weights = (
        ()
        if weight is None
        else (
            RevisionWeight(revision=OLD, role="stable", weight=1.0 - weight),
            RevisionWeight(revision=NEW, role="candidate", weight=weight),
        )
    )
    nothing = parked and not replicas
    queue = QueueSpec(length_max=8, wait_s_max=20.0)
    return route(*listed, weights=weights, parked=PARKED if nothing else None, queue=queue)


class Model:
    def __init__(self) -> None:
        self.core = QueueCore(keys_required=False)
        self.now_s = 100.0
        self.pins: dict[int, str] = {}
        self.waiting: dict[int, None] = {}
        self.leases: dict[int, int] = {}
        self.table = table({"rep-1"}, 0.3, False)
        self.core.set_routes([self.table], [], self.now)

    @property
    def now(self) -> Now:
        return Now(self.now_s, int(self.now_s * 1e9))

    def take(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Grant):
                ticket = effect.message.ticket
                pin = {"candidate": NEW}.get(self.pins[ticket], self.pins[ticket])
                assert pin in {"", effect.message.revision}, "answered by a revision that was not named"
                if not pin and self.weights():
                    assert self.weights()[effect.message.revision] > 0, "a revision without traffic got some"
                self.waiting.pop(ticket, None)
                self.leases[effect.message.lease] = ticket
            elif isinstance(effect, Deny):
                self.waiting.pop(effect.message.ticket, None)

    def weights(self) -> dict[RevisionId, float]:
        return {each.revision: each.weight for each in self.table.weights}

    def do(self, kind: str, value: object) -> None:
        if kind == "ask":
            ticket = len(self.pins) + 1
            self.pins[ticket] = str(value)
            self.waiting[ticket] = None
            asked = Acquire(
                ticket=ticket, key_sha256=None, deployment=NAME, arrived_unix_ns=1, revision=str(value)
            )
            self.take(self.core.arrive("w", asked, self.now))
        elif kind == "end" and self.leases:
            lease = sorted(self.leases)[int(str(value)) % len(self.leases)]
            del self.leases[lease]
            self.take(self.core.release(lease, self.now, Outcome(lease % 3 == 0, 0.1)))
        elif kind == "cancel" and self.waiting:
            ticket = sorted(self.waiting)[int(str(value)) % len(self.waiting)]
            del self.waiting[ticket]
            self.take(self.core.cancel("w", ticket, self.now))
        elif kind == "tick":
            self.now_s += float(str(value))
            self.take(self.core.tick(self.now))
        elif kind == "table" and isinstance(value, tuple):
            self.table = table(*value)
            self.take(self.core.change_route(KEY, self.table, self.now))

    def check(self) -> None:
        (load,) = self.core.loads(self.now)
        assert load.queued == len(self.waiting)
        assert sum(load.pinned.values()) == sum(1 for ticket in self.waiting if self.pins[ticket])
        deployment = self.core._deployments[KEY]
        for name, slots in deployment.replicas.items():
            if not slots.accepting or slots.in_flight >= slots.concurrency:
                continue
            named = REPLICAS[name]
            for ticket in self.waiting:
                pin = {"candidate": NEW}.get(self.pins[ticket], self.pins[ticket])
                fits = pin == named if pin else not self.weights() or self.weights()[named] > 0
                assert not fits, f"{ticket} waits beside a free slot of {name}"


@given(st.lists(events, max_size=40))
def test_pins_are_kept_nothing_leaks_and_nobody_waits_beside_a_slot(history: list[tuple[str, object]]) -> None:
    model = Model()
    for kind, value in history:
        model.do(kind, value)
        model.check()
    while model.leases:
        model.do("end", 0)
    model.do("tick", 30.0)
    while model.leases:
        model.do("end", 0)
    (load,) = model.core.loads(model.now)
    assert (load.in_flight, load.queued, load.pinned, model.waiting) == (0, 0, {}, {})
    assert not model.core.busy
