"""A world for collection: actors (pushes, collections, removals) that take turns at every single origin call.

Each actor is a thread that runs only while it has the baton, so a seed decides the whole interleaving. Time is
simulated; no call takes longer than PAUSE_S_MAX of it, which is what the protocol assumes of real ones.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from snowdrop.content.collect import Collector
from snowdrop.content.gcformat import ROOTS, PlatformRoots, Root, write_record
from snowdrop.content.keys import PUBLIC_HASHER, PUBLIC_KEYRING
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key, pack_key, ref_key
from snowdrop.content.leases import Clock, check_lease, push_lease
from snowdrop.content.manifest import encode_manifest, manifest_digest
from snowdrop.content.observe import Observer
from snowdrop.content.origin import MemoryOrigin, ObjectInfo
from snowdrop.content.refs import decode_ref, make_ref
from snowdrop.content.signing import Signer
from snowdrop.domain.errors import NotFoundError, SnowdropError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest
from snowdrop.domain.manifest import (
    FORMAT_VERSION,
    ArtefactRef,
    ChunkRef,
    Extent,
    FileEntry,
    Manifest,
    PackRef,
)

SECOND_NS = 1_000_000_000
PAUSE_S_MAX = 100
START_NS = 1_700_000_000 * SECOND_NS
SIGNER = Signer.make()
PACK_DATA = [bytes([65 + index]) * (index + 1) for index in range(6)]


class Killed(BaseException):
    """The actor's process is gone: nothing that it does from now on has an effect."""


def manifest_of(packs: tuple[int, ...]) -> bytes:
    """A manifest over `packs` of PACK_DATA: one file, chunk and pack for each."""
    digests = [PUBLIC_HASHER.hexdigest(PACK_DATA[pack]) for pack in packs]
    sizes = [len(PACK_DATA[pack]) for pack in packs]
    return encode_manifest(
        Manifest(
            version=FORMAT_VERSION,
            kind="model",
            key_domain=PUBLIC_DOMAIN,
            files=tuple(
                FileEntry(path=f"f{n}", size=size, mode=0o644, sha256="0" * 64, extents=(Extent(0, size, n, 0),))
                for n, size in enumerate(sizes)
            ),
            chunks=tuple(ChunkRef(d, s, n, 0, s) for n, (d, s) in enumerate(zip(digests, sizes, strict=True))),
            packs=tuple(PackRef(d, s) for d, s in zip(digests, sizes, strict=True)),
        )
    )


def packs_of(packs: tuple[int, ...]) -> list[str]:
    return [pack_key(PUBLIC_DOMAIN, PUBLIC_HASHER.hexdigest(PACK_DATA[pack])) for pack in packs]


class World:
    """The store, the clock, what control's state names, and the actors."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now_ns = START_NS
        self.store = MemoryOrigin()
        self.times: dict[str, int] = {}
        self.state: dict[str, str] = {}
        self.packs_of: dict[str, list[str]] = {}
        self.actors: list[Actor] = []
        self.told: list[str] = []
        self.is_changing = False

    def start(self, name: str, work: Callable[[ActorOrigin, ActorClock], None]) -> Actor:
        actor = Actor(self, name, work)
        self.actors.append(actor)
        return actor

    def run(self, *, kills: float = 0.0, slow: bool = True) -> None:
        """Until every actor has ended, `check`ing after every step. Without `slow` calls take no time."""
        while living := [actor for actor in self.actors if not actor.ended]:
            ready = [actor for actor in living if actor.wakes_ns <= self.now_ns]
            if not ready:
                self.now_ns = min(actor.wakes_ns for actor in living)
                continue
            actor = self.rng.choice(ready)
            if self.rng.random() < kills:
                actor.killed = True
            actor.step()
            self.check()
            if slow:
                self._pass_time()
        self.actors.clear()

    def _pass_time(self) -> None:
        wanted = self.rng.choice((0, 0, 0, 1, 10, 60, 100)) * SECOND_NS
        waiting = [max(a.wakes_ns, a.since_ns) for a in self.actors if not a.ended]
        allowed = min([since + PAUSE_S_MAX * SECOND_NS for since in waiting], default=self.now_ns) - self.now_ns
        self.now_ns += max(0, min(wanted, allowed))

    def live(self) -> set[str]:
        """Keys of the manifests that are named: by a ref at the origin, or by control's state."""
        named = set(self.state.values())
        for key, data in self.store.objects.items():
            if "/refs/" in key:
                ref = decode_ref(data, where=key)
                named.add(manifest_key(ref.key_domain, ref.manifest))
        return named

    def check(self) -> None:
        """Nothing that is named has lost anything."""
        for manifest in self.live():
            assert manifest in self.store.objects, f"live {manifest} is gone"
            for pack in self.packs_of[manifest]:
                assert pack in self.store.objects, f"{pack} of live {manifest} is gone"

    def content(self) -> set[str]:
        return {key for key in self.store.objects if "/packs/" in key or "/manifests/" in key}


