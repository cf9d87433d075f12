"""Owns the choice of a tracker: the one that the logger group asks for, behind its guard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tmpq_exp.config import LoggerConfig
from tmpq_exp.overrides import exit_status
from tmpq_exp.tracking.tracker import GuardedTracker, Job, NullTracker, Tracker


def open_tracker(settings: LoggerConfig, job: Job, recorded: Iterable[Mapping[str, Any]] = ()) -> Tracker:
    """Tracker of the logger group.

    Args:
        settings: The logger group. Without a group of its own, a job of a sweep is in the group of its sweep.
        job: What is tracked.
        recorded: Trials that a killed job had recorded; they are logged first, so that one tracker holds all.
    """
    if settings.name == "none":
        return NullTracker()
    tracker = GuardedTracker(NAMES[settings.name], lambda: _start(settings, job))
    for record in recorded:
        tracker.log_trial(record)
    return tracker


@contextmanager
def finishing(tracker: Tracker) -> Iterator[None]:
    """End the tracking with the exit status of what runs inside."""
    try:
        yield
    except BaseException as error:
        tracker.finish(exit_status(error))
        raise
    tracker.finish()


def say_notice(tracker: Tracker) -> None:
    """Print what the user can do with what was tracked, if there is anything."""
    if tracker.notice is not None:
        print(tracker.notice)


NAMES = {"wandb": "W&B", "csv": "CSV files", "tensorboard": "TensorBoard"}
"""Loggers as users call them."""


def _start(settings: LoggerConfig, job: Job) -> Tracker:
    if settings.name == "wandb":
        from tmpq_exp.tracking.wandb_run import WandbTracker

        group = settings.group or job.environment.get("sweep")
        return WandbTracker(job, settings.project, settings.mode, group, settings.tags)
    from tmpq_exp.tracking.lightning_files import CsvTracker, TensorBoardTracker

    return CsvTracker(job) if settings.name == "csv" else TensorBoardTracker(job)
