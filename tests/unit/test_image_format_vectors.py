"""The vectors of images' trees: what a reader must take, and what it must refuse."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from snowdrop.content.imagetree import decode_tree, encode_tree
from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.image import TreeEntry

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "format" / "images.json").read_text())


def named(cases: list[dict[str, str]]) -> Any:
    return pytest.mark.parametrize(
        "data", [pytest.param(base64.b64decode(case["tree"]), id=case["name"].replace(" ", "-")) for case in cases]
    )


@named(VECTORS["accepted"])
def test_a_tree_has_one_encoding(data: bytes) -> None:
    assert encode_tree(decode_tree(data)) == data


def test_every_field_is_where_the_format_says() -> None:
    tree = decode_tree(base64.b64decode(VECTORS["accepted"][1]["tree"]))
    entries = {entry.path: entry for entry in tree.entries}
    sha256, xattrs = bytes(range(32)), ((b"user.k", b"\0v"),)
    assert entries[b"b/f"] == TreeEntry(
        b"b/f", "file", 0o4755, 0, 0, 1_600_000_000_123_456_789, 4097, 0, sha256, b"", xattrs
    )
    assert entries[b"c"] == TreeEntry(b"c", "hardlink", target=b"b/f")
    assert (tree.data_bytes, tree.config.user, tree.config.env) == (12288, "1000:1000", ("PATH=/bin", "EMPTY="))


@named(VECTORS["refused"])
def test_a_tree_that_breaks_a_rule_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptContentError) as raised:
        decode_tree(data)
    assert raised.value.where.startswith("image: ")
