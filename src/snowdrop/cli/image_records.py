"""Images by their names: what control knows of them, and their trees."""

from __future__ import annotations

from snowdrop.cli.models import manifest_of
from snowdrop.cli.output import Context
from snowdrop.content.imageread import read_tree
from snowdrop.content.keys import load_keyring
from snowdrop.content.origin import open_origin
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.image import ImageTree
from snowdrop.wire.api import Info


def record_of(ctx: Context, name: str) -> ModelRecord:
    """Raises NotFoundError if the name is not that of an image."""
    record = ctx.client.get(ModelRecord, "models", name)
    if record.artefact.kind != "image":
        raise NotFoundError(
            f"{name!r} is a {record.artefact.kind}, not an image",
            where=f"image {name}",
            next_step=f"see `snowdrop model show {name}`",
        )
    return record


def image_of(ctx: Context, name: str) -> tuple[ModelRecord, ImageTree]:
    """An image's record and its tree, read from the origin and checked."""
    record = record_of(ctx, name)
    manifest = manifest_of(ctx, record)
    info = ctx.client.get(Info, "info")
    hasher = load_keyring(ctx.layout.content_keys).hasher(record.artefact.key_domain)
    return record, read_tree(open_origin(info.origin_url, info.origin), manifest, hasher)
