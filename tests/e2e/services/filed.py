"""A service that uses its model as files, as programs do that know nothing of Snowdrop."""

import hashlib
import mmap
from pathlib import Path

import snowdrop as sd


@sd.service(
    model=sd.Model("filed"),
    scale=sd.Scale(min=0, max=1, idle_s=2),
    resources=sd.ResourceSpec(memory_bytes_max=512 << 20),
)
class Filed:
    @sd.startup
    def load(self, model: sd.LoadedModel) -> None:
        self.path = model.path
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        self.mounted = any(f" {self.path} " in line and "fuse.snowdrop" in line for line in mounts)

    @sd.endpoint("/sums")
    def sums(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
                    found[str(path.relative_to(self.path))] = hashlib.sha256(content).hexdigest()
        return found

    @sd.endpoint("/mounted")
    def is_mounted(self) -> bool:
        return self.mounted
