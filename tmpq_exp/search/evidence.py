"""How far a search's figures can be trusted: rank correlations, noise over seeds, progress against random search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from scipy.stats import kendalltau, t


def rank_correlation(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, Any]:
    """Kendall's tau-b between two scores of the same candidates; those without a finite score in both are left out.

    Args:
        first, second: Candidate key -> score.

    Returns:
        ``tau`` in [-1, 1] and the two-sided ``p_value`` of no association, both None where fewer than two candidates
        or only ties are left; ``num_candidates``.

    References:
        Kendall, "The Treatment of Ties in Ranking Problems", Biometrika 33 (1945), by scipy.
    """
    keys = [key for key in first if key in second and math.isfinite(first[key]) and math.isfinite(second[key])]
    if len(keys) < 2:
        return {"tau": None, "p_value": None, "num_candidates": len(keys)}
    found = kendalltau([first[key] for key in keys], [second[key] for key in keys])
    tau, p_value = (float(value) if math.isfinite(value) else None for value in (found.statistic, found.pvalue))
    return {"tau": tau, "p_value": p_value, "num_candidates": len(keys)}


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and 95 % interval of the mean by Student's t; None for what one value cannot give."""
    count = len(values)
    if count < 2:
        return {"mean": values[0] if values else None, "std": None, "interval": None, "num_values": count}
    mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, count - 1)) * std / math.sqrt(count)
    return {"mean": mean, "std": std, "interval": [mean - half, mean + half], "num_values": count}


def best_so_far(scores: Sequence[float]) -> list[float | None]:
    """Best score, the lowest, after each evaluation; None until the first that did not fail."""
    return [best if math.isfinite(best) else None for best in accumulate(scores, min)]


def evenly_spread(ranked: Sequence[str], count: int) -> list[str]:
    """``count`` of these, the first and the last among them, at equal distances."""
    if len(ranked) <= count:
        return list(ranked)
    if count < 2:
        return list(ranked[:count])
    return [ranked[round(i * (len(ranked) - 1) / (count - 1))] for i in range(count)]
