"""The points of a search: which trials may share a picture, their front, and the best one so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tmpq_exp.report.content import TILE_RULE, higher_is_better

COSTLY_FACTOR = 1.25
"""A baseline above this many times the dearest candidate and the budget is drawn as a line."""


@dataclass(frozen=True)
class Point:
    """One scored trial.

    Args:
        index: Index of the trial in ``trials.jsonl``.
        bitops: BitOPs of the whole trajectory of one image.
        value: Quality under the view's metric, finite.
        key: Content hash of the candidate.
        name: Name of a baseline, empty for a searched candidate.
        num_steps: Number of kept timesteps.
        multiplications: Of the whole trajectory of one image, without Winograd's transforms; 0 if not known.
    """

    index: int
    bitops: int
    value: float
    key: str
    name: str
    num_steps: int
    multiplications: int = 0

    @property
    def is_float(self) -> bool:
        """Whether this is a baseline in float arithmetic."""
        return self.name.startswith("float")

    @property
    def label(self) -> str:
        """Short name of a baseline, such as ``float 10`` (its steps), ``W6A6`` or ``W8A8 F4``."""
        if self.name == TILE_RULE:
            return "tile rule"
        return f"float {self.num_steps}" if self.is_float else self.name.upper().replace("_", " ")


@dataclass(frozen=True)
class SearchView:
    """What the pictures of a search show; all values were measured under one fingerprint.

    Args:
        metric: Name of the quality metric.
        fingerprint: The one evaluation fingerprint of all points; empty if there are none.
        searched: Candidates in the order of their evaluation.
        baselines: Baselines scored on the search seeds.
        front: Searched candidates that no other one beats in both quality and BitOPs, by rising BitOPs.
        best: The candidate that is marked: the shipped one, else the best within the budget.
        progress: Best value within the budget after each evaluation; NaN until there is one.
        budget_bitops: The most BitOPs a candidate may cost.
        budget_name: Name of the budget.
        num_failed: Trials without a finite value, which no picture can show.
    """

    metric: str
    fingerprint: str
    searched: tuple[Point, ...]
    baselines: tuple[Point, ...]
    front: tuple[Point, ...]
    best: Point | None
    progress: tuple[float, ...]
    budget_bitops: int | None
    budget_name: str
    num_failed: int

    def cost_range(self) -> tuple[float, float]:
        """Least and most GBitOPs to show: all that is placed on the axis, and at least a tenth below the most.

        Candidates that use a budget up lie within a thousandth of it; an axis cut to them would show a difference
        where there is none.
        """
        placed = [*self.searched, *(point for point in self.baselines if not self.is_costly(point))]
        costs = [point.bitops for point in placed] + ([self.budget_bitops] if self.budget_bitops is not None else [])
        return min(0.9 * max(costs), *costs) / 1e9, max(costs) / 1e9

    def is_costly(self, point: Point) -> bool:
        """Whether a baseline costs so much more than the search that it is drawn as a line at its quality.

        On an axis that reached it, all candidates would stand in one corner.
        """
        costs = [p.bitops for p in self.searched] + ([self.budget_bitops] if self.budget_bitops is not None else [])
        return bool(costs) and point.bitops > COSTLY_FACTOR * max(costs)


def search_view(
    trials: Iterable[Mapping[str, Any]],
    *,
    metric: str,
    budget_bitops: int | None = None,
    budget_name: str = "budget",
    best_key: str | None = None,
    fingerprint: str | None = None,
) -> SearchView:
    """Select the trials that may share a picture.

    Args:
        trials: Records of ``trials.jsonl``. Only the phases ``search`` and ``baseline`` are taken: they are scored on
            the same seeds, the others are not.
        metric: Name of the quality metric.
        budget_bitops: The most BitOPs a candidate may cost; None for no budget.
        budget_name: Name of the budget.
        best_key: Content hash of the candidate to mark; None marks the best within the budget.
        fingerprint: The fingerprint that every taken record must have; None takes the records' own, if it is one.

    Returns:
        The view. A trial without a finite value is counted in ``num_failed``; a baseline scored twice counts once.

    Raises:
        ValueError: If the records mix fingerprints or have another than ``fingerprint``.
    """
    records = [record for record in trials if record["phase"] in ("search", "baseline")]
    common = _one_fingerprint(records, fingerprint)
    scored = [(record, _point(record, metric)) for record in records]
    searched = tuple(point for record, point in scored if point and record["phase"] == "search")
    by_name = {point.name: point for record, point in scored if point and record["phase"] == "baseline"}
    sign = -1.0 if higher_is_better(metric) else 1.0
    feasible = [point for point in searched if budget_bitops is None or point.bitops <= budget_bitops]
    best = next((point for point in searched if best_key is not None and point.key == best_key), None)
    if best is None and best_key is None and feasible:
        best = min(feasible, key=lambda point: (sign * point.value, point.bitops))
    return SearchView(
        metric=metric,
        fingerprint=common,
        searched=searched,
        baselines=tuple(by_name.values()),
        front=pareto_front(searched, metric),
        best=best,
        progress=_best_so_far(searched, sign, budget_bitops),
        budget_bitops=budget_bitops,
        budget_name=budget_name,
        num_failed=sum(point is None for _, point in scored),
    )


def pareto_front(points: Iterable[Point], metric: str) -> tuple[Point, ...]:
    """Points that no other one beats in both quality and BitOPs.

    Args:
        points: Points under one metric.
        metric: Name of the metric, which says which direction is better.

    Returns:
        The front by rising BitOPs; of equal points, the one that was scored first.
    """
    sign = -1.0 if higher_is_better(metric) else 1.0
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bitops, sign * p.value, p.index)):
        if not front or sign * point.value < sign * front[-1].value:
            front.append(point)
    return tuple(front)


def spread(positions: Sequence[float], distance: float) -> list[float]:
    """Move labels apart, keeping their order and their middle.

    Args:
        positions: Wanted positions.
        distance: Least distance of two neighbours.

    Returns:
        Positions in the order given; neighbours that were too close share the gap around their mean.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    clusters: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        clusters.append([index])
        centres.append(positions[index])
        while len(clusters) > 1 and centres[-1] - centres[-2] < distance * (len(clusters[-1]) + len(clusters[-2])) / 2:
            merged = clusters[-2] + clusters[-1]
            clusters[-2:] = [merged]
            centres[-2:] = [sum(positions[i] for i in merged) / len(merged)]
    result = [0.0] * len(positions)
    for cluster, centre in zip(clusters, centres, strict=True):
        for place, index in enumerate(cluster):
            result[index] = centre + (place - (len(cluster) - 1) / 2) * distance
    return result


