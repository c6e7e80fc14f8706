"""How the platform starts a process of its own."""

from __future__ import annotations

import sys


def own_process(module: str) -> list[str]:
    """The beginning of the argv that runs `module`.

    With `-P`: the folder in which somebody happens to say `snowdrop up` is no place to import from. A file there
    that is called like a library would be run instead of it, with the platform's rights.
    """
    return [sys.executable, "-P", "-m", module]
