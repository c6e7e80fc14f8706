"""Reading an origin back: every pack of the given artefacts, every chunk in it, and the refs that name them.

What a pack must be says its name, what a chunk must be the manifest, so both are compared. A pack that several
artefacts share is read once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from snowdrop.content.codec import decode
from snowdrop.content.gcformat import Root
from snowdrop.content.keys import Hasher, Keyring
from snowdrop.content.layout import manifest_key, pack_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import Origin
from snowdrop.content.refs import SeenRefs, read_ref
from snowdrop.content.signing import TrustedKeys
from snowdrop.domain.errors import (
    CorruptContentError,
    IntegrityError,
    NotFoundError,
    SnowdropError,
    UntrustedError,
)
from snowdrop.domain.ids import TenantId
from snowdrop.domain.manifest import MANIFEST_BYTES_MAX, Manifest

READERS = 4
"""Packs read at once, each of at most 64 MiB."""
PROBLEMS_MAX = 10_000


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Something that is not as it must be: `artefact` is a manifest's digest, `chunk` an index in it."""

    artefact: str
    where: str
    what: str
    file: str = ""
    chunk: int = -1


class VerifyProgress(msgspec.Struct, frozen=True, kw_only=True):
    done_bytes: int
    total_bytes: int


class OriginVerified(msgspec.Struct, frozen=True, kw_only=True):
    """What was read, and all that was wrong. `skipped` could not be judged: no key for a private domain."""

    artefacts: int
    packs: int
    read_bytes: int
    problems: tuple[Problem, ...]
    skipped: tuple[str, ...]


class _Wanted(msgspec.Struct, frozen=True):
    """One artefact's chunks in one pack."""

    root: Root
    manifest: Manifest
    chunks: tuple[int, ...]


def _silent(_: VerifyProgress) -> None:
    pass


def verify_origin(
    origin: Origin,
    roots: Iterable[Root],
    keyring: Keyring,
    *,
    progress: Callable[[VerifyProgress], None] = _silent,
) -> OriginVerified:
    """Reads the manifests of `roots` and all their packs. Raises what the origin raises beyond missing objects."""
    problems: list[Problem] = []
    skipped: list[str] = []
    by_pack: defaultdict[tuple[str, str], list[_Wanted]] = defaultdict(list)
    sizes: dict[tuple[str, str], int] = {}
    count = 0
    for root in roots:
        count += 1
        if root.key_domain not in keyring.domains:
            skipped.append(f"{root.manifest}: no key for {root.key_domain} here")
            continue
        manifest = _manifest(origin, root, keyring.hasher(root.key_domain), problems)
        if manifest is None:
            continue
        held: defaultdict[int, list[int]] = defaultdict(list)
        for index, chunk in enumerate(manifest.chunks):
            held[chunk.pack].append(index)
        for number, pack in enumerate(manifest.packs):
            place = (root.key_domain, pack.digest)
            sizes[place] = pack.size
            by_pack[place].append(_Wanted(root, manifest, tuple(held[number])))
    done, total = 0, sum(sizes.values())
    with ThreadPoolExecutor(READERS, thread_name_prefix="verify") as pool:

        def check(item: tuple[tuple[str, str], list[_Wanted]]) -> tuple[int, list[Problem]]:
            (domain, digest), wanted = item
            found = _check_pack(origin, pack_key(domain, digest), digest, wanted, keyring.hasher(domain))
            return sizes[domain, digest], found

        try:
            for size, found in pool.map(check, by_pack.items()):
                done += size
                problems += found
                progress(VerifyProgress(done_bytes=done, total_bytes=total))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return OriginVerified(
        artefacts=count,
        packs=len(by_pack),
        read_bytes=done,
        problems=tuple(problems[:PROBLEMS_MAX]),
        skipped=tuple(skipped),
    )


def verify_names(
    origin: Origin, names: Iterable[tuple[str, TenantId, str, str]], trusted: TrustedKeys, seen: SeenRefs
) -> list[Problem]:
    """Checks the refs of (key domain, tenant, name, manifest expected) as any reader must."""
    problems: list[Problem] = []
    for domain, tenant, name, expected in names:
        where = f"{tenant}/{name}"
        try:
            ref = read_ref(origin, domain, tenant, name, trusted=trusted, seen=seen)
        except (NotFoundError, CorruptContentError, UntrustedError) as error:
            problems.append(Problem(artefact=expected, where=error.where or where, what=error.message))
            continue
        if ref.manifest != expected:
            what = f"the name at the origin means {ref.manifest}; a push was cut short, push it again"
            problems.append(Problem(artefact=expected, where=where, what=what))
    return problems


def _manifest(origin: Origin, root: Root, hasher: Hasher, problems: list[Problem]) -> Manifest | None:
    key = manifest_key(root.key_domain, root.manifest)
    try:
        data = bytearray(min(origin.size(key), MANIFEST_BYTES_MAX + 1))
        if data:
            origin.read_range(key, 0, memoryview(data))
        return decode_manifest(bytes(data), expected=root.manifest, hasher=hasher)
    except (NotFoundError, IntegrityError, CorruptContentError) as error:
        problems.append(Problem(artefact=root.manifest, where=key, what=error.message))
        return None


def _check_pack(origin: Origin, key: str, digest: str, wanted: list[_Wanted], hasher: Hasher) -> list[Problem]:
    size = max((_pack_size(item, digest) for item in wanted), default=0)
    data = bytearray(size)
    try:
        there = origin.size(key)
        if there == size:
            origin.read_range(key, 0, memoryview(data))
        problem = "" if there == size else f"the pack has {there} bytes instead of {size}"
    except (NotFoundError, IntegrityError) as error:
        problem = error.message
    if problem:
        return [_problem(item, key, problem, item.chunks[0] if item.chunks else -1) for item in wanted]
    view = memoryview(data)
    found = [
        _problem(item, key, "its bytes are wrong", chunk)
        for item in wanted
        for chunk in item.chunks
        if not _is_right(item.manifest, chunk, view, hasher)
    ]
    if not found and hasher.hexdigest(view) != digest:
        # Only bytes that none of these artefacts uses: harmless to them, but not what the name says.
        found = [
            _problem(item, key, "the pack does not match its name, in bytes not used here", -1) for item in wanted
        ]
    return found


def _pack_size(item: _Wanted, digest: str) -> int:
    return next(pack.size for pack in item.manifest.packs if pack.digest == digest)


def _is_right(manifest: Manifest, index: int, pack: memoryview, hasher: Hasher) -> bool:
    chunk = manifest.chunks[index]
    stored = pack[chunk.pack_offset : chunk.pack_offset + chunk.stored_bytes]
    if chunk.codec == "plain":
        return hasher.hexdigest(stored) == chunk.digest
    plain = bytearray(chunk.plain_bytes)
    try:
        decode(chunk.codec, stored, memoryview(plain))
    except SnowdropError:
        return False
    return hasher.hexdigest(plain) == chunk.digest


def _problem(item: _Wanted, key: str, what: str, chunk: int) -> Problem:
    return Problem(
        artefact=item.root.manifest, where=key, what=what, file=_file_of(item.manifest, chunk), chunk=chunk
    )


def _file_of(manifest: Manifest, chunk: int) -> str:
    files = (entry.path for entry in manifest.files for extent in entry.extents if extent.chunk == chunk)
    return next(files, "")
