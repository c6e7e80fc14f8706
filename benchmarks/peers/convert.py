"""Writes safetensors files in another library's format, in that library's own environment.

convert.py torch|tensorizer FOLDER FILE...
"""

from __future__ import annotations

import os
import sys

import torch


def main():
    kind, folder, *files = sys.argv[1:]
    for file in files:
        tensors = read(file)
        target = os.path.join(folder, os.path.basename(file).rpartition(".")[0])
        if kind == "torch":
            torch.save(tensors, target + ".pt")
        else:
            from tensorizer import TensorSerializer

            serializer = TensorSerializer(target + ".tensors")
            serializer.write_state_dict(tensors)
            serializer.close()


def read(file):
    """The tensors of a BF16, F16 or F32 safetensors file, without that library."""
    import json

    with open(file, "rb") as source:
        data = bytearray(source.read())
    size = int.from_bytes(data[:8], "little")
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        begin, end = entry["data_offsets"]
        raw = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=8 + size + begin)
        tensors[name] = raw.view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


if __name__ == "__main__":
    main()
