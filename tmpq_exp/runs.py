"""Owns the reading of run directories that other jobs made, finished or not, without touching them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tmpq_exp.config import UserError
from tmpq_exp.config.identity import flatten, lasting
from tmpq_exp.job_record import job_name
from tmpq_exp.plain_data import parse_json_object, read_yaml_mapping
from tmpq_exp.report.classification import validate_classification
from tmpq_exp.report.content import validate_report
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.search.trials import read_trials


@dataclass(frozen=True)
class PastRun:
    """What a run directory holds.

    Args:
        directory: The directory.
        kind: ``run``, ``classify``, ``train`` or whatever its task was.
        config: Its resolved configuration.
        trials: Records of its ``trials.jsonl``; empty if it has none.
        report: Content of its ``report.json``; None if it is not finished.
        warnings: What was found damaged.
    """

    directory: RunDirectory
    kind: str
    config: Mapping[str, Any]
    trials: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any] | None
    warnings: Sequence[str]

    @property
    def name(self) -> str:
        """Name of the directory, or what a sweep calls the job in it."""
        return job_name(self.directory.path)


KINDS = {
    "tmpq_exp.pipeline.run": "run",
    "tmpq_exp.classify.classify": "classify",
    "tmpq_exp.train.train": "train",
}
"""Tasks that leave a run directory, by their target."""


def past_runs(paths: Sequence[str]) -> list[PastRun]:
    """The run directories, and those right below directories of sweeps.

    Args:
        paths: The key ``runs``.

    Raises:
        UserError: If there is none, one cannot be read, or one is given twice.
    """
    if not paths:
        raise UserError("runs: no run directory given; for example 'runs=[outputs/ddpm_digits/2026-01-31_12-00-00]'")
    directories = [directory for path in paths for directory in _run_directories(Path(path))]
    resolved = [directory.resolve() for directory in directories]
    for directory in directories:
        if resolved.count(directory.resolve()) > 1:
            raise UserError(f"runs: {directory} is given more than once")
    return [read_run(directory) for directory in directories]


def read_run(path: Path) -> PastRun:
    """What a run directory holds.

    Raises:
        UserError: If one of its files cannot be read; it is named.
    """
    directory = RunDirectory(path)
    try:
        config = read_yaml_mapping(directory.config)
    except ValueError as error:
        raise UserError(f"runs: {error}") from error
    trials, warnings = read_trials(directory.trials) if directory.trials.exists() else ([], [])
    task = config.get("task")
    kind = KINDS.get(str(task.get("_target_") if isinstance(task, dict) else None), "other")
    report = _read_report(directory.report_json, kind) if directory.report_json.exists() else None
    return PastRun(directory, kind, config, [asdict(trial) for trial in trials], report, warnings)


def differing_settings(runs: Sequence[PastRun]) -> list[dict[str, Any]]:
    """For every run its settings that are not the same in all, under dotted names, of those that results depend on."""
    flat = [flatten(lasting(run.config)) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for one in flat for key in one)
        if len({repr(one.get(key)) for one in flat}) > 1
    ]
    return [{key: one.get(key) for key in keys} for one in flat]


def _run_directories(path: Path) -> list[Path]:
    if RunDirectory(path).config.exists():
        return [path]
    if not path.is_dir():
        raise UserError(f"runs: {path} is no directory; a run directory, or one of a sweep, was expected")
    below = sorted((child for child in path.iterdir() if RunDirectory(child).config.exists()), key=_job_order)
    if not below:
        raise UserError(f"runs: {path} is no run directory and holds none (no config.yaml there)")
    return below


def _job_order(path: Path) -> tuple[int, str]:
    """Jobs of a sweep in the order of their numbers, which their names start with."""
    name = job_name(path)
    number = name.partition("_")[0]
    return int(number) if number.isdecimal() else 0, name


def _read_report(path: Path, kind: str) -> Mapping[str, Any]:
    try:
        report = parse_json_object(path.read_bytes())
        (validate_classification if kind == "classify" else validate_report)(report)
    except (ValueError, OSError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"runs: {path} is no report of this version ({error})") from error
    return report
