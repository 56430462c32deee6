"""Figures of the report as inline SVG: colours are CSS variables, so they follow the reader's colour scheme."""

import decimal
import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 22, 38
GUTTER = 26  # of a heat map, for the layers' numbers
MOST_POINTS = 64  # of a spectrum


class Series(NamedTuple):
    """A line of points (x, y), and its looks: `style` is a class of report.css, `shape` one of SHAPES."""

    name: str
    style: str
    shape: int
    points: Sequence[tuple[float, float]]


# Points of a marker around (0, 0), none for a circle; and the dashes of its line.
SHAPES = (
    ("", ""),
    ("-3.6,-3.6 3.6,-3.6 3.6,3.6 -3.6,3.6", "6 3"),
    ("0,-4.6 4.4,3.4 -4.4,3.4", ""),
    ("0,-4.9 4.9,0 0,4.9 -4.9,0", "8 2 2 2"),
    ("0,4.6 4.4,-3.4 -4.4,-3.4", "3 2"),
    (
        "-4.5,-1.5 -1.5,-1.5 -1.5,-4.5 1.5,-4.5 1.5,-1.5 4.5,-1.5 4.5,1.5 1.5,1.5 1.5,4.5 -1.5,4.5 -1.5,1.5 -4.5,1.5",
        "2 2",
    ),
)


def text(x: float, y: float, words: str, anchor: str = "middle", style: str = "") -> str:
    """An SVG text, escaped."""
    classes = f' class="{style}"' if style else ""
    return f'<text x="{x:.5g}" y="{y:.5g}" text-anchor="{anchor}"{classes}>{html.escape(words)}</text>'


def marker(x: float, y: float, series: Series) -> str:
    """The series' marker at a place."""
    points, _ = SHAPES[series.shape % len(SHAPES)]
    if not points:
        return f'<circle class="dot" cx="{x:.5g}" cy="{y:.5g}" r="4"/>'
    return f'<polygon class="dot" points="{points}" transform="translate({x:.5g} {y:.5g})"/>'


def legend(series: Sequence[Series]) -> str:
    """A list of the series with their markers."""
    rows = []
    for one in series:
        dashes = SHAPES[one.shape % len(SHAPES)][1]
        glyph = f'<path class="line" d="M0 7H32" stroke-dasharray="{dashes}"/>{marker(16, 7, one)}'
        rows.append(f'<li class="c-{one.style}"><svg viewBox="0 0 32 14" aria-hidden="true">{glyph}</svg>'
                    f"{html.escape(one.name)}</li>")  # fmt: skip
    return f'<ul class="legend">{"".join(rows)}</ul>'


def short(value: float) -> str:
    """A number for an axis: 1.5M, 20k, 0.003."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{decimal.Decimal(f'{value:.3g}'):f}"


def ticks(low: float, high: float, log: bool, most: int = 5) -> list[float]:
    """Round numbers between the two, at most `most` + 1 of them."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        return [10.0**e for e in range(first, last + 1, max(1, -(-(last - first) // most)))]
    raw = (high - low) / most
    size = 10 ** math.floor(math.log10(raw))
    step = size * next(m for m in (1, 2, 2.5, 5, 10) if m * size >= raw * (1 - 1e-9))
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


