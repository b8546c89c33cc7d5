"""Plots as inline SVG and HTML, for pages that need no other file.

Written by hand instead of by matplotlib, because the page must also be made where that is not
installed, and because it reads better: dots take the page's colours in light and dark, tell what
they are when pointed at, and some 200 of them take 40 kB. Nothing here is drawn twice by another
way; who wants other plots has the tables.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["", "base", "front"]
"""How a mark is drawn: as one of many, as a baseline, or with its name beside it."""
Box: TypeAlias = tuple[float, float, float, float]  # left, top, right, bottom

_WIDTH, _HEIGHT = 960, 460
_LEFT, _TOP, _RIGHT, _BOTTOM = 64, 20, 20, 48  # margins
_ENDS = 150  # room for the names of curves at their ends
_LETTER, _LINE = 6.6, 15  # size of a letter and of a line of text
_STEPS = (1, 2, 5, 10)
_WORST, _MIDDLE, _BEST = (244, 165, 130), (247, 247, 240), (146, 197, 222)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One mean with its interval."""

    name: str
    title: str  # shown when pointed at
    x: float
    y: float
    low: float
    high: float
    kind: Kind = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Means at several x, with their intervals."""

    name: str
    points: Sequence[Point]  # by rising x
    kind: Kind = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One place of a heat map."""

    value: float
    text: str
    title: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What stands at the axes of a plot."""

    x: str
    y: str
    x_tick: Callable[[float], str]
    y_tick: Callable[[float], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    first: float  # pixel of `low`
    last: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.is_log
            else (self.low, self.high, value)
        )
        return self.first + (at - low) / (high - low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Return round values within the axis, some three to ten of them."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [step * 10.0**power for power in powers for step in _STEPS[:-1]]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(step * unit for step in _STEPS if step * unit >= rough * 0.999)
            first = math.ceil(self.low / step - 1e-9)
            values = [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [value for value in values if self.low <= value <= self.high]


def pareto_front(places: Sequence[tuple[float, float]]) -> list[int]:
    """Return which (cost, gain) no other beats: none costs as little and gains as much.

    By rising cost; of equal ones the first.
    """
    order = sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1], i))
    front: list[int] = []
    for index in order:
        if not front or places[index][1] > places[front[-1]][1]:
            front.append(index)
    return front


def scatter(
    points: Sequence[Point],
    labels: Labels,
    *,
    marks: Mapping[str, float],
    levels: Mapping[str, float],
) -> str:
    """Draw means against a cost on a logarithmic axis; names on the front only.

    Args:
        points: at least one, x above 0. A line joins those of kind `front`.
        labels: of the axes.
        marks: vertical lines by name, x above 0.
        levels: horizontal lines by name.
    """
    x_axis = _log_axis([p.x for p in points] + list(marks.values()))
    y_axis = _y_axis(points, levels)
    boxes: list[Box] = []
    parts = [*_frame(x_axis, y_axis, labels), *_vertical_lines(marks, x_axis, boxes)]
    parts += _horizontal_lines(levels, x_axis, y_axis, boxes)
    front = sorted((p for p in points if p.kind == "front"), key=lambda p: p.x)
    parts += [_path(front, x_axis, y_axis, "curve front")] if len(front) > 1 else []
    for point in sorted(points, key=lambda p: ("", "base", "front").index(p.kind)):
        parts.append(_dot(point, x_axis, y_axis))
    boxes += [_around(x_axis.place(p.x), y_axis.place(p.y)) for p in front]
    for point in front:
        parts.append(_beside(point.name, x_axis.place(point.x), y_axis.place(point.y), boxes))
    return _svg(parts, f"{labels.y} against {labels.x}")


def curves(lines: Sequence[Curve], labels: Labels, *, levels: Mapping[str, float]) -> str:
    """Draw one curve each; the names of those that are of a kind stand at their ends.

    Args:
        lines: at least one, of at least one point each, x above 0.
        labels: of the axes.
        levels: horizontal lines by name.
    """
    points = [point for line in lines for point in line.points]
    x_axis = _log_axis([point.x for point in points], right=_ENDS)
    y_axis = _y_axis(points, levels)
    places = sorted({point.x for point in points})
    parts = _frame(x_axis, y_axis, labels, x_ticks=places)
    parts += _horizontal_lines(levels, x_axis, y_axis, [])
    ends: list[tuple[float, str]] = []
    for line in sorted(lines, key=lambda line: ("", "base", "front").index(line.kind)):
        path = _path(line.points, x_axis, y_axis, f"curve {line.kind}".strip())
        hit = _path(line.points, x_axis, y_axis, "hit")
        dots = "".join(_dot(point, x_axis, y_axis, kind=line.kind) for point in line.points)
        title = f"<title>{escape(line.name)}</title>"
        parts.append(f'<g class="item">{title}{path}{hit}{dots}</g>')
        if line.kind:
            ends.append((y_axis.place(line.points[-1].y), line.name))
    right = x_axis.last + 10
    for top, name in _apart(sorted(ends)):
        parts.append(f'<text x="{right:.1f}" y="{top + 4:.1f}">{escape(name)}</text>')
    return _svg(parts, f"{labels.y} against {labels.x}")


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell | None]]
) -> str:
    """Draw a table of coloured numbers: orange is the least of them, blue the most.

    Args:
        rows: their names, from the top.
        columns: their names.
        cells: by row and column; None where there is no number.
    """
    values = [cell.value for row in cells for cell in row if cell is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    head = "".join(f'<th class="n" scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(_heat_cell(cell, low, high) for cell in row)
        + "</tr>"
        for name, row in zip(rows, cells, strict=True)
    )
    return (
        f'<div class="wide"><table class="heat"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _heat_cell(cell: Cell | None, low: float, high: float) -> str:
    if cell is None:
        return '<td class="none">-</td>'
    share = (cell.value - low) / (high - low) if high > low else 1.0
    first, last, part = (
        (_WORST, _MIDDLE, share * 2) if share < 0.5 else (_MIDDLE, _BEST, share * 2 - 1)
    )
    color = "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(first, last, strict=True))
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    return f'<td style="background:#{color}"{title}>{escape(cell.text)}</td>'


def _log_axis(values: Sequence[float], *, right: int = _RIGHT) -> _Axis:
    low, high = min(values) / 1.15, max(values) * 1.15
    return _Axis(low=low, high=high, first=_LEFT, last=_WIDTH - right, is_log=True)


def _y_axis(points: Sequence[Point], levels: Mapping[str, float]) -> _Axis:
    low = min([point.low for point in points] + list(levels.values()))
    high = max([point.high for point in points] + list(levels.values()))
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return _Axis(low=low - room, high=high + room, first=_HEIGHT - _BOTTOM, last=_TOP)


def _frame(
    x_axis: _Axis, y_axis: _Axis, labels: Labels, *, x_ticks: Sequence[float] | None = None
) -> list[str]:
    """Return lines and names of the ticks, and what the axes are."""
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(_line(x_axis.first, y, x_axis.last, y, "grid"))
        parts.append(_text(x_axis.first - 8, y + 4, labels.y_tick(value), anchor="end"))
    for value in x_axis.ticks() if x_ticks is None else x_ticks:
        x = x_axis.place(value)
        parts.append(_line(x, y_axis.first, x, y_axis.last, "grid"))
        parts.append(_text(x, y_axis.first + 18, labels.x_tick(value), anchor="middle"))
    middle = (x_axis.first + x_axis.last) / 2
    parts.append(_text(middle, _HEIGHT - 8, labels.x, anchor="middle"))
    parts.append(_text(x_axis.first, _TOP - 7, labels.y))
    return parts


def _vertical_lines(marks: Mapping[str, float], x_axis: _Axis, boxes: list[Box]) -> Iterator[str]:
    """Yield lines across the plot with their names; adds the places of the names to `boxes`."""
    for name, value in marks.items():
        x, width = x_axis.place(value), _LETTER * len(name)
        yield _line(x, _TOP, x, _HEIGHT - _BOTTOM, "mark")
        bottom = _HEIGHT - _BOTTOM - 8
        fits = x + 6 + width <= x_axis.last
        yield _text(x + 6 if fits else x - 6, bottom, name, anchor="start" if fits else "end")
        left = x + 6 if fits else x - 6 - width
        boxes.append((left, bottom - _LINE, left + width, bottom))


def _horizontal_lines(
    levels: Mapping[str, float], x_axis: _Axis, y_axis: _Axis, boxes: list[Box]
) -> Iterator[str]:
    """Yield lines from left to right with their names; adds the places of the names to `boxes`."""
    for name, value in levels.items():
        y, left = y_axis.place(value), x_axis.first + 6
        yield _line(x_axis.first, y, x_axis.last, y, "mark")
        yield _text(left, y - 5, name)
        boxes.append(_box(left, y - 5, _LETTER * len(name)))


def _dot(point: Point, x_axis: _Axis, y_axis: _Axis, *, kind: Kind | None = None) -> str:
    """Return a dot with its interval; `kind` replaces that of the point."""
    x, y = x_axis.place(point.x), y_axis.place(point.y)
    style = f"dot {point.kind if kind is None else kind}".strip()
    radius = 3.0 if style == "dot" else 4.0
    ends = (y_axis.place(point.low), y_axis.place(point.high))
    interval = _line(x, ends[0], x, ends[1], style, extra=' stroke-opacity="0.45"')
    return (
        f'<g class="item"><title>{escape(point.title)}</title>{interval}'
        f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/></g>'
    )


def _path(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis, style: str) -> str:
    steps = " ".join(f"{x_axis.place(p.x):.1f},{y_axis.place(p.y):.1f}" for p in points)
    return f'<polyline class="{style}" points="{steps}"/>'


def _beside(name: str, x: float, y: float, boxes: list[Box]) -> str:
    """Write a name beside a dot where nothing is written yet; adds its place to `boxes`."""
    width = _LETTER * len(name)
    choices = [
        (left, y + down)
        for reach in range(8)
        for left, down in (
            (x - width - 8, -8 - reach * _LINE),
            (x + 8, 14 + reach * _LINE),
            (x + 8, -8 - reach * _LINE),
            (x - width - 8, 14 + reach * _LINE),
        )
    ]
    inside = [
        (left, base)
        for left, base in choices
        if left >= _LEFT
        and left + width <= _WIDTH - _RIGHT
        and _TOP + _LINE <= base <= _HEIGHT - _BOTTOM
    ] or choices[:1]
    free = [
        place for place in inside if not any(_meet(_box(*place, width), box) for box in boxes)
    ] or inside
    left, base = free[0]
    boxes.append(_box(left, base, width))
    return _text(left, base, name)


def _box(left: float, base: float, width: float) -> Box:
    return (left, base - _LINE + 3, left + width, base + 3)


def _around(x: float, y: float) -> Box:
    return (x - 4, y - 4, x + 4, y + 4)


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _apart(ends: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Push names apart that would be written over each other; keeps their order and the frame."""
    placed: list[tuple[float, str]] = []
    for top, name in ends:
        placed.append((max(top, placed[-1][0] + _LINE) if placed else top, name))
    below = float(_HEIGHT - _BOTTOM)
    for index in range(len(placed) - 1, -1, -1):
        top, name = placed[index]
        placed[index] = (min(top, below), name)
        below = placed[index][0] - _LINE
    return placed


def _line(x1: float, y1: float, x2: float, y2: float, style: str, *, extra: str = "") -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{extra}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
