"""Geometry of the two charts inside the HTML report: axes, ticks and marks in the units of an SVG drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

from tmpq_exp.report.pictures import is_log_scale
from tmpq_exp.report.points import Point, SearchView

WIDTH, HEIGHT = 480.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 468.0, 14.0, 288.0


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
        Everything the template draws. Float baselines cost many times more than any candidate, so they are drawn as
        lines at their quality instead of stretching the axis.
    """
    placed = [point for point in (*view.searched, *view.baselines) if not point.is_float]
    values = [point.value for point in (*view.searched, *view.baselines)]
    costs = [point.bitops / 1e9 for point in placed]
    if view.budget_bitops is not None:
        costs.append(view.budget_bitops / 1e9)
    x = Axis.around(costs, _LEFT, _RIGHT)
    y = Axis.around(values, _BOTTOM, _TOP, is_log=is_log_scale(values))
    front = {point.index for point in view.front}
    return {
        **_frame(x, y),
        "candidates": [_mark(p, x, y, view.metric) | {"on_front": p.index in front} for p in view.searched],
        "front": _stairs([(x.at(p.bitops / 1e9), y.at(p.value)) for p in view.front]),
        "uniform": [_mark(p, x, y, view.metric) | {"name": p.name.upper()} for p in view.baselines if not p.is_float],
        "floats": _float_lines([p for p in view.baselines if p.is_float], y),
        "budget": None if view.budget_bitops is None else x.at(view.budget_bitops / 1e9),
        "best": None if view.best is None else _mark(view.best, x, y, view.metric),
    }


def progress_chart(view: SearchView) -> dict[str, Any]:
    """Best value within the budget after each evaluation, over all values.

    Args:
        view: Points of the search, at least one searched candidate.

    Returns:
        Everything the template draws.
    """
    values = [point.value for point in view.searched]
    x = Axis.around([1.0, float(len(values))], _LEFT, _RIGHT)
    y = Axis.around(values, _BOTTOM, _TOP, is_log=is_log_scale(values))
    steps = [(x.at(i), y.at(value)) for i, value in enumerate(view.progress, 1) if math.isfinite(value)]
    known = [value for value in view.progress if math.isfinite(value)]
    return {
        **_frame(x, y),
        "candidates": [
            _mark(point, x, y, view.metric) | {"x": x.at(i), "on_front": False}
            for i, point in enumerate(view.searched, 1)
        ],
        "line": _stairs(steps),
        "last": {"x": steps[-1][0], "y": steps[-1][1], "text": f"{known[-1]:.4g}"} if steps else None,
    }


def _frame(x: Axis, y: Axis) -> dict[str, Any]:
    return {
        "width": WIDTH, "height": HEIGHT, "left": _LEFT, "right": _RIGHT, "top": _TOP, "bottom": _BOTTOM,
        "x_ticks": x.ticks(), "y_ticks": y.ticks(),
    }  # fmt: skip


def _mark(point: Point, x: Axis, y: Axis, metric: str) -> dict[str, Any]:
    what = point.name.upper() or f"candidate {point.index}"
    title = f"{what}: {metric} {point.value:.4g}, {point.bitops / 1e9:,.2f} GBitOPs, {point.num_steps} steps"
    return {"x": x.at(point.bitops / 1e9), "y": y.at(point.value), "title": title}


def _float_lines(points: Sequence[Point], y: Axis) -> list[dict[str, Any]]:
    """Lines of the float baselines; of two that nearly touch, one label stands above its line and one below."""
    lines: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: y.at(p.value)):
        at = y.at(point.value)
        below = (bool(lines) and at - lines[-1]["at"] < 16) or at < _TOP + 14
        text = f"float, {point.num_steps} steps ({point.bitops / 1e9:,.0f} GBitOPs)"
        lines.append({"at": at, "text_at": at + 14 if below else at - 5, "text": text})
    return lines


def _stairs(points: Sequence[tuple[float, float]]) -> str:
    """Path of an SVG that goes right before it goes up or down."""
    if not points:
        return ""
    path = f"M{points[0][0]} {points[0][1]}"
    return path + "".join(f"H{x}V{y}" for x, y in points[1:])
