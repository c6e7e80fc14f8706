"""A repository of a model hub as the source of a push: `hf://org/name@revision`.

The revision is resolved to a commit once. Files are read in ranges straight from the hub's storage, which the hub
points to for each file; nothing is written to its cache. What the hub says of a file (SHA-256 of large ones, Git's
blob id of small ones) is compared at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

from snowdrop.content.ingest.remote import Attempts, Memo, PassingError, Window
from snowdrop.content.ingest.source import EVERYTHING, Filter, SourceFile, in_load_order
from snowdrop.content.scan import IGNORED_IN_MODELS
from snowdrop.domain.errors import (
    InvalidInputError,
    NotFoundError,
    SnowdropError,
    UnauthorisedError,
    UnavailableError,
)
from snowdrop.domain.manifest import FILES_MAX

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.hf_api import RepoFile

SCHEME = "hf"
CONNECT_S_MAX = 15.0
STALL_S_MAX = 30.0
REVISION_DEFAULT = "main"
IGNORED = (*IGNORED_IN_MODELS, ".gitattributes", ".gitignore")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_RESET = re.compile(r";t=(\d+)")
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


def parse_hub_url(url: str) -> tuple[str, str]:
    """(repository, revision) of `hf://org/name@revision`; the revision is `main` if none is given."""
    repo, _, revision = unquote(url.removeprefix(f"{SCHEME}://")).partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise InvalidInputError(
            f"{url[:200]!r} names no repository",
            where="source",
            next_step="use hf://org/name or hf://org/name@revision",
        )
    return repo, revision or REVISION_DEFAULT


class HubSource:
    """The files of one commit. `token` and `endpoint` default to what huggingface_hub itself would use."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        endpoint: str | None = None,
        chosen: Filter = EVERYTHING,
        attempts: Attempts | None = None,
    ) -> None:
        import huggingface_hub  # noqa: PLC0415 (slow to import, and only this source needs it)

        self._repo, self._revision = parse_hub_url(url)
        self._api = huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="snowdrop")
        self._endpoint = self._api.endpoint
        self._token = token
        self._chosen = chosen
        self._attempts = attempts or Attempts()
        self._commit = ""
        self._locations = Memo()

    @property
    def name(self) -> str:
        return f"{SCHEME}://{self._repo}@{self._commit or self._revision}"

    @property
    def identity(self) -> str:
        return f"hub:{self._endpoint}/{self._repo}"

    def files(self) -> Sequence[SourceFile]:
        from huggingface_hub.hf_api import RepoFile  # noqa: PLC0415 (as above)

        info = self._ask(lambda: self._api.repo_info(self._repo, revision=self._revision, timeout=STALL_S_MAX))
        self._commit = str(info.sha or "")
        if not _SHA1.fullmatch(self._commit):
            raise UnavailableError("the hub gave no commit", where=self.name, next_step="check the endpoint")

        def listing() -> list[SourceFile]:
            # Folders are listed too, so an honest listing has at most twice as many entries.
            entries = self._api.list_repo_tree(self._repo, recursive=True, revision=self._commit)
            listed = islice(entries, 2 * FILES_MAX + 2)
            return [_source_file(entry) for entry in listed if isinstance(entry, RepoFile)]

        chosen = Filter(self._chosen.include, (*self._chosen.exclude, *IGNORED))
        files = [file for file in self._ask(listing) if chosen.takes(file.path)]
        return in_load_order(files, where=self.name)

    def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        self._attempts.fill(
            Window(offset, into), lambda window: self._attempt(file, window), where=f"{self.name}: {file.path}"
        )

    def settle(self, file: SourceFile) -> None:
        """Nothing to ask: a commit does not change, and what came was compared with its hash."""

    def close(self) -> None:
        """Ends what is still trying. The connections belong to huggingface_hub."""
        self._attempts.stop()

    def _attempt(self, file: SourceFile, window: Window) -> None:
        import httpx2  # noqa: PLC0415 (as above)
        from huggingface_hub import get_session  # noqa: PLC0415

        url, headers, is_remembered = self._location(file)
        last = window.offset + window.left - 1
        headers |= {"range": f"bytes={window.offset}-{last}", "accept-encoding": "identity"}
        timeout = httpx2.Timeout(STALL_S_MAX, connect=CONNECT_S_MAX)
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                if response.status_code >= 400 and is_remembered and response.status_code < 429:
                    # What the hub pointed to was signed for a while only.
                    self._locations.drop(file.path)
                    raise PassingError("expired", f"HTTP {response.status_code}")
                self._check(file, window, response)
                if not is_remembered and response.history:
                    self._locations.put(file.path, str(response.url))
                for data in response.iter_raw():
                    window.take(data)
        except httpx2.TimeoutException as error:
            raise PassingError("stalled", f"no byte for {STALL_S_MAX:g} s") from error
        except httpx2.ConnectError as error:
            raise PassingError("connect", f"cannot connect: {error}") from error
        except httpx2.TransportError as error:
            raise PassingError("reset", f"connection lost: {str(error) or type(error).__name__}") from error
        except httpx2.HTTPError as error:
            raise PassingError("garbled", f"{type(error).__name__}: {error}") from error

    def _location(self, file: SourceFile) -> tuple[str, dict[str, str], bool]:
        """(URL, headers, whether it is one that the hub pointed to). The token goes to the hub alone."""
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 (as above)
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

        headers = dict(build_hf_headers(token=self._token, library_name="snowdrop"))
        url = hf_hub_url(self._repo, file.path, revision=self._commit, endpoint=self._endpoint)
        remembered = self._locations.get(file.path)
        if remembered is None:
            return url, headers, False
        if urlsplit(remembered)[:2] != urlsplit(url)[:2]:
            headers.pop("authorization", None)
        return remembered, headers, True

    def _check(self, file: SourceFile, window: Window, response: httpx2.Response) -> None:
        """Raises unless the response brings exactly the wanted range of the file that was listed."""
        status, place = response.status_code, f"{self.name}: {file.path}"
        if status == 206:
            found = _RANGE.fullmatch(response.headers.get("content-range", ""))
            if found is None or int(found[1]) != window.offset:
                raise PassingError("garbled", "another range came than was asked for")
            if found[3] not in {"*", str(file.size)}:
                raise InvalidInputError(
                    f"{file.path} has {found[3]} bytes, the listing said {file.size}",
                    where=place,
                    next_step="push again; if it stays so, the hub is damaged",
                )
            return
        if status == 200 and window.offset == 0 and window.left == file.size:
            return
        if status == 200:
            raise InvalidInputError(
                "the hub does not serve ranges",
                where=place,
                next_step="download the model, then push the directory",
            )
        self._refuse(status, response.headers, place)

    def _refuse(self, status: int, headers: Mapping[str, str], place: str) -> NoReturn:
        if status == 429:
            raise PassingError("throttled", "HTTP 429: too many requests", retry_after_s=_retry_after(headers))
        if status >= 500:
            raise PassingError("server", f"HTTP {status}", retry_after_s=_retry_after(headers))
        raise _refusal(status, headers.get("x-error-code", ""), place, f"{self._endpoint}/{self._repo}")

    def _ask(self, question: Callable[[], _T]) -> _T:
        """A question to the hub's API, repeated while it is busy."""
        answers: list[_T] = []
        self._attempts.run(lambda: answers.append(self._asked(question)), where=self.name)
        return answers[-1]

    def _asked(self, question: Callable[[], _T]) -> _T:
        import httpx2  # noqa: PLC0415 (as above)
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled  # noqa: PLC0415

        try:
            return question()
        except HFValidationError as error:
            raise InvalidInputError(f"{error}", where=self.name, next_step="check the name") from error
        except OfflineModeIsEnabled as error:
            raise InvalidInputError(
                "HF_HUB_OFFLINE is set", where=self.name, next_step="unset it, or push a directory"
            ) from error
        except HfHubHTTPError as error:
            self._refuse(error.response.status_code, error.response.headers, self.name)
        except httpx2.TransportError as error:
            raise PassingError("connect", f"cannot reach {self._endpoint}: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise UnavailableError(
                f"the hub's answer has another form: {type(error).__name__}: {error}",
                where=self.name,
                next_step=f"is {self._endpoint} a model hub?",
            ) from error


