"""What a program sees in a mounted tree, through the kernel."""

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio.from_thread
import pytest

from content_helpers import noise
from fuse_helpers import DictSource, drop_cached, manifest_of, mounted, needs_fuse, serving
from snowdrop.content.fuse.mount import mounted_trees, unmount_tree
from snowdrop.domain.errors import IntegrityError

pytestmark = needs_fuse

WAIT_S_MAX = 20.0
FILES = {
    "config.json": b'{"a": 1}',
    "empty": b"",
    "weights/part one.bin": noise(3_000_001, 1),
    "weights/deep/er/vocab.txt": noise(70_000, 2),
    "имя-名前.txt": "ünïcödé".encode(),
}


def eventually(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < end_s, "it did not come about in time"
        time.sleep(0.01)


def error_of(action: Callable[[], object]) -> int | None:
    try:
        action()
    except OSError as error:
        return error.errno
    return None


def test_every_file_is_there_and_reads_as_it_should(tmp_path: Path) -> None:
    source = DictSource(FILES)
    with serving(tmp_path / "m", FILES, source):
        found = {
            str(path.relative_to(tmp_path / "m")): path.read_bytes()
            for path in (tmp_path / "m").rglob("*")
            if path.is_file()
        }
        assert found == FILES
        assert source.brought
        asked = source.reads
        assert (tmp_path / "m/config.json").read_bytes() == FILES["config.json"]
        assert source.reads == asked, "a second read comes from the page cache"
        usage = os.statvfs(tmp_path / "m")
        assert usage.f_bfree == 0
        assert usage.f_namemax == 255
        assert sorted(os.listdir(tmp_path / "m/weights")) == ["deep", "part one.bin"]
        assert (tmp_path / "m/weights").stat().st_nlink == 3
        assert stat.S_IMODE((tmp_path / "m/config.json").stat().st_mode) == 0o444


def test_errors_are_those_of_a_read_only_file_system(tmp_path: Path) -> None:
    with serving(tmp_path / "m", FILES, DictSource(FILES)):
        file = tmp_path / "m/config.json"
        assert error_of(lambda: os.open(file, os.O_WRONLY)) == errno.EROFS
        assert error_of((tmp_path / "m/new").touch) == errno.EROFS
        assert error_of(file.unlink) == errno.EROFS
        assert error_of((tmp_path / "m/weights").rmdir) == errno.EROFS
        assert error_of(lambda: os.rename(file, tmp_path / "m/other")) == errno.EROFS
        assert error_of(lambda: os.chmod(file, 0o777)) == errno.EROFS
        assert error_of(lambda: os.symlink("a", tmp_path / "m/link")) == errno.EROFS
        assert error_of(lambda: os.setxattr(file, "user.a", b"b")) == errno.EROFS
        assert error_of(lambda: os.open(tmp_path / "m/nothing", os.O_RDONLY)) == errno.ENOENT
        assert error_of(lambda: os.open(file / "below", os.O_RDONLY)) == errno.ENOTDIR
        assert error_of(lambda: os.getxattr(file, "user.a")) == errno.ENODATA
        assert error_of(lambda: os.readlink(file)) == errno.EINVAL
        assert os.listxattr(file) == []
        assert not os.access(file, os.W_OK)


def test_a_read_that_fails_fails_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = DictSource(FILES)
    broken = True

    def fail(file: int, _offset: int, _length: int) -> None:
        if broken and source.contents[file] == FILES["config.json"]:
            raise IntegrityError("wrong bytes everywhere", where="chunk 0")

    source.before = fail
    with serving(tmp_path / "m", FILES, source):
        assert error_of((tmp_path / "m/config.json").read_bytes) == errno.EIO
        assert "wrong bytes everywhere" in caplog.text
        assert (tmp_path / "m/weights/deep/er/vocab.txt").read_bytes() == FILES["weights/deep/er/vocab.txt"]
        broken = False
        assert (tmp_path / "m/config.json").read_bytes() == FILES["config.json"]


def test_a_fault_in_the_source_is_an_error_too_and_not_a_hang(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = DictSource(FILES)

    def fail(_file: int, _offset: int, _length: int) -> None:
        raise ZeroDivisionError

    source.before = fail
    with serving(tmp_path / "m", FILES, source):
        assert error_of((tmp_path / "m/config.json").read_bytes) == errno.EIO
        assert "ZeroDivisionError" in caplog.text


def test_a_read_that_takes_too_long_ends_with_an_error(tmp_path: Path) -> None:
    source = DictSource(FILES)
    source.hold = True
    with serving(tmp_path / "m", FILES, source, read_s_max=0.05) as portal:
        assert error_of((tmp_path / "m/config.json").read_bytes) == errno.EIO
        portal.call(source.let_go)
        assert (tmp_path / "m/config.json").read_bytes() == FILES["config.json"]


def test_bytes_that_are_dropped_again_and_again_end_with_an_error(tmp_path: Path) -> None:
    source = DictSource(FILES)
    source.read = lambda _file, _offset, _into: False  # type: ignore[method-assign]
    with serving(tmp_path / "m", FILES, source):
        assert error_of((tmp_path / "m/config.json").read_bytes) == errno.EIO


def test_bytes_that_the_disk_has_no_room_for_come_from_memory(tmp_path: Path) -> None:
    source = DictSource(FILES)
    source.by_memory = True
    with serving(tmp_path / "m", FILES, source):
        assert (tmp_path / "m/weights/part one.bin").read_bytes() == FILES["weights/part one.bin"]
        assert not source.here


def test_names_are_answered_while_many_reads_wait(tmp_path: Path) -> None:
    files = {f"{n}.bin": noise(5_000, n) for n in range(40)}
    source = DictSource(files)
    source.hold = True
    with ThreadPoolExecutor(len(files)) as readers, serving(tmp_path / "m", files, source) as portal:
        waiting = [readers.submit((tmp_path / "m" / name).read_bytes) for name in files]
        eventually(lambda: len(source.brought) == len(files))
        assert sorted(os.listdir(tmp_path / "m")) == sorted(files)
        assert (tmp_path / "m/7.bin").stat().st_size == 5_000
        assert not any(reader.done() for reader in waiting)
        portal.call(source.let_go)
        assert [reader.result(WAIT_S_MAX) for reader in waiting] == list(files.values())


def test_a_killed_reader_ends_at_once(tmp_path: Path) -> None:
    source = DictSource(FILES)
    source.hold = True
    # Past the page cache the reader waits for its own request, and the kernel for our answer.
    command = [
        "dd",
        "iflag=direct",
        "bs=4096",
        "count=1",
        "of=/dev/null",
        f"if={tmp_path / 'm/weights/part one.bin'}",
    ]
    with serving(tmp_path / "m", FILES, source):
        reader = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        eventually(lambda: bool(source.brought))
        reader.kill()
        assert reader.wait(WAIT_S_MAX) == -signal.SIGKILL


_ALARMED = """
import ctypes, mmap, os, signal, sys
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, True)
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
memory = mmap.mmap(-1, 8192)
libc = ctypes.CDLL(None, use_errno=True)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
count = libc.pread(fd, address, 8192, ctypes.c_long(4096))
signal.setitimer(signal.ITIMER_REAL, 0)
sys.exit(f"pread gave {count}, errno {ctypes.get_errno()}" if count != 8192 else 0)
"""


def test_other_signals_do_not_break_a_read(tmp_path: Path) -> None:
    source = DictSource(FILES)
    source.hold = True
    command = [sys.executable, "-c", _ALARMED, str(tmp_path / "m/weights/part one.bin")]
    with serving(tmp_path / "m", FILES, source) as portal, subprocess.Popen(command) as reader:
        eventually(lambda: bool(source.brought))
        time.sleep(0.5)  # many alarms, and more than one look at whether the reader is being killed
        assert reader.poll() is None
        portal.call(source.let_go)
        assert reader.wait(WAIT_S_MAX) == 0


_MAPPED = """
import mmap, random, sys
rng = random.Random(1)
expected = open(sys.argv[2], "rb").read()
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    for _ in range(200):
        at, length = rng.randrange(len(expected)), rng.choice([1, 100, 5_000, 300_000])
        if mapped[at : at + length] != expected[at : at + length]:
            sys.exit(f"{length} bytes at {at} are wrong")
    if mapped[:] != expected:
        sys.exit("the whole is wrong")
"""


def assert_maps_right(path: Path, expected: Path) -> None:
    """In another process: a page fault holds the interpreter, and the server of the mount runs in this one."""
    subprocess.run([sys.executable, "-c", _MAPPED, str(path), str(expected)], check=True, timeout=WAIT_S_MAX)


def test_mapped_bytes_at_random_places_are_the_right_ones(tmp_path: Path) -> None:
    files = {"model.gguf": noise(9_000_123, 5)}
    (tmp_path / "expected").write_bytes(files["model.gguf"])
    with serving(tmp_path / "m", files, DictSource(files)):
        assert_maps_right(tmp_path / "m/model.gguf", tmp_path / "expected")


_SCANNED = """
import os, sys
with os.scandir(sys.argv[1]) as entries:
    found = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
sys.exit(found != {f"{n:05}": len(str(n)) for n in range(10_000)})
"""


def test_a_directory_of_ten_thousand_files(tmp_path: Path) -> None:
    files = {f"d/{n:05}": str(n).encode() for n in range(10_000)}
    with serving(tmp_path / "m", files, DictSource(files)):
        assert sorted(os.listdir(tmp_path / "m/d")) == [f"{n:05}" for n in range(10_000)]
        command = [sys.executable, "-c", _SCANNED, str(tmp_path / "m/d")]
        subprocess.run(command, check=True, timeout=WAIT_S_MAX)
        assert (tmp_path / "m/d/04321").read_bytes() == b"4321"


def test_many_readers_at_once_all_get_the_right_bytes(tmp_path: Path) -> None:
    files = {f"{n}.bin": noise(2_000_000 + n, n) for n in range(6)}
    source = DictSource(files, block_bytes=256 << 10)

    def read_piecewise(name: str, seed: int) -> bool:
        rng = random.Random(seed)
        content = files[name]
        with (tmp_path / "m" / name).open("rb", buffering=0) as file:
            for _ in range(40):
                at = rng.randrange(len(content))
                length = rng.randrange(1, 400_000)
                if os.pread(file.fileno(), length, at) != content[at : at + length]:
                    return False
        return True

    with ThreadPoolExecutor(8) as readers, serving(tmp_path / "m", files, source, passthrough=False):
        results = [readers.submit(read_piecewise, f"{n % 6}.bin", n) for n in range(24)]
        assert all(result.result(60) for result in results)


# --- passthrough --------------------------------------------------------------------------------------------


def landed(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "landed.bin"
    path.write_bytes(content)
    return path


def test_a_complete_file_is_read_by_the_kernel_itself(tmp_path: Path) -> None:
    files = {"model.bin": noise(3_000_000, 8)}
    source = DictSource(files, is_here=True)
    source.landing[0] = landed(tmp_path, files["model.bin"])
    path = tmp_path / "m/model.bin"
    with serving(tmp_path / "m", files, source):
        assert path.read_bytes() == files["model.bin"]
        drop_cached(source.landing[0])
        assert path.read_bytes() == files["model.bin"]
        assert_maps_right(path, source.landing[0])
        assert source.reads == 0, "no read reached the server"


def test_a_file_turns_to_passthrough_when_no_cached_handle_is_left(tmp_path: Path) -> None:
    files = {"model.bin": noise(3_000_000, 8)}
    source = DictSource(files)
    path = tmp_path / "m/model.bin"
    with serving(tmp_path / "m", files, source):
        with path.open("rb", buffering=0) as early:
            assert early.read(1000) == files["model.bin"][:1000]
            source.landing[0] = landed(tmp_path, files["model.bin"])
            # The kernel would refuse a second way beside the open handle: the later open goes the old way.
            with path.open("rb", buffering=0) as late:
                assert late.read() == files["model.bin"]
            assert os.pread(early.fileno(), 1000, 2_000_000) == files["model.bin"][2_000_000:2_001_000]
        drop_cached(path)

        def is_read_by_the_kernel() -> bool:  # the last close reaches the server a moment after it returned
            asked = source.reads
            drop_cached(path)
            assert path.read_bytes() == files["model.bin"]
            return source.reads == asked

        eventually(is_read_by_the_kernel)


def test_a_landing_file_that_the_kernel_refuses_is_read_by_the_server(tmp_path: Path) -> None:
    files = {"model.bin": noise(300_000, 8)}
    source = DictSource(files)
    source.landing[0] = Path("/proc/self/status")  # no regular file of a disk: the ioctl says no
    with serving(tmp_path / "m", files, source):
        assert (tmp_path / "m/model.bin").read_bytes() == files["model.bin"]


# --- servers that come and go -------------------------------------------------------------------------------


def test_the_next_server_answers_what_the_last_one_had_read(tmp_path: Path) -> None:
    manifest = manifest_of(FILES)
    stuck, second = DictSource(FILES), DictSource(FILES)
    stuck.hold = True
    with (
        ThreadPoolExecutor(4) as readers,  # outermost: readers that wait end with the mount
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mounted(tmp_path / "m", manifest)) as mount,
    ):
        with portal.wrap_async_context_manager(mount.served(stuck)):
            paths = list(FILES)[2:4]
            waiting = [readers.submit((tmp_path / "m" / path).read_bytes) for path in paths]
            eventually(lambda: len({file for file, _, _ in stuck.brought}) == 2)
        # Nobody serves now: a new reader waits as well.
        late = readers.submit((tmp_path / "m/config.json").read_bytes)
        with portal.wrap_async_context_manager(mount.served(second)):
            assert [reader.result(WAIT_S_MAX) for reader in waiting] == [FILES[path] for path in paths]
            assert late.result(WAIT_S_MAX) == FILES["config.json"]


_SERVER = """
import json, sys
from pathlib import Path
import anyio
sys.path.insert(0, sys.argv[4])
from fuse_helpers import DictSource, Mounted, manifest_of
files = {name: bytes.fromhex(data) for name, data in json.loads(Path(sys.argv[3]).read_text()).items()}
async def main():
    source = DictSource(files)
    source.hold = True
    source.before = lambda *_: print("asked", flush=True)
    mount = Mounted(Path("/nowhere"), int(sys.argv[1]), int(sys.argv[2]), manifest_of(files))
    async with mount.served(source):
        await anyio.sleep_forever()
anyio.run(main)
"""


def test_a_server_killed_in_the_middle_of_a_read_is_taken_over(tmp_path: Path) -> None:
    described = tmp_path / "files.json"
    described.write_text(json.dumps({name: data.hex() for name, data in FILES.items()}))
    with (
        ThreadPoolExecutor(2) as readers,
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mounted(tmp_path / "m", manifest_of(FILES))) as mount,
    ):
        fds = (mount.device_fd, mount.journal_fd)
        helpers = str(Path(__file__).parent.parent)
        command = [sys.executable, "-c", _SERVER, *map(str, fds), str(described), helpers]
        with subprocess.Popen(command, pass_fds=fds, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            waiting = readers.submit((tmp_path / "m/weights/part one.bin").read_bytes)
            assert server.stdout.readline() == b"asked\n"
            server.kill()
        assert not waiting.done()
        with portal.wrap_async_context_manager(mount.served(DictSource(FILES))):
            assert waiting.result(WAIT_S_MAX) == FILES["weights/part one.bin"]
            assert (tmp_path / "m/config.json").read_bytes() == FILES["config.json"]


def test_handles_stay_counted_over_a_change_of_servers(tmp_path: Path) -> None:
    """A passthrough open that the kernel would refuse beside a cached one must not follow a takeover."""
    files = {"model.bin": noise(300_000, 8)}
    path = tmp_path / "m/model.bin"
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mounted(tmp_path / "m", manifest_of(files))) as mount,
    ):
        with portal.wrap_async_context_manager(mount.served(DictSource(files))):
            early = path.open("rb", buffering=0)
            early.read(10)
        source = DictSource(files)
        source.landing[0] = landed(tmp_path, files["model.bin"])
        with early, portal.wrap_async_context_manager(mount.served(source)):
            assert path.read_bytes() == files["model.bin"]
            assert os.pread(early.fileno(), 10, 200_000) == files["model.bin"][200_000:200_010]


