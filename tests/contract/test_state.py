"""One suite for every StateStore: the memory fake, a fresh SQLite file, one of an earlier life."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from platform_helpers import NODE, artefact, caller, deployment, receipt, replica_key, report, revision, usage
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.errors import ConflictError
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, ModelName, ReceiptId, RevisionId, TenantId
from snowdrop.domain.ref import Seen
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.secret import SecretRecord
from snowdrop.domain.service import Scale
from snowdrop.domain.usage import UsageTotal
from snowdrop.policy.autoscale import AutoscaleInput, AutoscaleState, judge, observe
from snowdrop.policy.autoscale.learned import Learned
from snowdrop.policy.autoscale.record import ScalingRecord
from snowdrop.policy.idle import Gaps, note_gap
from snowdrop.state.memory import MemoryState
from snowdrop.state.port import KeyRecord, StateStore
from snowdrop.state.sqlite import SqliteState
from snowdrop.wire.waits import WaitRecord

pytestmark = pytest.mark.anyio
OTHER = TenantId("other")
NAME = DeploymentName("embed")


@pytest.fixture(params=["memory", "sqlite", "sqlite-reopened"])
async def state(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StateStore]:
    if request.param == "memory":
        yield MemoryState()
        return
    if request.param == "sqlite-reopened":
        await (await SqliteState.open(tmp_path / "s" / "control.db")).aclose()
    store = await SqliteState.open(tmp_path / "s" / "control.db")
    try:
        yield store
    finally:
        await store.aclose()


def model(
    name: str = "minilm", *, tenant: TenantId = DEFAULT_TENANT, letter: str = "a", generation: int = 1
) -> ModelRecord:
    return ModelRecord(
        tenant=tenant, name=ModelName(name), artefact=artefact(letter), created_unix_ns=1, generation=generation
    )


def key(name: str = "ci", *, tenant: TenantId = DEFAULT_TENANT) -> KeyRecord:
    return KeyRecord(tenant=tenant, name=name, key_sha256=f"{tenant}-{name}", created_unix_ns=1)


class TestModels:
    async def test_the_last_write_counts(self, state: StateStore) -> None:
        await state.put_model(model(letter="a"))
        await state.put_model(model(letter="b", generation=2))
        assert await state.get_model(DEFAULT_TENANT, ModelName("minilm")) == model(letter="b", generation=2)

    async def test_an_older_generation_is_refused_also_after_a_deletion(self, state: StateStore) -> None:
        name = ModelName("minilm")
        assert await state.newest_ref(DEFAULT_TENANT, name) is None
        await state.put_model(model(letter="a", generation=3))
        await state.put_model(model(letter="a", generation=3))  # told twice
        for stale in (model(letter="b", generation=2), model(letter="b", generation=3)):
            with pytest.raises(ConflictError, match="generation 3"):
                await state.put_model(stale)
        assert await state.get_model(DEFAULT_TENANT, name) == model(letter="a", generation=3)
        await state.delete_model(DEFAULT_TENANT, name)
        with pytest.raises(ConflictError):
            await state.put_model(model(letter="b", generation=2))
        assert await state.get_model(DEFAULT_TENANT, name) is None
        assert await state.newest_ref(DEFAULT_TENANT, name) == Seen(generation=3, manifest=artefact("a").manifest)
        assert await state.newest_ref(OTHER, name) is None

    async def test_all_tenants_models_and_revisions_can_be_listed(self, state: StateStore) -> None:
        for tenant in (OTHER, DEFAULT_TENANT):
            await state.put_model(model(tenant=tenant))
            await state.put_revision(revision(tenant=tenant))
        assert [m.tenant for m in await state.list_models(None)] == [DEFAULT_TENANT, OTHER]
        assert {r.tenant for r in await state.list_all_revisions()} == {DEFAULT_TENANT, OTHER}

    async def test_listed_by_name_and_deleted_once(self, state: StateStore) -> None:
        for name in ("c", "a", "b"):
            await state.put_model(model(name))
        assert [m.name for m in await state.list_models(DEFAULT_TENANT)] == ["a", "b", "c"]
        assert await state.delete_model(DEFAULT_TENANT, ModelName("b")) is True
        assert await state.delete_model(DEFAULT_TENANT, ModelName("b")) is False
        assert await state.get_model(DEFAULT_TENANT, ModelName("b")) is None


class TestRevisions:
    async def test_a_revision_never_changes(self, state: StateStore) -> None:
        await state.put_revision(revision())
        await state.put_revision(revision())  # a repeat of the same is no change
        with pytest.raises(ConflictError):
            await state.put_revision(revision(concurrency=7))
        assert await state.get_revision(DEFAULT_TENANT, NAME, RevisionId("rev-1")) == revision()
        assert await state.get_revision(DEFAULT_TENANT, NAME, RevisionId("rev-9")) is None

    async def test_newest_first(self, state: StateStore) -> None:
        for number in (2, 3, 1):
            await state.put_revision(revision(f"rev-{number}", created=number))
        assert [r.id for r in await state.list_revisions(DEFAULT_TENANT, NAME)] == ["rev-3", "rev-2", "rev-1"]


class TestDeployments:
    async def test_fenced_by_generation(self, state: StateStore) -> None:
        await state.put_deployment(deployment(generation=1), expected_generation=0)
        with pytest.raises(ConflictError, match="exists already"):
            await state.put_deployment(deployment(generation=1), expected_generation=0)
        second = deployment(generation=2, scale=Scale(max=3))
        await state.put_deployment(second, expected_generation=1)
        with pytest.raises(ConflictError, match="changed meanwhile"):
            await state.put_deployment(deployment(generation=2), expected_generation=1)
        assert await state.get_deployment(DEFAULT_TENANT, NAME) == second

    async def test_a_fenced_write_to_what_is_gone_is_refused(self, state: StateStore) -> None:
        with pytest.raises(ConflictError):
            await state.put_deployment(deployment(generation=4), expected_generation=3)
        assert await state.get_deployment(DEFAULT_TENANT, NAME) is None

    async def test_deleted_with_its_revisions_but_not_its_history(self, state: StateStore) -> None:
        await state.put_revision(revision())
        await state.put_deployment(deployment(), expected_generation=0)
        await state.put_replica(report(state=ReplicaState.STOPPED))
        await state.put_receipt(receipt())
        await state.append_usage((usage(1),))
        await state.scaling.put_learned(DEFAULT_TENANT, NAME, Learned(done=1.0))
        await state.scaling.put_learned(OTHER, NAME, Learned(done=2.0))
        assert await state.delete_deployment(DEFAULT_TENANT, NAME, expected_generation=1) is True
        assert await state.scaling.get_learned(DEFAULT_TENANT, NAME) is None
        assert await state.scaling.get_learned(OTHER, NAME) == Learned(done=2.0)
        assert await state.delete_deployment(DEFAULT_TENANT, NAME, expected_generation=1) is False
        assert await state.list_deployments(None) == []
        assert await state.list_revisions(DEFAULT_TENANT, NAME) == []
        assert await state.list_receipts(DEFAULT_TENANT, NAME, limit=9) == [receipt()]
        assert len(await state.list_replicas(DEFAULT_TENANT, NAME, ended=True, limit=9)) == 1
        assert len(await state.usage_totals(DEFAULT_TENANT)) == 1

    async def test_a_delete_of_an_older_generation_removes_nothing(self, state: StateStore) -> None:
        await state.put_revision(revision())
        await state.put_deployment(deployment(generation=1), expected_generation=0)
        await state.put_deployment(deployment(generation=2), expected_generation=1)
        assert await state.delete_deployment(DEFAULT_TENANT, NAME, expected_generation=1) is False
        assert [d.generation for d in await state.list_deployments(None)] == [2]
        assert len(await state.list_revisions(DEFAULT_TENANT, NAME)) == 1

    async def test_can_be_made_again_after_it_was_deleted(self, state: StateStore) -> None:
        await state.put_deployment(deployment(generation=1), expected_generation=0)
        await state.delete_deployment(DEFAULT_TENANT, NAME, expected_generation=1)
        await state.put_deployment(deployment(generation=1), expected_generation=0)
        assert [d.name for d in await state.list_deployments(DEFAULT_TENANT)] == [NAME]


class TestReplicas:
    async def test_the_higher_version_is_kept(self, state: StateStore) -> None:
        await state.put_replica(report(version=5, state=ReplicaState.READY))
        await state.put_replica(report(version=4, state=ReplicaState.LOADING))
        await state.put_replica(report(version=5, state=ReplicaState.FAILED))
        (stored,) = await state.list_replicas(None, None, ended=False, limit=9)
        assert (stored.version, stored.state) == (5, ReplicaState.READY)
        await state.put_replica(report(version=6, state=ReplicaState.STOPPED))
        assert await state.list_replicas(None, None, ended=False, limit=9) == []
        assert [r.version for r in await state.list_replicas(None, None, ended=True, limit=9)] == [6]

    async def test_newest_first_with_a_limit(self, state: StateStore) -> None:
        for number in (2, 3, 1):
            await state.put_replica(report(f"rep-{number}", started_unix_ns=number))
        found = await state.list_replicas(DEFAULT_TENANT, NAME, ended=True, limit=2)
        assert [r.key.replica for r in found] == ["rep-3", "rep-2"]


class TestReceipts:
    async def test_the_caller_is_set_once_and_survives_a_rewrite(self, state: StateStore) -> None:
        assert await state.set_caller(receipt().id, caller("req-1")) is False
        await state.put_receipt(receipt())
        assert await state.set_caller(receipt().id, caller("req-1")) is True
        assert await state.set_caller(receipt().id, caller("req-2")) is True
        await state.put_receipt(receipt(outcome="failed: later"))
        stored = await state.get_receipt(DEFAULT_TENANT, receipt().id)
        assert stored == receipt(outcome="failed: later", caller=caller("req-1"))

    async def test_newest_first_of_one_deployment_or_all(self, state: StateStore) -> None:
        await state.put_receipt(receipt("rep-1", started=1))
        await state.put_receipt(receipt("rep-2", started=3, name="chat"))
        await state.put_receipt(receipt("rep-3", started=2))
        assert [r.replica for r in await state.list_receipts(DEFAULT_TENANT, None, limit=2)] == ["rep-2", "rep-3"]
        assert [r.replica for r in await state.list_receipts(DEFAULT_TENANT, NAME, limit=9)] == ["rep-3", "rep-1"]
        assert await state.get_receipt(DEFAULT_TENANT, ReceiptId("rcp-x")) is None


class TestUsage:
    async def test_a_repeat_is_counted_once(self, state: StateStore) -> None:
        batch = (usage(1, 10), usage(2, 20))
        await state.append_usage(batch)
        await state.append_usage(batch)
        await state.append_usage((usage(2, 999), usage(3, 30)))
        (total,) = await state.usage_totals(DEFAULT_TENANT)
        assert total == UsageTotal(deployment=NAME, unit="replica_ns", detail="", quantity=60)
        assert await state.last_usage_sequence(NODE, "jrn-1") == 3

    async def test_a_repeat_under_another_tenant_is_no_new_fact(self, state: StateStore) -> None:
        await state.append_usage((usage(1, 10),))
        await state.append_usage((usage(1, 10, tenant=OTHER),))
        assert [total.quantity for total in await state.usage_totals(DEFAULT_TENANT)] == [10]
        assert await state.usage_totals(OTHER) == []

    async def test_another_journal_counts_on_its_own(self, state: StateStore) -> None:
        await state.append_usage((usage(1, 10, source="jrn-1"), usage(1, 10, source="jrn-2")))
        (total,) = await state.usage_totals(DEFAULT_TENANT)
        assert total.quantity == 20
        assert await state.last_usage_sequence(NODE, "jrn-3") == 0

    async def test_summed_by_unit_and_detail(self, state: StateStore) -> None:
        await state.append_usage(
            (
                usage(1, 5),
                usage(2, 7, unit="content_bytes", detail="origin"),
                usage(3, 8, unit="content_bytes", detail="ram"),
                usage(4, 1, unit="content_bytes", detail="ram"),
            )
        )
        totals = await state.usage_totals(DEFAULT_TENANT)
        assert [(t.unit, t.detail, t.quantity) for t in totals] == [
            ("content_bytes", "origin", 7),
            ("content_bytes", "ram", 9),
            ("replica_ns", "", 5),
        ]


class TestKeys:
    async def test_names_are_unique_within_a_tenant(self, state: StateStore) -> None:
        await state.put_key(key())
        await state.put_key(key(tenant=OTHER))
        with pytest.raises(ConflictError):
            await state.put_key(key())
        assert await state.list_keys(DEFAULT_TENANT) == [key()]
        assert await state.list_keys(None) == [key(), key(tenant=OTHER)]
        assert await state.delete_key(DEFAULT_TENANT, "ci") is True
        assert await state.delete_key(DEFAULT_TENANT, "ci") is False
        assert await state.list_keys(None) == [key(tenant=OTHER)]


class TestTenants:
    async def test_never_see_each_others_rows(self, state: StateStore) -> None:
        await state.put_model(model())
        await state.put_revision(revision())
        await state.put_deployment(deployment(), expected_generation=0)
        await state.put_replica(report())
        await state.put_receipt(receipt())
        await state.append_usage((usage(1),))
        await state.put_key(key())
        assert await state.get_model(OTHER, ModelName("minilm")) is None
        assert await state.list_models(OTHER) == []
        assert await state.get_revision(OTHER, NAME, RevisionId("rev-1")) is None
        assert await state.list_revisions(OTHER, NAME) == []
        assert await state.get_deployment(OTHER, NAME) is None
        assert await state.list_deployments(OTHER) == []
        assert await state.list_replicas(OTHER, None, ended=True, limit=9) == []
        assert await state.get_receipt(OTHER, receipt().id) is None
        assert await state.list_receipts(OTHER, None, limit=9) == []
        assert await state.usage_totals(OTHER) == []
        assert await state.list_keys(OTHER) == []
        assert await state.delete_model(OTHER, ModelName("minilm")) is False
        assert await state.delete_deployment(OTHER, NAME, expected_generation=1) is False
        assert await state.delete_key(OTHER, "ci") is False
        assert await state.get_deployment(DEFAULT_TENANT, NAME) == deployment()

    async def test_the_same_names_live_side_by_side(self, state: StateStore) -> None:
        for tenant in (DEFAULT_TENANT, OTHER):
            await state.put_model(model(tenant=tenant, letter="a" if tenant == OTHER else "b"))
            await state.put_revision(revision(tenant=tenant, concurrency=3 if tenant == OTHER else 4))
            await state.put_deployment(deployment(tenant=tenant), expected_generation=0)
        await state.put_replica(report(replica_key("rep-1")))
        await state.put_replica(report(replica_key("rep-2", tenant=OTHER)))
        assert (await state.get_model(OTHER, ModelName("minilm"))) == model(tenant=OTHER, letter="a")
        found = await state.get_revision(OTHER, NAME, RevisionId("rev-1"))
        assert found is not None
        assert found.spec.concurrency == 3
        assert [d.tenant for d in await state.list_deployments(None)] == ["default", "other"]
        living = await state.list_replicas(OTHER, NAME, ended=False, limit=9)
        assert [r.key.replica for r in living] == ["rep-2"]
        await state.delete_deployment(OTHER, NAME, expected_generation=1)
        assert await state.get_revision(DEFAULT_TENANT, NAME, RevisionId("rev-1")) is not None


async def test_values_come_back_whole(state: StateStore) -> None:
    rich = revision(concurrency=5, scale=Scale(min=1, max=3), env={"A": "ü"}, accelerator=("L4", "cpu"))
    await state.put_revision(rich)
    stored = await state.get_revision(DEFAULT_TENANT, NAME, rich.id)
    assert stored == rich
    assert msgspec.json.encode(stored) == msgspec.json.encode(rich)


async def test_trim_drops_the_oldest_and_no_living_replica(state: StateStore) -> None:
    for number in range(5):
        await state.put_receipt(receipt(f"rep-{number}", started=number))
    for number in range(4):
        how = ReplicaState.STOPPED if number else ReplicaState.READY
        await state.put_replica(report(f"rep-{number}", how, started_unix_ns=number))
    await state.trim(receipts_max=2, replicas_max=1)
    kept = await state.list_receipts(DEFAULT_TENANT, None, limit=10)
    assert [each.id for each in kept] == ["rcp-4", "rcp-3"]
    left = await state.list_replicas(None, None, ended=True, limit=10)
    assert [each.key.replica for each in left] == ["rep-3", "rep-0"], "the oldest one still runs"


def decision(
    unix_ns: int, *, tenant: TenantId = DEFAULT_TENANT, load: int = 1, name: str = "embed"
) -> ScalingRecord:
    seen = AutoscaleInput(
        in_flight=load, queued=0, peak=load, ready=1, starting=1, concurrency=2, scale=Scale(max=4), start_s=2.0
    )
    _state, signals = observe(AutoscaleState(), seen, 5.0)
    return ScalingRecord(
        tenant=tenant,
        deployment=DeploymentName(name),
        revision=RevisionId("rev-1"),
        unix_ns=unix_ns,
        signals=signals,
        decision=judge(signals),
    )


def wait(request: str, *, ended: int, tenant: TenantId = DEFAULT_TENANT) -> WaitRecord:
    return WaitRecord(
        request_id=request,
        tenant=tenant,
        deployment=NAME,
        arrived_unix_ns=0,
        ended_unix_ns=ended,
        outcome="granted",
        reason="no replica is ready",
    )


class TestScaling:
    async def test_decisions_come_back_newest_first_with_all_they_were_made_from(self, state: StateStore) -> None:
        for unix_ns in (20, 10, 30):
            await state.scaling.put_decision(decision(unix_ns, load=unix_ns))
        await state.scaling.put_decision(decision(40, tenant=OTHER))
        found = await state.scaling.list_decisions(DEFAULT_TENANT, NAME, since_unix_ns=20, limit=10)
        assert found == [decision(30, load=30), decision(20, load=20)]
        assert [judge(record.signals) for record in found] == [record.decision for record in found]
        assert len(await state.scaling.list_decisions(DEFAULT_TENANT, NAME, since_unix_ns=0, limit=2)) == 2

    async def test_the_history_of_one_deployment_does_not_push_out_anothers(self, state: StateStore) -> None:
        for unix_ns in range(1, 8):
            await state.scaling.put_decision(decision(unix_ns))
        await state.scaling.put_decision(decision(1, name="quiet"))
        await state.scaling.trim(decisions_max=3, waits_max=1)
        kept = await state.scaling.list_decisions(DEFAULT_TENANT, NAME, since_unix_ns=0, limit=10)
        assert [record.unix_ns for record in kept] == [7, 6, 5]
        assert await state.scaling.list_decisions(
            DEFAULT_TENANT, DeploymentName("quiet"), since_unix_ns=0, limit=10
        ) == [decision(1, name="quiet")]

    async def test_what_was_learned_is_kept_by_deployment(self, state: StateStore) -> None:
        assert await state.scaling.get_learned(DEFAULT_TENANT, NAME) is None
        learned = Learned(starts_s=(1.0, 2.0), done=3.0, slot_s=0.6, gaps=note_gap(Gaps(), 12.0))
        await state.scaling.put_learned(DEFAULT_TENANT, NAME, Learned())
        await state.scaling.put_learned(DEFAULT_TENANT, NAME, learned)
        assert await state.scaling.get_learned(DEFAULT_TENANT, NAME) == learned
        assert await state.scaling.get_learned(OTHER, NAME) is None

    async def test_waits_are_found_by_request_and_the_oldest_are_dropped(self, state: StateStore) -> None:
        waits = [wait(f"req-{n}", ended=n) for n in range(1, 6)]
        await state.scaling.put_waits((*waits, wait("req-9", ended=9, tenant=OTHER)))
        await state.scaling.put_waits((wait("req-2", ended=7),))
        found = await state.scaling.get_waits(DEFAULT_TENANT, NAME, request_id="req-2", limit=10)
        assert [w.ended_unix_ns for w in found] == [7, 2]
        await state.scaling.trim(decisions_max=1, waits_max=3)
        found = await state.scaling.get_waits(DEFAULT_TENANT, NAME, request_id=None, limit=10)
        assert [w.ended_unix_ns for w in found] == [7, 5]
        assert len(await state.scaling.get_waits(OTHER, NAME, request_id="req-9", limit=10)) == 1
        assert await state.scaling.get_waits(DEFAULT_TENANT, NAME, request_id="req-9", limit=10) == []


class TestSecrets:
    def record(
        self, name: str = "hf-token", *, version: int = 1, tenant: TenantId = DEFAULT_TENANT
    ) -> SecretRecord:
        return SecretRecord(
            tenant=tenant,
            name="hf-token",
            version=version,
            key_id="k1",
            wrapped=b"\0w",
            sealed=b"\xffs",
            created_unix_ns=1,
            changed_unix_ns=version,
        )

    async def test_a_record_comes_back_as_it_was_and_only_its_tenants(self, state: StateStore) -> None:
        mine, others = self.record(), self.record(tenant=OTHER)
        await state.secrets.put(mine, expected=None)
        await state.secrets.put(others, expected=None)
        assert await state.secrets.get(DEFAULT_TENANT, "hf-token") == mine
        assert await state.secrets.listed(OTHER) == [others]
        assert await state.secrets.listed(None) == [mine, others]
        assert await state.secrets.delete(DEFAULT_TENANT, "hf-token")
        assert not await state.secrets.delete(DEFAULT_TENANT, "hf-token")
        assert await state.secrets.get(OTHER, "hf-token") == others

    async def test_a_write_that_comes_second_is_refused(self, state: StateStore) -> None:
        first, second = self.record(), self.record(version=2)
        await state.secrets.put(first, expected=None)
        with pytest.raises(ConflictError):
            await state.secrets.put(second, expected=None)
        await state.secrets.put(second, expected=first)
        with pytest.raises(ConflictError):
            await state.secrets.put(self.record(version=3), expected=first)
        assert await state.secrets.get(DEFAULT_TENANT, "hf-token") == second
