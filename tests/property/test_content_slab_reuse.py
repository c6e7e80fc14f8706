"""No mapping ever shows another artefact's bytes, whatever is ensured, released, evicted and cut off in between.

The real store with real memfds, and readers' real mappings of them; slabs are small so that they are reused often.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

from anyio.from_thread import start_blocking_portal
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from content_helpers import push, safetensors_bytes, settings_for
from snowdrop.content.mapping import map_slabs
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.progress import ProgressReader
from snowdrop.content.store import Landed, open_store
from snowdrop.domain.errors import StorageFullError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest

MODELS = 5
HOLDERS = 4
TENSOR_BYTES = 5 << 18
WAIT_S_MAX = 20.0


class HeldOrigin(MemoryOrigin):
    """Reads of packs wait while `open` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        if "/packs/" in key:
            assert self.open.wait(WAIT_S_MAX)
        super().read_range(key, offset, into)


class Library:
    """Models whose every tensor byte is the model's own number; pushed once for all examples."""

    def __init__(self) -> None:
        self.origin = HeldOrigin()
        self.digests: list[Digest] = []
        self.files: list[bytes] = []
        root = Path(tempfile.mkdtemp(prefix="slab-reuse-"))
        try:
            for number in range(1, MODELS + 1):
                folder = root / str(number)
                folder.mkdir()
                body = bytes([number])
                tensors = {
                    f"t{index}": ("U8", [TENSOR_BYTES + index], body * (TENSOR_BYTES + index))
                    for index in range(3)
                }
                self.files.append(safetensors_bytes(tensors))
                (folder / "model.safetensors").write_bytes(self.files[-1])
                self.digests.append(push(folder, self.origin).artefact.manifest)
        finally:
            shutil.rmtree(root)


_library: list[Library] = []


def library() -> Library:
    if not _library:
        _library.append(Library())
    return _library[0]


class Reader:
    """What a replica has of an area: a private mapping made before the bytes were there."""

    def __init__(self, model: int, landed: Landed) -> None:
        assert landed.area is not None
        assert landed.wake is not None
        self.model = model
        slabs = landed.area.slabs
        self.view = map_slabs([slab.fd for slab in slabs], [slab.size for slab in slabs])
        self.progress = ProgressReader(landed.area.progress.fileno(), landed.wake)

    def check(self) -> None:
        file = library().files[self.model]
        is_whole = self.progress.is_filled(0, len(file))
        seen = bytes(self.view[: len(file)])
        if is_whole:
            assert seen == file
        header = bytes(range(32, 127))
        body = seen[len(file) - 3 * TENSOR_BYTES - 3 :]
        assert not body.translate(None, bytes([0, self.model + 1])), "bytes of another artefact"
        assert not seen[8 : len(file) - len(body)].translate(None, header + b"\0"), "no header"
        assert not any(self.view[len(file) :]), "bytes behind the file"

    def close(self) -> None:
        self.progress.close()
        self.view.release()


class SlabReuse(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.readers: dict[int, list[Reader]] = {}
        self.stack = ExitStack()
        self.origin = library().origin
        self.origin.open.set()
        self.folder = tempfile.mkdtemp(prefix="slab-reuse-")
        self.stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.portal = self.stack.enter_context(start_blocking_portal())
        # Two slabs a model: three models fit, of five.
        limits = settings_for(Path(self.folder), ram_bytes_max=13 << 20, pool_bytes=4 << 20)
        opened = open_store(limits, origin=self.origin)
        self.store = self.stack.enter_context(self.portal.wrap_async_context_manager(opened))

    @rule(model=st.integers(0, MODELS - 1), holder=st.integers(0, HOLDERS - 1), lazy=st.booleans())
    def ensure(self, model: int, holder: int, lazy: bool) -> None:
        async def ensure() -> Landed:
            digest = library().digests[model]
            return await self.store.ensure(DEFAULT_TENANT, digest, str(holder), map_tensors=True, lazy=lazy)

        try:
            landed = self.portal.call(ensure)
        except StorageFullError:
            return
        self.readers.setdefault(holder, []).append(Reader(model, landed))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def end_holder(self, data: st.DataObject) -> None:
        """A replica ends or is killed: its mappings are gone, then its content is released."""
        holder = data.draw(st.sampled_from(sorted(self.readers)))
        for reader in self.readers.pop(holder):
            reader.close()
        self.portal.call(self.store.release, str(holder))

    @precondition(lambda self: self.readers and self.origin.open.is_set())
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """Somebody waits for a stretch of what he has."""
        reader = data.draw(st.sampled_from([r for readers in self.readers.values() for r in readers]))
        offset = data.draw(st.integers(0, 3 * TENSOR_BYTES - 100))
        reader.progress.wait(offset, 100, WAIT_S_MAX)

    @rule()
    def hold_reads(self) -> None:
        self.origin.open.clear()

    @rule()
    def let_reads(self) -> None:
        self.origin.open.set()

    @invariant()
    def every_mapping_shows_its_own_bytes(self) -> None:
        for readers in getattr(self, "readers", {}).values():
            for reader in readers:
                reader.check()

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        self.origin.open.set()
        for readers in self.readers.values():
            for reader in readers:
                reader.close()
        self.stack.close()


SlabReuse.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestSlabReuse = SlabReuse.TestCase
