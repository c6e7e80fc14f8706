"""The raw limits where there is no C compiler: the work of raw_direct.c and raw_receive.c, with the same words.

raw_python.py raw_direct THREADS BLOCK_BYTES FILE...
raw_python.py raw_receive CONNECTIONS BLOCK_BYTES ADDRESS PORT PATH SIZE [PATH SIZE]...
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import threading
import time

PAGE = 4096


def touched(size):
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for start in range(0, size, 64 << 20):
        memory[start : start + (64 << 20)] = bytes(min(64 << 20, size - start))
    return memoryview(memory)


def direct(threads, block_bytes, files):
    work, place = [], 0
    for path in files:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        size = os.fstat(fd).st_size
        for offset in range(0, size, block_bytes):
            length = -(-min(block_bytes, size - offset) // PAGE) * PAGE
            work.append((fd, offset, place + offset, length))
        place += -(-size // PAGE) * PAGE
    memory = touched(place)

    def take(item):
        fd, offset, at, length = item
        done = 0
        while done < length:
            got = os.preadv(fd, [memory[at + done : at + length]], offset + done)
            done += got
            if got == 0 or got % PAGE:
                break

    return threads, work, lambda: take


def receive(connections, block_bytes, address, port, *objects):
    work, place = [], 0
    for path, size in zip(objects[::2], map(int, objects[1::2])):
        for offset in range(0, size, block_bytes):
            length = min(block_bytes, size - offset)
            work.append((path, offset, place + offset, length))
        place += size
    memory = touched(place)

    def connected():
        sock = socket.create_connection((address, int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def take(item):
            path, offset, at, length = item
            span = f"bytes={offset}-{offset + length - 1}"
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: origin\r\nRange: {span}\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                more = sock.recv(8192)
                if not more:
                    raise EOFError(path)
                head += more
            head, _, body = head.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 206"):
                raise ValueError(head)
            memory[at : at + len(body)] = body
            done = len(body)
            while done < length:
                got = sock.recv_into(memory[at + done : at + length], 0, socket.MSG_WAITALL)
                if got == 0:
                    raise EOFError(path)
                done += got

        return take

    return connections, work, connected


def main():
    kind, workers, block_bytes, *rest = sys.argv[1:]
    block = int(block_bytes)
    made = direct(int(workers), block, rest) if kind == "raw_direct" else receive(int(workers), block, *rest)
    workers, work, prepare = made
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.monotonic()
    left = iter(work)
    lock = threading.Lock()

    def run():
        take = prepare()
        while True:
            with lock:
                item = next(left, None)
            if item is None:
                return
            take(item)

    threads = [threading.Thread(target=run) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"usable_s": time.monotonic() - begun}), flush=True)


if __name__ == "__main__":
    main()
