"""A service that says what it finds of its process before its own imports."""

import sys
from pathlib import Path

FOUND = sorted(set(sys.modules) & {"numpy"})

import numpy as np  # noqa: E402

import snowdrop as sd  # noqa: E402


@sd.service(warm_imports=["numpy"], scale=sd.Scale(max=1, idle_s=0.2), env={"OMP_NUM_THREADS": "1"})
class Warmed:
    @sd.startup
    def load(self) -> None:
        self.sum = int(np.arange(4).sum())

    @sd.endpoint("/found")
    async def found(self) -> dict[str, str]:
        processes = sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())
        return {"found": ",".join(FOUND), "sum": str(self.sum), "processes": ",".join(map(str, processes))}
