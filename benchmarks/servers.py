"""The byte servers of the weights benchmarks: nginx as HTTP origin, as S3 for reading, and as a hub; S3 stand-ins.

nginx serves one folder, from the page cache, with sendfile. Requests may be signed: it does not look at that. As a
hub it answers what huggingface_hub asks for one repository (REPOSITORY), whose files are the folder `files`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import msgspec

from benchmarks import harness

START_S_MAX = 15.0
STOP_S_MAX = 10.0
REPOSITORY = "bench/model"
COMMIT = "5d0" + "0" * 37
BUCKET = "bucket"
SLOW_BYTES_PER_S = 256 << 10
"""What a range gets that the server is slow with."""
S3_STANDINS = {"localbucket": "localbucket==1.2.*", "nanio": "nanio==0.1.*"}
ACCESS_KEY, SECRET_KEY = "bench-access", "bench-secret-key"

_CONFIG = """
daemon off;
worker_processes {workers};
pid {state}/nginx.pid;
error_log {state}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    tcp_nodelay on;
    keepalive_requests 1000000;
    client_body_temp_path {state};
    proxy_temp_path {state};
    fastcgi_temp_path {state};
    uwsgi_temp_path {state};
    scgi_temp_path {state};
    default_type application/octet-stream;
    map $request_id $slow_rate {{
        default 0;
        {slow}
    }}
    server {{
        listen {address}:{port} backlog=512;
        root {root};
        location / {{ }}
        location /slow/ {{
            alias {root}/;
            limit_rate $slow_rate;
        }}
        location /api/models/{repository} {{
            default_type application/json;
            rewrite /tree/ /hub-tree.json break;
            rewrite ^ /hub.json break;
        }}
        location ~ ^/{repository}/resolve/[^/]+/(.*)$ {{
            add_header X-Repo-Commit {commit};
            alias {root}/files/$1;
        }}
    }}
}}
"""


class ServerMissingError(Exception):
    """A byte server that this machine does not have."""


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """A server that answers at `address:port`; `url` is its root."""

    address: str
    port: int

    @property
    def url(self) -> str:
        """Without port 80: AWS's C runtime takes `address:80` for a name."""
        return f"http://{self.address}" if self.port == 80 else f"http://{self.address}:{self.port}"


@contextmanager
def nginx(
    root: Path,
    state: Path,
    *,
    address: str = "127.0.0.1",
    port: int,
    prefix: Sequence[str] = (),
    slow_of_256: int = 0,
    workers: int = 2,
) -> Iterator[Server]:
    """nginx over `root` while inside; its files are in `state`. With `slow_of_256`, so many of 256 requests under
    `/slow/` get SLOW_BYTES_PER_S. Raises ServerMissingError.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise ServerMissingError("no nginx: apt-get install nginx-light")
    state.mkdir(parents=True, exist_ok=True)
    slow = " ".join(f"~^{number:02x} {SLOW_BYTES_PER_S};" for number in range(slow_of_256))
    names = {"repository": REPOSITORY, "commit": COMMIT, "slow": slow, "workers": workers}
    config = state / "nginx.conf"
    config.write_text(_CONFIG.format(root=root, state=state, address=address, port=port, **names))
    # Its workers drop to another user, who must be able to read below a private scratch folder.
    own = ("-g", "user root;") if os.geteuid() == 0 else ()
    command = [*prefix, program, "-p", str(state), "-e", str(state / "error.log"), "-c", str(config), *own]
    with _running(command, prefix, Server(address=address, port=port)) as server:
        yield server


@contextmanager
def byteserver(root: Path, *, address: str, port: int, prefix: Sequence[str] = ()) -> Iterator[Server]:
    """`benchmarks.byteserver` over `root` while inside: slower than nginx, no hub, nothing is slow on purpose."""
    words = [sys.executable, "-m", "benchmarks.byteserver", str(root), address, str(port)]
    with _running([*prefix, *words], prefix, Server(address=address, port=port)) as server:
        yield server


@contextmanager
def s3_standin(
    name: str, root: Path, *, address: str = "127.0.0.1", port: int, prefix: Sequence[str] = ()
) -> Iterator[Server]:
    """One of S3_STANDINS over the folder of buckets `root`. Raises harness.PeerError if pip cannot install it."""
    bin_ = harness.peer_python(f"s3-{name}", [S3_STANDINS[name]]).parent
    env = dict(os.environ)
    if name == "localbucket":
        words = [str(bin_ / "localbucket"), "--host", address, "--port", str(port), str(root)]
    else:
        words = [str(bin_ / "nanio"), "serve", "--data-dir", str(root), "--host", address, "--port", str(port)]
        env |= {"NANIO_ACCESS_KEY": ACCESS_KEY, "NANIO_SECRET_KEY": SECRET_KEY}
    with _running([*prefix, *words], prefix, Server(address=address, port=port), env) as server:
        yield server


def write_hub_answer(root: Path) -> None:
    """What the hub's API says of the files in `root`/files."""
    files = sorted(path.name for path in (root / "files").iterdir())
    answer = {
        "id": REPOSITORY,
        "modelId": REPOSITORY,
        "sha": COMMIT,
        "private": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": name} for name in files],
    }
    (root / "hub.json").write_text(json.dumps(answer))
    sizes = {path.name: path.stat().st_size for path in sorted((root / "files").iterdir())}
    tree = [
        {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}
        for name, size in sizes.items()
    ]
    (root / "hub-tree.json").write_text(json.dumps(tree))


@contextmanager
def _running(
    command: Sequence[str], prefix: Sequence[str], server: Server, env: dict[str, str] | None = None
) -> Iterator[Server]:
    process = subprocess.Popen(
        list(command), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=harness.ROOT
    )
    try:
        _wait_until_up(process, prefix, server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(process: subprocess.Popen[bytes], prefix: Sequence[str], server: Server) -> None:
    limit_s = time.monotonic() + START_S_MAX
    while time.monotonic() < limit_s:
        answers = _answers(prefix, server)
        # Looked at after the answer, which may be that of a stranger who has the port.
        if process.poll() is not None:
            raise ServerMissingError(f"{process.args!r} ended with {process.returncode}")
        if answers:
            return
        time.sleep(0.05)
    raise ServerMissingError(f"{server.url} did not answer in {START_S_MAX:g} s")


def _answers(prefix: Sequence[str], server: Server) -> bool:
    if prefix:
        code = f"import socket; socket.create_connection(({server.address!r}, {server.port}), 1)"
        done = subprocess.run([*prefix, "python3", "-c", code], capture_output=True, check=False)
        return done.returncode == 0
    connection = HTTPConnection(server.address, server.port, timeout=1)
    try:
        connection.request("GET", "/")
        connection.getresponse()
    except OSError:
        return False
    else:
        return True
    finally:
        connection.close()


def own_address() -> str:
    """An address of the loopback network that no other benchmark uses."""
    pid = os.getpid()
    return f"127.77.{pid >> 8 & 255}.{pid & 255 or 1}"


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
