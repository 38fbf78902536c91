"""The suggestion as a picture: one SVG file, without any library for plots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from cenacle.cut.suggestion import Choice

__all__ = ["plot_choices"]

_WIDTH: Final = 960
_HEIGHT: Final = 450
_LEFT: Final = 88
_RIGHT: Final = 880
_TOP: Final = 56
_BOTTOM: Final = 330
_MOST_LABELS: Final = 32
_MOST_LETTERS: Final = 20

# Okabe and Ito's palette, which people with any kind of colour vision tell apart.
_SHARE: Final = "#0072B2"
_COMPUTE: Final = "#D55E00"
_ACCURACY: Final = "#009E73"
_BYTES: Final = "#C8C8C8"
_GOOD: Final = "#8C8C8C"


def _text(x: float, y: float, words: str, more: str = "") -> str:
    shown = "".join(c if c.isprintable() else "\ufffd" for c in words)
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(shown)}</text>'


def _line(points: Sequence[tuple[float, float]], colour: str, dashes: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{style}/>'


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def plot_choices(choices: Sequence[Choice], title: str) -> str:
    """Confidential share and tail compute (lines) and bytes crossing (bars) over depth, as SVG.

    Equal choices give equal bytes. Darker bars are the good cuts.

    Args:
        choices: in the order of :func:`cenacle.cut.suggestion.suggest`.
        title: in plain text; names in it and of layers are escaped.
    """
    step = (_RIGHT - _LEFT) / max(len(choices), 1)
    centres = [_LEFT + step * (k + 0.5) for k in range(len(choices))]
    largest = max((one.crossing_bytes for one in choices), default=0) or 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 22, title, ' font-size="15" font-weight="bold"'),
    ]
    for tenth in range(0, 11, 2):
        y = _BOTTOM - (_BOTTOM - _TOP) * tenth / 10
        parts += [
            f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_RIGHT}" y2="{y:.1f}" stroke="#E4E4E4"/>',
            _text(_LEFT - 8, y + 4, f"{tenth * 10}%", ' text-anchor="end"'),
            _text(_RIGHT + 8, y + 4, _bytes(largest * tenth / 10)),
        ]
    for one, x in zip(choices, centres, strict=True):
        height = (_BOTTOM - _TOP) * one.crossing_bytes / largest
        parts.append(
            f'<rect x="{x - step * 0.35:.1f}" y="{_BOTTOM - height:.1f}" width="{step * 0.7:.1f}" '
            f'height="{height:.1f}" fill="{_GOOD if one.good else _BYTES}">'
            f"<title>{escape(_shown(one.layer, 200))}: {_bytes(one.crossing_bytes)}</title></rect>"
        )
    parts += [
        _line([(x, _height(one.share)) for one, x in zip(choices, centres, strict=True)], _SHARE),
        _line(
            [(x, _height(one.macs_share)) for one, x in zip(choices, centres, strict=True)],
            _COMPUTE,
            "6 3",
        ),
    ]
    for one, x in zip(choices, centres, strict=True):
        if one.accuracy is not None:
            parts.append(
                f'<circle cx="{x:.1f}" cy="{_height(one.accuracy):.1f}" r="4" fill="{_ACCURACY}"/>'
            )
    every = -(-len(choices) // _MOST_LABELS) or 1
    for k, (one, x) in enumerate(zip(choices, centres, strict=True)):
        if k % every == 0:
            turn = f' text-anchor="end" transform="rotate(-45 {x:.1f} {_BOTTOM + 14})"'
            parts.append(_text(x, _BOTTOM + 14, _shown(one.layer, _MOST_LETTERS), turn))
    legend = [
        (_SHARE, "confidential share of the weights"),
        (_COMPUTE, "share of the computation in the tail"),
        (_BYTES, "bytes crossing for one row (dark: good cuts)"),
    ]
    if any(one.accuracy is not None for one in choices):
        legend.append((_ACCURACY, "accuracy after retraining"))
    x = float(_LEFT)
    for colour, words in legend:
        parts.append(f'<rect x="{x:.1f}" y="32" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(x + 17, 42, words))
        x += 34 + 6.3 * len(words)
    return "\n".join([*parts, "</svg>", ""])


def _height(share: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * min(max(share, 0.0), 1.0)


def _shown(name: str, most: int) -> str:
    clean = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return clean if len(clean) <= most else f"…{clean[-most + 1 :]}"
