"""Geometry of the charts inside the HTML report: axes, ticks and marks in the units of an SVG drawing; heat colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

from tmpq_exp.report.pictures import is_log_scale
from tmpq_exp.report.points import Point, SearchView, spread

WIDTH, HEIGHT = 480.0, 330.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 470.0, 14.0, 288.0
_LEFT_OF_NAMES = 416.0
_HEAT_LOW, _HEAT_HIGH = (0xE3, 0xEC, 0xFB), (0x16, 0x3A, 0x7D)


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Args:
        low: Smallest value shown.
        high: Largest value shown, above ``low``.
        start: Coordinate of ``low``.
        end: Coordinate of ``high``.
        is_log: Whether equal distances are equal ratios.
    """

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, is_log: bool = False) -> Axis:
        """Axis that shows all values with a margin of 8 % on either side."""
        low, high = min(values), max(values)
        if is_log:
            room = (high / low) ** 0.08
            return cls(low / room, high * room, start, end, is_log=True)
        room = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """Coordinate of a value, rounded to a tenth."""
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, count: int = 6) -> list[dict[str, Any]]:
        """Round values inside the axis with their coordinates."""
        locator = LogLocator(base=10, subs=(1.0, 2.0, 5.0)) if self.is_log else MaxNLocator(count, steps=[1, 2, 5, 10])
        values = [float(v) for v in locator.tick_values(self.low, self.high) if self.low <= v <= self.high]
        return [{"at": self.at(value), "text": f"{value:,.4g}"} for value in values]


def trials_chart(view: SearchView) -> dict[str, Any]:
    """Quality against BitOPs: candidates, front, baselines, budget and the best one.

    Args:
        view: Points of the search, at least one searched candidate.

    Returns:
        Everything the template draws. Baselines that cost far more than any candidate are lines at their quality,
        named in the right margin.
    """
    lines = [point for point in view.baselines if view.is_costly(point)]
    uniform = [point for point in view.baselines if not view.is_costly(point)]
    values = [point.value for point in (*view.searched, *view.baselines)]
    x = Axis.around(view.cost_range(), LEFT, _LEFT_OF_NAMES if lines else RIGHT)
    y = Axis.around(values, BOTTOM, TOP, is_log=is_log_scale(values))
    front = {point.index for point in view.front}
    return {
        **frame(x, y),
        "candidates": [_mark(p, x, y, view.metric) | {"on_front": p.index in front} for p in view.searched],
        "front": stairs([(x.at(p.bitops / 1e9), y.at(p.value)) for p in view.front]),
        "uniform": [_mark(p, x, y, view.metric) | {"name": p.label} for p in uniform],
        "lines": _named_lines(lines, y, view.metric),
        "budget": None if view.budget_bitops is None else x.at(view.budget_bitops / 1e9),
        "best": None if view.best is None else _mark(view.best, x, y, view.metric),
    }


def progress_chart(view: SearchView, random: Sequence[float | None] = ()) -> dict[str, Any]:
    """Best value within the budget after each evaluation, over all values.

    Args:
        view: Points of the search, at least one searched candidate.
        random: Best value so far of a random search beside it; None before its first value.

    Returns:
        Everything the template draws.
    """
    values = [point.value for point in view.searched]
    beside = {i: value for i, value in enumerate(random, 1) if value is not None}
    x = Axis.around([1.0, float(max(len(values), len(random)))], LEFT, RIGHT)
    y = Axis.around([*values, *beside.values()], BOTTOM, TOP, is_log=is_log_scale(values))
    steps = [(x.at(i), y.at(value)) for i, value in enumerate(view.progress, 1) if math.isfinite(value)]
    known = [value for value in view.progress if math.isfinite(value)]
    return {
        **frame(x, y),
        "candidates": [
            _mark(point, x, y, view.metric) | {"x": x.at(i), "on_front": False}
            for i, point in enumerate(view.searched, 1)
        ],
        "line": stairs(steps),
        "random": stairs([(x.at(i), y.at(value)) for i, value in beside.items()]),
        "last": {"x": steps[-1][0], "y": steps[-1][1], "text": f"{known[-1]:.4g}"} if steps else None,
    }


