"""`snowdrop.weights.load_file` in a process of its own: `python -m benchmarks.file_reader FILE...`.

Says {"ready": true}, waits for a line, loads, answers as `peers/loaders.py` does, and with the checksum.
"""

from __future__ import annotations

import sys
import time

import msgspec
import torch
from blake3 import blake3

from benchmarks.checkpoint import checksum_of
from benchmarks.reader import bytes_of, touch
from snowdrop.weights import load_file


def main() -> None:
    torch.set_grad_enabled(False)
    print('{"ready": true}', flush=True)
    sys.stdin.readline()
    begun = time.monotonic()
    tensors: dict[str, torch.Tensor] = {}
    for path in sys.argv[1:]:
        tensors.update(load_file(path))
    views_s = time.monotonic() - begun
    for tensor in tensors.values():
        touch(tensor)
    usable_s = time.monotonic() - begun
    digests = {name: blake3(bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}
    found = {"views_s": views_s, "usable_s": usable_s, "checksum": checksum_of(digests)}
    print(msgspec.json.encode(found).decode(), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
