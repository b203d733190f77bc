"""Charts of the report as SVG. Colours are CSS variables of the page, so both themes work.

Lines differ by colour, dash and marker: `NUM_COLORS` x `NUM_DASHES` before colour and dash repeat,
and markers go on past that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_kvcompress.evaluation.quality.intervals import Interval
from vllm_kvcompress.evaluation.quality.text import escape, percent, percent_interval, share

NUM_COLORS, NUM_DASHES = 7, 3
DASHES = ("", "7 3", "2 2.5")
MARKERS = (
    "M-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0-7.2 0z",  # disc
    "M-3.2-3.2h6.4v6.4h-6.4z",  # square
    "M0-4.4L4.4 0L0 4.4L-4.4 0z",  # diamond
    "M0-4.2L4 3.2H-4z",  # triangle
    "M0 4.2L4-3.2H-4z",  # triangle, point down
    "M-1.4-4h2.8v2.6H4v2.8H1.4V4h-2.8V1.4H-4v-2.8h2.6z",  # plus
    "M0-4.6L1.3-1.4L4.4-1.4L2 .7L2.8 4L0 2.1L-2.8 4L-2 .7L-4.4-1.4L-1.3-1.4z",  # star
    "M-4-1.6h8v3.2h-8z",  # bar
)
WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 34, 12, 14, 40
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
HEAT_STEPS = 10
CELL_WIDTH, CELL_HEIGHT = 29, 17
LETTER_WIDTH = 7
"""Of a digit in labels of 11 px, at most."""


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes
    ----------
    x : float
        Share of the cache, 0 to 1.
    y : float
        Mean score, 0 to 1.
    interval : Interval
        Of `y`.
    budget : float
        As asked.
    """

    x: float
    y: float
    interval: Interval
    budget: float


@dataclass(frozen=True)
class Line:
    """One policy.

    Attributes
    ----------
    name : str
        As people know it.
    style : int
        Its place among the policies, from 0; gives colour, dash and marker.
    points : sequence of Point
        In any order.
    """

    name: str
    style: int
    points: Sequence[Point]


class XAxis:
    """Shares of the cache on a logarithmic axis, on a linear one where a share is 0.

    Parameters
    ----------
    shares : sequence of float
        What has to fit; the whole cache always does.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.low, self.high = min([*shares, 1.0]), max([*shares, 1.0])
        self.log = self.low > 0
        if self.log:
            self.low = min(self.low * 0.85, 0.5)
            self.ticks = [tick for tick in TICKS if self.low <= tick <= self.high]
        else:
            self.low, self.ticks = 0.0, [0.0, 0.25, 0.5, 0.75, 1.0]

    def place(self, x: float) -> float:
        """Horizontal place in the chart."""
        low, high, x = (math.log(v) if self.log else v for v in (self.low, self.high, x))
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _height(y: float) -> float:
    return TOP + (1 - y) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    ident: str,
    title: str,
    lines: Sequence[Line],
    baseline: tuple[float, Interval | None] | None,
    x_label: str,
) -> str:
    """Score against what is kept, with 95 % intervals as bars.

    Parameters
    ----------
    ident : str
        Unique on the page.
    title : str
        What is shown.
    lines : sequence of Line
        One per policy.
    baseline : (float, Interval or None) or None
        Score of the whole cache, drawn as a dashed line; an interval becomes a band.
    x_label : str
        What x is.
    """
    axis = XAxis([point.x for line in lines for point in line.points])
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">{escape(title)}</title>'
        f'<desc id="{ident}-d">{escape(_described(lines, baseline))}</desc>',
        *_axes(axis, x_label),
    ]
    if baseline is not None:
        parts += _baseline(*baseline)
    parts += [_line(line, axis) for line in lines]
    return "".join([*parts, "</svg>"])


def _described(lines: Sequence[Line], baseline: tuple[float, Interval | None] | None) -> str:
    said = [f"Whole cache: {percent(baseline[0])}."] if baseline else ["No baseline."]
    for line in lines:
        points = sorted(line.points, key=lambda point: -point.budget)
        values = ", ".join(f"{percent(each.y)} at {share(each.budget)}" for each in points)
        said.append(f"{line.name}: {values}.")
    return " ".join(said)


def _axes(axis: XAxis, x_label: str) -> list[str]:
    parts, end = [], WIDTH - RIGHT
    for y in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = f"{_height(y):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {height}H{end}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 5}" y="{height}" dy=".32em" text-anchor="end">'
            f"{y * 100:.0f}</text>"
        )
    for x in axis.ticks:
        place = f"{axis.place(x):.1f}"
        parts.append(f'<path class="grid" d="M{place} {TOP}V{_height(0):.1f}"/>')
        anchor = "end" if axis.place(x) > end - 8 else "middle"
        parts.append(
            f'<text class="tick" x="{place}" y="{_height(0) + 14:.1f}" text-anchor="{anchor}">'
            f"{share(x)}</text>"
        )
    middle = (LEFT + end) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return parts


def _baseline(mean: float, interval: Interval | None) -> list[str]:
    end, said, parts = WIDTH - RIGHT, f"Whole cache: {percent(mean)}", []
    if interval is not None:
        top, bottom = _height(interval.high), _height(interval.low)
        said += f" {percent_interval(interval)}"
        parts.append(
            f'<rect class="wholeband" x="{LEFT}" y="{top:.1f}" width="{end - LEFT}" '
            f'height="{bottom - top:.1f}"/>'
        )
    line = f"M{LEFT} {_height(mean):.1f}H{end}"
    return [*parts, f'<path class="whole" d="{line}"><title>{said}</title></path>']


def _line(line: Line, axis: XAxis) -> str:
    points = sorted(line.points, key=lambda point: point.x)
    places = [(axis.place(point.x), point) for point in points]
    track = "L".join(f"{x:.1f} {_height(point.y):.1f}" for x, point in places)
    bars = "".join(
        f"M{x - 2.5:.1f} {_height(point.interval.high):.1f}h5m-2.5 0"
        f"V{_height(point.interval.low):.1f}m-2.5 0h5"
        for x, point in places
    )
    marks = "".join(
        f'<path class="mark" transform="translate({x:.1f} {_height(point.y):.1f})" '
        f'd="{marker(line.style)}"><title>{escape(_point(line, point))}</title></path>'
        for x, point in places
    )
    return (
        f'<g class="line {style_classes(line.style)}"><path class="bar" d="{bars}"/>'
        f'<path class="track" d="M{track}"{_dash(line.style)}/>{marks}</g>'
    )


def _point(line: Line, point: Point) -> str:
    held = "" if point.x == point.budget else f", holds {share(point.x)}"
    value = f"{percent(point.y)} {percent_interval(point.interval)}"
    return f"{line.name}, budget {share(point.budget)}{held}: {value}"


def style_classes(style: int) -> str:
    """CSS classes of a policy: `c` its colour, `k` the policy itself."""
    return f"c{style % NUM_COLORS} k{style}"


def marker(style: int) -> str:
    """Path of a policy's marker around 0, 0."""
    return MARKERS[style % len(MARKERS)]


