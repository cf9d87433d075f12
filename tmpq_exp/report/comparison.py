"""The content of a comparison of runs: groups that share a fingerprint, rows for the page, and the CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmpq_exp.files import replace_file
from tmpq_exp.report.content import find_baseline, saving_factor


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Args:
        name: Name of its directory.
        directory: The directory.
        report: Content of its ``report.json``; None if it is not finished.
        settings: Its settings that are not the same in all compared runs, under dotted names.
        num_trials: Evaluations it has recorded.
    """

    name: str
    directory: Path
    report: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    num_trials: int


@dataclass(frozen=True)
class Group:
    """Finished runs whose final figures were measured under one fingerprint, and so compare.

    Args:
        fingerprint: The one.
        runs: The runs, in the order given.
    """

    fingerprint: str
    runs: Sequence[ComparedRun]

    @property
    def reports(self) -> list[Mapping[str, Any]]:
        """Reports of the runs, in their order."""
        return [run.report for run in self.runs if run.report is not None]

    @property
    def metric(self) -> str:
        """Name of the quality metric: the fingerprint has it."""
        return str(self.reports[0]["metric"])

    def by_search(self) -> dict[str, list[int]]:
        """Search fingerprint -> numbers of the runs in this group whose search scores compare."""
        found: dict[str, list[int]] = {}
        for index, report in enumerate(self.reports):
            found.setdefault(str(report["fingerprint"]["search"]), []).append(index)
        return found


def groups_of(runs: Sequence[ComparedRun]) -> list[Group]:
    """Finished runs, those of one final fingerprint together, in the order of their first."""
    found: dict[str, list[ComparedRun]] = {}
    for run in runs:
        if run.report is not None:
            found.setdefault(str(run.report["fingerprint"]["final"]), []).append(run)
    return [Group(fingerprint, members) for fingerprint, members in found.items()]


def protocol_differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """What the groups were measured under differently: part of the fingerprint -> its value in every group."""
    parts = [group.reports[0].get("fingerprint_parts", {}).get("final", {}) for group in groups]
    keys = dict.fromkeys(key for part in parts for key in part)
    found = {key: [part.get(key) for part in parts] for key in keys}
    return {key: values for key, values in found.items() if len({repr(value) for value in values}) > 1}


def mixed_message(groups: Sequence[Group]) -> str | None:
    """Why not all runs stand in one table; None where they do."""
    if len(groups) < 2:
        return None
    differing = ", ".join(protocol_differences(groups)) or "parts that the reports do not name"
    return (
        f"the runs were measured under {len(groups)} fingerprints, which differ in: {differing}. Figures measured "
        "differently cannot stand in one table or plot: every fingerprint has its own"
    )


CSV_COLUMNS = (
    *("run", "directory", "status", "entry", "fingerprint", "search_fingerprint", "model", "metric", "quality"),
    *("quality_low", "quality_high", "psnr_db", "bitops", "saving", "macs", "weight_bytes", "num_steps"),
    *("weight_bits_mean", "act_bits_mean", "num_images", "seed", "num_evaluations", "seconds", "num_warnings"),
)
"""Columns of the CSV file; behind them stand further metrics, and the settings that differ as ``config.<key>``."""


def comparison_rows(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """Rows of the CSV file: for every finished run its best and its baselines, one row for every other run."""
    rows = []
    for run in runs:
        settings = {f"config.{key}": value for key, value in run.settings.items()}
        place = {"run": run.name, "directory": str(run.directory)}
        if run.report is None:
            rows.append({**place, "status": "not finished", **settings})
            continue
        for entry in (run.report["best"], *run.report["baselines"]):
            rows.append({**place, "status": "finished", **_entry_row(run.report, entry), **settings})
    return rows


def _entry_row(report: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    metric = report["metric"]
    low, high = entry["intervals"].get(metric) or (None, None)
    others = {name: value for name, value in entry["metrics"].items() if name not in (metric, "psnr_db")}
    return {
        "entry": entry["name"],
        "fingerprint": report["fingerprint"]["final"],
        "search_fingerprint": report["fingerprint"]["search"],
        "model": report["model"],
        "metric": metric,
        "quality": entry["metrics"][metric],
        "quality_low": low,
        "quality_high": high,
        "psnr_db": entry["metrics"].get("psnr_db"),
        "saving": round(saving_factor(report, entry), 4),
        "num_steps": len(entry["timesteps"]),
        "weight_bits_mean": entry["bits"]["weight_bits_mean"],
        "act_bits_mean": entry["bits"]["act_bits_mean"],
        "num_evaluations": report["search"]["num_evaluations"],
        "seconds": total_seconds(report),
        "num_warnings": len(report["warnings"]),
        **{name: entry[name] for name in ("bitops", "macs", "weight_bytes", "num_images", "seed")},
        **others,
        **{f"fingerprint.{name}": fingerprint for name, fingerprint in (entry.get("further") or {}).items()},
    }


def write_comparison_csv(path: str | os.PathLike[str], runs: Sequence[ComparedRun]) -> None:
    """Write the rows as CSV, atomically; a value that a row has not is empty."""
    rows = comparison_rows(runs)
    columns = list(dict.fromkeys([*CSV_COLUMNS, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def total_seconds(report: Mapping[str, Any]) -> float:
    """Wall time of all stages."""
    return round(sum(seconds or 0.0 for seconds in report["stages"].values()), 1)


def uniform_quality(report: Mapping[str, Any]) -> float | None:
    """Quality of uniform W6A6 in the same run."""
    value: float | None = find_baseline(report, "w6a6")["metrics"][report["metric"]]
    return value
