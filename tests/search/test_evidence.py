"""Rank correlation, intervals over seeds, and progress of a search."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.search.evidence import best_so_far, evenly_spread, mean_interval, rank_correlation


def test_kendall_by_hand() -> None:
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    second = {"a": 10.0, "b": 30.0, "c": 20.0, "d": 40.0, "e": 0.0}
    found = rank_correlation(first, second)
    assert found["tau"] == pytest.approx((5 - 1) / 6)  # five pairs agree, one does not
    assert found["num_candidates"] == 4


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=9, unique=True))
def test_kendall_of_a_ranking_with_itself_and_its_reverse(values: list[int]) -> None:
    scores = {str(i): float(value) for i, value in enumerate(values)}
    assert rank_correlation(scores, scores)["tau"] == pytest.approx(1)
    assert rank_correlation(scores, {key: -value for key, value in scores.items()})["tau"] == pytest.approx(-1)


def test_kendall_leaves_failed_candidates_out() -> None:
    first = {"a": 1.0, "b": math.inf, "c": 3.0}
    assert rank_correlation(first, {"a": 5.0, "b": 1.0, "c": 6.0})["num_candidates"] == 2
    assert rank_correlation(first, {"a": 5.0}) == {"tau": None, "p_value": None, "num_candidates": 1}
    assert rank_correlation({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0})["tau"] is None


def test_interval_of_a_mean() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["std"] == pytest.approx(statistics.stdev([1.0, 2.0, 3.0]))
    half = 4.3027 / math.sqrt(3)  # Student's t with two degrees of freedom, from a table
    assert found["interval"] == pytest.approx([2 - half, 2 + half], rel=1e-4)
    assert mean_interval([7.0]) == {"mean": 7.0, "std": None, "interval": None, "num_values": 1}
    assert mean_interval([])["mean"] is None


def test_best_so_far() -> None:
    assert best_so_far([math.inf, 3.0, 5.0, 2.0]) == [None, 3.0, 3.0, 2.0]


@given(st.integers(1, 40), st.integers(1, 40))
def test_spread(length: int, count: int) -> None:
    ranked = [str(i) for i in range(length)]
    chosen = evenly_spread(ranked, count)
    assert len(chosen) == len(set(chosen)) == min(length, count)
    assert chosen[0] == ranked[0]
    assert count == 1 or chosen[-1] == ranked[-1]
    assert chosen == sorted(chosen, key=int)
