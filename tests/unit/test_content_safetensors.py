import json

import pytest

from content_helpers import framed, safetensors_bytes
from snowdrop.content.safetensors import Header, read_header
from snowdrop.domain.errors import CorruptContentError


def parse(data: bytes) -> Header:
    return read_header(lambda offset, length: data[offset : offset + length], len(data), where="a.safetensors")


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(table: dict[str, object], body: bytes) -> bytes:
    return framed(json.dumps(table).encode(), body)


def test_tensors_come_in_offset_order_with_absolute_offsets() -> None:
    data = file_of({"b": entry(offsets=[4, 8]), "a": entry(), "__metadata__": {"format": "pt"}}, b"x" * 8)
    header = parse(data)
    assert [tensor.name for tensor in header.tensors] == ["a", "b"]
    assert header.tensors[1].offset == header.data_offset + 4
    assert header.metadata == {"format": "pt"}


def test_scalars_and_empty_tensors_are_tensors() -> None:
    header = parse(safetensors_bytes({"scalar": ("F32", [], b"1234"), "none": ("F32", [0, 7], b"")}))
    assert {tensor.name: tensor.length for tensor in header.tensors} == {"scalar": 4, "none": 0}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "header_bytes_max"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "header_bytes_max"),
        ((50).to_bytes(8, "little") + b"{}", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (framed(b"{"), "not JSON"),
        (framed(b"\xff\xfe"), "not JSON"),
        (framed(b"[" * 100_000), "not JSON"),
        (framed(b"[]"), "not a JSON object"),
        (framed(b'{"__metadata__": {"a": 1}}'), "__metadata__"),
    ],
)
def test_a_broken_header_is_refused_with_the_files_name(data: bytes, said: str) -> None:
    with pytest.raises(CorruptContentError, match=said) as caught:
        parse(data)
    assert caught.value.where == "a.safetensors"


@pytest.mark.parametrize(
    ("bad", "body", "said"),
    [
        ({"t": 1}, b"", "exactly dtype"),
        ({"t": {**entry(), "extra": 1}}, b"1234", "exactly dtype"),
        ({"t": entry(dtype="Q7")}, b"1234", "unknown"),
        ({"t": entry(dtype=["U8"])}, b"1234", "unknown"),
        ({"t": entry(shape=[-4])}, b"1234", "shape"),
        ({"t": entry(shape=[True])}, b"1234", "shape"),
        ({"t": entry(shape=[4.0])}, b"1234", "shape"),
        ({"t": entry(shape=[2**60, 2**60])}, b"1234", "shape"),
        ({"t": entry(offsets=[4, 0])}, b"1234", "backwards"),
        ({"t": entry(offsets=[0])}, b"1234", "pair"),
        ({"t": entry(shape=[5])}, b"1234", "needs 5 bytes"),
        ({"t": entry(dtype="F4", shape=[3], offsets=[0, 1])}, b"1", "needs None bytes"),
        ({"t": entry()}, b"12", "truncated"),
        ({"s": entry(), "t": entry(offsets=[2, 6])}, b"123456", "overlaps its neighbour by 2"),
        ({"s": entry(), "t": entry(offsets=[6, 10])}, b"1" * 10, "2 bytes before it"),
        ({"t": entry(offsets=[100, 104])}, b"1234", "out of range"),
    ],
)
def test_a_broken_tensor_is_refused_by_name(bad: dict[str, object], body: bytes, said: str) -> None:
    with pytest.raises(CorruptContentError, match=said) as caught:
        parse(file_of(bad, body))
    assert caught.value.where == "a.safetensors: tensor 't'"


def test_a_name_that_occurs_twice_is_refused() -> None:
    one = json.dumps(entry())
    with pytest.raises(CorruptContentError, match="twice") as caught:
        parse(framed(f'{{"t": {one}, "t": {one}}}'.encode(), b"1234"))
    assert "'t'" in caught.value.where


def test_bytes_after_the_last_tensor_are_refused() -> None:
    with pytest.raises(CorruptContentError, match="3 bytes at the end"):
        parse(file_of({"t": entry()}, b"1234567"))
