"""The figure of ``mnist_privacy``: accuracy over epsilon, and the ledger, as one SVG file.

It needs no library, and follows the reader's light or dark colours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

__all__ = ["Bar", "Point", "write_plot"]

WIDTH: Final = 980
HEIGHT: Final = 400
_TOP: Final = 60
_BOTTOM: Final = 330
_LEFT: Final = (70, 500)
_RIGHT: Final = (700, 900)
_MARKS: Final = ("own", "first", "second", "third")

_STYLE: Final = """\
    svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Arial, sans-serif; \
font-size: 13px; }
    .paper { fill: #ffffff; }
    text { fill: #1c2733; }
    .small { fill: #46566a; }
    .head { font-size: 15px; font-weight: 600; }
    .mid { text-anchor: middle; }
    .end { text-anchor: end; }
    .grid { stroke: #d5dde5; stroke-width: 1; }
    .own { fill: #2d7a3d; stroke: #2d7a3d; }
    .curve { fill: none; stroke: #2d7a3d; stroke-width: 2; }
    .first { fill: none; stroke: #43617d; stroke-width: 1.8; }
    .second { fill: none; stroke: #a3532a; stroke-width: 1.8; }
    .third { fill: none; stroke: #6b4f8a; stroke-width: 1.8; }
    .spent { fill: #b9d9c0; }
    .added { fill: #2d7a3d; }
    .over { fill: none; stroke: #a3532a; stroke-width: 1.5; stroke-dasharray: 5 4; }
    .cap { stroke: #a3532a; stroke-width: 2; }
    .warn { fill: #a3532a; }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #0d1117; }
      text { fill: #e6edf3; }
      .small { fill: #a9b8c9; }
      .grid { stroke: #2b3644; }
      .own, .added { fill: #5fc274; stroke: #5fc274; }
      .curve { stroke: #5fc274; }
      .first { stroke: #8fb1d3; }
      .second, .over, .cap { stroke: #e59a70; }
      .third { stroke: #c0a3e0; }
      .spent { fill: #274b31; }
      .warn { fill: #e59a70; }
    }
"""


@dataclass(frozen=True)
class Point:
    """One model: its epsilon, the share of test pictures that it reads, whose it is."""

    epsilon: float
    accuracy: float
    series: str


@dataclass(frozen=True)
class Bar:
    """One line of the ledger: epsilon of all models up to this one, taken or refused."""

    model: str
    together: float
    refused: bool


def write_plot(
    path: Path,
    points: Sequence[Point],
    bars: Sequence[Bar],
    *,
    budget: float,
    delta: float,
    data: str,
) -> None:
    """Write the figure, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    body = "\n".join(f"  {line}" for line in (*_scatter(points, delta), *_ledger(bars, budget)))
    own = ", ".join(
        f"{p.accuracy:.2%} at {p.epsilon:.3g}" for p in points if p.series == points[0].series
    )
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="title desc">\n'
        f'  <title id="title">{escape(data)}: accuracy over epsilon, and the budget</title>\n'
        f'  <desc id="desc">Accuracy: {own}. Budget: {budget:g}.</desc>\n'
        f"  <style>\n{_STYLE}  </style>\n"
        f'  <rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="10"/>\n{body}\n</svg>\n'
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Scale:
    """From values to pixels, over round numbers that enclose all values."""

    def __init__(self, values: Sequence[float], pixels: tuple[float, float]) -> None:
        low, high = min(values), max(values)
        rough = max(high - low, 1e-6) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        self.step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
        self.low = math.floor(low / self.step) * self.step
        self.high = math.ceil(high / self.step) * self.step
        self.high += self.step * (self.high == self.low)
        self.pixels = pixels

    def __call__(self, value: float) -> float:
        begin, end = self.pixels
        return round(begin + (value - self.low) / (self.high - self.low) * (end - begin), 1)

    def ticks(self) -> list[float]:
        return [
            self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)
        ]


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{style}">{escape(text)}</text>'


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _box(style: str, left: float, top: float, right: float, height: float) -> str:
    width = round(right - left, 1)
    return f'<rect class="{style}" x="{left}" y="{top}" width="{width}" height="{height}"/>'


def _scatter(points: Sequence[Point], delta: float) -> Iterator[str]:
    """Accuracy over epsilon; the first series is joined and labelled."""
    x = _Scale([0.0, *(p.epsilon for p in points)], _LEFT)
    y = _Scale([100 * p.accuracy for p in points] or [0, 100], (_BOTTOM, _TOP))
    yield _text(_LEFT[0], 32, "Test accuracy over each model's epsilon", "head")
    for tick in y.ticks():
        yield _line("grid", _LEFT[0], y(tick), _LEFT[1], y(tick))
        yield _text(_LEFT[0] - 8, y(tick) + 4, f"{tick:g} %", "small end")
    yield _text(sum(_LEFT) / 2, _BOTTOM + 44, f"epsilon at delta {delta:g}", "small mid")
    for tick in x.ticks():
        yield _text(x(tick), _BOTTOM + 20, f"{tick:g}", "small mid")
    series = list(dict.fromkeys(p.series for p in points))
    for place, (name, mark) in enumerate(zip(series, _MARKS, strict=False)):
        own = [(x(p.epsilon), y(100 * p.accuracy), p) for p in points if p.series == name]
        if not place:
            path = " ".join(f"{px},{py}" for px, py, _ in sorted(own, key=lambda each: each[0]))
            yield f'<polyline class="curve" points="{path}"/>'
        for px, py, p in own:
            yield f'<circle class="{mark}" cx="{px}" cy="{py}" r="4.5"/>'
            if not place:
                yield _text(px - 4, py - 9, f"{p.accuracy:.2%}", "end")
        row = _BOTTOM - 14 - 20 * (len(series) - 1 - place)
        yield f'<circle class="{mark}" cx="{_LEFT[1] - 190}" cy="{row - 4}" r="4.5"/>'
        yield _text(_LEFT[1] - 178, row, name, "small")


def _ledger(bars: Sequence[Bar], budget: float) -> Iterator[str]:
    """What each model added, and where the budget ends."""
    x = _Scale([0.0, budget, *(b.together for b in bars)], _RIGHT)
    high = (_BOTTOM - _TOP) / max(len(bars), 1)
    yield _text(_RIGHT[0] - 120, 32, "Ledger: epsilon of all models together", "head")
    before = 0.0
    for place, bar in enumerate(bars):
        top, thick = round(_TOP + place * high + high * 0.2, 1), round(high * 0.6, 1)
        middle = round(top + thick / 2 + 4, 1)
        begin, end = x(before), x(bar.together)
        yield _text(_RIGHT[0] - 10, middle, bar.model, "end")
        yield _box("spent", x(0), top, begin, thick)
        yield _box("over" if bar.refused else "added", begin, top, end, thick)
        verdict = f"{bar.together:.2f}" + (" refused" if bar.refused else "")
        yield _text(end + 8, middle, verdict, "warn" if bar.refused else "")
        before = before if bar.refused else bar.together
    yield _line("cap", x(budget), _TOP - 8, x(budget), _BOTTOM)
    yield _text(x(budget), _BOTTOM + 20, f"budget {budget:g}", "warn mid")
    yield _text(x(0), _BOTTOM + 20, "0", "small mid")
