"""A service that takes one rank's part of a lazy model, as tensor-parallel engines do."""

from typing import Any

import snowdrop as sd

RANK, WORLD = 3, 16


@sd.service(model=sd.Model("e2e-parted", lazy=True), scale=sd.Scale(min=0, max=1, idle_s=1))
class Parted:
    @sd.startup
    def load(self, model: sd.LoadedModel) -> None:
        self.keys = model.keys()
        parts = model.state_dict(rank=RANK, world=WORLD, split={"weight": 0})
        self.shape = list(parts["weight"].shape)
        self.total = float(parts["weight"].double().sum())
        self.corner = float(model.get_slice("weight")[0, 0])

    @sd.endpoint("/facts")
    async def facts(self) -> dict[str, Any]:
        return {"keys": self.keys, "shape": self.shape, "total": self.total, "corner": self.corner}
