"""A sweep as a list of jobs: how each stands, why it failed, what it found; task=sweep, and the end of every sweep."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tmpq_exp.config import Config, UserError
from tmpq_exp.job_record import RECORD_NAME, JobRecord, JobState, read_record, state_now
from tmpq_exp.overrides import EXIT_UNEXPECTED
from tmpq_exp.report.sweep_page import SweptJob, sweep_html, sweep_table
from tmpq_exp.rundir import writing
from tmpq_exp.runs import read_run
from tmpq_exp.terminal import print_table

PAGE_NAME = "sweep.html"


def list_sweeps(config: Config, resolved: dict[str, Any]) -> None:
    """Write ``sweep.html`` into the directory of every sweep of ``runs``, and print its jobs.

    Args:
        config: Checked configuration; ``runs`` names directories of sweeps.
        resolved: The same as plain data; not needed, every task takes it.

    Raises:
        UserError: If there is no such directory, or it holds no job of a sweep.
    """
    if not config.runs:
        raise UserError("runs: no sweep given; for example 'runs=[outputs/multirun_2026-01-31_12-00-00]'")
    for path in map(Path, config.runs):
        if not path.is_dir() or not swept_jobs(path):
            raise UserError(f"runs: {path} holds no job of a sweep (no {RECORD_NAME} in a directory below it)")
        conclude(path)


def conclude(place: Path) -> int:
    """Write the page, print the table and how to go on.

    Returns:
        Exit status: 0 if every job is done or still at work, else that of the first that is not.
    """
    jobs = swept_jobs(place)
    if not jobs:
        return 0
    with writing(place):
        sweep_html(place / PAGE_NAME, place.name, jobs)
    print_table(sweep_table(place.name, jobs))
    print(f"sweep   {place / PAGE_NAME}")
    undone = [job for job in jobs if job.state in (JobState.FAILED, JobState.STOPPED)]
    if undone:
        _advise(place, undone)
        return undone[0].exit_status or EXIT_UNEXPECTED
    return 0


def _advise(place: Path, undone: Sequence[SweptJob]) -> None:
    failed = sum(job.state is JobState.FAILED for job in undone)
    counts = [f"{count} {what}" for count, what in ((failed, "failed"), (len(undone) - failed, "stopped")) if count]
    retry = " sweep.retry_failed=true" if failed else ""
    print(
        f"tmpq-exp: {' and '.join(counts)}; the same command with hydra.sweep.dir={place}{retry} goes on, and runs no "
        "finished job again",
        file=sys.stderr,
    )


def swept_jobs(place: Path) -> list[SweptJob]:
    """Jobs right below the directory of a sweep, by their numbers; what else lies there is left out."""
    found = sorted(child for child in place.iterdir() if (child / RECORD_NAME).exists())
    records = {directory: read_record(directory) for directory in found}
    labels = _labels(records)
    jobs = [_swept_job(directory, record, labels[directory]) for directory, record in records.items()]
    return sorted(jobs, key=lambda job: (job.number is None, job.number or 0, job.name))


def _labels(records: Mapping[Path, JobRecord | None]) -> dict[Path, str]:
    """What tells each job from the others: its overrides without those that all have, or the hash of its directory."""
    overrides = {directory: record.overrides if record else [] for directory, record in records.items()}
    known = [set(own) for own in overrides.values() if own]
    shared = set.intersection(*known) if len(known) > 1 else set()
    return {d: ", ".join(one for one in own if one not in shared) or d.name for d, own in overrides.items()}


def _swept_job(directory: Path, record: JobRecord | None, label: str) -> SweptJob:
    if record is None:
        what = f"{RECORD_NAME} is damaged; start the sweep again with the same hydra.sweep.dir"
        return SweptJob(directory, None, label, JobState.STOPPED, None, what, None, None)
    state, cause = state_now(directory, record), record.cause
    job = SweptJob(directory, record.number, label, state, record.exit_status, cause, record.seconds, None)
    if state is not JobState.FINISHED or not (directory / "config.yaml").exists():
        return job  # not every task leaves a run directory
    try:
        found = replace(job, report=read_run(directory).report)
        return found if found.result else job
    except (UserError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration) as error:
        what = str(error) if isinstance(error, UserError) else f"report.json is damaged ({error!r})"
        return replace(job, cause=what)
