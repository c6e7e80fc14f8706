"""`snowdrop dev`: serves without the platform, restarts on change, survives errors."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError
from snowdrop.sdk.dev import run_dev

pytestmark = pytest.mark.slow

ANSWER_S_MAX = 30.0
SERVICE = """
import snowdrop as sd

@sd.service(model=sd.Model("tiny"))
class Echo:
    @sd.startup
    def load(self, model: object) -> None:
        self.name = model.name

    @sd.endpoint("/echo")
    def echo(self, text: str) -> str:
        return f"{self.name}: {text}, VERSION"
"""
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started from has set
from pathlib import Path
from snowdrop.sdk.dev import run_dev
run_dev(Path(sys.argv[1]), None, "127.0.0.1", int(sys.argv[2]), {"tiny": Path(sys.argv[3])}, True)
"""


@contextmanager
def developing(file: Path, model: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", PROGRAM, str(file), str(port), str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=ANSWER_S_MAX)
            print(output)


def call(url: str) -> tuple[int, object]:
    data = json.dumps({"text": "hi"}).encode()
    request = urllib.request.Request(f"{url}/echo", data=data, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S_MAX) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def call_until(url: str, wanted: tuple[int, object]) -> tuple[int, object]:
    """Calls until the answer is as wanted; the last answer if it never is."""
    deadline = time.monotonic() + ANSWER_S_MAX
    found: tuple[int, object] = (0, None)
    while found != wanted and time.monotonic() < deadline:
        try:
            status, body = call(url)
        except (OSError, ValueError):
            time.sleep(0.05)
            continue
        if isinstance(body, dict):
            body = body["error"]["message"]
        found = (status, body)
    return found


def test_a_change_is_served_at_the_same_address_and_an_error_is_survived(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    folder = tmp_path / "code"
    folder.mkdir()
    file = folder / "service.py"
    file.write_text(SERVICE.replace("VERSION", "one"))
    with developing(file, model) as url:
        assert call_until(url, (200, "tiny: hi, one")) == (200, "tiny: hi, one")
        file.write_text("raise ValueError('half a thought')\n")
        broken = (500, "ValueError: half a thought")
        assert call_until(url, broken) == broken
        file.write_text(SERVICE.replace("VERSION", "two"))
        assert call_until(url, (200, "tiny: hi, two")) == (200, "tiny: hi, two")


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    file = tmp_path / "service.py"
    file.write_text(SERVICE)
    with pytest.raises(NotFoundError, match=r"absent\.py"):
        run_dev(tmp_path / "absent.py", None, "127.0.0.1", 0, {}, False)
    with pytest.raises(InvalidInputError, match="nowhere"):
        run_dev(file, None, "127.0.0.1", 0, {"tiny": tmp_path / "nowhere"}, False)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConflictError, match="in use"):
        run_dev(file, None, "127.0.0.1", taken.getsockname()[1], {}, False)


@pytest.mark.parametrize("kind", ["asgi", "command"])
def test_an_app_and_a_command_are_served_and_restarted_too(tmp_path: Path, kind: str) -> None:
    file, model = tmp_path / "served.py", tmp_path / "tiny"
    model.mkdir()
    server = (
        "import http.server, json, sys\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        "    def do_POST(self):\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(VERSION).encode())\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    app = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    assert "model" in scope["state"]["models"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"VERSION"})
"""
    lines = {
        "asgi": f'{app}\nsite = sd.asgi(app, model=sd.Model("tiny"))\n',
        "command": f'site = sd.command(["{{python}}", "-c", {server!r}, "{{port}}"], model=sd.Model("tiny"))\n',
    }
    text = "import snowdrop as sd\n" + lines[kind]
    file.write_text(text.replace("VERSION", "1"))
    with developing(file, model) as url:
        assert call_until(url, (200, 1)) == (200, 1)
        file.write_text(text.replace("VERSION", "2"))
        assert call_until(url, (200, 2)) == (200, 2)
