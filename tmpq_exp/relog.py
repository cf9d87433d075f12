"""task=log: log finished or killed runs to the logger again, from what their directories hold."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from tmpq_exp.config import Config, LoggerConfig, UserError
from tmpq_exp.runs import PastRun, past_runs
from tmpq_exp.tracking import (
    Job,
    classification_records,
    classification_results,
    open_tracker,
    run_results,
    say_notice,
)


def log_runs(config: Config, resolved: dict[str, Any]) -> None:
    """Log every run of ``runs`` to the logger, into its own directory; what it logged before stays beside it.

    A run that has its report counts as finished (exit status 0), any other as failed (1).

    Args:
        config: Checked configuration; its logger group says where to.
        resolved: The same as plain data; not needed, every task takes it.

    Raises:
        UserError: If nothing would be logged, or a run directory cannot be read.
    """
    if config.logger.name == "none":
        raise UserError("logger=none logs nothing; choose logger=wandb, csv or tensorboard")
    runs = past_runs(config.runs)
    for run in runs:
        if run.kind not in ("run", "classify"):
            raise UserError(f"runs: {run.directory.path} is of task={run.kind}; task=log takes run and classify")
    for run in runs:
        for warning in run.warnings:
            print(f"warning: {run.directory.path}: {warning}", file=sys.stderr)
        log_run(run, config.logger)


def log_run(run: PastRun, settings: LoggerConfig) -> None:
    """Log one run: trials, and the report where there is one; the run's own group and tags unless others are given."""
    own = run.config.get("logger") or {}
    settings = replace(settings, group=settings.group or own.get("group"), tags=settings.tags or own.get("tags") or [])
    job = Job.of_directory(run.directory.path, run.kind, run.config)
    if run.kind == "classify":
        tracker = open_tracker(settings, job, [] if run.report is None else classification_records(run.report))
        results = None if run.report is None else classification_results(run.report)
    else:
        tracker = open_tracker(settings, job, run.trials)
        results = run_results(run.directory, run.trials, run.report)
    if results is not None:
        tracker.log_results(results)
    tracker.finish(0 if run.report is not None else 1)
    state = "finished" if run.report is not None else "not finished"
    print(f"logged  {run.directory.path}: {len(run.trials)} trials, {state}")
    say_notice(tracker)
