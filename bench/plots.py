"""Plots as SVG: lines on logarithmic scales, legible on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.building import ROOT
from bench.rounds import middle

IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 30, 50
COLOURS = {
    "sink:compiled": "#c2410c",
    "sink:protobuf": "#a61e4d",
    "receive": "#5c677d",
    "cpp": "#0b7285",
    "go": "#2b8a3e",
}
"""A server's colour, the same in every plot."""
_STYLE = """
text { font: 13px sans-serif; fill: #222 } .grid { stroke: #8884; stroke-width: 1 }
.line { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .line, .dot, .name { filter: brightness(1.5) } }
"""
_MIDDLE = ' text-anchor="middle"'
Points = Sequence[tuple[float, float]]


def drawings(results: dict[str, Any]) -> dict[Path, str]:
    """The plots that the results have points for, by file."""
    found = {}
    cases = results.get("cases", {}).get("figures", {})
    by_load, by_tenants = _by(cases, ("load-", "light", "headline")), _by(cases, ("tenants-", "headline"))
    if by_load:
        found[IMAGES / "cost-load.svg"] = draw(
            "Cost against load: http, 16 KiB, 4 connections",
            ("entries a second", "µs an entry"),
            by_load,
        )
    if by_tenants:
        found[IMAGES / "cost-tenants.svg"] = draw(
            "Cost against tenants: http, 16 KiB, saturated", ("tenants", "µs an entry"), by_tenants
        )
    return found


def _by(cases: Mapping[str, Any], wanted: tuple[str, ...]) -> dict[str, Points]:
    """Points of every server that has more than two: over tenants, where a wanted name says so, or load."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, case in cases.items():
        if not name.startswith(wanted) or " " in name:
            continue
        for server, figures in case["servers"].items():
            cost = middle(figures["us_entry"])[0]
            x = case["case"]["tenants"] if wanted[0] == "tenants-" else middle(figures["entries_s"])[0]
            lines.setdefault(server, []).append((x, cost))
    return {server: sorted(points) for server, points in sorted(lines.items()) if len(points) > 2}


def draw(title: str, axes: tuple[str, str], lines: Mapping[str, Points]) -> str:
    """Lines by name, both scales logarithmic."""
    points = [point for line in lines.values() for point in line]
    low_x, high_x = _decades(x for x, _ in points)
    low_y, high_y = _decades(y for _, y in points)

    def across(x: float) -> float:
        return LEFT + (math.log10(x) - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(y) - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{title}</title><style>{_STYLE}</style>",
        f'<text x="{LEFT}" y="18">{title}</text>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}"{_MIDDLE}>{axes[0]}</text>',
        f'<text transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)"{_MIDDLE}>{axes[1]}</text>',
    ]
    for power in range(low_x, high_x + 1):
        x = across(10.0**power)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}"{_MIDDLE}>{10**power:,}</text>')
    for power in range(low_y, high_y + 1):
        y = down(10.0**power)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    heights = _apart({name: down(line[-1][1]) for name, line in lines.items()})
    for name, line in lines.items():
        colour = COLOURS.get(name, "#6741d9")
        places = [(across(x), down(y)) for x, y in line]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path class="line" stroke="{colour}" d="M{path}"/>')
        parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        place = f'x="{right + 8}" y="{heights[name] + 4:.1f}" style="fill:{colour}"'
        parts.append(f'<text class="name" {place}>{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _decades(values: Iterable[float]) -> tuple[int, int]:
    """Powers of ten that hold all values."""
    held = list(values)
    low, high = math.floor(math.log10(min(held))), math.ceil(math.log10(max(held)))
    return low, max(high, low + 1)


def _apart(heights: dict[str, float], least: float = 16) -> dict[str, float]:
    """Heights of names so that none covers another."""
    placed: dict[str, float] = {}
    above = -math.inf
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        above = placed[name] = max(height, above + least)
    return placed