def _refusal(status: int, code: str, place: str, page: str) -> SnowdropError:
    if code == "GatedRepo":
        return UnauthorisedError(
            "this repository is gated",
            where=place,
            next_step=f"accept its conditions at {page}, and give a token with --token or HF_TOKEN",
        )
    if code == "RevisionNotFound":
        return NotFoundError("no such revision", where=place, next_step=f"see the branches and tags at {page}")
    if status in {401, 403}:
        return UnauthorisedError(
            f"the hub refuses it (HTTP {status}): it is not there, or this token may not read it",
            where=place,
            next_step="check the name; for a private or gated one give a token with --token or HF_TOKEN",
        )
    if status == 404:
        return NotFoundError(
            "the hub has no such repository or file",
            where=place,
            next_step="check the name; a private one needs a token: --token or HF_TOKEN",
        )
    return UnavailableError(f"the hub answered HTTP {status}", where=place, next_step="try again later")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the hub wants us to wait: Retry-After, or what is left of its rate limit's window."""
    text = headers.get("retry-after", "")
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    found = _RESET.search(headers.get("ratelimit", ""))
    return float(found[1][:9]) if found else None


def _source_file(entry: RepoFile) -> SourceFile:
    """Believes nothing: huggingface_hub takes the hub's JSON as it is."""
    path: object = entry.path
    size: object = entry.size
    sha256: object = entry.lfs.sha256 if entry.lfs is not None else ""
    blob: object = entry.blob_id if entry.lfs is None else ""
    if not isinstance(path, str) or not isinstance(sha256, str) or not isinstance(blob, str):
        raise TypeError("a path or a hash is no text")
    if not isinstance(size, int) or size < 0:
        raise TypeError("a size is no count")
    if not (_SHA256.fullmatch(sha256) if entry.lfs is not None else _SHA1.fullmatch(blob)):
        raise ValueError("a hash has another form")
    return SourceFile(path=path, size=size, mode=0o644, version=sha256 or blob, sha256=sha256, git_blob=blob)
