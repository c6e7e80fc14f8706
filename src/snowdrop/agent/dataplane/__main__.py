"""`python -m snowdrop.agent.dataplane --fd N --settings JSON`: started by the agent, ends with it."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import sys

import anyio

from snowdrop.agent.dataplane.client import raise_descriptor_limit
from snowdrop.agent.dataplane.server import serve
from snowdrop.content.settings import decode_settings
from snowdrop.domain.errors import SnowdropError

_PR_SET_PDEATHSIG = 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="snowdrop.agent.dataplane")
    parser.add_argument("--fd", type=int, required=True, help="packet socket to the agent")
    parser.add_argument("--settings", required=True, help="DataPlaneSettings as JSON")
    arguments = parser.parse_args()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A terminal's Ctrl-C is for the agent, which closes the channel in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(arguments.fd, False)
    raise_descriptor_limit()
    try:
        settings = decode_settings(arguments.settings.encode())
        with socket.socket(fileno=arguments.fd) as sock:
            anyio.run(serve, sock, settings)
    except SnowdropError as error:
        print(f"data plane: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
