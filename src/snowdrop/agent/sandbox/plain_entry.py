"""Run by path, in place of a sandbox: waits at the gate until limits are set, ties its life to the agent's,
becomes the entry. Standard library only."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(gate_fd: int, agent_pid: int, entry: list[str]) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent_pid:  # it died before we could be told
        sys.exit(1)
    opened = os.read(gate_fd, 1)
    os.close(gate_fd)
    if not opened:
        sys.exit(1)
    os.execvp(entry[0], entry)  # noqa: S606 (this is what a launcher is for)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
