import os
import threading
from pathlib import Path

import pytest

from content_helpers import noise, push, safetensors_bytes
from snowdrop.content.disk import DiskTier
from snowdrop.content.keys import PUBLIC_KEYRING
from snowdrop.content.landing import Landing
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.scrub import Scrubber, idle_io_priority
from snowdrop.content.source import PackSource
from snowdrop.domain.errors import NotFoundError, UnavailableError
from snowdrop.domain.ids import Digest
from snowdrop.policy.scrub import BUSY_S_MAX, BUSY_WAIT_S

pytestmark = pytest.mark.anyio


class Node:
    """A disk tier with one whole artefact, and a scrubber whose waits are counted instead of waited."""

    def __init__(self, root: Path) -> None:
        source = root / "source"
        source.mkdir()
        self.shared = noise(300_000, 5)
        for shard in range(2):
            tensors = {
                "own": ("U8", [2 << 20], noise(2 << 20, shard)),
                "shared": ("U8", [len(self.shared)], self.shared),
            }
            (source / f"m-{shard}.safetensors").write_bytes(safetensors_bytes(tensors))
        (source / "vocab.txt").write_bytes(noise(70_000, 9))
        self.origin = MemoryOrigin()
        self.digest: Digest = push(source, self.origin).artefact.manifest
        data = self.origin.objects[manifest_key(PUBLIC_DOMAIN, self.digest)]
        self.manifest = decode_manifest(data)
        self.packs = PackSource(self.origin, self.manifest)
        self.right = {path.name: path.read_bytes() for path in source.iterdir()}
        self.cache = root / "cache"
        self.disk = self.opened("a boot")
        self.disk.reserve(self.digest, self.manifest, set())
        self.landing = self.disk.open_landing(self.digest, self.manifest)
        self.bring(list(range(len(self.manifest.chunks))))
        self.waits: list[float] = []
        self.mended: list[list[int]] = []

    def opened(self, boot: str) -> DiskTier:
        disk = DiskTier(self.cache, 1 << 30, boot_id=boot)
        disk.open()
        return disk

    def bring(self, chunks: list[int]) -> None:
        for chunk in chunks:
            data = memoryview(bytearray(self.manifest.chunks[chunk].plain_bytes))
            self.packs.read(chunk, 1, data)
            self.landing.write(chunk, data)
        self.landing.sync()

    def scrubber(self, rate: int = 1 << 20, busy: list[bool] | None = None) -> Scrubber:
        states = iter(busy or [])

        async def mend(digest: Digest, chunks: list[int]) -> None:
            assert digest == self.digest
            self.mended.append(chunks)
            self.bring(chunks)

        async def sleep(seconds: float) -> None:
            self.waits.append(seconds)

        return Scrubber(
            self.disk,
            PUBLIC_KEYRING,
            mend,
            bytes_per_s=rate,
            is_busy=lambda: next(states, False),
            sleep=sleep,
        )

    def damage(self, name: str, at: int) -> None:
        with (self.landing.tree / name).open("r+b") as stream:
            stream.seek(at)
            byte = stream.read(1)
            stream.seek(at)
            stream.write(bytes([byte[0] ^ 1]))

    def tree(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.landing.tree.iterdir()}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


async def test_right_bytes_are_left_alone(node: Node) -> None:
    done = await node.scrubber().scrub(node.digest)
    assert done.chunks == len(node.manifest.chunks)
    assert done.read_bytes == sum(chunk.plain_bytes for chunk in node.manifest.chunks)
    assert not done.bad
    assert not node.mended
    assert node.landing.is_complete
    node.disk.close()


@pytest.mark.parametrize(
    ("name", "at"),
    [("m-0.safetensors", 1_000_000), ("m-1.safetensors", -100), ("vocab.txt", 5), ("m-1.safetensors", 0)],
    ids=["a tensor", "the second place of a chunk", "a small file", "a header"],
)
async def test_a_wrong_bit_is_found_set_aside_and_mended(node: Node, name: str, at: int) -> None:
    node.damage(name, at % len(node.right[name]))
    done = await node.scrubber().scrub(node.digest)
    assert len(done.bad) == 1
    assert node.mended == [list(done.bad)]
    assert node.landing.is_complete
    assert node.tree() == node.right
    events = node.disk.events.recent()
    assert [(event.kind, event.chunk, event.seen_by) for event in events] == [
        ("quarantined", done.bad[0], "scrub"),
        ("replaced", done.bad[0], "scrub"),
    ]
    assert events[0].artefact == node.digest
    assert events[0].digest == node.manifest.chunks[done.bad[0]].digest
    assert events[0].file in node.right
    assert node.disk.events.counts == {"quarantined": 1, "replaced": 1}
    node.disk.close()
    again = node.opened("another boot")
    assert again.events.counts == {"quarantined": 1, "replaced": 1}
    again.close()


