"""Which trials may share a picture, their front, and the axes they are drawn on."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.report.example import BUDGET, make_report, make_trials, render, trial
from tmpq_exp.report import pareto_png, search_view
from tmpq_exp.report.charts import Axis
from tmpq_exp.report.points import Point, pareto_front, spread


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=40), st.sampled_from(["fd_digits", "psnr_db"])
)
def test_front_is_exactly_the_undominated_values(pairs: list[tuple[int, int]], metric: str) -> None:
    sign = -1 if metric == "psnr_db" else 1
    points = [Point(i, cost, float(value), str(i), "", 1) for i, (cost, value) in enumerate(pairs)]
    undominated = {
        (c, v) for c, v in pairs
        if not any(c2 <= c and sign * v2 <= sign * v and (c2, v2) != (c, v) for c2, v2 in pairs)
    }  # fmt: skip
    front = pareto_front(points, metric)
    assert {(p.bitops, p.value) for p in front} == undominated
    assert [p.bitops for p in front] == sorted({p.bitops for p in front})


def test_view_takes_only_what_was_scored_on_the_search_seeds() -> None:
    trials = [
        trial(0, 9.0, 10, phase="baseline", name="w6a6"), trial(1, 8.0, 12), trial(2, None, 9), trial(3, 7.0, 99),
        trial(4, 6.5, 11), trial(5, 1.0, 1, phase="final", fingerprint="final-f"), trial(6, 0.1, 5, error="nan images"),
    ]  # fmt: skip
    view = search_view(trials, metric="fd_digits", budget_bitops=12)
    assert [p.index for p in view.searched] == [1, 3, 4]
    assert view.num_failed == 2
    assert view.best is not None
    assert view.best.index == 4
    assert view.progress == (8.0, 8.0, 6.5)
    assert [p.name for p in view.baselines] == ["w6a6"]
    assert math.isnan(search_view(trials[3:4], metric="fd_digits", budget_bitops=12).progress[0])


def test_mixed_fingerprints_are_refused_everywhere(tmp_path: Path) -> None:
    mixed = [*make_trials(), trial(99, 1.0, 1e9, fingerprint="other")]
    with pytest.raises(ValueError, match="share one evaluation fingerprint, found 2: other, search-f"):
        pareto_png(tmp_path / "pareto.png", mixed, metric="fd_digits")
    with pytest.raises(ValueError, match="share one evaluation fingerprint"):
        render(tmp_path, make_report(), trials=mixed)
    foreign = make_report() | {"fingerprint": {"search": "foreign", "final": "final-f"}, "front": []}
    with pytest.raises(ValueError, match="search fingerprint 'foreign', found 'search-f'"):
        render(tmp_path, foreign)
    assert not list(tmp_path.iterdir())


@given(st.floats(0.01, 1e6), st.floats(1.001, 1e4), st.booleans())
def test_axis_keeps_values_inside_and_in_order(low: float, ratio: float, is_log: bool) -> None:
    axis = Axis.around([low, low * ratio], 0.0, 100.0, is_log=is_log)
    assert 0 < axis.at(low) <= axis.at(low * math.sqrt(ratio)) <= axis.at(low * ratio) < 100
    assert all(0 <= tick["at"] <= 100 for tick in axis.ticks())


@given(st.lists(st.floats(-100, 100), max_size=8), st.floats(0.5, 20))
def test_spread_labels_keep_their_distance_and_order(positions: list[float], distance: float) -> None:
    moved = spread(positions, distance)
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    assert all(moved[b] - moved[a] >= distance - 1e-9 for a, b in itertools.pairwise(order))
    assert sum(moved) == pytest.approx(sum(positions), abs=1e-6)


def test_only_baselines_far_above_the_search_become_lines() -> None:
    view = search_view(make_trials(), metric="fd_digits", budget_bitops=BUDGET)
    assert [p.label for p in view.baselines if view.is_costly(p)] == ["float 50", "float 10", "W8A8"]


def test_candidates_on_the_ceiling_do_not_look_far_apart() -> None:
    records = [trial(index, 5.0, bitops) for index, bitops in enumerate((9_990_000, 10_000_000))]
    low, high = search_view(records, metric="fd_digits", budget_bitops=10_000_000).cost_range()
    assert (low, high) == (pytest.approx(0.009), pytest.approx(0.01))
