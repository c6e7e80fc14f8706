"""Every metric is described, what is described exists, and the dashboard shows nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "snowdrop"
REFERENCE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "snowdrop.json").read_text())
SUFFIXES = re.compile(r"_(total|bucket|sum|count)$")


def _declared() -> set[str]:
    """Names of families in the modules that use the library."""
    names: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        if "prometheus_client" in text:
            names |= set(re.findall(r'"(snowdrop_[a-z_]+)"', text))
    return names


def _documented() -> set[str]:
    return {SUFFIXES.sub("", name) for name in re.findall(r"^\| `(snowdrop_[a-z_]+)`", REFERENCE, re.MULTILINE)}


def test_every_metric_is_described_and_what_is_described_exists() -> None:
    assert _declared() == _documented()
    assert len(_declared()) > 25


def _samples() -> dict[str, set[str]]:
    """Names of samples as Prometheus has them, with their labels, by the reference's types."""
    found: dict[str, set[str]] = {}
    rows = re.findall(r"^\| `(snowdrop_[a-z_]+)` \| (\w+) \| ([^|]*)\|", REFERENCE, re.MULTILINE)
    for name, kind, labels in rows:
        names = {word.strip() for word in labels.split(",") if word.strip()} | {"process", "node"}
        assert (kind == "counter") == name.endswith("_total"), name
        if kind == "histogram":
            found |= {name + "_bucket": names | {"le"}, name + "_sum": names, name + "_count": names}
        else:
            found[name] = names
    return found


def test_the_dashboard_asks_only_for_samples_and_labels_that_exist() -> None:
    known = _samples()
    shown: set[str] = set()
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"]
            asked = set(re.findall(r"snowdrop_[a-z_]+", expr))
            assert asked <= known.keys(), panel["title"]
            shown |= {SUFFIXES.sub("", name) for name in asked}
            used = {word.strip() for words in re.findall(r"by \(([^)]*)\)", expr) for word in words.split(",")}
            used |= set(re.findall(r"([a-z_]+)(?:=~|!~|!=|=)\"", expr))
            used |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for name in asked:
                assert used <= known[name], (panel["title"], name)
    assert len(shown) > 15


def test_the_dashboards_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