async def test_bit_rot_that_the_fast_check_takes_for_right_is_found_by_its_digest(node: Node) -> None:
    node.damage("m-0.safetensors", 1_000_000)
    for chunk in node.landing.held_chunks():
        data = memoryview(bytearray(node.manifest.chunks[chunk].plain_bytes))
        node.landing.read(chunk, 1, data)
        node.landing.learn(chunk, data)  # what is never done with bytes that were not verified
        assert not list(node.landing.unchecked(chunk, 1, data))
    done = await node.scrubber().scrub(node.digest)
    assert len(done.bad) == 1
    assert node.tree() == node.right
    (bad,) = done.bad
    right = memoryview(bytearray(node.manifest.chunks[bad].plain_bytes))
    node.landing.read(bad, 1, right)
    assert list(node.landing.unchecked(bad, 1, right))  # its check went with it
    await node.scrubber().scrub(node.digest)
    assert not list(node.landing.unchecked(bad, 1, right))
    node.disk.close()


async def test_a_wrong_chunk_is_not_served_while_it_is_not_mended(node: Node) -> None:
    node.damage("m-0.safetensors", 1_000_000)

    async def cannot(digest: Digest, chunks: list[int]) -> None:
        assert "m-0.safetensors" not in node.tree()
        assert not any(node.landing.holds(chunk) for chunk in chunks)
        raise UnavailableError("the origin is away")

    scrubber = node.scrubber()
    scrubber._mend = cannot
    with pytest.raises(UnavailableError):
        await scrubber.scrub(node.digest)
    assert "m-0.safetensors" not in node.tree()
    node.disk.close()


async def test_after_a_restart_a_pass_proves_what_is_there(node: Node) -> None:
    node.disk.close()
    node.disk = node.opened("another boot")
    await node.scrubber().scrub(node.digest)
    landing = node.disk.known_landing(node.digest)
    assert isinstance(landing, Landing)
    assert landing.is_complete
    node.disk.close()


async def test_the_rate_is_kept_and_zero_is_as_fast_as_it_goes(node: Node) -> None:
    total = sum(chunk.plain_bytes for chunk in node.manifest.chunks)
    await node.scrubber(rate=1000).scrub(node.digest)
    assert sum(node.waits) == pytest.approx(total / 1000, rel=0.05)
    node.waits.clear()
    await node.scrubber(rate=1000).scrub(node.digest, 0)
    assert not node.waits
    node.disk.close()


async def test_nothing_is_read_while_a_load_is_under_way_for_a_bounded_time(node: Node) -> None:
    chunks = len(node.manifest.chunks)
    await node.scrubber(rate=1 << 40, busy=[True] * 7).scrub(node.digest)
    assert [wait for wait in node.waits if wait >= BUSY_WAIT_S] == [BUSY_WAIT_S] * 7
    node.waits.clear()
    await node.scrubber(rate=1 << 40, busy=[True] * 1_000_000).scrub(node.digest)
    assert sum(node.waits) == pytest.approx(chunks * BUSY_S_MAX, rel=0.01)
    node.disk.close()


async def test_a_run_reads_what_is_due_and_then_rests(node: Node) -> None:
    scrubber = node.scrubber(rate=1 << 40)
    assert node.disk.scrub_times() == {node.digest: 0.0}
    node.damage("vocab.txt", 5)

    class RestError(Exception):
        pass

    async def sleep(seconds: float) -> None:
        if node.disk.scrub_times()[node.digest]:
            assert seconds > BUSY_WAIT_S
            raise RestError

    scrubber._sleep = sleep
    with pytest.raises(RestError):
        await scrubber.run()
    assert node.mended
    node.disk.close()


async def test_a_rate_of_zero_switches_it_off(node: Node) -> None:
    await node.scrubber(rate=0).run()
    assert node.disk.scrub_times() == {node.digest: 0.0}
    node.disk.close()


async def test_an_artefact_that_is_not_here_is_not_found(node: Node) -> None:
    with pytest.raises(NotFoundError):
        await node.scrubber().scrub(Digest("blake3:" + "0" * 64))
    node.disk.evict(node.digest)
    node.disk.close()


async def test_the_idle_class_is_left_again() -> None:
    if os.uname().machine not in {"x86_64", "aarch64"}:
        pytest.skip("no number for the system call")
    seen: list[int] = []

    def inside() -> None:
        from snowdrop.content.scrub import _IOPRIO_SYSCALLS, _libc  # noqa: PLC0415

        get = _IOPRIO_SYSCALLS[os.uname().machine][1]
        seen.append(_libc.syscall(get, 1, 0))
        with idle_io_priority():
            seen.append(_libc.syscall(get, 1, 0))
        seen.append(_libc.syscall(get, 1, 0))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen[0] == seen[2] != seen[1] == 3 << 13