def test_a_dead_mount_is_found_removed_and_made_again(tmp_path: Path) -> None:
    manifest = manifest_of(FILES)
    at = tmp_path / "with blank"
    with anyio.from_thread.start_blocking_portal() as portal:
        with portal.wrap_async_context_manager(mounted(at, manifest)) as mount:
            os.close(os.dup(mount.device_fd))
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, mount.device_fd)  # the last copy of the device is closed, as when its holder dies
            os.close(null)
            assert error_of(lambda: os.listdir(at)) == errno.ENOTCONN
            assert [tree.path for tree in mounted_trees(tmp_path)] == [at]
            unmount_tree(at)
            assert mounted_trees(tmp_path) == []
            unmount_tree(at)
        with serving(at, FILES, DictSource(FILES)):
            assert (at / "config.json").read_bytes() == FILES["config.json"]


def test_unmounting_under_open_files_leaves_them_readable(tmp_path: Path) -> None:
    path = tmp_path / "m/weights/part one.bin"
    with serving(tmp_path / "m", FILES, DictSource(FILES)), path.open("rb", buffering=0) as file:
        unmount_tree(tmp_path / "m")
        assert os.listdir(tmp_path / "m") == []
        assert file.read() == FILES["weights/part one.bin"]


def test_the_session_ends_when_the_mount_is_gone(tmp_path: Path) -> None:
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(mounted(tmp_path / "m", manifest_of(FILES))) as mount,
    ):
        session, journal = mount.session(DictSource(FILES))
        running = portal.start_task_soon(session.run)
        assert (tmp_path / "m/config.json").read_bytes() == FILES["config.json"]
        unmount_tree(tmp_path / "m")
        running.result(WAIT_S_MAX)
        journal.close()


