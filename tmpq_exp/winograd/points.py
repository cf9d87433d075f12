"""Search for the points of F(m, r) that amplify rounding noise least."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
from scipy.optimize import minimize

from tmpq_exp.winograd.transform import (
    INFINITY,
    MAX_M,
    MAX_R,
    MIN_M,
    MIN_R,
    Point,
    build_transform,
    check_range,
    format_point,
    noise_gain,
)

NUM_STARTS, MAX_EVALUATIONS = 12, 4000
"""Starts of the search for each form of point set, and evaluations of each; both are caps."""

_START_RANGE = 2.5
_CLOSEST = 1e-3


def find_points(
    m: int, r: int = 3, *, symmetric: bool = True, max_denominator: int = 64, seed: int = 0
) -> tuple[Point, ...]:
    """Points of least noise gain kappa, as rationals of small denominators.

    Every form of point set is searched: with and without infinity and, if symmetric, with and without 0. The
    continuous optimum of each is rounded to rationals and the exact noise gain of those decides.

    Args:
        m: Outputs of a tile, 2..8.
        r: Taps of the kernel, 2..5.
        symmetric: Only sets that hold -p with p; such transforms need fewer additions. Otherwise any set of distinct
            points, started from symmetric optima as well, so that it is never worse.
        max_denominator: Largest denominator of a point, at least 1.
        seed: Of the starting points.

    Returns:
        n = m + r - 1 points, infinity last.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_range("m", m, MIN_M, MAX_M)
    check_range("r", r, MIN_R, MAX_R)
    check_range("max_denominator", max_denominator, 1, 10**6)
    candidates = [_search(m, r, form, max_denominator, seed) for form in _symmetric_forms(m + r - 1)]
    if not symmetric:
        starts = [[float(f) for f, g in points if g != 0] for _, points in candidates]
        for with_infinity in (True, False):
            count = m + r - 1 - with_infinity
            form = _Form(count, free=True, with_zero=False, with_infinity=with_infinity)
            near = [start for start in starts if len(start) == count]
            candidates.append(_search(m, r, form, max_denominator, seed, near))
    return min(candidates, key=lambda found: found[0])[1]


class _Form:
    """A form of point set: how a vector of free numbers becomes finite points, and whether infinity is one."""

    def __init__(self, count: int, *, free: bool, with_zero: bool, with_infinity: bool) -> None:
        self.count, self.free, self.with_zero, self.with_infinity = count, free, with_zero, with_infinity

    def finite(self, values: np.ndarray) -> list[float]:
        if self.free:
            return [float(v) for v in values]
        return [*([0.0] if self.with_zero else []), *(float(s * v) for v in values for s in (1, -1))]


def _symmetric_forms(num_points: int) -> list[_Form]:
    forms = []
    for with_zero, with_infinity in itertools.product((True, False), repeat=2):
        rest = num_points - with_zero - with_infinity
        if rest >= 0 and rest % 2 == 0:
            forms.append(_Form(rest // 2, free=False, with_zero=with_zero, with_infinity=with_infinity))
    return forms


def _search(
    m: int, r: int, form: _Form, max_denominator: int, seed: int, near: list[list[float]] | None = None
) -> tuple[float, tuple[Point, ...]]:
    """Least noise gain of a form, and its points."""

    def objective(values: np.ndarray) -> float:
        return _log_gain(form.finite(values), form.with_infinity, m, r)

    rng = np.random.default_rng(seed)
    span = _START_RANGE if form.free else 0.0
    starts = [rng.uniform(-span, _START_RANGE, form.count) for _ in range(NUM_STARTS)]
    starts += [np.array(start) + rng.normal(0, scale, form.count) for start in near or () for scale in (0.0, 0.05)]
    best: tuple[float, tuple[Point, ...]] | None = None
    for start in starts:
        end = start
        if form.count:
            options = {"maxfev": MAX_EVALUATIONS, "xatol": 1e-5, "fatol": 1e-9}
            end = minimize(objective, start, method="Nelder-Mead", options=options).x
        points = _rational(form, end, max_denominator)
        if points is not None:
            gain = noise_gain(build_transform(m, r, [format_point(p) for p in points]))
            best = (gain, points) if best is None or gain < best[0] else best
    if best is None:
        return math.inf, ()
    return best


def _rational(form: _Form, values: np.ndarray, max_denominator: int) -> tuple[Point, ...] | None:
    """The points as rationals; None where two of them have become one."""
    rounded = [Fraction(float(v)).limit_denominator(max_denominator) for v in values]
    finite = rounded if form.free else [
        *([Fraction(0)] if form.with_zero else []), *(s * v for v in rounded for s in (1, -1))
    ]  # fmt: skip
    if len(set(finite)) != len(finite):
        return None
    return (*((value, Fraction(1)) for value in finite), *([INFINITY] if form.with_infinity else []))


def _log_gain(finite: list[float], with_infinity: bool, m: int, r: int) -> float:
    """log kappa in floats; points closer than ``_CLOSEST`` are out of bounds."""
    ordered = sorted(finite)
    if any(b - a < _CLOSEST for a, b in itertools.pairwise(ordered)):
        return 1e3
    square = np.vander(np.array(finite), m + r - 1, increasing=True)
    if with_infinity:
        square = np.vstack([square, np.eye(m + r - 1)[-1]])

    def columns(count: int) -> np.ndarray:
        values = np.vander(np.array(finite), count, increasing=True)
        return np.vstack([values, np.eye(count)[-1]]) if with_infinity else values

    b = np.square(np.linalg.inv(square)).sum(axis=0)
    a, g = (np.square(columns(count)).sum(axis=1) for count in (m, r))
    return float(np.log((a * b * g).sum() / (m * r)))
