"""Run by path in front of a command: ties its life to the replica's, then becomes it. Standard library only."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
EXIT_NOT_FOUND = 127
EXIT_NOT_EXECUTABLE = 126


def main(replica_pid: int, argv: list[str]) -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != replica_pid:  # it died before we could be told
        return 1
    try:
        os.execvp(argv[0], argv)  # noqa: S606 (the service's own command, inside its sandbox)
    except FileNotFoundError:
        print(f"snowdrop: there is no program {argv[0]!r} in the replica's environment", file=sys.stderr)
        return EXIT_NOT_FOUND
    except OSError as error:
        print(f"snowdrop: {argv[0]!r} cannot be run: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
