"""Tree paths: the one rule for what a file of a tree may be called, at ingest and again when it is landed."""

from __future__ import annotations

from snowdrop.domain.errors import CorruptContentError, InvalidInputError
from snowdrop.domain.manifest import PATH_BYTES_MAX

COMPONENT_BYTES_MAX = 255
"""NAME_MAX of the file systems that trees land on."""


def parse_tree_path(text: str, *, error: type[InvalidInputError] = CorruptContentError) -> str:
    """`text` if it is a path inside a tree: relative, normalised, `/`-separated UTF-8.

    Raises `error` naming the path and the rule: no absolute path, no `.`, `..` or empty component, no NUL, at
    most PATH_BYTES_MAX bytes in all and COMPONENT_BYTES_MAX in a component.
    """
    broken = _broken_rule(text)
    if broken:
        raise error(
            f"path {text[:200]!r} {broken}",
            where=ascii(text[:200]),
            next_step="every path must be relative, normalised and inside its tree",
        )
    return text


def _broken_rule(text: str) -> str:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if not raw:
        return "is empty"
    if len(raw) > PATH_BYTES_MAX:
        return f"has {len(raw)} bytes (path_bytes_max={PATH_BYTES_MAX})"
    if b"\0" in raw:
        return "holds a NUL"
    if raw.startswith(b"/"):
        return "is absolute"
    for component in raw.split(b"/"):
        if component == b"..":
            return "escapes its tree with '..'"
        if component in {b"", b"."}:
            return "has an empty or '.' component"
        if len(component) > COMPONENT_BYTES_MAX:
            return f"has a component of {len(component)} bytes (component_bytes_max={COMPONENT_BYTES_MAX})"
    return ""


def clashing_path(paths: list[str]) -> str | None:
    """The first path that occurs twice, or that is a file and a directory at once; None if there is none."""
    files = set(paths)
    if len(files) != len(paths):
        seen: set[str] = set()
        for path in paths:
            if path in seen:
                return path
            seen.add(path)
    checked: set[str] = set()
    for path in paths:
        parent = path.rpartition("/")[0]
        while parent and parent not in checked:
            if parent in files:
                return parent
            checked.add(parent)
            parent = parent.rpartition("/")[0]
    return None
