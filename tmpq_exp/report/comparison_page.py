"""The comparison of runs as one HTML file: a table and its plots for every fingerprint."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich import box
from rich.table import Table
from rich.text import Text

from tmpq_exp.files import replace_file
from tmpq_exp.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, frame, stairs
from tmpq_exp.report.comparison import (
    ComparedRun,
    Group,
    groups_of,
    mixed_message,
    protocol_differences,
    total_seconds,
    uniform_quality,
)
from tmpq_exp.report.content import find_baseline, higher_is_better, mean_bits, number, plain, saving_factor
from tmpq_exp.report.page import template
from tmpq_exp.report.pictures import is_log_scale
from tmpq_exp.report.points import spread

NUM_COLOURS = 8
"""Colours of the lines; beyond them they come again, dashed."""

MAX_LABEL = 60
"""Most characters of settings as a label."""


def comparison_html(path: str | os.PathLike[str], runs: Sequence[ComparedRun]) -> None:
    """Write the comparison; it links to the runs' own reports by relative paths.

    Args:
        path: File to write or replace.
        runs: The runs, finished or not.
    """
    groups = groups_of(runs)
    home = Path(path).resolve().parent
    context = {
        "num_runs": len(runs),
        "mixed": mixed_message(groups),
        "differences": plain(protocol_differences(groups)) if len(groups) > 1 else {},
        "groups": [_group(group, home) for group in groups],
        "unfinished": [run for run in runs if run.report is None],
    }
    replace_file(path, template("comparison.html").render(context).encode())


def comparison_tables(runs: Sequence[ComparedRun]) -> list[Table]:
    """A table for the terminal for every fingerprint: the best found of every run."""
    tables = []
    for group in groups_of(runs):
        better = "higher" if higher_is_better(group.metric) else "lower"
        caption = f"{group.metric}: {better} is better; fingerprint {group.fingerprint}"
        table = Table(
            title=Text(str(group.reports[0]["model"])), caption=Text(caption), box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("", overflow="fold")
        for heading in (group.metric, "W6A6", "psnr_db", "GBitOPs", "saving", "steps", "seconds"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in _rows(group, Path.cwd()):
            figures = (row["quality"], row["uniform"])
            table.add_row(
                Text(row["label"]),  # text: what stands in brackets is no markup here
                *(number(value) for value in figures),
                number(row["psnr_db"], 1),
                number(row["gbitops"], 1),
                f"{row['saving']:.1f}x",
                str(row["num_steps"]),
                number(row["seconds"], 0),
                style="bold green" if row["is_best"] else "",
            )
        tables.append(table)
    return tables


def run_labels(runs: Sequence[ComparedRun]) -> list[str]:
    """What tells each run from the others.

    Jobs of a sweep are named by their overrides: those that all of them share are left out. Other runs are told by
    their settings that differ, where these are few, or else by the names of their directories.
    """
    jobs = [run.name.partition("_")[2].split(",") for run in runs if "=" in run.name]
    shared = set(jobs[0]).intersection(*jobs[1:]) if len(jobs) > 1 else set()
    return [_label(run, shared) for run in runs]


def _label(run: ComparedRun, shared: set[str]) -> str:
    if "=" in run.name:
        own = [override for override in run.name.partition("_")[2].split(",") if override not in shared]
        return ", ".join(own) or run.name
    settings = ", ".join(f"{key}={value}" for key, value in run.settings.items())
    return settings if 0 < len(settings) <= MAX_LABEL else run.name


def _group(group: Group, home: Path) -> dict[str, Any]:
    rows = _rows(group, home)
    return {
        "fingerprint": group.fingerprint,
        "model": group.reports[0]["model"],
        "num_images": group.reports[0]["best"]["num_images"],
        "seed": group.reports[0]["best"]["seed"],
        "metric": group.metric,
        "better": "higher" if higher_is_better(group.metric) else "lower",
        "rows": rows,
        "settings": list(dict.fromkeys(key for run in group.runs for key in run.settings)),
        "quality_chart": quality_chart(group, rows),
        "progress": [
            {"fingerprint": fingerprint, "chart": progress_chart(group, members, rows)}
            for fingerprint, members in group.by_search().items()
        ],
    }


def _rows(group: Group, home: Path) -> list[dict[str, Any]]:
    sign = -1.0 if higher_is_better(group.metric) else 1.0
    values = [report["best"]["metrics"][group.metric] for report in group.reports]
    known = [sign * value for value in values if value is not None]
    rows, labels = [], run_labels(group.runs)
    for index, (run, report) in enumerate(zip(group.runs, group.reports, strict=True)):
        best, page = report["best"], run.directory / "report.html"
        interval = best["intervals"].get(group.metric)
        rows.append(
            {
                "number": index + 1,
                "colour": index % NUM_COLOURS,
                "dashed": index >= NUM_COLOURS,
                "label": labels[index],
                "name": run.name,
                "link": quote(os.path.relpath(page.resolve(), home)) if page.exists() else None,
                "settings": run.settings,
                "quality": values[index],
                "is_best": values[index] is not None and sign * values[index] == min(known),
                "interval": "" if interval is None else f"{number(interval[0])} to {number(interval[1])}",
                "uniform": uniform_quality(report),
                "psnr_db": best["metrics"].get("psnr_db"),
                "gbitops": best["bitops"] / 1e9,
                "saving": saving_factor(report, best),
                "bits": mean_bits(best),
                "num_steps": len(best["timesteps"]),
                "weight_kb": best["weight_bytes"] / 1e3,
                "num_evaluations": report["search"]["num_evaluations"],
                "seconds": total_seconds(report),
                "num_warnings": len(report["warnings"]),
            }
        )
    return rows


def quality_chart(group: Group, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Quality against BitOPs of the best found of every run, and of uniform W6A6 in the same runs.

    Returns:
        Everything the template draws; None where no run has a finite quality.
    """
    marks = [
        (row, "best", row["gbitops"], row["quality"]) for row in rows if row["quality"] is not None
    ] + [
        (row, "uniform", find_baseline(report, "w6a6")["bitops"] / 1e9, row["uniform"])
        for row, report in zip(rows, group.reports, strict=True)
        if row["uniform"] is not None
    ]  # fmt: skip
    if not marks:
        return None
    values = [value for *_, value in marks]
    costs = [cost for _, _, cost, _ in marks]
    x = Axis.around([min(0.9 * max(costs), *costs), max(costs)], LEFT, RIGHT)  # equal budgets must not look far apart
    y = Axis.around(values, BOTTOM, TOP, is_log=is_log_scale(values))
    names = {"best": "best found", "uniform": "W6A6"}
    return {
        **frame(x, y),
        "marks": [
            {
                "x": x.at(cost), "y": y.at(value), "kind": kind, "colour": row["colour"], "number": row["number"],
                "title": f"{row['label']}, {names[kind]}: {group.metric} {value:.4g}, {cost:,.2f} GBitOPs",
            }
            for row, kind, cost, value in marks
        ],
    }  # fmt: skip


