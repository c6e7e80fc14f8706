"""Bar charts as SVG, written by hand: small, readable as text, and the same for the same figures."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

WIDTH = 760
LABEL_WIDTH = 200
VALUE_WIDTH = 70
ROW_HEIGHT = 22
BAR_HEIGHT = 14
TITLE_HEIGHT = 30
PANEL_GAP = 16
INK, FAINT, OWN, OTHER = "#24292f", "#6e7781", "#1a7f37", "#8c959f"


def bars(title: str, series: Mapping[str, Mapping[str, float]], *, mark: str) -> str:
    """One panel a metric, one bar a contestant, shortest first. Names that begin with `mark` stand out."""
    parts: list[str] = []
    y = TITLE_HEIGHT + 10
    for metric, values in series.items():
        if not values:
            continue
        parts.append(_text(0, y, metric, size=13, weight="bold"))
        y += 10
        longest = max(values.values()) or 1.0
        for name, value in sorted(values.items(), key=lambda item: item[1]):
            parts += _row(y, name, value, longest, own=name.startswith(mark))
            y += ROW_HEIGHT
        y += PANEL_GAP + 14
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        f'font-family="system-ui, sans-serif">'
    )
    background = f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>'
    return "\n".join([head, background, _text(0, 20, title, size=15, weight="bold"), *parts, "</svg>", ""])


def _row(y: int, name: str, value: float, longest: float, *, own: bool) -> list[str]:
    room = WIDTH - LABEL_WIDTH - VALUE_WIDTH
    length = max(1.0, room * value / longest)
    middle = y + ROW_HEIGHT // 2 + 4
    bar = (
        f'<rect x="{LABEL_WIDTH}" y="{y + (ROW_HEIGHT - BAR_HEIGHT) // 2}" width="{length:.1f}" '
        f'height="{BAR_HEIGHT}" fill="{OWN if own else OTHER}"/>'
    )
    return [
        _text(LABEL_WIDTH - 8, middle, name, anchor="end", weight="bold" if own else "normal"),
        bar,
        _text(LABEL_WIDTH + length + 6, middle, f"{value:.3g}", fill=FAINT),
    ]


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "normal",
    anchor: str = "start",
    fill: str = INK,
) -> str:
    return (
        f'<text x="{x + 8 if anchor == "start" else x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )
