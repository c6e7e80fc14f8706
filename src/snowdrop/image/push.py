"""Push of an image: its layers become one tree, the tree an artefact in the content store."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import msgspec
from blake3 import blake3

from snowdrop.content.imagetree import encode_tree
from snowdrop.content.ingest import IngestIndex, PushOptions, PushProgress, PushResult, SourceFile, push_source
from snowdrop.content.ingest.source import changed
from snowdrop.content.origin import Origin
from snowdrop.domain.image import DATA_FILE, IMAGE_FORMAT_VERSION, TREE_FILE, ImageTree, TreeEntry
from snowdrop.image.flatten import Flattener
from snowdrop.image.layout import Content, Layout, lay_out
from snowdrop.image.source import ImageSource, SourceImage
from snowdrop.image.unpack import LayerFolder, Unpacked


class ImageOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`order` are paths as a start reads them, from a trace; `fetch` brings layers here before unpacking them."""

    allow_setid: bool = False
    skip_devices: bool = False
    fetch: bool = False
    order: tuple[bytes, ...] = ()


class LayerProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Stored bytes of layers that were read, of how many (0: not known)."""

    layer: int
    layers: int
    done_bytes: int
    total_bytes: int


class ImagePushed(msgspec.Struct, frozen=True, kw_only=True):
    """What `push_image` gives: the image at its source, the tree, and what the content store says."""

    source: SourceImage
    tree: ImageTree
    result: PushResult


def push_image(
    source: ImageSource,
    origin: Origin,
    folder: LayerFolder,
    options: PushOptions,
    image_options: ImageOptions,
    *,
    index: IngestIndex | None = None,
    layer_progress: Callable[[LayerProgress], None] = lambda _: None,
    progress: Callable[[PushProgress], None] = lambda _: None,
) -> ImagePushed:
    """Pushes the image of `source`. The same layers always give the same tree.

    Raises what the source raises, CorruptContentError for what no image may have, IntegrityError for wrong bytes,
    StorageFullError or UnavailableError from the folder or the origin. `folder` is empty after a push that ended
    well; otherwise it holds what the next one goes on from.
    """
    found = source.image()
    layers = list(_unpacked(source, found, folder, image_options, layer_progress))
    layout, places = assemble(layers, image_options)
    tree = ImageTree(
        version=IMAGE_FORMAT_VERSION, config=found.config, data_bytes=layout.data_bytes, entries=layout.entries
    )
    with ExitStack() as stack:
        opened = list(_open(layers, stack))
        files = _ImageFiles(source.name, tree=tree, layout=layout, places=places, opened=opened)
        result = push_source(files, origin, options, index=index, progress=progress)
    folder.clear()
    return ImagePushed(source=found, tree=tree, result=result)


def assemble(layers: Sequence[Unpacked], options: ImageOptions) -> tuple[Layout, dict[bytes, int]]:
    """The laid out tree, and where each content lies in the layers' data, counted through all of them."""
    flattener = Flattener(allow_setid=options.allow_setid)
    begin = 0
    for layer in layers:
        flattener.next_layer()
        for entry in layer.entries:
            flattener.add(_moved(entry, begin) if entry.size else entry)
        begin += layer.data_bytes
    entries = flattener.entries()
    places = {entry.sha256: entry.offset for entry in entries if entry.size}
    return lay_out(entries, order=options.order), places


def _moved(entry: TreeEntry, by: int) -> TreeEntry:
    return msgspec.structs.replace(entry, offset=entry.offset + by)


def _unpacked(
    source: ImageSource,
    found: SourceImage,
    folder: LayerFolder,
    options: ImageOptions,
    report: Callable[[LayerProgress], None],
) -> Iterator[Unpacked]:
    total = sum(max(layer.size, 0) for layer in found.layers)
    done = 0
    for number, layer in enumerate(found.layers, 1):

        def progress(count: int, number: int = number) -> None:
            nonlocal done
            done += count
            report(
                LayerProgress(
                    layer=number, layers=len(found.layers), done_bytes=done, total_bytes=max(total, done)
                )
            )

        yield folder.obtain(
            source, layer, fetch=options.fetch, skip_devices=options.skip_devices, progress=progress
        )


class _Opened(NamedTuple):
    """A layer's data, and where it begins when all are counted through."""

    begin: int
    fd: int


class _ImageFiles:
    """`tree` and `data` as the source of a push."""

    def __init__(
        self,
        name: str,
        *,
        tree: ImageTree,
        layout: Layout,
        places: dict[bytes, int],
        opened: Sequence[_Opened],
    ) -> None:
        self.name = name
        self.identity = f"image:{name}"
        self._tree = encode_tree(tree)
        self._layout = layout
        self._places = places
        self._begins = [content.offset for content in layout.contents]
        self._layers = list(opened)
        self._layer_begins = [layer.begin for layer in self._layers]

    def files(self) -> Sequence[SourceFile]:
        # What the contents are, and where, decides what `data` is: the same in another run, and from other layers.
        version = blake3(msgspec.msgpack.encode(self._layout.contents)).hexdigest()
        return [
            SourceFile(path=TREE_FILE, size=len(self._tree), mode=0o644, version=blake3(self._tree).hexdigest()),
            SourceFile(
                path=DATA_FILE,
                size=self._layout.data_bytes,
                mode=0o644,
                version=version,
                cuts=self._layout.cuts,
            ),
        ]

    def read(self, file: SourceFile, offset: int, into: memoryview) -> None:
        if file.path == TREE_FILE:
            into[:] = self._tree[offset : offset + len(into)]
            return
        into[:] = bytes(len(into))
        for content in self._contents(offset, offset + len(into)):
            begin = max(content.offset, offset)
            end = min(content.offset + content.size, offset + len(into))
            if begin < end:
                place = self._places[content.sha256] + begin - content.offset
                self._read_layer(place, into[begin - offset : end - offset])

    def settle(self, file: SourceFile) -> None:
        pass

    def close(self) -> None:
        pass

    def _contents(self, begin: int, end: int) -> Iterable[Content]:
        first = bisect_right(self._begins, begin) - 1
        for index in range(max(first, 0), len(self._begins)):
            if self._begins[index] >= end:
                return
            yield self._layout.contents[index]

    def _read_layer(self, place: int, into: memoryview) -> None:
        layer = self._layers[bisect_right(self._layer_begins, place) - 1]
        done = 0
        while done < len(into):
            count = os.preadv(layer.fd, [into[done:]], place - layer.begin + done)
            if count == 0:
                raise changed(self.name)
            done += count


def _open(layers: Sequence[Unpacked], stack: ExitStack) -> Iterator[_Opened]:
    begin = 0
    for layer in layers:
        if not layer.data_bytes:
            continue
        fd = os.open(layer.data, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        yield _Opened(begin, fd)
        begin += layer.data_bytes
