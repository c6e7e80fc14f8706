"""A program for test_weights_ownership: random use of models, tensors and views, with a check of every byte.

    python ownership_fuzz.py FIRST_SEED SEEDS STEPS [sabotage]

It ends by a signal if a view dangles, with a traceback if contents are wrong. `sabotage` unmaps what a model gave
out when the model is dropped, to show that this would be seen.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from snowdrop.weights import load_file, safe_open
from snowdrop.weights.area import AreaSource
from snowdrop.weights.loaded import LoadedModel
from weights_helpers import FillingArea

HELD_MAX = 60
NAMES = ["a", "b", "c", "d", "e"]


class Held(NamedTuple):
    """Something that user code holds, whose it is, and what it must contain."""

    thing: Any
    origin: tuple[int, str]
    expected: bytearray


class Opened(NamedTuple):
    number: int
    model: LoadedModel


class Mapped(NamedTuple):
    """A tensor in its model's mapping: its address, and what the mapping shows after what was written to it."""

    base: int
    shown: bytearray


class World:
    def __init__(self, seed: int, folder: Path, *, is_sabotaged: bool) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.is_sabotaged = is_sabotaged
        self.areas: list[FillingArea] = []
        self.models: list[Opened] = []
        self.held: list[Held] = []
        self.mapped: dict[tuple[int, str], Mapped] = {}
        self.count = 0
        draw = torch.Generator().manual_seed(seed)
        self.values = {
            name: torch.randint(1 << 30, (rows, 50), dtype=torch.int32, generator=draw)
            for name, rows in zip(NAMES, (37, 1, 200, 90, 3), strict=True)
        }
        self.data = save(self.values)

    def run(self, steps: int) -> None:
        actions: list[tuple[int, Callable[[], None]]] = [
            (6, self.new_area), (6, self.open_area), (2, self.open_file), (14, self.take), (8, self.derive),
            (10, self.write), (8, self.drop_held), (5, self.drop_model), (6, self.close_area),
            (2, self.remove_file), (3, self.collect), (2, self.churn), (6, self.check),
            (2, self.write_beside_what_is_to_come),
        ]  # fmt: skip
        weights = [weight for weight, _ in actions]
        for _ in range(steps):
            self.random.choices([action for _, action in actions], weights)[0]()
        self.check()
        for area in self.areas:
            area.close()
        self.collect()
        self.check()

    def new_area(self) -> None:
        if len(self.areas) < 4:
            area = FillingArea(
                {"m.safetensors": self.data}, chunk_bytes=self.random.choice([900, 900, 4096, 10_000])
            )
            order = list(range(len(area.chunks)))
            self.random.shuffle(order)
            # Few at first: what is wanted comes one by one, beside pages that are written to meanwhile.
            area.fill(0, *order[: self.random.randrange(len(order) + 1) // 4])
            area.serve_wants()
            self.areas.append(area)

    def open_area(self) -> None:
        if self.areas:
            area = self.random.choice(self.areas)
            source = area.source(is_lazy=self.random.random() < 0.5)
            self._opened(LoadedModel("m", self.folder, source, lambda: None))

    def open_file(self) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        (folder / "m.safetensors").write_bytes(self.data)
        self._opened(LoadedModel.from_directory(folder))

    def take(self) -> None:
        if not self.models:
            return
        opened = self.random.choice(self.models)
        names = self.random.sample(NAMES, self.random.randint(1, len(NAMES)))
        how = self.random.randrange(4)
        if how == 0:
            got: dict[str, Any] = dict(opened.model.tensors(names=names))
        elif how == 1:
            got = dict(opened.model.numpy(names=names))
        elif how == 2:
            self._take_rows(opened, names[0])
            got = {}
        else:
            stream = opened.model.tensors(names=names, order="asked")
            got = dict([next(stream)])  # given up in the middle
        for name, thing in got.items():
            self._hold(thing, (opened.number, name), bytes(self._mapping(opened, name).shown))

    def write_beside_what_is_to_come(self) -> None:
        """Writes to tensors of a fresh lazy model; the bytes beside them come later, and none may be lost."""
        area = FillingArea({"m.safetensors": self.data}, chunk_bytes=900)
        area.fill(0)
        area.serve_wants()
        model = LoadedModel("m", self.folder, area.source(is_lazy=True), lambda: None)
        names = self.random.sample(NAMES, self.random.randint(1, len(NAMES) - 1))
        for tensor in model.state_dict(names=names).values():
            tensor.fill_(5)
        for name, whole in model.numpy().items():
            is_right = raw(whole) == self.values[name].numpy().tobytes()
            assert is_right or name in names, f"a write to {names} has cost {name} bytes"
        area.close()

    def _take_rows(self, opened: Opened, name: str) -> None:
        rows = len(self.values[name])
        start = self.random.randrange(rows)
        stop = self.random.randint(start + 1, rows)
        part = opened.model.get_slice(name)[start:stop]
        self._hold(part, (opened.number, name), bytes(self._mapping(opened, name).shown[200 * start : 200 * stop]))

    def _mapping(self, opened: Opened, name: str) -> Mapped:
        """Where a model's own mapping has a tensor, and what it shows by now."""
        origin = (opened.number, name)
        if origin not in self.mapped:
            source: Any = opened.model._source
            entry = next(each for each in source.header(0).tensors if each.name == name)
            view = source.area.private if isinstance(source, AreaSource) else source.mapped(0)
            base = ctypes.addressof(ctypes.c_char.from_buffer(view)) + entry.offset
            self.mapped[origin] = Mapped(base, bytearray(self.values[name].numpy().tobytes()))
        return self.mapped[origin]

    def derive(self) -> None:
        """Views of views, in the ways in which user code makes them."""
        if not self.held:
            return
        held = self.random.choice(self.held)
        size = len(held.expected) // 4
        if isinstance(held.thing, np.ndarray):
            flat: Any = held.thing.reshape(-1)
            other: Any = torch.from_numpy(flat)
        else:
            flat = held.thing.reshape(-1)
            other = flat.detach().numpy()
        start = self.random.randrange(size)
        stop = self.random.randint(start + 1, size)
        part = self.random.choice([flat, other])[start:stop]
        self._hold(part, held.origin, bytes(held.expected[4 * start : 4 * stop]))

    def write(self) -> None:
        if not self.held:
            return
        self._write_to(self.random.choice(self.held))

    def _write_to(self, held: Held) -> None:
        value = self.random.randrange(1 << 20)
        held.thing[...] = value
        begin, end = address(held.thing), address(held.thing) + len(held.expected)
        fresh = np.int32(value).tobytes()
        for other in self.held:
            at = address(other.thing)
            low, high = max(begin, at), min(end, at + len(other.expected))
            if low < high:
                assert other.origin == held.origin, f"{other.origin} and {held.origin} share memory"
                other.expected[low - at : high - at] = fresh * ((high - low) // 4)
        mapped = self.mapped[held.origin]
        at = begin - mapped.base
        if 0 <= at < len(mapped.shown):  # else it has memory of its own
            mapped.shown[at : at + len(held.expected)] = held.expected

    def drop_held(self) -> None:
        for _ in range(self.random.randrange(6)):
            if self.held:
                self.held.pop(self.random.randrange(len(self.held)))

    def drop_model(self) -> None:
        if self.models:
            opened = self.models.pop(self.random.randrange(len(self.models)))
            if self.is_sabotaged:
                unmap(opened.model)

    def close_area(self) -> None:
        """The data plane goes: descriptors, its mappings, its socket. Models that wait for bytes are dropped."""
        if self.areas:
            area = self.areas.pop(self.random.randrange(len(self.areas)))
            area.fill_all()
            area.close()

    def remove_file(self) -> None:
        for path in self.folder.rglob("*.safetensors"):
            is_needed = any(path.parent == opened.model._directory for opened in self.models)
            if not is_needed and self.random.random() < 0.3:
                path.unlink()

    def collect(self) -> None:
        gc.collect()

    def churn(self) -> None:
        """New mappings, which take addresses that were given back."""
        path = self.folder / "other.safetensors"
        path.write_bytes(save({"z": torch.full((self.random.randrange(1, 30_000),), 77)}))
        kept = load_file(path, backend=self.random.choice(["mmap", "pread"]))
        with safe_open(path, "np") as file:
            assert int(file.get_tensor("z")[0]) == 77
        assert int(kept["z"].min()) == 77

    def check(self) -> None:
        for held in self.held:
            assert raw(held.thing) == held.expected, f"contents of {held.origin} are wrong"

    def _opened(self, model: LoadedModel) -> None:
        self.count += 1
        self.models.append(Opened(self.count, model))

    def _hold(self, thing: Any, origin: tuple[int, str], expected: bytes) -> None:
        assert raw(thing) == expected, f"contents of {origin} are wrong when they are given out"
        if len(self.held) < HELD_MAX:
            self.held.append(Held(thing, origin, bytearray(expected)))


def raw(thing: Any) -> bytes:
    return bytes((thing if isinstance(thing, np.ndarray) else thing.numpy()).tobytes())


def address(thing: Any) -> int:
    return int(thing.ctypes.data if isinstance(thing, np.ndarray) else thing.data_ptr())


def unmap(model: LoadedModel) -> None:
    area = getattr(model._source, "area", None)
    if area is not None:
        view = area.private
        begin = ctypes.addressof(ctypes.c_char.from_buffer(view))
        ctypes.CDLL(None).munmap(ctypes.c_void_p(begin), ctypes.c_size_t(len(view)))


def main(first: int, seeds: int, steps: int, *, is_sabotaged: bool) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    for seed in range(first, first + seeds):
        print(f"seed {seed}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            World(seed, Path(folder), is_sabotaged=is_sabotaged).run(steps)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), is_sabotaged="sabotage" in sys.argv[4:])
