"""What every device does with a stream of tensors: the CPU, the simulated CUDA device both ways, CUDA if there
is one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from snowdrop.domain.errors import DeviceError, InvalidInputError
from snowdrop.weights.devices.choose import open_device
from snowdrop.weights.devices.cpu import CpuDevice
from snowdrop.weights.devices.cuda import CudaDevice
from snowdrop.weights.devices.port import Device
from snowdrop.weights.devices.sim import SimClock, SimCudaRuntime
from snowdrop.weights.feeds import Feed, Loan, Piece
from snowdrop.weights.plan import PlannedTensor, Request
from snowdrop.weights.stream import as_stored, floating_to, plan_of, stream
from weights_helpers import FillingArea

TENSORS = {
    "a": torch.randn(300, 70),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.randn(33, 17).bfloat16(),
    "d": torch.tensor(3.5),
    "e": torch.empty(0, 4),
    "f": torch.randn(200, 300).half(),
    "g": torch.tensor([True, False]),
    "h": torch.randn(7).to(torch.float8_e4m3fn),
}


def simulated(**options: Any) -> CudaDevice:
    return CudaDevice(SimCudaRuntime(SimClock(), bytes_per_s=1e9, **options), in_flight_bytes_max=100_000)


@pytest.fixture(params=["cpu", "cuda simulated, registered", "cuda simulated, ring", "cuda"])
def make(request: pytest.FixtureRequest) -> Callable[[], Device]:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA here")
        return lambda: open_device("cuda")
    if request.param == "cpu":
        return CpuDevice
    return lambda: simulated(can_register="registered" in request.param)


@pytest.fixture
def area() -> Iterator[FillingArea]:
    made = FillingArea({"m.safetensors": save(TENSORS)}, chunk_bytes=10_000)
    yield made
    made.close()


def load(area: FillingArea, device: Device, request: Request = Request(), **casts: Any) -> dict[str, torch.Tensor]:  # noqa: B008
    source = area.source()
    return dict(stream(source, plan_of(source, request), device, floating_to(casts.get("dtype"))))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_tensors_arrive_as_they_are(area: FillingArea, make: Callable[[], Device]) -> None:
    area.fill_all()
    got = load(area, make())
    assert set(got) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
        assert raw(got[name]) == raw(tensor), name


def test_only_floats_are_cast(area: FillingArea, make: Callable[[], Device]) -> None:
    area.fill_all()
    got = load(area, make(), dtype=torch.float32)
    for name, tensor in TENSORS.items():
        wanted = tensor.float() if tensor.is_floating_point() else tensor
        assert raw(got[name]) == raw(wanted), name


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_those_of_the_tensor(area: FillingArea, make: Callable[[], Device], dim: int) -> None:
    area.fill_all()
    got = [load(area, make(), Request(rank=rank, world=3, split=dim)) for rank in range(3)]
    for name in ("a", "c", "f"):
        assert raw(torch.cat([part[name].cpu() for part in got], dim)) == raw(TENSORS[name])


def test_tensors_outlive_the_area_and_share_nothing(area: FillingArea, make: Callable[[], Device]) -> None:
    area.fill_all()
    got, again = load(area, make()), load(area, make())
    area.close()
    gc.collect()
    got["a"].fill_(1)
    assert raw(got["f"]) == raw(TENSORS["f"])
    assert raw(again["f"]) == raw(TENSORS["f"])


def test_writing_into_one_reaches_no_other_mapping(area: FillingArea, make: Callable[[], Device]) -> None:
    area.fill_all()
    mine, other = load(area, make()), load(area, make())
    mine["a"].fill_(7)
    assert raw(other["a"]) == raw(TENSORS["a"])
    assert raw(load(area, make())["a"]) == raw(TENSORS["a"])


def test_each_is_there_while_later_bytes_are_not(area: FillingArea, make: Callable[[], Device]) -> None:
    source = area.source(wait_s_max=0.05)
    area.fill(0)
    plan = plan_of(source, Request())
    by_end = sorted(plan.tensors, key=lambda tensor: tensor.entry.offset)
    with closing(make()) as device, closing(source.open(plan)) as feed:
        for tensor in by_end:
            # Its bytes, and those that share a page with its last.
            end = tensor.entry.offset + tensor.entry.length
            area.fill(*[i for i, chunk in enumerate(area.chunks) if chunk.offset <= -(-end // 4096) * 4096])
            assert raw(device.place(tensor, feed, None)) == raw(TENSORS[tensor.entry.name])
    gc.collect()


def test_a_failing_feed_is_raised_as_it_is_and_the_device_closes(
    area: FillingArea, make: Callable[[], Device]
) -> None:
    class Failing:
        def whole(self, _tensor: PlannedTensor) -> Loan:
            raise ConnectionError("gone")

        def pieces(self, _tensor: PlannedTensor) -> Iterator[Piece]:
            raise ConnectionError("gone")

        def close(self) -> None:
            pass

    area.fill_all()
    plan = plan_of(area.source(), Request())
    with closing(make()) as device, pytest.raises(ConnectionError, match="gone"):
        device.place(plan.tensors[0], Failing(), None)


def test_closing_twice_is_harmless(make: Callable[[], Device]) -> None:
    device = make()
    device.close()
    device.close()


def test_unknown_devices_are_refused() -> None:
    for name in ("rocket", "cuda:99"):
        with pytest.raises(InvalidInputError, match="no device"):
            open_device(name)


def test_other_devices_of_torch_get_a_copy(area: FillingArea) -> None:
    area.fill_all()
    got = load(area, open_device("meta"))
    assert got["a"].device.type == "meta"
    assert got["a"].shape == TENSORS["a"].shape


class Arriving:
    """A feed whose bytes come over a link of limited bandwidth, in the same virtual time as the device's
    copies.
    """

    def __init__(self, feed: Feed, clock: SimClock, bytes_per_s: float) -> None:
        self._feed, self._clock, self._bytes_per_s = feed, clock, bytes_per_s
        self.bytes = 0

    def pieces(self, tensor: PlannedTensor) -> Iterator[Piece]:
        for piece in self._feed.pieces(tensor):
            self._arrive(len(piece.view))
            yield piece

    def whole(self, tensor: PlannedTensor) -> Loan:
        self._arrive(tensor.length)
        return self._feed.whole(tensor)

    def close(self) -> None:
        self._feed.close()

    def _arrive(self, length: int) -> None:
        self.bytes += length
        self._clock.advance_to(self.bytes / self._bytes_per_s)


@pytest.fixture
def equal() -> Iterator[tuple[FillingArea, int]]:
    """Ten tensors of 40,000 bytes."""
    tensors = {f"t{i}": torch.full((10_000,), float(i)) for i in range(10)}
    area = FillingArea({"m.safetensors": save(tensors)})
    area.fill_all()
    yield area, 40_000
    area.close()


def run(
    area: FillingArea, runtime: SimCudaRuntime, clock: SimClock, link: float, **options: Any
) -> dict[str, torch.Tensor]:
    source = area.source()
    plan = plan_of(source, Request())
    got: dict[str, torch.Tensor] = {}
    with (
        closing(CudaDevice(runtime, **options)) as device,
        closing(Arriving(source.open(plan), clock, link)) as feed,
    ):
        for tensor in plan.tensors:
            got[tensor.entry.name] = device.place(tensor, feed, None)
    return got


class TestOverlap:
    @pytest.mark.parametrize("can_register", [True, False])
    def test_copies_run_while_later_tensors_arrive(
        self, equal: tuple[FillingArea, int], can_register: bool
    ) -> None:
        area, each = equal
        clock = SimClock()
        runtime = SimCudaRuntime(clock, bytes_per_s=2e6, can_register=can_register)
        run(area, runtime, clock, link=1e6)
        # The link is the slower one: all but the last copy hides behind it.
        assert runtime.ready_s == pytest.approx(10 * each / 1e6 + each / 2e6)

    def test_a_slow_device_is_busy_from_the_first_tensor_to_the_last(self, equal: tuple[FillingArea, int]) -> None:
        area, each = equal
        clock = SimClock()
        runtime = SimCudaRuntime(clock, bytes_per_s=1e6)
        run(area, runtime, clock, link=4e6)
        assert runtime.ready_s == pytest.approx(each / 4e6 + 10 * each / 1e6)


class TestBounds:
    def test_bytes_in_flight_are_bounded(self, equal: tuple[FillingArea, int]) -> None:
        area, each = equal
        clock = SimClock()
        runtime = SimCudaRuntime(clock, bytes_per_s=1e3)
        run(area, runtime, clock, link=1e9, in_flight_bytes_max=3 * each)
        assert runtime.in_flight_bytes_most == 3 * each

    def test_the_ring_is_bounded_and_its_buffers_are_used_again(
        self, equal: tuple[FillingArea, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        area, _ = equal
        for module in ("feeds", "area", "devices.cuda"):
            monkeypatch.setattr(f"snowdrop.weights.{module}.PIECE_BYTES_MAX", 16_000)
        clock = SimClock()
        runtime = SimCudaRuntime(clock, bytes_per_s=1e6, can_register=False)
        got = run(area, runtime, clock, link=1e9, ring_slots=2)
        assert runtime.pinned_bytes == 2 * 16_000
        assert [got[f"t{i}"].unique().tolist() for i in range(10)] == [[float(i)] for i in range(10)]

    def test_memory_is_registered_once_and_given_back(
        self, equal: tuple[FillingArea, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        area, _ = equal
        monkeypatch.setattr("snowdrop.weights.area.REGION_BYTES", 1 << 16)
        clock = SimClock()
        runtime = SimCudaRuntime(clock, bytes_per_s=1e6)
        got = run(area, runtime, clock, link=1e9)
        assert runtime.registrations == -(-area.area_bytes // (1 << 16))
        assert runtime.registered == set()
        assert [got[f"t{i}"].unique().tolist() for i in range(10)] == [[float(i)] for i in range(10)]

    def test_registered_memory_stays_mapped_until_it_is_unregistered(self, equal: tuple[FillingArea, int]) -> None:
        def shared_mappings() -> int:
            lines = Path("/proc/self/maps").read_text().splitlines()
            return sum("memfd:slab" in line and "r--s" in line for line in lines)

        area, _ = equal
        before = shared_mappings()
        clock = SimClock()
        device = CudaDevice(SimCudaRuntime(clock, bytes_per_s=1e9))
        mapped: list[int] = []
        for _ in range(2):  # as after a renewal: the second area's copies let go of the first one's sources
            source = area.source()
            plan = plan_of(source, Request())
            device.place(plan.tensors[0], source.open(plan), None)
            clock.advance_to(clock.now_s + 1)
            gc.collect()
            mapped.append(shared_mappings() - before)
        assert mapped[1] == 2 * mapped[0] > 0
        del source
        device.close()
        gc.collect()
        assert shared_mappings() == before

    def test_dropped_tensors_give_their_memory_back(self, equal: tuple[FillingArea, int]) -> None:
        area, each = equal
        runtime = SimCudaRuntime(SimClock(), bytes_per_s=1e6, memory_bytes=2 * each)
        source = area.source()
        # Two fit: the one that the loop holds, and the next.
        sums = [
            float(t.sum()) for _, t in stream(source, plan_of(source, Request()), CudaDevice(runtime), as_stored)
        ]
        assert sums == [10_000.0 * i for i in range(10)]


class TestFailures:
    def test_no_memory_names_device_and_tensor(self, equal: tuple[FillingArea, int]) -> None:
        area, each = equal
        clock = SimClock()
        runtime = SimCudaRuntime(clock, bytes_per_s=1e6, memory_bytes=3 * each)
        with pytest.raises(DeviceError, match="no memory for 40000 bytes") as caught:
            run(area, runtime, clock, link=1e9)
        assert caught.value.where == "cuda:sim, m.safetensors: tensor 't3'"
        assert runtime.registered == set()

    def test_a_failed_copy_names_device_and_tensor(self, equal: tuple[FillingArea, int]) -> None:
        area, _ = equal
        clock = SimClock()
        runtime = SimCudaRuntime(clock, bytes_per_s=1e6, failing_copy=2)
        with pytest.raises(DeviceError, match="illegal memory access") as caught:
            run(area, runtime, clock, link=1e9)
        assert caught.value.where == "cuda:sim, m.safetensors: tensor 't2'"
        assert runtime.registered == set()

    def test_a_stream_that_is_given_up_waits_for_its_copies(self, equal: tuple[FillingArea, int]) -> None:
        area, _ = equal
        runtime = SimCudaRuntime(SimClock(), bytes_per_s=1e3)
        source = area.source()
        tensors = stream(source, plan_of(source, Request()), CudaDevice(runtime), as_stored)
        next(tensors)
        tensors.close()  # type: ignore[attr-defined]
        assert runtime.registered == set()


class TestTheSimulationItself:
    """It is strict: what a real device may forgive is an error here."""

    def runtime(self) -> tuple[SimClock, SimCudaRuntime]:
        clock = SimClock()
        return clock, SimCudaRuntime(clock, bytes_per_s=10.0)

    def test_a_tensor_that_is_used_too_early_is_wrong(self) -> None:
        _, runtime = self.runtime()
        source = runtime.pinned(4)
        source[:] = b"abcd"
        target = runtime.allocate((4,), torch.uint8)
        runtime.copy(target, 0, source)
        assert bytes(target.tolist()) != b"abcd"
        runtime.order(runtime.record())
        assert bytes(target.tolist()) == b"abcd"

    def test_a_source_that_changes_under_way_is_an_error(self) -> None:
        clock, runtime = self.runtime()
        source = runtime.pinned(4)
        runtime.copy(runtime.allocate((4,), torch.uint8), 0, source)
        event = runtime.record()
        assert not runtime.is_done(event)
        source[0] = 1
        with pytest.raises(RuntimeError, match="written to before"):
            runtime.synchronise(event)
        assert clock.now_s == pytest.approx(0.4)

    def test_pageable_sources_are_an_error(self) -> None:
        _, runtime = self.runtime()
        with pytest.raises(RuntimeError, match="registered or pinned"):
            runtime.copy(runtime.allocate((4,), torch.uint8), 0, memoryview(bytearray(4)))
