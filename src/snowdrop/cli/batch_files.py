"""The files of a batch: lines that come in, the journal of what is done, the result.

The journal `OUT.part` gets one line for each that is done, in the order in which they end, and is all that a
killed batch needs to go on. OUT itself appears at the end, whole, by one rename.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from snowdrop.domain.errors import ConflictError, InvalidInputError

IDENTITY_BYTES = 1 << 20
SYNC_S = 2.0
LINE_BYTES_MAX = 64 << 20
_encode = msgspec.json.Encoder().encode


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `custom_id` and `path` are of OpenAI's form; without them the whole line is the body."""

    number: int
    body: bytes
    method: str = "POST"
    path: str = ""
    custom_id: str | None = None
    is_openai: bool = False
    problem: str = ""


class _OpenAiLine(msgspec.Struct):
    custom_id: str
    url: str
    method: str = "POST"
    body: msgspec.Raw = msgspec.Raw(b"{}")


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First line of a journal: what it belongs to."""

    input_bytes: int
    input_sha256: str
    deployment: str
    endpoint: str


class _Done(msgspec.Struct):
    line: int
    ok: bool
    out: msgspec.Raw


def read_lines(path: Path) -> Iterator[Line]:
    """The lines that are not empty, numbered from 1. One that is no JSON object has its `problem`."""
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            text = data.strip()
            if text:
                yield parse_line(number, text)


def parse_line(number: int, text: bytes) -> Line:
    """OpenAI's form if it has `custom_id` and `url`, else a body as it is."""
    if len(text) > LINE_BYTES_MAX:
        return Line(number=number, body=b"", problem=f"the line has more than {LINE_BYTES_MAX} bytes")
    try:
        found = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as error:
        return Line(number=number, body=b"", problem=f"not a JSON object: {error}")
    if not {"custom_id", "url"} <= found.keys():
        return Line(number=number, body=text)
    try:
        asked = msgspec.json.decode(text, type=_OpenAiLine)
    except msgspec.DecodeError as error:
        return Line(number=number, body=b"", is_openai=True, problem=f"not a line of a batch: {error}")
    if not asked.url.startswith("/"):
        return Line(number=number, body=b"", custom_id=asked.custom_id, is_openai=True, problem="url has no path")
    return Line(
        number=number,
        body=bytes(asked.body),
        method=asked.method.upper(),
        path=asked.url,
        custom_id=asked.custom_id,
        is_openai=True,
    )


