"""Mounts that an agent left which was killed: its directories of models, and those that people asked for.

Whoever ends or begins with no agent alive removes them: the next agent, the supervisor when it has stopped
everything, and `snowdrop down` where a supervisor was killed. A mount that nobody serves answers ENOTCONN or not
at all, so none of this looks into one.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import msgspec

from snowdrop.content.fuse.mount import mounted_trees, unmount_tree
from snowdrop.domain.errors import UnavailableError
from snowdrop.image.mount.kernel import sweep_erofs
from snowdrop.wire.mounts import PersonalMount

log = logging.getLogger("snowdrop.agent")


def images_below(folder: Path) -> Path:
    """Where the metadata of mounted images lies."""
    return folder / "images"


def read_mounts_record(record: Path) -> list[PersonalMount]:
    """The mounts that people asked for; none if the record is not understood. Blocks."""
    try:
        return msgspec.json.decode(record.read_bytes(), type=list[PersonalMount])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s is not understood, its mounts are not made again: %s", record, error)
        return []


def sweep_mounts(folder: Path, record: Path) -> list[PersonalMount]:
    """Removes what is still mounted in `folder` and where people asked for it; gives the latter. Blocks.

    One that stays is logged.
    """
    personal = read_mounts_record(record)
    images = images_below(folder)
    for place in (folder, *(Path(entry.directory) for entry in personal)):
        sweep_erofs(place, images)
        for tree in mounted_trees(place):
            try:
                unmount_tree(tree.path)
                log.info("removed %s, which an earlier agent left", tree.path)
            except UnavailableError as error:
                log.warning("a mount of an earlier agent stays: %s", error)
    shutil.rmtree(images, ignore_errors=True)
    return personal
