"""The plan covers exactly the bytes that are asked for, in order, each once, whatever is cut and how."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from snowdrop.content.safetensors import tensor_bytes
from snowdrop.domain.manifest import TensorEntry
from snowdrop.weights.direct import ALIGNMENT, plan_windows
from snowdrop.weights.frameworks import numpy_array, torch_tensor
from snowdrop.weights.plan import FileTable, LoadPlan, PlannedTensor, Request, normalise_index, part_of, plan_load

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "U8": np.uint8}


@st.composite
def entries(draw: st.DrawFn, prefix: str = "t") -> tuple[TensorEntry, ...]:
    """Tensors one after the other, as the safetensors format has them, after a header of any length."""
    offset = draw(st.integers(10, 200))
    made: list[TensorEntry] = []
    for number in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
        length = tensor_bytes(dtype, shape)
        assert length is not None
        made.append(TensorEntry(name=f"{prefix}{number}", dtype=dtype, shape=shape, offset=offset, length=length))
        offset += length
    return tuple(made)


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    bound = st.none() | st.integers(-9, 9)
    step = st.none() | st.integers(1, 4)
    parts: list[int | slice] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        if size and draw(st.booleans()):
            parts.append(draw(st.integers(-size, size - 1)))
        else:
            parts.append(slice(draw(bound), draw(bound), draw(step)))
    return tuple(parts)


def file_bytes(table: tuple[TensorEntry, ...]) -> bytearray:
    size = table[-1].offset + table[-1].length
    return bytearray((i * 7 + i // 251) % 256 for i in range(size))


def array_of(data: bytearray, entry: TensorEntry) -> np.ndarray:
    raw = bytes(data[entry.offset : entry.offset + entry.length])
    return np.frombuffer(raw, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def gathered(data: bytearray, tensor: PlannedTensor) -> bytes:
    return b"".join(bytes(data[offset : offset + length]) for offset, length in tensor.spans(0))


@settings(deadline=None)
@given(st.data())
def test_a_slice_is_what_numpy_slices(data: st.DataObject) -> None:
    table = data.draw(entries())
    entry = data.draw(st.sampled_from(table))
    index = data.draw(indices(entry.shape))
    content = file_bytes(table)
    wanted = array_of(content, entry)[index]
    part = normalise_index(entry.shape, index)
    assert part is not None
    tensor = PlannedTensor(file=0, path="f", entry=entry, index=part)
    assert tensor.shape == wanted.shape
    assert tensor.length == wanted.nbytes
    assert gathered(content, tensor) == wanted.tobytes()
    view = memoryview(content)[entry.offset : entry.offset + entry.length]
    assert numpy_array(view, tensor).tobytes() == wanted.tobytes()
    made = torch_tensor(view, tensor)
    assert tuple(made.shape) == wanted.shape
    assert made.is_contiguous()
    assert made.numpy().tobytes() == wanted.tobytes()


@settings(deadline=None)
@given(st.data(), st.integers(0, 40))
def test_merged_spans_cover_the_exact_ones_and_little_more(data: st.DataObject, gap_bytes: int) -> None:
    table = data.draw(entries())
    entry = data.draw(st.sampled_from(table))
    part = normalise_index(entry.shape, data.draw(indices(entry.shape)))
    tensor = PlannedTensor(file=0, path="f", entry=entry, index=part)
    exact, merged = list(tensor.spans(0)), list(tensor.spans(gap_bytes))
    assert sum(length for _, length in exact) == tensor.length
    for runs, gap in ((exact, 0), (merged, gap_bytes)):
        for (offset, length), (later, _) in pairwise(runs):
            assert later - (offset + length) > gap
    bytes_of = [{at for o, n in runs for at in range(o, o + n)} for runs in (exact, merged)]
    assert bytes_of[0] <= bytes_of[1]
    assert len(bytes_of[1] - bytes_of[0]) <= gap_bytes * max(0, len(exact) - 1)
    assert all(entry.offset <= at < entry.offset + entry.length for at in bytes_of[1])


@st.composite
def models(draw: st.DrawFn) -> list[FileTable]:
    count = draw(st.integers(1, 3))
    return [FileTable(path=f"f{i}", tensors=draw(entries(prefix=f"{'abc'[i]}."))) for i in range(count)]


@settings(deadline=None)
@given(models())
def test_a_plan_of_all_covers_each_file_once_in_load_order(files: list[FileTable]) -> None:
    plan = plan_load(files, Request())
    assert [tensor.entry.name for tensor in plan.tensors] == [e.name for table in files for e in table.tensors]
    for number, table in enumerate(files):
        begin = table.tensors[0].offset
        end = table.tensors[-1].offset + table.tensors[-1].length
        extents = [extent for extent in plan.extents() if extent.file == number]
        assert [(e.offset, e.length) for e in extents] == ([(begin, end - begin)] if end > begin else [])


@settings(deadline=None)
@given(models(), st.data())
def test_names_choose_and_order(files: list[FileTable], data: st.DataObject) -> None:
    names = [entry.name for table in files for entry in table.tensors]
    asked = tuple(data.draw(st.lists(st.sampled_from([*names, "a.*", "?.0"]), min_size=1, unique=True)))
    plan = plan_load(files, Request(names=asked))
    got = [tensor.entry.name for tensor in plan.tensors]
    assert got == [name for name in names if name in asked or any(matches(name, each) for each in asked)]
    reordered = [t.entry.name for t in plan_load(files, Request(names=asked, order="asked")).tensors]
    assert sorted(reordered) == sorted(got)
    ranks = [next(i for i, each in enumerate(asked) if matches(name, each)) for name in reordered]
    assert ranks == sorted(ranks)
    assert no_byte_twice(plan)


def matches(name: str, pattern: str) -> bool:
    if pattern == "a.*":
        return name.startswith("a.")
    return name[1:] == ".0" if pattern == "?.0" else name == pattern


def no_byte_twice(plan: LoadPlan) -> bool:
    taken: set[tuple[int, int]] = set()
    for extent in plan.extents(0):
        cells = {(extent.file, at) for at in range(extent.offset, extent.offset + extent.length)}
        if taken & cells:
            return False
        taken |= cells
    return True


@settings(deadline=None)
@given(entries(), st.integers(1, 5), st.integers(-4, 3))
def test_the_parts_of_all_ranks_are_the_tensor(table: tuple[TensorEntry, ...], world: int, dim: int) -> None:
    content = file_bytes(table)
    files = [FileTable(path="f", tensors=table)]
    plans = [plan_load(files, Request(rank=rank, world=world, split=dim)) for rank in range(world)]
    assert all(no_byte_twice(plan) for plan in plans)
    for number, entry in enumerate(table):
        whole = array_of(content, entry)
        parts = [
            np.frombuffer(gathered(content, plan.tensors[number]), dtype=whole.dtype).reshape(
                plan.tensors[number].shape
            )
            for plan in plans
        ]
        if -whole.ndim <= dim < whole.ndim:
            assert np.array_equal(np.concatenate(parts, axis=dim), whole, equal_nan=entry.dtype[0] == "F")
            sizes = [part.shape[dim] for part in parts]
            assert max(sizes) - min(sizes) <= 1
        else:
            assert all(np.array_equal(part, whole, equal_nan=entry.dtype[0] == "F") for part in parts)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40))
def test_parts_are_those_of_array_split(size: int, world: int) -> None:
    wanted = [len(part) for part in np.array_split(np.zeros(size, dtype=np.int8), world)]
    got = [part_of(size, rank, world) for rank in range(world)]
    assert [stop - start for start, stop in got] == wanted
    assert got[0][0] == 0
    assert all(one[1] == two[0] for one, two in pairwise(got))


@settings(deadline=None)
@given(models(), st.data())
def test_windows_hold_every_byte_of_their_tensors(files: list[FileTable], data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 3))
    request = Request(rank=data.draw(st.integers(0, world - 1)), world=world, split=0)
    plan = plan_load(files, request)
    windows, numbers = plan_windows(plan)
    assert len(numbers) == len(plan.tensors)
    assert sorted(n for n in numbers if n >= 0) == [n for n in numbers if n >= 0]
    for tensor, number in zip(plan.tensors, numbers, strict=True):
        if not tensor.length:
            assert number == -1
            continue
        window = windows[number]
        assert window.file == tensor.file
        assert window.start <= tensor.entry.offset
        assert tensor.entry.offset + tensor.entry.length <= window.end
        assert window.start % ALIGNMENT == window.end % ALIGNMENT == 0
        read = {at for offset, length in window.spans for at in range(offset, offset + length)}
        assert all(at in read for offset, length in tensor.spans(0) for at in range(offset, offset + length))
