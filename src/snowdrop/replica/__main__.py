"""`python -m snowdrop.replica --fd N`: the first process of a sandbox.

Imports little before it has told the agent that it lives; everything else it needs comes with Boot.
"""

from __future__ import annotations

import gc
import io
import os
import socket
import sys
import time
from collections.abc import Callable

from snowdrop.domain.errors import SnowdropError
from snowdrop.replica.link import AgentLink
from snowdrop.replica.stages import EXIT_AGENT_GONE, EXIT_STAGE_FAILED
from snowdrop.wire.codec import check_version
from snowdrop.wire.packet import PacketChannel
from snowdrop.wire.replica import TO_REPLICA, Boot, Booted, StageFailed, ToReplica

EXIT_USAGE = 2


def main(argv: list[str]) -> int:
    """Runs one replica over the packet socket given by `--fd`. Returns the exit code."""
    # Not argparse, whose import a cold start would wait for: only the agent calls this.
    if len(argv) != 2 or argv[0] != "--fd" or not argv[1].isdecimal():
        print("usage: python -m snowdrop.replica --fd N, the packet socket to the agent", file=sys.stderr)
        return EXIT_USAGE
    return serve(socket.socket(fileno=int(argv[1])))


def serve(sock: socket.socket, adopt: Callable[[Boot], None] | None = None) -> int:
    """The whole life of a replica on a connected packet socket. `adopt` is what a fork does before user code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # logs are read while the replica runs
    channel: PacketChannel[ToReplica] = PacketChannel(sock, TO_REPLICA)
    try:
        boot, fds = channel.receive_blocking()
        booted_unix_ns = time.time_ns()
        if not isinstance(boot, Boot):
            print(f"replica: {type(boot).__name__} came before Boot", file=sys.stderr)
            return EXIT_STAGE_FAILED
        check_version(boot.version, peer="the agent")
        channel.send_blocking(Booted(unix_ns=booted_unix_ns))
    except (EOFError, OSError):
        return EXIT_AGENT_GONE
    except SnowdropError as error:
        print(f"replica: {error}", file=sys.stderr)
        channel.send_blocking(StageFailed(stage="boot", error=error.body()))
        return EXIT_STAGE_FAILED
    link = AgentLink(sock, channel)
    link.start()

    gc.disable()  # imports make next to no garbage, but much that would be looked through again and again
    from snowdrop.replica import runtime  # noqa: PLC0415 -- heavy: the agent has heard of us first

    gc.enable()
    gc.freeze()
    runtime.apply_environment(boot)
    if adopt is not None:
        adopt(boot)
    return runtime.run(link, boot, fds, booted_unix_ns)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: a thread of user code that never ends must not keep the process.
    os._exit(code)
