"""llama.cpp's own server on a GGUF file, through xllamacpp: run as the command of a service.

The file is mapped, so that it is read as it is needed, and shared by all replicas of a node.
"""

import argparse
import signal
import sys
import threading

CONTEXT_TOKENS = 4096


def main() -> int:
    parser = argparse.ArgumentParser(description="used by `snowdrop run`")
    parser.add_argument("--model", required=True, help="the GGUF file")
    parser.add_argument("--alias", required=True, help="the model's name in answers")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=CONTEXT_TOKENS, help="tokens of one conversation")
    parser.add_argument("--parallel", type=int, default=4, help="conversations at once")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu-layers", type=int, default=-1, help="-1: as many as fit")
    given = parser.parse_args()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = {given.alias}
    params.hostnames = [given.host]
    params.port = given.port
    params.n_ctx = given.context * given.parallel
    params.n_parallel = given.parallel
    params.cpuparams.n_threads = given.threads
    params.cpuparams_batch.n_threads = given.threads
    # Threads that spin for work take the CPU from others on a machine that is shared.
    params.cpuparams.poll = params.cpuparams_batch.poll = 0
    params.n_threads_http = given.parallel + 2
    params.n_gpu_layers = given.gpu_layers
    params.use_jinja = True
    params.ui = False
    params.verbosity = 2  # warnings; its lines of each request say nothing that the platform does not count
    params.endpoint_slots = False
    params.cache_ram_mib = 0  # beside the sandbox's memory limit a prompt cache of 8 GiB makes no sense
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    server = xllamacpp.Server(params)
    print(f"llama.cpp serves {given.model} at {server.listening_address}", flush=True)
    ended.wait()  # no bound: this is the replica's life
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main())
