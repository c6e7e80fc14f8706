from snowdrop.content.cut import TINY_BYTES, cut_fixed, cut_safetensors, load_order_key
from snowdrop.content.safetensors import Header
from snowdrop.domain.manifest import CHUNK_BYTES_MAX, TensorEntry


def header_of(lengths: list[int], data_offset: int = 128) -> Header:
    tensors, offset = [], data_offset
    for index, length in enumerate(lengths):
        tensors.append(TensorEntry(name=f"t{index}", dtype="U8", shape=(length,), offset=offset, length=length))
        offset += length
    return Header(data_offset=data_offset, tensors=tuple(tensors), metadata={})


def test_fixed_cuts_cover_the_range() -> None:
    pieces = list(cut_fixed(0, CHUNK_BYTES_MAX * 2 + 5))
    assert [piece.length for piece in pieces] == [CHUNK_BYTES_MAX, CHUNK_BYTES_MAX, 5]


def test_header_large_and_tiny_tensors_are_cut_apart() -> None:
    big = CHUNK_BYTES_MAX + 7
    pieces = list(cut_safetensors(header_of([10, 20, big, 30, 0, TINY_BYTES, 40])))
    assert [piece.length for piece in pieces] == [128, 30, CHUNK_BYTES_MAX, 7, 30, TINY_BYTES, 40]


def test_tiny_neighbours_share_chunks_up_to_the_limit() -> None:
    pieces = list(cut_safetensors(header_of([TINY_BYTES - 1] * 40)))
    assert max(piece.length for piece in pieces) <= CHUNK_BYTES_MAX
    assert len(pieces) == 4


def test_a_longer_tensor_in_front_moves_no_later_cut() -> None:
    def relative(first: int) -> list[int]:
        return [piece.length for piece in cut_safetensors(header_of([first, TINY_BYTES * 3, 50, 60]))][-2:]

    assert relative(TINY_BYTES) == relative(TINY_BYTES + 4096)


def test_metadata_comes_before_weights_and_shard_2_before_10() -> None:
    paths = ["m-10.safetensors", "m-2.safetensors", "vocab.txt", "config.json"]
    assert sorted(paths, key=load_order_key) == ["config.json", "vocab.txt", "m-2.safetensors", "m-10.safetensors"]