def _one_fingerprint(records: list[Mapping[str, Any]], expected: str | None) -> str:
    found = {str(record["fingerprint"]) for record in records}
    if len(found) > 1:
        raise ValueError(
            f"trials must share one evaluation fingerprint, found {len(found)}: {', '.join(sorted(found))}; "
            "figures measured differently cannot stand in one picture"
        )
    if expected is not None and found - {expected}:
        raise ValueError(f"trials must have the search fingerprint {expected!r}, found {found.pop()!r}")
    return found.pop() if found else ""


def _point(record: Mapping[str, Any], metric: str) -> Point | None:
    value = (record["metrics"] or {}).get(metric)
    if record.get("error") or value is None or not math.isfinite(value):
        return None
    return Point(
        index=record["index"],
        bitops=record["bitops"],
        value=float(value),
        key=record["key"],
        name=record.get("name") or "",
        num_steps=len((record.get("candidate") or {}).get("timesteps", ())),
        multiplications=record.get("multiplications", 0),
    )


def _best_so_far(points: Iterable[Point], sign: float, budget_bitops: int | None) -> tuple[float, ...]:
    best, progress = math.nan, []
    for point in points:
        fits = budget_bitops is None or point.bitops <= budget_bitops
        if fits and not sign * point.value >= sign * best:
            best = point.value
        progress.append(best)
    return tuple(progress)
