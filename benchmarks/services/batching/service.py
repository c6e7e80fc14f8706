"""One torch model twice: a call for each request, and a call for many."""

from __future__ import annotations

import torch

import snowdrop as sd

WIDTH = 2_048
LAYERS = 4
ENV = {"OMP_NUM_THREADS": "1"}
"""A replica has one CPU here: more threads in one call would only wait for each other."""


class Ranker:
    """Scores a seed: four square layers, 67 MB of weights that each call reads, as large models do."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self._seeds = torch.randn(1_024, WIDTH, generator=generator)
        layers: list[torch.nn.Module] = []
        for _ in range(LAYERS):
            linear = torch.nn.Linear(WIDTH, WIDTH)
            torch.nn.init.normal_(linear.weight, std=WIDTH**-0.5, generator=generator)
            layers += [linear, torch.nn.GELU()]
        self._network = torch.nn.Sequential(*layers).eval()

    def scores(self, seeds: list[int]) -> list[float]:
        with torch.inference_mode():
            found: list[float] = self._network(self._seeds[[seed % 1_024 for seed in seeds]]).mean(dim=1).tolist()
        return found


ONE = sd.Scale(min=1, max=1)


@sd.service(concurrency=64, scale=ONE, env=ENV)
class Single(Ranker):
    @sd.endpoint("/score")
    def score(self, seed: int) -> float:
        return self.scores([seed])[0]


@sd.service(concurrency=64, scale=ONE, env=ENV)
class Batched(Ranker):
    @sd.endpoint("/score", batch=sd.Batch(size_max=32, wait_ms_max=5))
    def score(self, seed: list[int]) -> list[float]:
        return self.scores(seed)
