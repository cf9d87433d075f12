"""Owns what every tracker does, the one that does nothing, and the guard that keeps a tracker's faults from the job."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Job:
    """What a tracker is told of a job when it starts.

    Args:
        directory: The job's run directory, which exists.
        kind: Kind of job: ``run``, ``classify`` or ``train``.
        config: The resolved configuration as plain data.
        environment: Command, commit, sweep, versions and hardware, as ``environment.json`` has them of a start.
    """

    directory: Path
    kind: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_directory(cls, directory: Path, kind: str, config: Mapping[str, Any]) -> Job:
        """Job of a run directory, with the last of its recorded starts."""
        starts = json.loads((directory / "environment.json").read_text(encoding="utf-8"))["starts"]
        return cls(directory, kind, config, starts[-1])


@dataclass(frozen=True)
class QualityChart:
    """Points of quality against cost that may share a picture.

    Args:
        metric: Name of the quality metric.
        rows: GBitOPs, quality and name of every point.
    """

    metric: str
    rows: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Results:
    """What a job leaves behind.

    Args:
        summary: Final figures by name, numbers or text.
        pictures: PNG files.
        trials_file: ``trials.jsonl``, None if there is none.
        trials: Its records.
        chart: Quality against BitOPs of the search, None if nothing was scored.
        bits: Bits of every layer of the best found, by what they are of.
    """

    summary: Mapping[str, Any]
    pictures: Sequence[Path] = ()
    trials_file: Path | None = None
    trials: Sequence[Mapping[str, Any]] = ()
    chart: QualityChart | None = None
    bits: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Tracker(Protocol):
    """What a job tells about itself while it goes on."""

    @property
    def notice(self) -> str | None:
        """A line for the user: where the tracker's files are and what to do with them. None if there is nothing."""

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """Log one record of ``trials.jsonl``."""

    def log_training(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of a training step."""

    def log_results(self, results: Results) -> None:
        """Log what the job leaves behind."""

    def finish(self, exit_code: int = 0) -> None:
        """End the tracking with the exit status of the job; 0 is success."""


class NullTracker:
    """Tracker that keeps nothing."""

    notice: str | None = None

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_training(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_results(self, results: Results) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""


class GuardedTracker:
    """A tracker whose faults are said once, on the standard error stream; from then on nothing more is tracked.

    The run's own files are the source of truth, so that nothing is lost: ``task=log`` logs a run directory again.

    Args:
        name: What the user calls it.
        start: Makes the tracker; its faults are guarded too.
    """

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._guarded(lambda: self._set(start()))

    @property
    def notice(self) -> str | None:
        """The tracker's; None once it failed."""
        return None if self._tracker is None else self._tracker.notice

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """Log one record of ``trials.jsonl``."""
        self._with(lambda tracker: tracker.log_trial(record))

    def log_training(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of a training step."""
        self._with(lambda tracker: tracker.log_training(step, values))

    def log_results(self, results: Results) -> None:
        """Log what the job leaves behind."""
        self._with(lambda tracker: tracker.log_results(results))

    def finish(self, exit_code: int = 0) -> None:
        """End the tracking."""
        self._with(lambda tracker: tracker.finish(exit_code))

    def _set(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def _with(self, action: Callable[[Tracker], object]) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._guarded(lambda: action(tracker))

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run an action; at its failure say so and stop tracking."""
        try:
            action()
        except Exception as error:  # a tracker raises what it likes; none of it may end a job
            self._tracker = None
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            print(
                f"warning: tracking with {self._name} stopped ({reason}); the job goes on and its own files hold "
                "everything. Log it again with: python -m tmpq_exp task=log 'runs=[RUN DIRECTORY]'",
                file=sys.stderr,
                flush=True,
            )
