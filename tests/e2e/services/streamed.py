"""A service that uses its first tensor while the others are still on the wire."""

from typing import Any

import snowdrop as sd


@sd.service(model=sd.Model("e2e-slow"), scale=sd.Scale(min=0, max=1, idle_s=60))
class Streamed:
    @sd.startup
    def load(self, model: sd.LoadedModel) -> None:
        first = model.numpy(names="t0")["t0"]
        print("the first tensor is here", flush=True)
        tensors = model.numpy()
        self.sums = {name: int(array.sum()) for name, array in tensors.items()}
        self.first = int(first.sum())

    @sd.endpoint("/facts")
    async def facts(self) -> dict[str, Any]:
        return {"sums": self.sums, "first": self.first}
