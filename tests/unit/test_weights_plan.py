import pytest

from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.manifest import TensorEntry
from snowdrop.weights.plan import FileTable, PlannedTensor, Request, normalise_index, plan_load


def entry(name: str, shape: tuple[int, ...], offset: int = 100, dtype: str = "F32") -> TensorEntry:
    length = 4
    for size in shape:
        length *= size
    return TensorEntry(name=name, dtype=dtype, shape=shape, offset=offset, length=length)


FILES = [
    FileTable(path="model-1.safetensors", tensors=(entry("q.weight", (8, 4)), entry("q.bias", (8,), 228))),
    FileTable(path="model-2.safetensors", tensors=(entry("o.weight", (4, 8)),)),
]


def test_a_split_by_name_cuts_what_it_names_and_leaves_the_rest_whole() -> None:
    split = {"o.*": 1, "q.weight": 0, "*": None}
    plan = plan_load(FILES, Request(rank=1, world=2, split=split))
    assert {tensor.entry.name: tensor.shape for tensor in plan.tensors} == {
        "q.weight": (4, 4),
        "q.bias": (8,),
        "o.weight": (4, 4),
    }


def test_rows_need_half_of_the_bytes_and_columns_all_chunks_between() -> None:
    rows, _, columns = plan_load(FILES, Request(rank=1, world=2, split={"o.*": 1, "q.weight": 0})).tensors
    assert list(rows.spans()) == [(100 + 64, 64)]
    assert list(columns.spans(0)) == [(100 + 16 + 32 * row, 16) for row in range(4)]
    assert list(columns.spans()) == [(116, 32 * 3 + 16)]


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (Request(rank=2, world=2, split=0), InvalidInputError, "rank 2 of 2"),
        (Request(rank=-1, world=2, split=0), InvalidInputError, "rank -1"),
        (Request(world=2), InvalidInputError, "without split"),
        (Request(world=2, split={"q.bias": 1}), InvalidInputError, "no dimension 1"),
        (Request(file="other"), NotFoundError, "model-1.safetensors"),
        (Request(names=("v.weight",)), NotFoundError, "v.weight"),
        (Request(names=("q.*", "v.*")), NotFoundError, r"v\.\*"),
    ],
)
def test_what_cannot_be_planned_is_refused(request_: Request, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        plan_load(FILES, request_)


def test_a_wrong_split_names_file_and_tensor() -> None:
    with pytest.raises(InvalidInputError) as caught:
        plan_load(FILES, Request(world=2, split={"q.bias": 1}))
    assert caught.value.where == "model-1.safetensors: tensor 'q.bias'"


def test_one_name_in_two_files_needs_the_file() -> None:
    files = [FileTable(path=path, tensors=(entry("t", (2,)),)) for path in ("unet/a", "vae/a")]
    with pytest.raises(InvalidInputError, match="more than one file") as caught:
        plan_load(files, Request())
    assert caught.value.where == "unet/a, vae/a"
    assert [t.path for t in plan_load(files, Request(file="vae/*")).tensors] == ["vae/a"]


def test_a_name_with_brackets_is_found_as_it_is() -> None:
    files = [FileTable(path="f", tensors=(entry("w[0]", (2,)), entry("w0", (2,), 108)))]
    assert plan_load(files, Request(names=("w[0]",))).tensors[0].entry.name == "w[0]"


def test_packed_values_are_cut_by_their_bytes() -> None:
    packed = TensorEntry(name="p", dtype="F4", shape=(4, 6), offset=0, length=12)
    (part,) = plan_load([FileTable(path="f", tensors=(packed,))], Request(rank=1, world=2, split=0)).tensors
    assert (part.shape, list(part.spans())) == ((2, 3), [(6, 6)])
    crossing = TensorEntry(name="p", dtype="F6_E2M3", shape=(4, 4), offset=0, length=12)
    with pytest.raises(InvalidInputError, match="F6_E2M3 cannot be cut"):
        plan_load([FileTable(path="f", tensors=(crossing,))], Request(world=2, split=0))


def test_an_index_that_is_not_basic_is_none_and_a_wrong_one_raises() -> None:
    for index in ([0, 1], None, (slice(None, None, -1),), True, (..., ...), "a"):
        assert normalise_index((3, 4), index) is None
    for wrong in (3, (0, -5), (slice(None),) * 3):
        with pytest.raises(IndexError):
            normalise_index((3, 4), wrong)


def test_a_large_tensor_is_counted_out_in_few_steps() -> None:
    tall = TensorEntry(name="t", dtype="F32", shape=(1 << 28, 16), offset=0, length=1 << 34)
    index = normalise_index(tall.shape, (slice(None), slice(0, 4)))
    assert len(list(PlannedTensor(file=0, path="f", entry=tall, index=index).spans())) == 1
