"""Points of least noise gain are found, and are as good as the known optima."""

from __future__ import annotations

import math

import pytest

from tmpq_exp.winograd.points import find_points
from tmpq_exp.winograd.transform import IMPROVED_POINTS, INFINITY, build_transform, format_point, noise_gain


def loss_db(m: int, points: object) -> float:
    return 20 * math.log10(noise_gain(build_transform(m, 3, points)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("m", "optimum"), [(2, 4.35), (3, 8.35), (4, 13.52), (5, 19.57), (6, 26.28)])
def test_symmetric_search_reaches_the_known_optimum(m: int, optimum: float) -> None:
    found = find_points(m)
    names = [format_point(p) for p in found]
    assert loss_db(m, names) == pytest.approx(optimum, abs=0.02)
    assert loss_db(m, names) <= loss_db(m, IMPROVED_POINTS[m, 3]) + 1e-9
    finite = {f for f, g in found if g != 0}
    assert {-f for f in finite} == finite
    assert INFINITY not in found[:-1]


@pytest.mark.parametrize("m", [2, 3])
def test_any_points_are_never_worse_than_symmetric_ones(m: int) -> None:
    free, symmetric = ([format_point(p) for p in find_points(m, symmetric=s)] for s in (False, True))
    assert loss_db(m, free) <= loss_db(m, symmetric) + 1e-9


def test_denominators_keep_their_bound() -> None:
    found = find_points(4, max_denominator=3)
    assert all(f.denominator <= 3 for f, _ in found)
    assert loss_db(4, [format_point(p) for p in found]) <= loss_db(4, IMPROVED_POINTS[4, 3]) + 1e-9


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"m must be an integer in 2\.\.8, found 1"):
        find_points(1)
    with pytest.raises(ValueError, match="max_denominator must be an integer"):
        find_points(4, max_denominator=0)
