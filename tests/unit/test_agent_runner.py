"""One replica on a node, from the order to the end, with the test in the replica's place."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import anyio
import pytest

from agent_helpers import CODE, MODEL, WAIT_S_MAX, Bench, FakeReplica, open_fds, order
from snowdrop.agent import runner as runner_module
from snowdrop.agent import sandboxed as sandboxed_module
from snowdrop.agent.runner import ReplicaRunner
from snowdrop.agent.sandbox.launcher import CODE_TARGET, MODELS_TARGET
from snowdrop.domain.errors import (
    ErrorBody,
    IntegrityError,
    NotFoundError,
    PlatformDownError,
    SandboxError,
    StorageFullError,
)
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.domain.replica import ReplicaReport, ReplicaState
from snowdrop.wire.replica import (
    Booted,
    DirectoryReady,
    Drain,
    Drained,
    Imported,
    ModelRenewed,
    Ready,
    RenewModel,
    StageFailed,
    WaitForDirectory,
)

pytestmark = pytest.mark.anyio
S = ReplicaState
UP = [S.MOUNTING, S.STARTING, S.LOADING, S.READY]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def reach(bench: Bench, state: ReplicaState) -> FakeReplica:
    replica = await bench.launcher.launched()
    await replica.become(state)
    await bench.until(state)
    return replica


class TestLife:
    async def test_every_state_is_reported_with_its_reason(self, bench: Bench) -> None:
        async with bench.living() as runner:
            assert runner.report.state is S.PENDING
            replica = await reach(bench, S.READY)
            runner.drain("scaled down", 7.0)
            assert await replica.hear() == Drain(drain_s_max=7.0)
            await replica.say(Drained())
            replica.end(0)
        assert bench.states() == [*UP, S.DRAINING, S.STOPPED]
        assert [report.version for report in bench.reports] == [2, 3, 4, 5, 6, 7]
        assert [report.reason for report in bench.reports] == [
            "ordered by control",
            "content is on the node",
            "imports are done",
            "startup is done",
            "scaled down",
            "process exited with code 0",
        ]
        last = bench.reports[-1]
        assert last == runner.report
        assert last.error is None
        assert [step.after for step in last.history] == bench.states()
        assert 0 < last.started_unix_ns < last.ended_unix_ns
        assert replica.kills == 0

    async def test_the_report_has_what_the_start_cost(self, bench: Bench) -> None:
        bench.plane.filled_content = ContentBytes(ram=1000)
        async with bench.living() as runner:
            replica = await bench.launcher.launched()
            await replica.boot()
            await replica.say(
                Booted(unix_ns=5), Imported(spans=(Span(name="import", start_unix_ns=5, end_unix_ns=6),))
            )
            await replica.say(Ready(spans=(Span(name="startup", start_unix_ns=6, end_unix_ns=7),)))
            ready = await bench.until(S.READY)
            runner.drain("enough", 1.0)
            await replica.hear()
            replica.end()
        assert ready.content == ContentBytes(ram=1000, disk=100, origin=10)
        assert [span.name for span in ready.spans if not span.parent] == ["mount", "start", "import", "startup"]
        assert {(s.name, s.note) for s in ready.spans if s.parent == "mount"} == {
            ("fetch", "code"),
            ("fetch", "minilm"),
        }
        assert ready.sandbox == "made up for a test"

    async def test_boot_hands_over_content_and_the_listening_socket(self, bench: Bench) -> None:
        async with bench.living(order(env={"A": "b"})) as runner:
            replica = await bench.launcher.launched()
            boot = await replica.boot()
            assert (boot.key, boot.env, boot.code_directory) == (runner.order.key, {"A": "b"}, CODE_TARGET)
            (model,) = boot.models
            assert (model.name, model.directory, model.area_bytes) == ("minilm", f"{MODELS_TARGET}/minilm", 4096)
            given = open_fds()
            assert given[replica.fds[model.slabs[0].fd]].startswith("/memfd:area")
            assert given[replica.fds[model.progress_fd]].startswith("/memfd:progress")
            assert given[replica.fds[model.wake_fd]].startswith("/memfd:wake")
            targets = [mount.target for mount in replica.spec.mounts]
            assert targets == [CODE_TARGET, f"{MODELS_TARGET}/minilm"]
            with socket.socket(fileno=os.dup(replica.fds[0])) as listener, socket.socket(socket.AF_UNIX) as client:
                client.connect(runner.report.socket_path)
                listener.accept()[0].close()
            replica.end()
        assert bench.plane.ensured == [(CODE, "rep-1", False), (MODEL, "rep-1", True)]

    async def test_what_it_prints_is_kept_to_the_last_word(self, bench: Bench) -> None:
        async with bench.living() as runner:
            replica = await reach(bench, S.READY)
            os.write(replica.stdout_fd, b"hello\n")
            os.write(replica.stderr_fd, b"no end of line")
            replica.end(3)
        text = bench.context.log_path(runner.order.key).read_text()
        assert "stdout hello\n" in text
        assert "stderr no end of line\n" in text

    async def test_descriptors_that_a_replica_hands_over_are_closed(self, bench: Bench) -> None:
        async with bench.living():
            replica = await bench.launcher.launched()
            await replica.boot()
            gift = os.memfd_create("gift")
            await replica.channel.send(Booted(unix_ns=1), (gift,))
            os.close(gift)
            await replica.say(Imported(spans=()))
            await bench.until(S.LOADING)
            replica.end()

    async def test_a_cancelled_runner_gives_everything_back(self, bench: Bench) -> None:
        before = open_fds()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ReplicaRunner(order(), bench.context).run)
            replica = await reach(bench, S.READY)
            tasks.cancel_scope.cancel()
        assert replica.closes == 1
        bench.nothing_left("rep-1", before)


class TestContent:
    @pytest.mark.parametrize("missing", [(CODE,), (MODEL,), (CODE, MODEL)], ids=["code", "model", "both"])
    async def test_failure_has_the_typed_error(self, bench: Bench, missing: tuple[str, ...]) -> None:
        error = NotFoundError("no such artefact", where="origin", next_step="push it again")
        bench.plane.errors = dict.fromkeys(missing, error)
        async with bench.living():
            pass
        assert bench.states() == [S.MOUNTING, S.FAILED]
        assert bench.reports[-1].error == error.body()
        assert bench.reports[-1].reason == str(error)
        assert not bench.launcher.asked.is_set()

    async def test_one_that_fails_stops_the_rest(self, bench: Bench) -> None:
        bench.plane.errors[CODE] = IntegrityError("wrong bytes")
        bench.plane.gates[MODEL] = anyio.Event()
        async with bench.living():
            pass
        assert bench.states()[-1] is S.FAILED

    async def test_what_landed_before_another_failed_is_given_back(self, bench: Bench) -> None:
        bench.plane.gates[CODE] = anyio.Event()
        bench.plane.errors[CODE] = StorageFullError("no space", where="cache")
        bench.plane.after_ensure = bench.plane.gates[CODE].set
        async with bench.living():
            pass  # `living` looks for the model's area among the open descriptors
        assert bench.reports[-1].error is not None
        assert bench.reports[-1].error.kind == "storage_full"

    async def test_a_directory_is_answered_when_it_is_complete(self, bench: Bench) -> None:
        async with bench.living():
            replica = await reach(bench, S.LOADING)
            await replica.say(WaitForDirectory(model="minilm"))
            assert await replica.hear() == DirectoryReady(model="minilm")
            error = IntegrityError("wrong bytes", where="chunk 3")
            bench.plane.directory_error = error
            await replica.say(WaitForDirectory(model="minilm"))
            assert await replica.hear() == DirectoryReady(model="minilm", error=error.body())
            await replica.say(WaitForDirectory(model="other"))
            unknown = await replica.hear()
            assert isinstance(unknown, DirectoryReady)
            assert unknown.error is not None
            assert unknown.error.kind == "not_found"
            replica.end()


class TestLaunch:
    async def test_failure_has_the_typed_error(self, bench: Bench) -> None:
        bench.launcher.error = SandboxError("bwrap is gone", where="/usr/bin/bwrap")
        async with bench.living():
            pass
        assert bench.states() == [S.MOUNTING, S.STARTING, S.FAILED]
        assert bench.reports[-1].error == bench.launcher.error.body()

    async def test_a_socket_that_cannot_be_made_is_a_launch_failure(self, bench: Bench) -> None:
        bench.context.sockets.rmdir()
        async with bench.living():
            pass
        error = bench.reports[-1].error
        assert error is not None
        assert error.kind == "sandbox"
        assert "cannot prepare" in error.message
        assert not bench.launcher.asked.is_set()

    async def test_dead_before_boot_is_read(self, bench: Bench) -> None:
        async with bench.living():
            replica = await bench.launcher.launched()
            replica.end(127)
        assert bench.states() == [S.MOUNTING, S.STARTING, S.FAILED]
        assert bench.reports[-1].reason == "process exited with code 127"


class TestStages:
    @pytest.mark.parametrize(
        ("state", "stage"), [(S.STARTING, "boot"), (S.STARTING, "import"), (S.LOADING, "startup")]
    )
    async def test_failure_tells_the_users_error_and_ends_it(
        self, bench: Bench, state: ReplicaState, stage: str
    ) -> None:
        error = ErrorBody(kind="user_code", message="ValueError: no", where="service.py:3")
        async with bench.living():
            replica = await reach(bench, state)
            await replica.say(StageFailed(stage=stage, error=error))
            replica.end(1)
        last = bench.reports[-1]
        assert (last.state, last.error) == (S.FAILED, error)
        assert last.reason == f"{stage}: ValueError: no (service.py:3)"
        assert bench.states().count(S.FAILED) == 1

    async def test_one_that_stays_after_its_stage_failed_is_killed(self, bench: Bench) -> None:
        async with bench.living():
            replica = await reach(bench, S.LOADING)
            await replica.say(StageFailed(stage="startup", error=ErrorBody(kind="user_code", message="no")))
        assert replica.kills == 1

    async def test_shutdown_that_raises_is_still_an_orderly_end(self, bench: Bench) -> None:
        async with bench.living() as runner:
            replica = await reach(bench, S.READY)
            runner.drain("enough", 5.0)
            await replica.hear()
            await replica.say(StageFailed(stage="shutdown", error=ErrorBody(kind="user_code", message="no")))
            replica.end(1)
        assert bench.reports[-1].state is S.STOPPED
        assert bench.reports[-1].error is None


class TestExit:
    @pytest.mark.parametrize("state", [S.STARTING, S.LOADING, S.READY])
    async def test_without_an_order_is_a_failure(self, bench: Bench, state: ReplicaState) -> None:
        async with bench.living():
            replica = await reach(bench, state)
            replica.end(by_signal=signal.SIGSEGV)
        last = bench.reports[-1]
        assert (last.state, last.reason) == (S.FAILED, "process killed by signal 11")
        assert last.error is not None
        assert last.error.kind == "replica_died"
        assert "snowdrop logs embed" in last.error.next_step

    async def test_over_its_memory_names_the_limit(self, bench: Bench) -> None:
        async with bench.living():
            replica = await reach(bench, S.READY)
            replica.end(by_signal=signal.SIGKILL, oom_killed=True)
        assert "resources.memory_bytes_max" in bench.reports[-1].reason

    async def test_the_last_words_are_heard_before_the_exit(self, bench: Bench) -> None:
        error = ErrorBody(kind="user_code", message="why it died")
        async with bench.living():
            replica = await reach(bench, S.LOADING)
            # No checkpoint lies between the two: the exit is known at the same time as the words.
            replica.channel.send_blocking(StageFailed(stage="startup", error=error))
            replica.end(1)
        assert bench.reports[-1].error == error

    async def test_a_channel_kept_open_by_a_child_delays_the_end_by_its_bound_only(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sandboxed_module, "LAST_WORDS_S_MAX", 0.005)
        async with bench.living():
            replica = await reach(bench, S.READY)
            child = replica.sock.dup()
            replica.end(1)
            await bench.until(S.FAILED)
            child.close()


class TestBounds:
    async def overrun(self, bench: Bench, **spec: float) -> ReplicaReport:
        async with bench.living(order(**spec)):
            await bench.until(S.FAILED)
        last = bench.reports[-1]
        assert last.error is not None
        assert last.error.kind == "timed_out"
        assert last.error.where in last.reason
        return last

    async def test_content(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, content_s_max=0.005)
        bench.plane.gates[MODEL] = anyio.Event()
        last = await self.overrun(bench)
        assert last.error is not None
        assert last.error.where == "agent.content_s_max=0.005"
        assert bench.states() == [S.MOUNTING, S.FAILED]

    async def test_import(self, bench: Bench) -> None:
        last = await self.overrun(bench, import_s_max=0.005)
        assert last.error is not None
        assert last.error.where == "import_s_max=0.005"
        assert (await bench.launcher.launched()).kills == 1

    async def test_a_launch_that_hangs(self, bench: Bench) -> None:
        bench.launcher.gate = anyio.Event()
        last = await self.overrun(bench, import_s_max=0.005)
        assert last.error is not None
        assert last.error.where == "import_s_max=0.005"

    async def test_startup(self, bench: Bench) -> None:
        async with bench.living(order(startup_s_max=0.005)):
            replica = await reach(bench, S.LOADING)
        last = bench.reports[-1]
        assert last.error is not None
        assert (last.state, last.error.where) == (S.FAILED, "startup_s_max=0.005")
        assert replica.kills == 1

    async def test_drain(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner_module, "KILL_GRACE_S", 0.0)
        async with bench.living() as runner:
            replica = await reach(bench, S.READY)
            runner.drain("scaled down", 0.005)
        last = bench.reports[-1]
        assert (last.state, replica.kills) == (S.STOPPED, 1)
        assert "drain_s_max=0.005" in last.reason
        assert "killed by signal 9" in last.reason

    async def test_drain_of_one_that_does_not_hear(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner_module, "KILL_GRACE_S", 0.01)
        monkeypatch.setattr(sandboxed_module, "TELL_S_MAX", 0.01)
        async with bench.living() as runner:
            replica = await reach(bench, S.READY)
            for _ in range(sandboxed_module.MESSAGES_MAX - 10):
                await replica.channel.send(WaitForDirectory(model="none"))
            await anyio.wait_all_tasks_blocked()
            runner.drain("no longer needed", 0.01)
        assert (bench.reports[-1].state, replica.kills) == (S.STOPPED, 1)

    async def test_drain_orders_again_do_not_prolong_it(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runner_module, "KILL_GRACE_S", 0.0)
        async with bench.living() as runner:
            replica = await reach(bench, S.READY)
            runner.drain("scaled down", 3_600.0)
            await replica.hear()
            runner.drain("the agent stops", 0.005)  # the later order has the last word
        assert replica.kills == 1
        assert bench.states().count(S.DRAINING) == 1


class TestDrain:
    async def test_while_content_comes(self, bench: Bench) -> None:
        bench.plane.gates[CODE] = anyio.Event()
        async with bench.living() as runner:
            await bench.until(S.MOUNTING)
            runner.drain("deleted", 5.0)
        assert bench.states() == [S.MOUNTING, S.STOPPED]
        assert not bench.launcher.asked.is_set()

    async def test_while_it_is_launched(self, bench: Bench) -> None:
        bench.launcher.gate = anyio.Event()
        async with bench.living() as runner:
            with anyio.fail_after(WAIT_S_MAX):
                await bench.launcher.asked.wait()
            runner.drain("deleted", 5.0)
            await bench.until(S.DRAINING)
            bench.launcher.gate.set()
        assert bench.states()[-2:] == [S.DRAINING, S.STOPPED]
        assert bench.launcher.replicas["rep-1"].kills >= 1

    async def test_while_a_launch_fails(self, bench: Bench) -> None:
        bench.launcher.gate = anyio.Event()
        bench.launcher.error = SandboxError("no")
        async with bench.living() as runner:
            with anyio.fail_after(WAIT_S_MAX):
                await bench.launcher.asked.wait()
            runner.drain("deleted", 5.0)
            await bench.until(S.DRAINING)
            bench.launcher.gate.set()
        assert bench.states()[-1] is S.STOPPED

    @pytest.mark.parametrize("state", [S.STARTING, S.LOADING])
    async def test_before_ready_ends_it_at_once(self, bench: Bench, state: ReplicaState) -> None:
        async with bench.living() as runner:
            replica = await reach(bench, state)
            runner.drain("deleted", 5.0)
        assert replica.kills == 1
        assert bench.states()[-2:] == [S.DRAINING, S.STOPPED]
        assert bench.reports[-1].error is None

    async def test_after_the_end_is_harmless(self, bench: Bench) -> None:
        async with bench.living() as runner:
            replica = await reach(bench, S.READY)
            replica.end(0)
        runner.drain("late", 5.0)
        assert bench.states()[-1] is S.FAILED


class TestStreaming:
    async def test_ready_counts_when_the_areas_are_filled(self, bench: Bench) -> None:
        bench.plane.filled_gate = anyio.Event()
        bench.plane.filled_content = ContentBytes(origin=7)
        async with bench.living():
            replica = await bench.launcher.launched()
            await replica.become(S.READY)
            await bench.until(S.LOADING)
            await anyio.wait_all_tasks_blocked()
            assert bench.states()[-1] is S.LOADING
            bench.plane.filled_gate.set()
            ready = await bench.until(S.READY)
            assert ready.content.origin == 17
            assert [span.note for span in ready.spans if span.parent == "startup"] == ["minilm"]
            replica.end(0)

    async def test_an_area_that_cannot_be_filled_fails_the_replica_with_its_error(self, bench: Bench) -> None:
        bench.plane.filled_errors = [IntegrityError("chunk 3 is wrong at the origin")]
        async with bench.living():
            pass
        last = bench.reports[-1]
        assert last.state is S.FAILED
        assert last.error is not None
        assert last.error.kind == "integrity"
        assert bench.launcher.replicas["rep-1"].kills == 1

    async def test_a_model_whose_data_plane_died_is_given_again(self, bench: Bench) -> None:
        bench.plane.filled_errors = [PlatformDownError("the node's data plane is gone")]
        bench.plane.filled_content = ContentBytes(disk=5)
        async with bench.living():
            replica = await reach(bench, S.LOADING)
            await replica.say(RenewModel(model="minilm"))
            with anyio.fail_after(WAIT_S_MAX):
                answer, fds = await replica.channel.receive()
            assert isinstance(answer, ModelRenewed)
            assert answer.handle is not None
            given = open_fds()
            assert given[fds[answer.handle.slabs[0].fd]].startswith("/memfd:area")
            assert given[fds[answer.handle.progress_fd]].startswith("/memfd:progress")
            for fd in fds:
                os.close(fd)
            await replica.say(Ready(spans=()))
            ready = await bench.until(S.READY)
            assert ready.content.disk == 105
            replica.end(0)
        assert [each for each in bench.plane.ensured if each[0] == MODEL] == [(MODEL, "rep-1", True)] * 2

    async def test_a_model_is_given_although_the_data_plane_dies_as_it_is_asked(self, bench: Bench) -> None:
        bench.plane.filled_errors = [PlatformDownError("the node's data plane is gone")]
        async with bench.living():
            replica = await reach(bench, S.LOADING)
            bench.plane.deaths[MODEL] = 2
            await replica.say(RenewModel(model="minilm"))
            with anyio.fail_after(WAIT_S_MAX):
                answer, fds = await replica.channel.receive()
            assert isinstance(answer, ModelRenewed)
            assert answer.error is None
            for fd in fds:
                os.close(fd)
            replica.end(0)

    async def test_one_that_was_complete_before_its_data_plane_died_is_ready_all_the_same(
        self, bench: Bench
    ) -> None:
        bench.plane.filled_errors = [PlatformDownError("the node's data plane is gone")]
        async with bench.living():
            replica = await reach(bench, S.READY)
            replica.end(0)

    async def test_a_model_that_it_does_not_have_is_not_given(self, bench: Bench) -> None:
        async with bench.living():
            replica = await reach(bench, S.LOADING)
            await replica.say(RenewModel(model="another"))
            answer = await replica.hear()
            assert isinstance(answer, ModelRenewed)
            assert answer.error is not None
            assert answer.error.kind == "not_found"
            replica.end(0)


class TestFaults:
    """What no table foresees fails the replica, says so, and leaves nothing."""

    def failed(self, bench: Bench, kind: str) -> ErrorBody:
        last = bench.reports[-1]
        assert last.state is S.FAILED
        assert bench.states().count(S.FAILED) == 1
        assert last.ended_unix_ns > 0
        assert last.error is not None
        assert last.error.kind == kind
        return last.error

    async def test_bug_in_the_content_path(self, bench: Bench) -> None:
        bench.plane.errors[MODEL] = RuntimeError("a bug")
        async with bench.living():
            pass
        assert "RuntimeError" in self.failed(bench, "internal").message

    async def test_bug_in_the_launcher(self, bench: Bench) -> None:
        bench.launcher.error = KeyError("a bug")
        async with bench.living():
            pass
        assert "KeyError" in self.failed(bench, "internal").message

    async def test_message_out_of_turn(self, bench: Bench) -> None:
        async with bench.living():
            replica = await reach(bench, S.STARTING)
            await replica.say(Ready(spans=()))
        assert "IllegalTransition" in self.failed(bench, "internal").message

    async def test_garbage_on_the_channel(self, bench: Bench) -> None:
        async with bench.living():
            replica = await reach(bench, S.READY)
            replica.sock.send(b"\xff garbage")
        self.failed(bench, "protocol")

    async def test_a_flood_of_messages_is_cut_off_and_holds_nobody_up(self, bench: Bench) -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await anyio.lowlevel.checkpoint()
                turns += 1

        async with bench.living():
            replica = await reach(bench, S.READY)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(others)
                try:
                    while True:
                        await replica.channel.send(Drained())
                        await anyio.lowlevel.checkpoint()
                except OSError:
                    tasks.cancel_scope.cancel()
        assert "messages_max" in self.failed(bench, "protocol").where
        assert turns > sandboxed_module.MESSAGES_MAX

    async def test_a_sandbox_that_cannot_be_closed(self, bench: Bench) -> None:
        async with bench.living():
            replica = await reach(bench, S.READY)
            replica.close_error = TimeoutError("stuck in the kernel")
            replica.end(1)
        assert bench.states()[-1] is S.FAILED

    async def test_a_sandbox_whose_close_hangs(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sandboxed_module, "CLOSE_S_MAX", 0.005)
        async with bench.living():
            replica = await reach(bench, S.READY)
            replica.close_hangs = True
            replica.end(1)
        assert bench.states()[-1] is S.FAILED