class Actor:
    """One process of the world."""

    def __init__(self, world: World, name: str, work: Callable[[ActorOrigin, ActorClock], None]) -> None:
        self.world = world
        self.name = name
        self.ended = False
        self.killed = False
        self.wakes_ns = self.since_ns = world.now_ns
        self.error: BaseException | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def step(self) -> None:
        self._go.release()
        self._back.acquire()
        if self.ended:
            self._thread.join()
            if self.error is not None:
                raise self.error

    def pause(self, duration_s: float = 0.0) -> None:
        """Gives the baton back; called by the actor before every effect."""
        if self.killed:
            raise Killed
        self.since_ns = self.world.now_ns
        self.wakes_ns = self.world.now_ns + int(duration_s * SECOND_NS)
        self._back.release()
        self._go.acquire()
        if self.killed:
            raise Killed

    def _run(self, work: Callable[[ActorOrigin, ActorClock], None]) -> None:
        self._go.acquire()
        try:
            work(ActorOrigin(self), ActorClock(self))
        except Killed:
            pass
        except SnowdropError as error:
            # An error that is told is a right outcome: the invariant says whether harm was done.
            self.world.told.append(f"{self.name}: {error}")
        except BaseException as error:  # noqa: BLE001 -- `step` raises it again in the test's own thread
            self.error = error
        self.ended = True
        self._back.release()


class ActorClock(Clock):
    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def now_unix_ns(self) -> int:
        return self._actor.world.now_ns

    def sleep(self, duration_s: float) -> None:
        self._actor.pause(duration_s)


class ActorOrigin:
    """The store as one actor has it: others may act before each of its calls takes effect."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._world = actor.world

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._actor.pause()
        self._world.store.put(key, data)
        self._world.times[key] = self._world.now_ns

    def exists(self, key: str) -> bool:
        self._actor.pause()
        return self._world.store.exists(key)

    def size(self, key: str) -> int:
        self._actor.pause()
        return self._world.store.size(key)

    def read_start(self, key: str, into: memoryview) -> int:
        self._actor.pause()
        return self._world.store.read_start(key, into)

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        # In one step with `size`: a record that is replaced in between is read whole or not at all, as files are.
        self._world.store.read_range(key, offset, into)

    def list(self, prefix: str) -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[ObjectInfo]:
        """In two halves, so that what changes in between may or may not be seen."""
        self._actor.pause()
        keys = sorted(key for key in self._world.store.objects if key.startswith(prefix))
        for half in (keys[: len(keys) // 2], keys[len(keys) // 2 :]):
            for key in half:
                data = self._world.store.objects.get(key)
                if data is not None:
                    yield ObjectInfo(key, len(data), self._world.times[key])
            self._actor.pause()

    def delete(self, key: str) -> None:
        self._actor.pause()
        self._world.store.delete(key)

    def sweep(self, before_unix_ns: int, *, dry_run: bool = False) -> tuple[int, int]:
        return (0, 0)

    def close(self) -> None:
        return


def pushes(world: World, name: str, packs: tuple[int, ...], *, by_state: bool) -> Callable[..., None]:
    """A push as production does it: lease, packs, manifest, then the name, at the origin or in control's state."""
    encoded = manifest_of(packs)
    digest = manifest_digest(encoded)
    key = manifest_key(PUBLIC_DOMAIN, digest)
    world.packs_of[key] = packs_of(packs)

    def work(origin: ActorOrigin, clock: ActorClock) -> None:
        with push_lease(origin, purpose=name, clock=clock) as lease:
            for pack, data in zip(packs_of(packs), (PACK_DATA[pack] for pack in packs), strict=True):
                if not lease.origin.exists(pack):
                    lease.origin.put(pack, data)
                if world.rng.random() < 0.3:
                    lease.renew()
            if not lease.origin.exists(key):
                lease.origin.put(key, encoded)
            lease.check()
            check_lease(origin, lease.id, now_unix_ns=clock.now_unix_ns())
            if by_state:
                _name_in_state(world, origin, clock, name, key)
            else:
                origin.put(ref_key(PUBLIC_DOMAIN, DEFAULT_TENANT, name), _ref(name, digest))

    return work


def _ref(name: str, digest: Digest) -> bytes:
    artefact = ArtefactRef(manifest=digest, kind="model", total_bytes=1, file_count=1)
    return make_ref(artefact, tenant=DEFAULT_TENANT, name=name, generation=1, created_unix_ns=1, signer=SIGNER)


@contextmanager
def changing(world: World, clock: ActorClock) -> Iterator[None]:
    """Control's lock: from looking at what is named until it is named."""
    while world.is_changing:
        clock.sleep(1)
    world.is_changing = True
    try:
        yield
    finally:
        world.is_changing = False


def _name_in_state(world: World, origin: ActorOrigin, clock: ActorClock, name: str, key: str) -> None:
    """As control does: known at the origin first, then in the state."""
    with changing(world, clock):
        _say_roots(origin, [*world.state.values(), key])
        world.state[name] = key


def _say_roots(origin: ActorOrigin, keys: list[str]) -> list[Root]:
    roots = [Root(PUBLIC_DOMAIN, Digest("blake3:" + key[-64:])) for key in keys]
    write_record(origin, ROOTS + "p", PlatformRoots(platform="p", seen_unix_ns=1, roots=tuple(roots)))
    return roots


def removes(world: World, name: str) -> Callable[..., None]:
    def work(origin: ActorOrigin, clock: ActorClock) -> None:
        with changing(world, clock):
            origin.delete(ref_key(PUBLIC_DOMAIN, DEFAULT_TENANT, name))
            world.state.pop(name, None)

    return work


def collects(world: World, grace_s: float) -> Callable[..., None]:
    def work(origin: ActorOrigin, clock: ActorClock) -> None:
        observer = Observer(
            origin, lambda: _own_roots(world, origin, clock), keyring=lambda: PUBLIC_KEYRING, readers=1
        )
        with suppress(NotFoundError):
            Collector(origin, observer, grace_s=grace_s, clock=clock, deleters=1).run()

    return work


def _own_roots(world: World, origin: ActorOrigin, clock: ActorClock) -> list[Root]:
    with changing(world, clock):
        return _say_roots(origin, list(world.state.values()))
