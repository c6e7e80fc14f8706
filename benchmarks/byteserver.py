"""A plain range server for machines without nginx: `python -m benchmarks.byteserver FOLDER ADDRESS PORT`.

One thread a connection, sendfile. It knows GET and HEAD of files with one range: what an origin is asked for.
"""

from __future__ import annotations

import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

RANGE = re.compile(r"bytes=(\d+)-(\d*)")
SLOW = "/slow/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder = Path()

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        # Nothing is slow here; the path only has to exist.
        path = self.path.partition("?")[0]
        name = unquote(path).removeprefix(SLOW).lstrip("/")
        try:
            if not (self.folder / name).is_file():
                raise FileNotFoundError(name)
            fd = os.open(self.folder / name, os.O_RDONLY)
        except OSError:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        try:
            status = os.fstat(fd)
            total = status.st_size
            wanted = RANGE.fullmatch(self.headers.get("Range", ""))
            begin = int(wanted[1]) if wanted else 0
            end = min(int(wanted[2]) + 1, total) if wanted and wanted[2] else total
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Last-Modified", self.date_time_string(int(status.st_mtime)))
            self.send_header("ETag", f'"{status.st_mtime_ns:x}-{total:x}"')
            if wanted:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
            self.end_headers()
            self.wfile.flush()
            while body and begin < end:
                begin += os.sendfile(self.connection.fileno(), fd, begin, end - begin)
        finally:
            os.close(fd)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        """Says nothing."""


def main() -> None:
    Handler.folder = Path(sys.argv[1])
    with ThreadingHTTPServer((sys.argv[2], int(sys.argv[3])), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
