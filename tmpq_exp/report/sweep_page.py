"""The jobs of a sweep as one HTML file and as a table for the terminal: state, cause of failure, result."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich import box
from rich.table import Table
from rich.text import Text

from tmpq_exp.files import replace_file
from tmpq_exp.job_record import JobState
from tmpq_exp.report.content import number, saving_factor
from tmpq_exp.report.page import template

STYLES = {JobState.FINISHED: "green", JobState.FAILED: "red", JobState.STOPPED: "yellow", JobState.RUNNING: "blue"}


@dataclass(frozen=True)
class SweptJob:
    """One job of a sweep.

    Args:
        directory: Its directory.
        number: Its number; None if it is not known.
        name: Its overrides.
        state: How it stands.
        exit_status: Of a job that ended.
        cause: Why it failed.
        seconds: Time of its last start until its end.
        report: Content of its ``report.json``, if it has one.
    """

    directory: Path
    number: int | None
    name: str
    state: JobState
    exit_status: int | None
    cause: str | None
    seconds: float | None
    report: Mapping[str, Any] | None

    @property
    def result(self) -> dict[str, str]:
        """Figures of its best, as text: ``quality``, ``gbitops``, ``saving``; of a classifier the float top-1."""
        if self.report is None:
            return {"quality": "", "gbitops": "", "saving": ""}
        if "best" not in self.report:
            top1 = next(row["top1"] for row in self.report["classification"] if row["name"] == "float")
            return {"quality": f"top-1 {number(top1)} % (float)", "gbitops": "", "saving": ""}
        best, metric = self.report["best"], self.report["metric"]
        return {
            "quality": f"{metric} {number(best['metrics'][metric])}",
            "gbitops": number(best["bitops"] / 1e9, 1),
            "saving": f"{saving_factor(self.report, best):.1f}x",
        }


def sweep_html(path: str | os.PathLike[str], name: str, jobs: Sequence[SweptJob]) -> None:
    """Write the list of jobs; it links to their own pages by relative paths.

    Args:
        path: File to write or replace.
        name: Name of the sweep.
        jobs: Its jobs, in the order of the table.
    """
    home = Path(path).resolve().parent
    counts = Counter(job.state for job in jobs)
    context = {
        "name": name,
        "counts": [(state.value, counts[state]) for state in JobState if counts[state]],
        "rows": [{"job": job, "state": job.state.value, **job.result, "link": _link(job, home)} for job in jobs],
    }
    replace_file(path, template("sweep.html").render(context).encode())


def _link(job: SweptJob, home: Path) -> str | None:
    """Where a reader finds more: the job's report, else what it printed."""
    for file in ("report.html", "crash.log", "run.log"):
        page = job.directory / file
        if page.exists():
            return quote(os.path.relpath(page.resolve(), home))
    return None


def sweep_table(name: str, jobs: Sequence[SweptJob]) -> Table:
    """The same for the terminal."""
    table = Table(title=Text(name), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", justify="right")
    table.add_column("job", overflow="fold")
    for heading in ("state", "result", "GBitOPs", "saving", "seconds"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("state", "result") else "right")
    table.add_column("cause", overflow="fold")
    for job in jobs:
        result = job.result
        table.add_row(
            "" if job.number is None else str(job.number),
            Text(job.name),  # as text: what stands in brackets is no markup here
            Text(job.state.value, STYLES[job.state]),
            Text(result["quality"]),
            result["gbitops"],
            result["saving"],
            "" if job.seconds is None else number(job.seconds, 0),
            Text(job.cause or ""),
        )
    return table
