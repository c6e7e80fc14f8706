"""`python -m benchmarks NAME [ARGUMENTS]`: runs one benchmark; without a name, lists them."""

from __future__ import annotations

import importlib
import signal
import sys

# One line a benchmark: its name is its module's.
NAMES = (
    "batching",
    "burst",
    "cold_start",
    "fs_ops",
    "gateway",
    "image_trace",
    "weights_dedupe",
    "weights_local",
    "weights_origin",
)


def main() -> int:
    """0 whatever the figures are; 2 for an unknown name; what goes wrong in set-up is raised."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        print(f"usage: python -m benchmarks NAME [ARGUMENTS]; NAME is one of: {', '.join(NAMES)}", file=sys.stderr)
        return 2
    # Ended from outside, it takes away what it made, as after an error.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    name = sys.argv[1]
    sys.argv = [f"benchmarks {name}", *sys.argv[2:]]
    importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
