"""Streaming out of a landing area: what comes when, what is asked for, and what happens when it ends early."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from snowdrop.domain.errors import CorruptContentError, ErrorBody, IntegrityError, PlatformDownError, TimedOutError
from snowdrop.weights.area import RENEWALS_MAX, AreaSource, MappedArea, map_area
from snowdrop.weights.loaded import LoadedModel
from snowdrop.wire.replica import AreaFile
from weights_helpers import FillingArea

BOUND_S = 0.05
"""For waits that must run out."""

SHAPE = (1000, 3)


def tensor(value: float, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.full(shape, float(value))


@pytest.fixture
def make() -> Iterator[Callable[..., FillingArea]]:
    made: list[FillingArea] = []

    def build(*shards: dict[str, torch.Tensor], chunk_bytes: int | None = None) -> FillingArea:
        files = {f"model-{i}.safetensors": save(tensors) for i, tensors in enumerate(shards, 1)}
        made.append(FillingArea(files, chunk_bytes=chunk_bytes))
        return made[-1]

    yield build
    for area in made:
        area.close()


def model(source: AreaSource) -> LoadedModel:
    return LoadedModel("m", Path("/nowhere"), source, lambda: None)


def chunks_of(area: FillingArea, begin: int, end: int) -> list[int]:
    return [i for i, c in enumerate(area.chunks) if c.offset < end and c.offset + len(c.data) > begin]


def headers(area: FillingArea) -> list[int]:
    """The first chunk of each file."""
    return [i for i, chunk in enumerate(area.chunks) if any(chunk.offset == file.offset for file in area.files)]


def test_a_tensor_is_given_out_while_later_ones_are_on_the_wire(make: Callable[..., FillingArea]) -> None:
    big = (1 << 17) // 4  # with a chunk of its own, a whole number of pages
    area = make({f"t{i}": tensor(i, (big * 4,)) for i in range(4)})
    area.fill(0)
    tensors = model(area.source(wait_s_max=BOUND_S)).tensors()
    for i in range(3):
        # Its own chunk, and the next one, which shares its last page.
        area.fill(i + 1, i + 2)
        name, got = next(tensors)
        assert (name, got.unique().tolist()) == (f"t{i}", [float(i)])
    assert not area.writer.filled[4] or len(area.chunks) == 5


def test_a_wait_has_the_bound_that_it_was_given(make: Callable[..., FillingArea]) -> None:
    area = make({"t": tensor(1)})
    with pytest.raises(TimedOutError):
        model(area.source(wait_s_max=BOUND_S)).keys()
    area.fill(0)
    got = model(area.source(wait_s_max=BOUND_S))
    assert got.keys() == ["t"]
    with pytest.raises(TimedOutError, match="bytes are not there"):
        got.state_dict()
    with pytest.raises(TimedOutError):
        got.wait_complete(BOUND_S)
    area.fill_all()
    got.wait_complete(BOUND_S)
    assert got.state_dict()["t"].unique().tolist() == [1.0]


def test_a_waiting_thread_goes_on_when_bytes_come(make: Callable[..., FillingArea]) -> None:
    area = make({f"t{i:02}": tensor(i) for i in range(20)}, chunk_bytes=5000)
    got: dict[str, torch.Tensor] = {}
    loaded = model(area.source())
    thread = threading.Thread(target=lambda: got.update(loaded.tensors()))
    thread.start()
    for number in range(len(area.chunks)):
        area.fill(number)
    thread.join(30)
    assert [value.unique().tolist() for value in got.values()] == [[float(i)] for i in range(20)]


def test_why_an_area_cannot_be_filled_is_raised(make: Callable[..., FillingArea]) -> None:
    area = make({"t": tensor(1)})
    area.fill(0)
    area.fail(ErrorBody(kind="integrity", message="chunk 7 is wrong", where="pack p"))
    with pytest.raises(IntegrityError, match="chunk 7 is wrong"):
        model(area.source()).state_dict()


class TestEdges:
    """A page that a tensor shares with bytes which are still to come."""

    def test_writing_to_a_tensor_loses_no_byte_of_its_neighbour(self, make: Callable[..., FillingArea]) -> None:
        area = make({"a": tensor(1), "b": tensor(2)}, chunk_bytes=100)
        begin = area.files[0].size - 2 * 12_000
        area.fill(*chunks_of(area, 0, begin + 12_000))
        loaded = model(area.source(wait_s_max=BOUND_S))
        with pytest.raises(TimedOutError):
            next(loaded.tensors())  # its last page also holds the beginning of b
        area.fill(*chunks_of(area, 0, begin + 12_000 + 4096))
        _, first = next(loaded.tensors())
        first.fill_(9)
        area.fill_all()
        assert loaded.state_dict()["b"].unique().tolist() == [2.0]
        assert first.unique().tolist() == [9.0]

    def test_where_the_neighbour_is_not_asked_for_the_tensor_has_its_own_memory(
        self, make: Callable[..., FillingArea]
    ) -> None:
        area = make({"a": tensor(1), "b": tensor(2)}, chunk_bytes=100)
        area.fill(0)
        area.serve_wants()
        loaded = model(area.source(is_lazy=True))
        first = loaded.state_dict(names="a")["a"]
        first.fill_(9)
        assert not all(area.writer.filled)
        assert loaded.state_dict(names="b")["b"].unique().tolist() == [2.0]
        assert loaded.state_dict(names="a")["a"].unique().tolist() == [1.0]

    def test_a_lazy_load_of_neighbours_copies_nothing(self, make: Callable[..., FillingArea]) -> None:
        area = make({"a": tensor(1), "b": tensor(2), "c": tensor(3)}, chunk_bytes=100)
        area.fill(0)
        area.serve_wants()
        loaded = model(area.source(is_lazy=True))
        assert loaded.keys() == ["a", "b", "c"]
        area.fill(*chunks_of(area, 0, area.files[0].size - 3 * 12_000))  # the header is always there
        one, two = loaded.state_dict(), loaded.state_dict()
        assert [one[name].data_ptr() == two[name].data_ptr() for name in "abc"] == [True] * 3

    def test_numpy_as_well(self, make: Callable[..., FillingArea]) -> None:
        area = make({"a": tensor(1), "b": tensor(2)}, chunk_bytes=100)
        area.fill(0)
        area.serve_wants()
        loaded = model(area.source(is_lazy=True))
        loaded.numpy(names="a")["a"][:] = 9
        assert np.unique(loaded.numpy()["b"]).tolist() == [2.0]


class TestWants:
    def test_a_rank_asks_only_for_the_chunks_of_its_part(self, make: Callable[..., FillingArea]) -> None:
        area = make({"w": torch.arange(4 * 40_000.0).reshape(4, 40_000)}, chunk_bytes=40_000)
        area.fill(*headers(area))
        area.serve_wants()
        loaded = model(area.source(is_lazy=True))
        got = loaded.state_dict(rank=2, world=4, split=0)["w"]
        assert torch.equal(got, torch.arange(2 * 40_000.0, 3 * 40_000.0).reshape(1, 40_000))
        begin = area.files[0].size - 4 * 160_000
        needed = chunks_of(area, begin + 2 * 160_000, begin + 3 * 160_000)
        assert set(area.wanted) == set(needed)
        assert [i for i, filled in enumerate(area.writer.filled) if filled] == sorted({*needed, 0})

    def test_a_slice_as_well(self, make: Callable[..., FillingArea]) -> None:
        area = make({"w": torch.arange(4 * 40_000.0).reshape(4, 40_000)}, chunk_bytes=40_000)
        area.fill(*headers(area))
        area.serve_wants()
        piece = model(area.source(is_lazy=True)).get_slice("w")
        assert piece.get_shape() == [4, 40_000]
        assert area.takes_wants() == []
        assert torch.equal(piece[3, 100:110], torch.arange(3 * 40_000.0 + 100, 3 * 40_000.0 + 110))
        assert len(set(area.wanted)) <= 2

    def test_what_is_asked_comes_first_in_the_order_asked(self, make: Callable[..., FillingArea]) -> None:
        area = make({f"t{i}": tensor(i) for i in range(6)}, chunk_bytes=3000)
        area.fill(*headers(area))
        tensors = model(area.source(wait_s_max=BOUND_S)).tensors(names=["t4", "t1"], order="asked")
        with pytest.raises(TimedOutError):
            next(tensors)
        begin = area.files[0].size - 6 * 12_000
        last, first = (chunks_of(area, begin + i * 12_000, begin + (i + 1) * 12_000) for i in (4, 1))
        first = [chunk for chunk in first if chunk not in last and not area.writer.filled[chunk]]
        assert area.takes_wants()[: len(last) + len(first)] == last + first

    def test_a_long_plan_is_asked_for_as_it_goes(
        self, make: Callable[..., FillingArea], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("snowdrop.weights.area.ASK_BYTES", 12_000)
        area = make({f"t{i:02}": tensor(i) for i in range(12)}, chunk_bytes=12_000)
        area.fill(*headers(area))
        tensors = model(area.source(wait_s_max=BOUND_S)).tensors()
        with pytest.raises(TimedOutError):
            next(tensors)
        asked = set(area.takes_wants())
        assert 2 <= len(asked) <= 4
        area.serve_wants()
        rest = dict(model(area.source()).tensors())
        assert len(rest) == 12


class TestRenewal:
    def test_when_the_data_plane_dies_another_area_goes_on(self, make: Callable[..., FillingArea]) -> None:
        tensors = {f"t{i}": tensor(i) for i in range(6)}
        first, second = make(tensors, chunk_bytes=3000), make(tensors, chunk_bytes=3000)
        second.fill_all()
        first.fill(*range(12))
        loaded = model(first.source(renew=second.map))
        stream = loaded.tensors()
        early = [next(stream), next(stream)]
        first.close()
        late = list(stream)
        gc.collect()
        got = dict(early + late)
        assert list(got) == list(tensors)
        assert [got[f"t{i}"].unique().tolist() for i in range(6)] == [[float(i)] for i in range(6)]

    def test_a_tensor_that_had_come_in_half_is_taken_from_one_area(self, make: Callable[..., FillingArea]) -> None:
        tensors = {"w": torch.arange(4 * 100_000.0).reshape(4, 100_000)}
        first, second = make(tensors, chunk_bytes=40_000), make(tensors, chunk_bytes=40_000)
        begin = first.files[0].size - 4 * 400_000
        first.fill(*chunks_of(first, 0, begin + 100_000))
        second.fill(*headers(second))
        second.serve_wants()
        loaded = model(first.source(is_lazy=True, renew=second.map))
        assert loaded.keys() == ["w"]
        first.close()
        # Two runs far apart: the first is in the old area, the second only in the new one.
        got = loaded.state_dict(rank=0, world=8, split=1)["w"]
        assert torch.equal(got, tensors["w"][:, :12_500])

    def test_it_is_tried_a_bounded_number_of_times(self, make: Callable[..., FillingArea]) -> None:
        tensors = {"t": tensor(1)}
        areas = [make(tensors, chunk_bytes=3000) for _ in range(RENEWALS_MAX + 2)]
        mapped: list[MappedArea] = []
        for area in areas[1:]:
            mapped.append(area.map())
            area.close()
        areas[0].fill(0)
        loaded = model(areas[0].source(renew=lambda: mapped.pop(0)))
        areas[0].close()
        with pytest.raises(PlatformDownError):
            loaded.state_dict()
        assert len(mapped) == 1
        assert mapped[0].reader is not None
        mapped[0].reader.close()

    def test_without_a_way_to_renew_it_is_said(self, make: Callable[..., FillingArea]) -> None:
        area = make({"t": tensor(1)})
        area.fill(0)
        loaded = model(area.source())
        area.close()
        with pytest.raises(PlatformDownError, match="data plane ended"):
            loaded.state_dict()

    def test_another_model_is_refused(self, make: Callable[..., FillingArea]) -> None:
        area, other = make({"t": tensor(1)}), make({"t": tensor(1, (7,))})
        area.fill(0)
        loaded = model(area.source(renew=other.map))
        area.close()
        with pytest.raises(CorruptContentError, match="changed while"):
            loaded.state_dict()


def own_bytes() -> int:
    """Memory that slabs take in this process alone: pages copied because they were written to."""
    total, is_slab = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            is_slab = "memfd:" in line
        elif is_slab and line.startswith("Anonymous:"):
            total += int(line.split()[1]) << 10
    return total


def test_a_second_mapping_copies_no_page_but_those_that_are_written_to(make: Callable[..., FillingArea]) -> None:
    area = make({f"t{i}": tensor(i, (300, 500)) for i in range(8)})
    area.fill_all()
    before = own_bytes()
    first, second = model(area.source()).state_dict(), model(area.source()).state_dict()
    module = torch.nn.ParameterDict({f"t{i}": torch.empty(300, 500, device="meta") for i in range(8)})
    third = model(area.source())
    third.load_into(module)
    totals = [sum(float(value.detach().sum()) for value in got.values()) for got in (first, second, module)]
    assert totals == [28 * 150_000.0] * 3
    assert own_bytes() == before
    first["t3"][7, 7] = 1
    assert own_bytes() == before + 4096
    assert second["t3"][7, 7] == 3


def test_many_threads_load_at_once(make: Callable[..., FillingArea]) -> None:
    shard = [{f"s{s}.t{i}": tensor(10 * s + i) for i in range(8)} for s in range(2)]
    area = make(*shard, chunk_bytes=3000)
    loaded = model(area.source())
    results: list[dict[str, torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(loaded.state_dict())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for number in reversed(range(len(area.chunks))):
        area.fill(number)
    for thread in threads:
        thread.join(30)
    assert len(results) == 6
    for got in results:
        assert {name: value[0, 0].item() for name, value in got.items()} == {
            f"s{s}.t{i}": 10 * s + i for s in range(2) for i in range(8)
        }


def test_a_model_that_goes_gives_its_descriptors_back(make: Callable[..., FillingArea]) -> None:
    area = make({"t": tensor(1)})
    area.fill_all()
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [model(area.source()).state_dict()["t"] for _ in range(5)]
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(each.unique().tolist() == [1.0] for each in kept)


def test_a_file_outside_of_its_area_or_slabs_is_refused() -> None:
    with pytest.raises(CorruptContentError, match="outside"):
        map_area((AreaFile("a", 4096, 10),), 4096, [], [], None)
    with pytest.raises(CorruptContentError, match="larger than its slabs"):
        map_area((AreaFile("a", 0, 10),), 4096, [], [], None)
