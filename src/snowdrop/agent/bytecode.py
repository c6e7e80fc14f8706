"""Byte code of what every replica imports, made before the first one needs it.

Sandboxes show the installation read-only, so no replica can keep what it compiles; where nothing else has kept it
(an editable install, `PYTHONDONTWRITEBYTECODE`), each would compile the runtime anew, and a burst all at once.
"""

from __future__ import annotations

import logging
import os
import subprocess

import anyio

log = logging.getLogger("snowdrop.agent")

COMPILE_S_MAX = 60.0
IMPORTS = "import snowdrop.replica.__main__, snowdrop.replica.runtime, snowdrop.replica.app, snowdrop.replica.load"
"""What a replica of a class imports. Its files are then in the page cache, too."""


async def keep_bytecode(python: str, imports: str = IMPORTS) -> None:
    """Runs `imports` once under `python`, in a process that keeps its byte code. Without success: a warning."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    try:
        with anyio.fail_after(COMPILE_S_MAX):
            await anyio.run_process(
                [python, "-P", "-c", imports], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=env
            )
    except (OSError, TimeoutError, subprocess.CalledProcessError) as error:
        log.warning("the replicas' runtime could not be compiled in advance: %s; each start compiles it", error)
