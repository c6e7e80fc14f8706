"""An object-store prefix, or files on a web server, as the source of a push.

`s3://`, `gs://` and `az://` prefixes are listed. A web server cannot be: an `http(s)://` URL that ends with `/`
needs a file `SHA256SUMS` there (as `sha256sum` writes it), which names the files and what they are; a URL that
does not end with `/` is one file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError, UnauthenticatedError

from snowdrop.content.ingest.remote import Attempts, PassingError, Window
from snowdrop.content.ingest.source import EVERYTHING, Filter, SourceFile, changed, in_load_order
from snowdrop.content.origin.stores import one_line, open_store
from snowdrop.content.scan import IGNORED_IN_MODELS
from snowdrop.domain.errors import InvalidInputError, NotFoundError, UnauthorisedError
from snowdrop.domain.manifest import FILES_MAX
from snowdrop.domain.origin import OriginOptions

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta

SUMS_FILE = "SHA256SUMS"
SUMS_BYTES_MAX = 64 << 20
LIST_PAGE = 1_000
_ASK_THREADS = 8
_SUM = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_T = TypeVar("_T")


class PrefixSource:
    """The files below a URL. What is read must carry the ETag and the size that were listed."""

    def __init__(
        self,
        url: str,
        options: OriginOptions,
        *,
        chosen: Filter = EVERYTHING,
        attempts: Attempts | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise InvalidInputError(
                "the URL of a source has no user, query or fragment",
                where="SOURCE",
                next_step="credentials come from the environment; a signed URL: download it, push the directory",
            )
        self.name = url
        self.identity = f"prefix:{options.endpoint}:{url}"
        self._is_web = parts.scheme in {"http", "https"}
        root, _, self._file = url.rpartition("/") if self._is_web else (url, "", "")
        self._store = open_store(root if self._is_web else url, options).store
        self._chosen = Filter(chosen.include, (*chosen.exclude, *IGNORED_IN_MODELS))
        self._attempts = attempts or Attempts()
        self._etags: dict[str, str | None] = {}

    def files(self) -> Sequence[SourceFile]:
        if not self._is_web:
            found = self._listed()
        elif self._file:
            found = [self._described(unquote(self._file), "")]
        else:
            sums = self._sums()
            with ThreadPoolExecutor(_ASK_THREADS, "head") as threads:
                found = list(threads.map(lambda path: self._described(path, sums[path]), sums))
        return in_load_order([file for file in found if self._chosen.takes(file.path)], where=self.name)

    def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        self._attempts.fill(
            Window(offset, into), lambda window: self._attempt(file, window), where=f"{self.name}: {file.path}"
        )

    def settle(self, file: SourceFile) -> None:
        """A later change does not matter: every range came with the ETag that was listed."""

    def close(self) -> None:
        """Ends what is still trying. The store closes its connections when it is dropped."""
        self._attempts.stop()

    def _attempt(self, file: SourceFile, window: Window) -> None:
        wanted = (window.offset, window.offset + window.left)
        result = self._call(lambda: obstore.get(self._store, file.path, options={"range": wanted}), file.path)
        self._check(file, result, wanted)
        stream = iter(result.stream(min_chunk_size=1 << 20))
        while (data := self._call(lambda: next(stream, None), file.path)) is not None:
            window.take(memoryview(data))

    def _check(self, file: SourceFile, result: GetResult, wanted: tuple[int, int]) -> None:
        meta = result.meta
        if meta["size"] != file.size or meta["e_tag"] != self._etags[file.path]:
            raise changed(file.path)
        if tuple(result.range) != wanted:
            raise PassingError("garbled", "another range came than was asked for")

    def _listed(self) -> list[SourceFile]:
        listed: list[ObjectMeta] = []
        pages = iter(obstore.list(self._store, chunk_size=LIST_PAGE))
        while (page := self._asked(lambda: next(pages, None), self.name)) is not None:
            listed.extend(page)
            if len(listed) > 2 * FILES_MAX:
                break
        folders = {""} | {path[:at] for path in (meta["path"] for meta in listed) for at in _slashes(path)}
        # Consoles make empty objects to stand for folders.
        return [self._file_of(meta, "") for meta in listed if meta["size"] or meta["path"] not in folders]

    def _sums(self) -> dict[str, str]:
        """The paths in SHA256SUMS with their digests."""
        try:
            meta = self._asked(lambda: obstore.head(self._store, SUMS_FILE), SUMS_FILE)
        except NotFoundError as error:
            raise NotFoundError(
                f"a web server cannot be listed, and there is no {SUMS_FILE} here",
                where=self.name,
                next_step=f"run `sha256sum * > {SUMS_FILE}` beside the files, or name one file",
            ) from error
        if meta["size"] > SUMS_BYTES_MAX:
            raise InvalidInputError(f"{SUMS_FILE} is too long", where=f"sums_bytes_max={SUMS_BYTES_MAX}")
        sums_file = self._file_of(meta, "")
        data = bytearray(meta["size"])
        if data:
            self.read(sums_file, 0, memoryview(data))
        sums: dict[str, str] = {}
        for number, line in enumerate(_lines(data), start=1):
            found = _SUM.fullmatch(line)
            if found is None or len(sums) > FILES_MAX:
                raise InvalidInputError(
                    f"line {number} of {SUMS_FILE} is not `<SHA-256>  <path>`",
                    where=f"{self.name}{SUMS_FILE}, line {number}",
                    next_step="make it with sha256sum",
                )
            path = found[2].removeprefix("./")
            if path in sums:
                raise InvalidInputError(f"{SUMS_FILE} names {path} twice", where=f"{self.name}{SUMS_FILE}")
            if path != SUMS_FILE:
                sums[path] = found[1].lower()
        return sums

    def _described(self, path: str, sha256: str) -> SourceFile:
        in_load_order([SourceFile(path=path, size=0, mode=0o644, version="")], where=self.name)
        return self._file_of(self._asked(lambda: obstore.head(self._store, path), path), sha256)

    def _file_of(self, meta: ObjectMeta, sha256: str) -> SourceFile:
        self._etags[meta["path"]] = meta["e_tag"]
        version = sha256 or f"{meta['size']} {meta['e_tag']} {meta['version']} {meta['last_modified'].isoformat()}"
        return SourceFile(path=meta["path"], size=meta["size"], mode=0o644, version=version, sha256=sha256)

    def _asked(self, question: Callable[[], _T], path: str) -> _T:
        answers: list[_T] = []
        self._attempts.run(lambda: answers.append(self._call(question, path)), where=f"{self.name}: {path}")
        return answers[-1]

    def _call(self, question: Callable[[], _T], path: str) -> _T:
        """One call of obstore; its errors as ours, or as one that may pass."""
        try:
            return question()
        except FileNotFoundError as error:
            raise NotFoundError(
                "the source has no such object", where=f"{self.name}: {path}", next_step="check the URL"
            ) from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise UnauthorisedError(
                f"the source refuses it: {one_line(error)}",
                where=f"{self.name}: {path}",
                next_step="check the credentials in the environment",
            ) from error
        except NotSupportedError as error:
            raise InvalidInputError(
                f"the server does not serve ranges: {one_line(error)}",
                where=f"{self.name}: {path}",
                next_step="download the model, then push the directory",
            ) from error
        except (BaseError, OSError) as error:
            raise PassingError("server", one_line(error)) from error


def _slashes(path: str) -> Iterator[int]:
    return (at for at, character in enumerate(path) if character == "/")


def _lines(data: bytearray) -> list[str]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{SUMS_FILE} is not UTF-8", where=SUMS_FILE) from error
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