def progress_chart(group: Group, members: Sequence[int], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Best score so far of the searches that share a fingerprint, against the candidates they scored."""
    curves = {index: group.reports[index]["evidence"]["progress"]["search"] for index in members}
    known = {
        index: [(i, value) for i, value in enumerate(curve, 1) if value is not None and math.isfinite(value)]
        for index, curve in curves.items()
    }
    values = [value for points in known.values() for _, value in points]
    if not values:
        return None
    x = Axis.around([1.0, float(max(len(curve) for curve in curves.values()))], LEFT, RIGHT)
    y = Axis.around(values, BOTTOM, TOP, is_log=is_log_scale(values))
    ends = {index: (x.at(float(points[-1][0])), y.at(points[-1][1])) for index, points in known.items() if points}
    text_at = dict(zip(ends, spread([at for _, at in ends.values()], 13.0), strict=True))
    return {
        **frame(x, y),
        "lines": [
            {
                "path": stairs([(x.at(float(i)), y.at(value)) for i, value in points]),
                "title": f"{rows[index]['label']}: {points[-1][1]:.4g} after {points[-1][0]} candidates",
                **{key: rows[index][key] for key in ("colour", "dashed", "number")},
                "end": (ends[index][0], round(text_at[index] - 3, 1)),
            }
            for index, points in known.items()
            if points
        ],
    }
