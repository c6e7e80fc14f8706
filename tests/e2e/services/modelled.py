"""A service on a model: it needs the files' directory and the small files, no framework."""

import hashlib
import json
from typing import Any

import snowdrop as sd


@sd.service(model=sd.Model("e2e-model"), concurrency=2, park_s_max=0.0, scale=sd.Scale(min=0, max=1, idle_s=1))
class Modelled:
    @sd.startup
    def load(self, model: sd.LoadedModel) -> None:
        self.config = json.loads(model.file("config.json").read_text())
        whole = model.path / "model.safetensors"
        self.sha256 = hashlib.sha256(whole.read_bytes()).hexdigest()
        self.sums = {name: float(array.sum()) for name, array in model.numpy().items()}

    @sd.endpoint("/facts")
    async def facts(self) -> dict[str, Any]:
        return {"config": self.config, "sha256": self.sha256, "sums": self.sums}
