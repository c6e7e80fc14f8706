"""Loads weights once with the library named, in that library's own environment; knows nothing of Snowdrop.

    loaders.py NAME JSON

NAME is a function below; JSON has its arguments. Imports, says {"ready": true} or {"missing": REASON}, waits for a
line, loads, and says, in seconds since that line:

    views_s     every tensor is there as an object of the library
    usable_s    every byte is in memory and addressable: one byte of each page of each tensor has been read
    private_mib what the process has of its own more than before (Private_* of smaps_rollup)
"""

from __future__ import annotations

import glob
import json
import os
import sys
import time

PAGE = 4096
LOADS = {}


def load(prepare):
    LOADS[prepare.__name__] = prepare
    return prepare


@load
def safetensors_mmap(files):
    """safetensors' own: views on a mapping of the file."""
    from safetensors.torch import load_file

    return lambda: {name: tensor for file in files for name, tensor in load_file(file).items()}


@load
def torch_mmap(files):
    """torch.load of a checkpoint saved by torch.save, mapped."""
    import torch

    return lambda: {
        name: tensor for file in files for name, tensor in torch.load(file, mmap=True, weights_only=True).items()
    }


@load
def runai(files, concurrency):
    """Run:ai model streamer, from files or s3:// addresses; one buffer for all, so that tensors stay valid."""
    os.environ["RUNAI_STREAMER_CONCURRENCY"] = str(concurrency)
    os.environ.setdefault("RUNAI_STREAMER_LOG_LEVEL", "ERROR")
    os.environ["RUNAI_STREAMER_MEMORY_LIMIT"] = "-1"
    from runai_model_streamer import SafetensorsStreamer

    def run():
        keep = {}
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files)
            for name, tensor in streamer.get_tensors():
                keep[name] = tensor
        return keep

    return run


@load
def fastsafetensors(files, threads):
    """fastsafetensors without GPUDirect, to the CPU."""
    import torch
    from fastsafetensors import SafeTensorsFileLoader

    def run():
        loader = SafeTensorsFileLoader(None, torch.device("cpu"), nogds=True, max_threads=threads)
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        return tensors, loader, buffers

    return run


@load
def tensorizer(files, readers):
    """tensorizer, from its own format."""
    from tensorizer import TensorDeserializer

    def run():
        keep, tensors = [], {}
        for file in files:
            reader = TensorDeserializer(file, device="cpu", num_readers=readers)
            tensors.update({name: reader[name] for name in reader.keys()})
            keep.append(reader)
        return tensors, keep

    return run


@load
def instanttensor(files):
    """InstantTensor; it needs CUDA, which its own error says."""
    import torch
    from instanttensor import safe_open

    if not torch.cuda.is_available():
        try:
            with safe_open(files, framework="pt", device="cpu"):
                pass
        except Exception as error:
            raise Missing(str(error)) from error
    device = "cuda:0" if torch.cuda.is_available() else "cpu"

    def run():
        with safe_open(files, framework="pt", device=device) as opened:
            return dict(opened.tensors())

    return run


@load
def hub(endpoint, repository, folder):
    """huggingface_hub downloads all files to disk, then safetensors maps them."""
    os.environ.update(HF_ENDPOINT=endpoint, HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    os.environ.update(HF_HOME=folder, HF_HUB_DISABLE_XET="1")
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file

    def run():
        place = snapshot_download(repository)
        files = sorted(glob.glob(os.path.join(place, "*.safetensors")))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    return run


@load
def boto3(endpoint, bucket, keys, folder, concurrency):
    """boto3's transfer manager downloads to disk in parts, then safetensors maps the files."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from safetensors.torch import load_file

    s3 = boto3.client("s3", endpoint_url=endpoint)
    config = TransferConfig(
        max_concurrency=concurrency, multipart_chunksize=8 << 20, preferred_transfer_client="classic"
    )

    def run():
        tensors = {}
        for key in keys:
            target = os.path.join(folder, os.path.basename(key))
            s3.download_file(bucket, key, target, Config=config)
            tensors.update(load_file(target))
        return tensors

    return run


@load
def awscrt(endpoint, bucket, keys, folder):
    """AWS's C runtime, all files at once and each in parts, to disk, then safetensors maps the files.

    Through s3transfer, for boto3 itself gives that client no endpoint.
    """
    import botocore.session
    from s3transfer import crt
    from safetensors.torch import load_file

    session = botocore.session.get_session()
    region = os.environ["AWS_DEFAULT_REGION"]
    provider = crt.BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    client = crt.create_s3_crt_client(region, crt_credentials_provider=provider, use_ssl=False)
    serializer = crt.BotocoreCRTRequestSerializer(session, {"region_name": region, "endpoint_url": endpoint})
    manager = crt.CRTTransferManager(client, serializer)

    def run():
        targets = [os.path.join(folder, os.path.basename(key)) for key in keys]
        moves = [manager.download(bucket, key, target) for key, target in zip(keys, targets)]
        for move in moves:
            move.result()
        return {name: tensor for target in targets for name, tensor in load_file(target).items()}

    return run


class Missing(Exception):
    """The library cannot run here, and says why."""


def tensors_in(loaded):
    return loaded[0] if isinstance(loaded, tuple) else loaded


def touch(tensors):
    """Reads one byte of each page of each tensor; returns the tensors' bytes."""
    import torch

    size = 0
    for tensor in tensors.values():
        if tensor.numel():
            raw = tensor.reshape(-1).view(torch.uint8)
            raw[::PAGE].max()
            size += raw.numel()
    return size


def private_bytes():
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def main():
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        import torch

        torch.set_grad_enabled(False)
        run = LOADS[name](**arguments)
    except (Missing, ImportError, OSError) as error:
        print(json.dumps({"missing": f"{type(error).__name__}: {error}"}), file=answers)
        return
    before = private_bytes()
    print(json.dumps({"ready": True}), file=answers)
    sys.stdin.readline()
    begun = time.monotonic()
    loaded = run()
    views_s = time.monotonic() - begun
    size = touch(tensors_in(loaded))
    usable_s = time.monotonic() - begun
    found = {"views_s": views_s, "usable_s": usable_s, "bytes": size, "tensors": len(tensors_in(loaded))}
    found["private_mib"] = (private_bytes() - before) / (1 << 20)
    print(json.dumps(found), file=answers)
    sys.stdin.readline()
    # Libraries' threads and buffers are none of our business any more.
    os._exit(0)


if __name__ == "__main__":
    main()
