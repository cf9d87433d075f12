"""Owns the door of a job: check its configuration, run its task, say why it failed, and keep how it ended."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tmpq_exp import locks, sweep_end
from tmpq_exp.config import to_config
from tmpq_exp.files import remedy
from tmpq_exp.job_record import (
    LOCK_NAME,
    RECORD_NAME,
    JobRecord,
    JobState,
    read_record,
    register_resolvers,
    write_record,
)
from tmpq_exp.overrides import (
    EXIT_BAD_INPUT,
    EXIT_UNEXPECTED,
    exit_status,
    explain,
    is_bad_input,
    is_out_of_time,
    lost_process,
)

register_resolvers()  # here, because the processes of a launcher import this module before they compose a job


def conf_dir() -> Path:
    """Folder of the configuration: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run_job(composed: DictConfig) -> None:
    """One job of Hydra: the door through which a configuration enters."""
    config = to_config(composed)
    if config.wants_stand_in:
        from tmpq_exp.smoke import with_stand_in

        composed = with_stand_in(composed)
        config = to_config(composed)
    resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    import torch  # after the checks, so that a typo fails at once

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    instantiate(config.task)(config, resolved)


def reporting_job(composed: DictConfig) -> int:
    """``run_job`` that reports its own failure: a single job exits with it, one of a sweep lets the others go on.

    Returns:
        Exit status of a job of a sweep; 0 for a single one.
    """
    directory, hydra = Path(composed.paths.run_dir), HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN:
        own = JobRecord(hydra.job.num, list(hydra.overrides.task), hydra.job.override_dirname)
        is_alone = hydra.launcher._target_.endswith("BasicLauncher")
        return _sweep_job(composed, directory, own, logs=not is_alone)
    before = read_record(directory)  # a job of a sweep that is started again by hand
    failure = _attempt(composed, directory) if before is None else _recorded(composed, directory, before)
    if failure is not None:
        _say(failure.message)
        sys.exit(failure.status)
    return 0


def _sweep_job(composed: DictConfig, directory: Path, own: JobRecord, *, logs: bool) -> int:
    """A job of a sweep: skipped if it is done, left alone if another process is at it, else run and recorded.

    Args:
        composed: Configuration.
        directory: Of the job, which exists.
        own: Record of the job as it starts.
        logs: Whether what it prints goes to ``run.log``, because other jobs run beside it.
    """
    title, lock = f"job {own.number} ({own.name}): ", directory / LOCK_NAME
    try:
        locks.hold(lock)
    except locks.LockedError as error:
        _say(f"{title}left to {error}, which is at it")
        return 0
    except OSError as error:
        return report_failure(error, directory, title)
    try:
        before = read_record(directory)
        if before is not None and before.state is JobState.FINISHED:
            _say(f"{title}finished before, skipped")
            return 0
        if before is not None and before.state is JobState.FAILED and not composed.sweep.retry_failed:
            _say(f"{title}failed before ({before.cause}); sweep.retry_failed=true tries it again")
            return EXIT_UNEXPECTED if before.exit_status is None else before.exit_status
        if logs:
            _say(f"{title}started, see {directory / 'run.log'}")
        with _printing_to(directory / "run.log") if logs else _printing_here():
            failure = _recorded(composed, directory, own)
        if failure is not None:
            _say(title + failure.message)
            return failure.status
        if logs:
            _say(f"{title}finished")
        return 0
    finally:
        locks.release(lock)


@contextmanager
def _printing_here() -> Iterator[None]:
    yield


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    with path.open("a", buffering=1, encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


@dataclass(frozen=True)
class Failure:
    """Why a job ended early.

    Args:
        status: Exit status.
        message: One line for the user.
    """

    status: int
    message: str


def _recorded(composed: DictConfig, directory: Path, record: JobRecord) -> Failure | None:
    """Run a job whose directory keeps how it stands; what is killed is left as running, without a lock."""
    start = time.monotonic()
    record = JobRecord(record.number, record.overrides, record.name)
    failure = _kept(directory, record) or _attempt(composed, directory)
    seconds = round(time.monotonic() - start, 3)
    state = JobState.FINISHED if failure is None else JobState.FAILED
    status, cause = (0, None) if failure is None else (failure.status, failure.message)
    ended = replace(record, state=state, exit_status=status, cause=cause, seconds=seconds)
    unwritten = _kept(directory, ended)
    return failure or unwritten


def _kept(directory: Path, record: JobRecord) -> Failure | None:
    try:
        write_record(directory, record)
    except OSError as error:
        return failure_of(error, directory)
    return None


def _attempt(composed: DictConfig, directory: Path) -> Failure | None:
    try:
        run_job(composed)
    except Exception as error:
        return failure_of(error, directory)
    return None


def report_failure(error: Exception, run_dir: Path | None = None, name: str = "") -> int:
    """Say in one line why a job failed, and which; returns the exit status. See ``failure_of``."""
    failure = failure_of(error, run_dir)
    _say(name + failure.message)
    return failure.status


def failure_of(error: Exception, run_dir: Path | None = None) -> Failure:
    """Why a job failed, in one line; the traceback of what nobody foresaw goes into ``crash.log``.

    Args:
        error: What composing, checking or running raised.
        run_dir: The job's directory, if it got that far.
    """
    if is_bad_input(error):
        return Failure(exit_status(error), explain(error, sys.argv[1:], conf_dir()))
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        advice, how = remedy(error), "hydra.sweep.dir" if sweep_end.directory() is not None else "hydra.run.dir"
        found = f"{place}{error.strerror}; what was written before is kept"
        if advice is None:
            return Failure(EXIT_UNEXPECTED, f"{found}, start again with the same {how}")
        return Failure(EXIT_BAD_INPUT, f"{found}. {advice} and start again with the same {how}")
    if is_out_of_time(error):
        advice = "hydra.launcher.max_num_timeout=10 has a job queued again up to ten times"
        return Failure(EXIT_UNEXPECTED, f"hydra.launcher.timeout_min: the time limit of the job was reached; {advice}")
    lost = lost_process(error)
    if lost is not None:
        message = "hydra/launcher: a job's process was killed, or memory did not suffice for it"
        return Failure(EXIT_UNEXPECTED, f"{message}; what it recorded is safe ({lost})")
    first_line = next(iter(str(error).splitlines()), "")
    found = f"unexpected error {type(error).__name__}: {first_line}"
    return Failure(EXIT_UNEXPECTED, f"{found}; {_keep_traceback(error, run_dir)}")


def _keep_traceback(error: Exception, run_dir: Path | None) -> str:
    # never litter a folder that is not ours
    is_run = run_dir is not None and any((run_dir / name).exists() for name in ("config.yaml", RECORD_NAME))
    path = (run_dir if run_dir is not None and is_run else Path.cwd()) / "crash.log"
    lines = "".join(traceback.format_exception(error))
    try:
        path.write_text(lines, encoding="utf-8")
    except OSError:
        return f"the traceback, which could not be written to {path}, follows; please report it\n{lines}"
    return f"the traceback is in {path}; please report it"


def _say(message: str) -> None:
    print(f"tmpq-exp: {message}", file=sys.stderr)
