"""From what a person writes to the source of a push."""

from __future__ import annotations

from pathlib import Path

import msgspec

from snowdrop.content.ingest.directory import DirectorySource
from snowdrop.content.ingest.source import Filter, Source
from snowdrop.content.scan import IGNORED_IN_MODELS
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.origin import OriginOptions

SCHEMES = "a directory, hf://org/name@revision, s3://, gs://, az://, https:// or http://"


class SourceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a source is reached (`token` for a hub, `endpoint` of a hub or a store), and which files are taken."""

    token: str | None = None
    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False
    chosen: Filter = Filter()


def open_source(text: str, options: SourceOptions) -> Source:
    """The source that `text` names: a path, or a URL. Raises InvalidInputError if it names none."""
    scheme, separator, _ = text.partition("://")
    if not separator:
        return DirectorySource(Path(text), ignored=IGNORED_IN_MODELS, chosen=options.chosen)
    # Each kind brings a library that only it needs.
    if scheme == "hf":
        from snowdrop.content.ingest.hub import HubSource  # noqa: PLC0415

        return HubSource(text, token=options.token, endpoint=options.endpoint, chosen=options.chosen)
    if scheme in {"s3", "gs", "az", "http", "https"}:
        from snowdrop.content.ingest.prefix import PrefixSource  # noqa: PLC0415

        reached = OriginOptions(
            endpoint=options.endpoint or "", region=options.region or "", anonymous=options.anonymous
        )
        return PrefixSource(text, reached, chosen=options.chosen)
    raise InvalidInputError(f"{text[:200]!r} is no source", where="SOURCE", next_step=f"name {SCHEMES}")