def multiplications_chart(view: SearchView) -> dict[str, Any] | None:
    """Quality against multiplications: candidates, baselines at equal steps, and the best one.

    Args:
        view: Points of the search; those that know no multiplications are left out.

    Returns:
        Everything the template draws; None where no candidate has multiplications.
    """
    searched = [point for point in view.searched if point.multiplications]
    if not searched:
        return None
    ceiling = 1.25 * max(point.multiplications for point in searched)
    baselines = [point for point in view.baselines if point.multiplications]
    near = [point for point in baselines if point.multiplications <= ceiling and not point.is_float]
    lines = [point for point in baselines if point not in near]
    x = Axis.around([p.multiplications / 1e9 for p in (*searched, *near)], LEFT, _LEFT_OF_NAMES if lines else RIGHT)
    values = [point.value for point in (*searched, *baselines)]
    y = Axis.around(values, BOTTOM, TOP, is_log=is_log_scale(values))

    def mark(point: Point) -> dict[str, Any]:
        multiplications = point.multiplications / 1e9
        title = f"{_title(point, view.metric)}, {multiplications:,.3f} G multiplications"
        return {"x": x.at(multiplications), "y": y.at(point.value), "title": title, "trial": point.index}

    best = view.best if view.best is not None and view.best.multiplications else None
    return {
        **frame(x, y),
        "candidates": [mark(point) | {"on_front": False} for point in searched],
        "front": "",
        "uniform": [mark(point) | {"name": point.label} for point in near],
        "lines": _named_lines(lines, y, view.metric),
        "budget": None,
        "best": None if best is None else mark(best),
    }


def curve_chart(values: Sequence[float]) -> dict[str, Any]:
    """Values of the steps of learning, in their order, at least two."""
    x, y = Axis.around([1.0, float(len(values))], LEFT, RIGHT), Axis.around(values, BOTTOM, TOP)
    line = " ".join(f"{x.at(float(i))},{y.at(value)}" for i, value in enumerate(values, 1))
    return {**frame(x, y), "line": line}


def heat_colours(share: float) -> dict[str, str]:
    """Fill of a cell, light for 0 and dark for 1, and the ink that is readable on it."""
    share = min(1.0, max(0.0, share))
    channels = [round(low + share * (high - low)) for low, high in zip(_HEAT_LOW, _HEAT_HIGH, strict=True)]
    return {"fill": "#{:02x}{:02x}{:02x}".format(*channels), "ink": "#ffffff" if share > 0.5 else "#14213d"}


def frame(x: Axis, y: Axis) -> dict[str, Any]:
    """Size, edges and ticks of a chart with these axes."""
    return {
        "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": x.end, "top": TOP, "bottom": BOTTOM,
        "x_ticks": x.ticks(), "y_ticks": y.ticks(),
    }  # fmt: skip


def _mark(point: Point, x: Axis, y: Axis, metric: str) -> dict[str, Any]:
    x_at, y_at = x.at(point.bitops / 1e9), y.at(point.value)
    return {"x": x_at, "y": y_at, "title": _title(point, metric), "trial": point.index}


def _title(point: Point, metric: str) -> str:
    what = point.label or f"candidate {point.index}"
    return f"{what}: {metric} {point.value:.4g}, {point.bitops / 1e9:,.2f} GBitOPs, {point.num_steps} steps"


def _named_lines(points: Sequence[Point], y: Axis, metric: str) -> list[dict[str, Any]]:
    ats = [y.at(point.value) for point in points]
    return [
        {"at": at, "text_at": round(text_at + 4, 1), "text": point.label, "title": _title(point, metric),
         "kind": "float" if point.is_float else "uniform", "trial": point.index}
        for point, at, text_at in zip(points, ats, spread(ats, 14.0), strict=True)
    ]  # fmt: skip


def stairs(points: Sequence[tuple[float, float]]) -> str:
    """Path of an SVG that goes right before it goes up or down."""
    if not points:
        return ""
    path = f"M{points[0][0]} {points[0][1]}"
    return path + "".join(f"H{x}V{y}" for x, y in points[1:])
