"""Checkpoints with random weights, shaped like a language model's: what the weights benchmarks load.

32 layers of nine tensors, an embedding, a final norm and a head (291 tensors); the hidden size follows from the
size that is asked for. The bytes of a tensor are a keyed stream of its seed, so that two checkpoints share exactly
the tensors that they should share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from blake3 import blake3

LAYERS = 32
VOCABULARY = 32_000
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
Dtype = Literal["BF16", "F16", "F32"]
_STEP_BYTES = 32 << 20
HIDDEN_STEP = 16
"""Hidden sizes are multiples of this, so that every tensor's bytes are aligned for its dtype."""


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor to be made. `parts` are (seed, bytes): its content, one stream after the other."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(length for _, length in self.parts)


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint on disk: its folder, its safetensors files in load order, the bytes of those files.

    `checksum` is that of all tensors, as `checksum_of` gives it.
    """

    folder: Path
    files: tuple[Path, ...]
    total_bytes: int
    first_tensor_bytes: int
    checksum: str


def model(gib: float, dtype: Dtype = "BF16", *, seed: str = "base") -> list[Tensor]:
    """About `gib` GiB of tensors in load order."""
    width = DTYPE_BYTES[dtype]
    hidden = _hidden(gib * (1 << 30) / width)
    inner, narrow = hidden * 11 // 4, hidden // 4

    def made(name: str, *shape: int) -> Tensor:
        size = width
        for length in shape:
            size *= length
        return Tensor(name=name, dtype=dtype, shape=shape, parts=((f"{seed}/{name}", size),))

    tensors = [made("model.embed_tokens.weight", VOCABULARY, hidden)]
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        tensors += [
            made(f"{layer}.input_layernorm.weight", hidden),
            made(f"{layer}.self_attn.q_proj.weight", hidden, hidden),
            made(f"{layer}.self_attn.k_proj.weight", narrow, hidden),
            made(f"{layer}.self_attn.v_proj.weight", narrow, hidden),
            made(f"{layer}.self_attn.o_proj.weight", hidden, hidden),
            made(f"{layer}.post_attention_layernorm.weight", hidden),
            made(f"{layer}.mlp.gate_proj.weight", inner, hidden),
            made(f"{layer}.mlp.up_proj.weight", inner, hidden),
            made(f"{layer}.mlp.down_proj.weight", hidden, inner),
        ]
    return [*tensors, made("model.norm.weight", hidden), made("lm_head.weight", VOCABULARY, hidden)]


def _hidden(wanted_values: float) -> int:
    """The hidden size whose model has about so many values: 10.75 h^2 a layer, 2 v h for embedding and head."""
    square, linear = LAYERS * 10.75, 2.0 * VOCABULARY
    root: float = (-linear + (linear * linear + 4 * square * wanted_values) ** 0.5) / (2 * square)
    return max(HIDDEN_STEP, round(root / HIDDEN_STEP) * HIDDEN_STEP)


def write(folder: Path, tensors: Sequence[Tensor], *, shards: int = 4) -> Checkpoint:
    """Writes `tensors` as `shards` safetensors files of about the same size, with index and config."""
    folder.mkdir(parents=True)
    split = _split(tensors, shards)
    weight_map: dict[str, str] = {}
    files: list[Path] = []
    digests: dict[str, str] = {}
    for number, members in enumerate(split, 1):
        name = f"model-{number:05}-of-{len(split):05}.safetensors" if len(split) > 1 else "model.safetensors"
        path = folder / name
        digests |= _write_file(path, members)
        files.append(path)
        weight_map.update((tensor.name, name) for tensor in members)
    total = sum(tensor.size for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": LAYERS}))
    return Checkpoint(
        folder=folder,
        files=tuple(files),
        total_bytes=sum(path.stat().st_size for path in files),
        first_tensor_bytes=tensors[0].size,
        checksum=checksum_of(digests),
    )


def _split(tensors: Sequence[Tensor], shards: int) -> list[list[Tensor]]:
    total = sum(tensor.size for tensor in tensors)
    split: list[list[Tensor]] = [[]]
    done = 0
    for tensor in tensors:
        if done >= total * len(split) / shards and split[-1]:
            split.append([])
        split[-1].append(tensor)
        done += tensor.size
    return split


def checksum_of(digests: Mapping[str, str]) -> str:
    """One checksum from the BLAKE3 of each tensor's bytes by name, in whatever order they came."""
    digest: str = blake3("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()
    return digest


def _write_file(path: Path, tensors: Sequence[Tensor]) -> dict[str, str]:
    """Returns the BLAKE3 of each tensor's bytes."""
    table: dict[str, object] = {}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb", buffering=0) as out:
        out.write(len(header).to_bytes(8, "little") + header)
        digests: dict[str, str] = {}
        for tensor in tensors:
            hasher = blake3()
            for piece in _content(tensor):
                hasher.update(piece)
                out.write(piece)
            digests[tensor.name] = hasher.hexdigest()
    return digests


def _content(tensor: Tensor) -> Iterator[bytes]:
    for seed, length in tensor.parts:
        stream = blake3(seed.encode())
        for start in range(0, length, _STEP_BYTES):
            yield stream.digest(length=min(_STEP_BYTES, length - start), seek=start)