# --- without root -------------------------------------------------------------------------------------------

_AS_USER = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fuse_helpers import DictSource, serving
from snowdrop.content.fuse.mount import may_mount, mounted_trees, unmount_tree
at = Path(sys.argv[1])
files = {"a.txt": b"hello", "d/model.bin": bytes(range(256)) * 4000}
assert os.geteuid() != 0 and may_mount() == "fusermount3"
with serving(at, files, DictSource(files), passthrough=False):
    assert (at / "d/model.bin").read_bytes() == files["d/model.bin"]
    assert (at / "a.txt").read_bytes() == b"hello"
    assert [tree.path for tree in mounted_trees(at)] == [at]
assert mounted_trees(at) == []
print("read as", os.geteuid())
"""

_AS_NOBODY = """
mount --make-rprivate / && mknod -m 666 "$1/fuse" c 10 229 && mount --bind "$1/fuse" /dev/fuse && shift || exit 77
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""


@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="needs fusermount3 of Debian's fuse3")
def test_without_root_the_helper_mounts() -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder, "mount")
        at.mkdir()
        Path(folder).chmod(0o755)
        os.chown(at, 65534, 65534)
        program = [sys.executable, "-c", _AS_USER, str(at), str(Path(__file__).parent.parent)]
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", _AS_NOBODY, "sh", folder, *program],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        if done.returncode == 77:
            pytest.skip("no mount namespace of its own here")
        assert done.stdout == "read as 65534\n", done.stderr