def header_of(path: Path, *, deployment: str, endpoint: str) -> Header:
    """Recognises an input file by its size, start and end."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(IDENTITY_BYTES))
        file.seek(max(0, size - IDENTITY_BYTES))
        digest.update(file.read(IDENTITY_BYTES))
    return Header(input_bytes=size, input_sha256=digest.hexdigest(), deployment=deployment, endpoint=endpoint)


class Journal:
    """OUT.part, open and locked. Made by `open_journal`."""

    def __init__(self, file: BinaryIO, out: Path, done: dict[int, bool]) -> None:
        self._file = file
        self._out = out
        self._synced_s = time.monotonic()
        self.done = done
        """Line numbers and whether each went well."""

    def add(self, line: int, out: dict[str, Any], *, ok: bool) -> None:
        """One line is done. It survives a kill of this process at once, a power cut after SYNC_S."""
        self._file.write(_encode({"line": line, "ok": ok, "out": out}) + b"\n")
        self._file.flush()
        self.done[line] = ok
        if time.monotonic() - self._synced_s > SYNC_S:
            os.fsync(self._file.fileno())
            self._synced_s = time.monotonic()

    def finish(self, order: Literal["input", "completed"]) -> None:
        """Writes OUT from the journal and removes the journal. Killed in the middle, it can be done again."""
        places: list[tuple[int, int]] = []
        self._file.seek(0)
        place = len(self._file.readline())
        for data in self._file:
            places.append((msgspec.json.decode(data, type=_Done).line, place))
            place += len(data)
        if order == "input":
            places.sort()
        fresh = self._out.with_name(self._out.name + ".new")
        with open(fresh, "wb") as target:
            for _line, at in places:
                self._file.seek(at)
                target.write(bytes(msgspec.json.decode(self._file.readline(), type=_Done).out) + b"\n")
            target.flush()
            os.fsync(target.fileno())
        fresh.replace(self._out)
        self.part(self._out).unlink()

    def close(self) -> None:
        """One with nothing done is not left behind: there is nothing to go on with."""
        part = self.part(self._out)
        if not self.done and _lies_at(self._file, part):
            part.unlink()
        self._file.close()

    @staticmethod
    def part(out: Path) -> Path:
        return out.with_name(out.name + ".part")


def open_journal(out: Path, header: Header, *, again: bool, overwrite: bool) -> Journal:
    """The journal of `out`: a new one, or that of a batch that was broken off.

    With `again`, lines that failed are forgotten, so that they run once more, also those of a finished batch.
    Raises ConflictError if `out` is there already, if the journal is another batch's, or if somebody works on it.
    """
    part = Journal.part(out)
    if overwrite:
        part.unlink(missing_ok=True)
    elif out.exists() and not part.exists() and not again:
        raise ConflictError(
            f"{out} is there already", where=str(out), next_step="choose another file, or say --overwrite"
        )
    if again and out.exists() and not part.exists():
        _journal_of_result(out, part, header)
    file = open(part, "a+b")  # noqa: SIM115 -- it is the journal's
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(f"another batch writes {out}", where=str(part)) from error
        if not _lies_at(file, part):
            raise ConflictError(f"another batch has just ended at {out}", where=str(part), next_step="try again")
        done = _recover(file, header, part)
        if again and not all(done.values()):
            file.close()
            _keep_good(part)
            return open_journal(out, header, again=False, overwrite=False)
    except BaseException:
        file.close()
        raise
    return Journal(file, out, done)


def _lies_at(file: BinaryIO, path: Path) -> bool:
    """Whether it is still the file of that name, and not one that was removed meanwhile."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _recover(file: BinaryIO, header: Header, part: Path) -> dict[int, bool]:
    """Reads what is done, cuts off a line that was being written, writes the header of a new one."""
    file.seek(0)
    first = file.readline()
    if not first.endswith(b"\n"):
        file.truncate(0)
        file.write(_encode(header) + b"\n")
        file.flush()
        return {}
    try:
        found = msgspec.json.decode(first, type=Header)
    except msgspec.DecodeError as error:
        raise ConflictError(f"{part} is no journal of a batch", where=str(part)) from error
    if found != header:
        raise ConflictError(
            f"{part} is of another input, deployment or endpoint",
            where=str(part),
            next_step="give the same again to go on, or --overwrite to begin anew",
        )
    done: dict[int, bool] = {}
    place = len(first)
    for data in file:
        try:
            entry = msgspec.json.decode(data, type=_Done)
        except msgspec.DecodeError:
            break
        if not data.endswith(b"\n"):
            break
        done[entry.line] = entry.ok
        place += len(data)
    file.truncate(place)
    file.seek(0, os.SEEK_END)
    return done


def _keep_good(part: Path) -> None:
    fresh = part.with_name(part.name + ".new")
    with open(part, "rb") as source, open(fresh, "wb") as target:
        target.write(source.readline())
        for data in source:
            if msgspec.json.decode(data, type=_Done).ok:
                target.write(data)
        target.flush()
        os.fsync(target.fileno())
    fresh.replace(part)


class _Result(msgspec.Struct):
    """What tells a line of OUT to be good, in both forms."""

    line: int = 0
    id: str = ""
    status_code: int | None = None
    response: dict[str, Any] | None = None


def _journal_of_result(out: Path, part: Path, header: Header) -> None:
    """A finished batch becomes a journal again, so that what failed in it can run once more."""
    fresh = part.with_name(part.name + ".new")
    with open(out, "rb") as source, open(fresh, "wb") as target:
        target.write(_encode(header) + b"\n")
        for data in source:
            try:
                found = msgspec.json.decode(data, type=_Result)
                number = found.line or int(found.id.rpartition("_")[2])
            except (msgspec.DecodeError, ValueError) as error:
                raise InvalidInputError(f"{out} is no result of a batch", where=str(out)) from error
            status = found.status_code or (found.response or {}).get("status_code") or 0
            entry = {"line": number, "ok": 200 <= status < 300, "out": msgspec.Raw(data.strip())}
            target.write(_encode(entry) + b"\n")
        target.flush()
        os.fsync(target.fileno())
    fresh.replace(part)