def _dash(style: int) -> str:
    dash = DASHES[style // NUM_COLORS % NUM_DASHES]
    return f' stroke-dasharray="{dash}"' if dash else ""


def swatch(style: int) -> str:
    """A policy's line and marker, for legends; hidden from screen readers."""
    return (
        f'<svg class="swatch c{style % NUM_COLORS}" viewBox="0 0 34 12" aria-hidden="true">'
        f'<path class="track" d="M1 6H33"{_dash(style)}/>'
        f'<path class="mark" transform="translate(17 6)" d="{marker(style)}"/></svg>'
    )


# --- heat maps ----------------------------------------------------------------------------


def heat_map(
    ident: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    means: Mapping[tuple[int, int], float],
) -> str:
    """Mean scores by depth and length; what is lost is coloured, and every cell says its number.

    Parameters
    ----------
    ident : str
        Unique on the page.
    title : str
        What is shown.
    rows, columns : sequence of str
        Depths and lengths.
    means : mapping
        From (row, column) to a score of 0 to 1; absent where nothing was measured.
    """
    left, bottom = 38, 16
    # As wide as the longest label, so that labels do not run into one another.
    cell = max(CELL_WIDTH, LETTER_WIDTH * (max(map(len, columns), default=0) + 1))
    width, height = left + cell * len(columns) + 1, CELL_HEIGHT * len(rows) + bottom
    said = f"Rows are depths, columns are lengths. {_worst(rows, columns, means)}"
    parts = [
        f'<svg class="heat" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img" aria-labelledby="{ident}-t {ident}-d"><title id="{ident}-t">'
        f'{escape(title)}</title><desc id="{ident}-d">{escape(said)}</desc>'
    ]
    for row, label in enumerate(rows):
        y = CELL_HEIGHT * row + CELL_HEIGHT / 2
        parts.append(f'<text class="tick" x="{left - 4}" y="{y}" dy=".34em">{escape(label)}</text>')
        for column in range(len(columns)):
            place = left + cell * column, CELL_HEIGHT * row
            parts.append(_heat_cell(*place, cell, means.get((row, column))))
    for column, label in enumerate(columns):
        x = left + cell * (column + 0.5)
        parts.append(f'<text class="tick m" x="{x}" y="{height - 4}">{escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def _heat_cell(x: int, y: int, width: int, mean: float | None) -> str:
    size = f'width="{width - 1}" height="{CELL_HEIGHT - 1}"'
    if mean is None:
        return f'<rect class="nothing" x="{x + 0.5}" y="{y + 0.5}" {size}/>'
    step = round((1 - mean) * HEAT_STEPS)
    middle = f'x="{x + width / 2}" y="{y + CELL_HEIGHT / 2}" dy=".34em"'
    return (
        f'<rect class="h{step}" x="{x + 0.5}" y="{y + 0.5}" {size}/>'
        f'<text class="n{step}" {middle}>{mean * 100:.0f}</text>'
    )


def _worst(
    rows: Sequence[str], columns: Sequence[str], means: Mapping[tuple[int, int], float]
) -> str:
    if not means:
        return "Nothing was measured."
    (row, column), mean = min(means.items(), key=lambda item: item[1])
    return f"Lowest: {percent(mean)} at depth {rows[row]}, length {columns[column]}."
