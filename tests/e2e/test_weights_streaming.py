"""Tensors through the real processes: parts of a lazy model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from e2e_platform import Platform, session

pytestmark = pytest.mark.anyio

ROWS, COLUMNS = 16 * 1024, 1024
RANK, WORLD = 3, 16
CHUNK_BYTES = 4 << 20


async def test_a_lazy_model_brings_the_parts_that_are_asked_for(platform: Platform, tmp_path: Path) -> None:
    weight = np.random.default_rng(5).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    platform.run("model", "push", "e2e-parted", str(tmp_path))
    platform.deploy("parted.py", "parted")
    async with session() as http, http.post(f"{platform.url}/parted/facts", json={}) as answer:
        assert answer.status == 200, await answer.text()
        facts = await answer.json()
    each = ROWS // WORLD
    part = weight[RANK * each : (RANK + 1) * each]
    assert facts["keys"] == ["weight"]
    assert facts["shape"] == list(part.shape)
    assert facts["total"] == pytest.approx(float(part.astype(np.float64).sum()))
    assert facts["corner"] == float(weight[0, 0])
    origin_bytes = platform.receipts("parted", at_least=1)[0]["content"]["origin"]
    # The part is one chunk; beside it a chunk for the corner, the header, small files and the service's code.
    assert part.nbytes <= origin_bytes <= part.nbytes + 2 * CHUNK_BYTES
