"""Stored content over the life of models: pushed, pushed again, removed, collected, verified, and still served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from e2e_platform import CommandError, Platform, wait_until


def write_model(folder: Path, seed: int) -> Path:
    """A model as the service of `modelled.py` wants it: 8 tensors and a config."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    save_file(
        {f"layer.{i}": rng.standard_normal((256, 300), dtype=np.float32) for i in range(8)},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"layers": 8}))
    return folder


def content_of(platform: Platform) -> set[Path]:
    return {path for kind in ("packs", "manifests") for path in platform.state.glob(f"origin/public/{kind}/*/*")}


def test_what_is_removed_goes_and_what_is_used_is_served(own_platform: Platform, tmp_path: Path) -> None:
    platform = own_platform
    folder = write_model(tmp_path / "model", 1)
    platform.run("model", "push", "e2e-model", str(folder))
    platform.deploy("modelled.py", "old")
    write_model(folder, 2)
    platform.run("model", "push", "e2e-model", str(folder))
    platform.deploy("modelled.py", "new")
    platform.run("model", "push", "unused", str(write_model(tmp_path / "unused", 3)))
    full = content_of(platform)
    platform.run("model", "rm", "unused")

    stats = platform.run("store", "stats")["origin"]
    assert (stats["models"], stats["garbage_objects"] > 0, stats["notes"]) == (2, True, [])
    planned = platform.run("store", "gc", "--dry-run", "--grace-s", "0")["origin"]
    assert content_of(platform) == full
    assert platform.run("store", "gc")["origin"]["deleted_objects"] == 0, "a day of grace is the default"
    done = platform.run("store", "gc", "--grace-s", "0")["origin"]
    assert done["deleted_objects"] == planned["deleted_objects"] == len(full - content_of(platform)) > 0
    assert platform.run("store", "verify", "--all", "--origin")["ok"]

    # Nothing has been on the node yet: both revisions come from what is left at the origin.
    for name in ("old", "new"):
        assert platform.run("call", f"{name}/facts")["config"] == {"layers": 8}
    platform.run("delete", "old")
    assert platform.run("store", "gc", "--grace-s", "0")["origin"]["deleted_objects"] > 0
    assert platform.run("store", "verify", "e2e-model", "--origin")["ok"]
    again = platform.run("model", "push", "unused", str(tmp_path / "unused"))
    assert again["new_bytes"] > 1_000_000, "it was gone"


def test_pins_outlive_the_data_plane_and_wrong_copies_are_mended(own_platform: Platform, tmp_path: Path) -> None:
    platform = own_platform
    platform.run("model", "push", "m", str(write_model(tmp_path / "model", 1)))
    platform.run("store", "pin", "m")
    (copy,) = platform.state.glob("cache/artefacts/*/tree/model.safetensors")
    right = copy.read_bytes()
    with open(copy, "r+b") as file:
        file.seek(1_000_000)
        file.write(b"wrong bytes")
    found = platform.run("store", "verify", "m")
    assert found["ok"]
    bad = found["node"][0]["bad"]
    assert [(chunk["file"], chunk["problem"]) for chunk in bad] == [("model.safetensors", "")]
    assert copy.read_bytes() == right
    node = platform.run("store", "stats")["node"]
    assert (node["quarantined"], node["replaced"], node["pinned"]) == (1, 1, 1)

    platform.kill_agent()
    wait_until(lambda: platform.run("store", "stats")["node"]["pinned"] == 1, "the pin is there again")
    platform.run("model", "rm", "m")
    assert platform.run("store", "gc", "--grace-s", "0")["node"]["evicted"] == []
    platform.run("store", "unpin", "m")
    assert len(platform.run("store", "gc", "--grace-s", "0")["node"]["evicted"]) == 1
    assert not list(platform.state.glob("cache/artefacts/*"))


def test_names_are_signed_and_keys_can_change(own_platform: Platform, tmp_path: Path) -> None:
    platform = own_platform
    folder = write_model(tmp_path / "model", 1)
    platform.run("model", "push", "m", str(folder))
    ref = platform.state / "origin/public/refs/default/m"
    first = ref.read_bytes()
    old = platform.run("store", "keys", "ls")["signing"]
    rotated = platform.run("store", "keys", "rotate")
    assert (rotated["old"], rotated["signed"], rotated["failed"]) == (old, 1, [])
    platform.run("store", "keys", "distrust", old)
    assert platform.run("store", "verify", "--all", "--origin")["ok"]
    ref.write_bytes(first)
    with pytest.raises(CommandError) as caught:
        platform.run("store", "verify", "m", "--origin")
    assert caught.value.code == 1
    write_model(folder, 2)
    pushed = platform.run("model", "push", "m", str(folder))
    assert pushed["model"]["generation"] == 3
    assert platform.run("store", "verify", "m", "--origin")["ok"]