class Scale(NamedTuple):
    """Maps low..high to start..end."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (*self[:2], value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def chart(series: Sequence[Series], title: str, x_name: str, y_name: str, log_y: bool = False) -> str:
    """Lines with markers over a linear x, y linear from 0 or logarithmic. Figures stand in a table beside it."""
    shown = [s._replace(points=[p for p in s.points if p[1] > 0 or not log_y]) for s in series]
    points = [p for s in shown for p in s.points] or [(1.0, 1.0)]  # all may be 0, which has no logarithm
    xs, ys = zip(*points, strict=True)
    low, high = (10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)) + 1e-9)) if log_y else (
        0.0, max(ys) * 1.08 or 1.0)  # fmt: skip
    x = Scale(0.0, max(xs) * 1.06, LEFT, WIDTH - RIGHT, False)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, log_y)
    parts = []
    for tick in ticks(low, high, log_y):
        parts += [f'<path class="grid" d="M{LEFT} {y(tick):.4g}H{WIDTH - RIGHT}"/>',
                  text(LEFT - 6, y(tick) + 3.5, short(tick), "end")]  # fmt: skip
    for tick in ticks(0, max(xs) * 1.06, False):
        parts.append(text(x(tick), HEIGHT - BOTTOM + 15, short(tick)))
    parts += [text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_name), text(2, 12, y_name, "start")]
    for one in shown:
        dashes = SHAPES[one.shape % len(SHAPES)][1]
        path = "L".join(f"{x(a):.5g} {y(b):.5g}" for a, b in one.points)
        drawn = "".join(marker(x(a), y(b), one) for a, b in one.points)
        parts.append(
            f'<g class="c-{one.style}"><path class="line" stroke-dasharray="{dashes}" d="M{path}"/>{drawn}</g>'
        )
        if len(one.points) == 1:  # a lone point carries its name
            (a, b), right = one.points[0], x(one.points[0][0]) > WIDTH * 0.6
            parts.append(text(x(a) + (-9 if right else 9), y(b) + 3.5, one.name, "end" if right else "start", "name"))
    return svg("".join(parts), WIDTH, HEIGHT, title)


def svg(content: str, width: float, height: float, title: str) -> str:
    """An image with a name for those who do not see it; the letters of a wide one grow on a phone."""
    style = "chart wide" if width == WIDTH else "chart"
    return (f'<svg class="{style}" role="img" aria-label="{html.escape(title)}" viewBox="0 0 {width:g} {height:g}">'
            f"{content}</svg>")  # fmt: skip


def bars(rows: Sequence[tuple[str, str, float, str]], title: str) -> str:
    """Horizontal bars: (name, style, value, label) of each."""
    largest = max(value for *_, value, _ in rows) or 1.0
    parts = []
    for i, (name, style, value, label) in enumerate(rows):
        top, length = 34 * i, max(1.0, value / largest * (WIDTH - 8))
        parts.append(
            text(0, top + 11, name, "start", "strong") + text(WIDTH - 2, top + 11, label, "end")
            + f'<rect class="bar c-{style}" x="0" y="{top + 16}" width="{length:.5g}" height="9" rx="2"/>'
        )  # fmt: skip
    return svg("".join(parts), WIDTH, 34 * len(rows), title)


def spectrum(lines: dict[str, Sequence[float]], low: float, high: float, title: str) -> str:
    """Falling eigenvalues on a logarithmic scale low..high: "keys" as a line, "values" dashed."""
    y, parts = Scale(low, high, 96, 4, True), []
    for tick in ticks(low, high, True, 4):
        parts += [f'<path class="grid" d="M34 {y(tick):.4g}H148"/>',
                  text(31, y(tick) + 3, f"1e{round(math.log10(tick))}", "end")]  # fmt: skip
    for part, values in lines.items():
        step = -(-len(values) // MOST_POINTS)
        x = Scale(0, max(len(values) - 1, 1), 35, 148, False)
        path = "L".join(f"{x(i):.4g} {y(max(v, low)):.4g}" for i, v in list(enumerate(values))[::step])
        style, dashes = ("s1", "") if part == "keys" else ("mlx", "4 2")
        parts.append(f'<g class="c-{style}"><path class="line" stroke-dasharray="{dashes}" d="M{path}"/></g>')
    return svg("".join(parts), 150, 100, title)


def heat_map(rows: Sequence[tuple[int, int, str]], title: str) -> str:
    """Bits of each dimension (across) of each (layer, head) (down): runs of equal bits as one rectangle each."""
    size = 11.0 if len(rows) <= 24 else 7.0 if len(rows) <= 96 else 4.0
    paths: dict[str, list[str]] = {str(b): [] for b in range(9)}
    names, top, layer = [], 2.0, -1
    for row_layer, _, bits in rows:
        if row_layer != layer:
            top += size / 2 if layer >= 0 else 0.0
            layer = row_layer
            names.append((top, layer))
        left = 0
        for width, run in itertools.groupby(bits):
            count = len(list(run))
            unit = (WIDTH - GUTTER) / len(bits)
            edge, span = GUTTER + left * unit, count * unit
            paths[width].append(f"M{edge:.4g} {top:g}h{span:.4g}v{size - 0.5:g}h-{span:.4g}z")
            left += count
        top += size
    step = max(1, -(-len(names) * 11 // max(int(top), 1)))
    labels = [text(GUTTER - 5, y + 9.5, f"{n}", "end") for y, n in names[::step]]
    drawn = [f'<path class="w{b}" d="{"".join(runs)}"/>' for b, runs in paths.items() if runs]
    return svg("".join(labels + drawn), WIDTH, top, title)


def heat_legend() -> str:
    """The scale of the heat map."""
    box = '<svg viewBox="0 0 32 14" aria-hidden="true"><rect class="w{0}" width="32" height="14"/></svg>'
    parts = [f"<li>{box.format(b)}{b}</li>" for b in range(9)]
    return f'<ul class="legend" aria-label="bits of a dimension">{"".join(parts)}</ul>'
