"""Owns what trackers make of a run's files: names and values of a trial, summaries, and the points of the chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.report.classification import all_rows
from tmpq_exp.report.points import search_view
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.search.objective import PROXIES
from tmpq_exp.tracking.tracker import QualityChart, Results

BIT_EDGES = tuple(bits - 0.5 for bits in range(2, 18))
"""Edges of a histogram of bits: one bin for each width in 2..16."""


def trial_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of a trial.

    Metrics stand under their phase, such as ``trial/search/fd_digits``: phases differ in their seeds, and so in their
    fingerprints, and a tracker draws all values of one name as one line.

    Args:
        record: Record of ``trials.jsonl``. Metrics that are null or not finite are left out.
    """
    phase = record["phase"]
    values = {
        "trial/index": record["index"],
        "trial/phase": phase,
        "trial/bitops": record["bitops"],
        "trial/macs": record["macs"],
        "trial/weight_bytes": record["weight_bytes"],
        **{f"trial/{phase}/{name}": value for name, value in finite(record["metrics"]).items()},
    }
    for name in ("name", "generation", "error", "fingerprint", "num_images", "seed"):
        if record.get(name) is not None:
            values[f"trial/{name}"] = record[name]
    candidate = record.get("candidate") or {}
    if "timesteps" in candidate:
        values["trial/num_steps"] = len(candidate["timesteps"])
    for name, bits in trial_bits(record).items():
        values[f"trial/{name}_mean"] = sum(bits) / len(bits)
    return values


def trial_bits(record: Mapping[str, Any]) -> dict[str, list[int]]:
    """``weight_bits`` and ``act_bits`` of all layers (of all steps, where they differ) that are not float.

    The softmax output of attention products counts among weights, as in every allocation.
    """
    found: dict[str, list[int]] = {}
    for allocation in (record.get("candidate") or {}).get("allocations", ()):
        for name in ("weight_bits", "act_bits"):
            found.setdefault(name, []).extend(bits for bits in allocation[name] if bits != FLOAT_BITS)
    return {name: bits for name, bits in found.items() if bits}


def bit_counts(bits: Sequence[int]) -> list[int]:
    """Layers at each bit width in 2..16."""
    return [sum(value == width for value in bits) for width in range(2, 17)]


def table_rows(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table of all trials; a value that a trial has not is None."""
    values = [trial_values(record) | {"trial/key": record["key"]} for record in records]
    columns = list(dict.fromkeys(name for row in values for name in row))
    return [name.removeprefix("trial/") for name in columns], [[row.get(name) for name in columns] for row in values]


def quality_metric(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Name of the metric that a search is about; None before its first trial.

    It is what its trials have beside the proxies, which every search measures.
    """
    searched = [record for record in records if record["phase"] == "search"]
    names = list(searched[-1]["metrics"]) if searched else []
    return next((name for name in names if name not in PROXIES), next(iter(names), None))


def comparable_records(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Trials of the search and its baselines that share protocol and quantizers with the search's last trial."""
    searched = [record for record in records if record["phase"] == "search"]
    if not searched:
        return []
    wanted = searched[-1]["fingerprint"], searched[-1]["state"]
    return [
        record
        for record in records
        if record["phase"] in ("search", "baseline") and (record["fingerprint"], record["state"]) == wanted
    ]


def quality_chart(records: Sequence[Mapping[str, Any]], metric: str | None = None) -> QualityChart | None:
    """Quality against BitOPs of the search and its baselines; None if nothing was scored.

    Args:
        records: Records of ``trials.jsonl``.
        metric: The search's metric; None finds it in the trials.
    """
    metric = metric or quality_metric(records)
    if metric is None:
        return None
    view = search_view(comparable_records(records), metric=metric)
    points = [(point, point.label if point.name else "candidate") for point in (*view.searched, *view.baselines)]
    rows = [(point.bitops / 1e9, point.value, name) for point, name in points]
    return QualityChart(metric, rows) if rows else None


def run_results(
    directory: RunDirectory, records: Sequence[Mapping[str, Any]], report: Mapping[str, Any] | None
) -> Results:
    """What a job of ``task=run`` leaves behind, finished or not.

    Args:
        directory: Its run directory.
        records: Records of its ``trials.jsonl``.
        report: Content of ``report.json``; None where the run did not get that far.
    """
    return Results(
        summary={} if report is None else _run_summary(report),
        pictures=_existing(directory.pareto, directory.samples),
        trials_file=directory.trials if directory.trials.exists() else None,
        trials=records,
        chart=quality_chart(records, None if report is None else report["metric"]),
        bits={} if report is None else trial_bits(report["best"]),
    )


def classification_results(report: Mapping[str, Any]) -> Results:
    """What a job of ``task=classify`` leaves behind."""
    summary: dict[str, Any] = {"fingerprint": report["fingerprint"], "num_images": report["num_images"]}
    for entry in all_rows(report):
        summary |= {f"{entry['name']}/{name}": value for name, value in finite(_scores(entry)).items()}
    return Results(summary)


def classification_records(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a ``report.json`` of ``task=classify`` as records that ``log_trial`` takes."""
    rows = zip(all_rows(report), report["details"], strict=True)
    return [
        {"index": index, "phase": "classify", "name": entry["name"], "metrics": _scores(entry)}
        | {name: detail[name] for name in ("bitops", "macs", "weight_bytes")}
        for index, (entry, detail) in enumerate(rows)
    ]


def _scores(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("top1", "sqnr_db", "multiplications_ratio")}


def _run_summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of the baselines and the best, seconds of the stages, and what they were measured under."""
    values: dict[str, Any] = {"search/num_evaluations": report["search"]["num_evaluations"]}
    for place, entry in [*((e["name"], e) for e in report["baselines"]), ("best", report["best"])]:
        values |= {f"{place}/{name}": value for name, value in finite(entry["metrics"]).items()}
        values |= {f"{place}/{name}": entry[name] for name in ("bitops", "macs", "weight_bytes")}
    values |= {f"stage/{name}_seconds": seconds for name, seconds in finite(report["stages"]).items()}
    return values | {f"fingerprint/{name}": value for name, value in report["fingerprint"].items()}


def _existing(*paths: Path) -> list[Path]:
    return [path for path in paths if path.exists()]


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that are numbers and finite."""
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
