"""Owns the Weights & Biases run of a job: what is logged, and that only ``online`` uses the network."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tmpq_exp.job_record import job_name
from tmpq_exp.tracking.records import BIT_EDGES, bit_counts, table_rows, trial_bits, trial_values
from tmpq_exp.tracking.tracker import Job, QualityChart, Results

INIT_TIMEOUT_SECONDS = 30
"""How long ``online`` waits for the server at the start, and for W&B's own process before that."""

FINISH_TIMEOUT_SECONDS = 60
"""How long it waits at the end for what is not uploaded yet."""


class WandbTracker:
    """One W&B run for one job.

    A resumed job starts a fresh W&B run and logs all its trials again: an offline run cannot be continued, and half a
    history is worse than two runs. ``trials.jsonl`` is the source of truth, not W&B.

    Args:
        job: The job; its directory gets the ``wandb/`` folder.
        project: W&B project.
        mode: ``offline`` (files only, no network, no prompt), ``online`` or ``disabled``.
        group: Group of the runs of one sweep; None for no group.
        tags: Tags of the run.

    Raises:
        Exception: Whatever W&B raises, here and in every method; see ``GuardedTracker``.
    """

    def __init__(
        self, job: Job, project: str, mode: Any = "offline", group: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        if not os.environ.get("WANDB_MODE"):
            os.environ.pop("WANDB_MODE", None)
        if mode != "online":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # crash reports need the network too
        import wandb

        self._job, self._finished = job, False
        self._run: Any = wandb.init(
            project=project,
            mode=mode,
            dir=os.fspath(job.directory.absolute()),  # of this process: the service may have been started elsewhere
            group=group,
            job_type=job.kind,
            tags=list(tags),
            config={**job.config, "environment": dict(job.environment)},
            name=job_name(job.directory),
            reinit="create_new",
            settings=wandb.Settings(**_known_settings(mode, job)),
        )
        for prefix, step in (("trial", "trial/index"), ("train", "train/step")):
            self._run.define_metric(step, hidden=True)
            self._run.define_metric(f"{prefix}/*", step_metric=step)

    @property
    def directory(self) -> Path | None:
        """Directory of the W&B run, what ``wandb sync`` takes; None if there is none."""
        return None if getattr(self._run, "disabled", False) else Path(self._run.dir).parent

    @property
    def notice(self) -> str | None:
        """The command that uploads an offline run, or the address of an online one."""
        if self._run.settings.mode == "online":
            return f"wandb   {self._run.url}"
        return None if self.directory is None else f"wandb   wandb sync {shlex.quote(str(self.directory))}"

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """Log a trial at its own index, so that order and gaps survive a resume, with histograms of its bits."""
        import wandb

        values = trial_values(record)
        for name, bits in trial_bits(record).items():
            values[f"trial/{name}"] = wandb.Histogram(np_histogram=(bit_counts(bits), list(BIT_EDGES)))
        self._run.log(values)

    def log_training(self, step: int, values: Mapping[str, float]) -> None:
        """Log figures of a training step."""
        self._run.log({"train/step": step, **{f"train/{name}": value for name, value in values.items()}})

    def log_results(self, results: Results) -> None:
        """Log summary, pictures, the chart of quality against BitOPs, bits, and the trials as an artifact."""
        import wandb

        self._run.summary.update(dict(results.summary))
        with _staged_in(self._job.directory / "wandb"):
            logged: dict[str, Any] = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in results.pictures}
            if results.chart is not None:
                logged["charts/quality_against_bitops"] = _scatter(results.chart)
            for name, bits in results.bits.items():
                logged[f"best/{name}"] = wandb.Histogram(np_histogram=(bit_counts(bits), list(BIT_EDGES)))
            if logged:
                self._run.log(logged)
            if results.trials_file is not None:
                self._log_trials(results.trials_file, results.trials)

    def _log_trials(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """The artifact ``trials-<run id>``: the file itself, and its trials as a table."""
        import wandb

        artifact = wandb.Artifact(f"trials-{self._run.id}", type="trials")
        artifact.add_file(str(path))
        columns, rows = table_rows(records)
        artifact.add(wandb.Table(columns=columns, data=rows, allow_mixed_types=True), "trials")
        self._run.log_artifact(artifact)

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run; a second call does nothing.

        W&B's service may write the offline file's last records for a moment longer; the end of the process waits.

        Args:
            exit_code: 0 marks the run finished, anything else failed.

        Raises:
            TimeoutError: If an online run could not be uploaded in time; ``wandb sync`` of its directory still can.
        """
        if self._finished:
            return
        self._finished = True
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError as error:
            raise TimeoutError(
                f"W&B was not reached in time; later: wandb sync {shlex.quote(str(self.directory))}"
            ) from error


def _scatter(chart: QualityChart) -> Any:
    """W&B's own scatter plot of the points."""
    import wandb

    table = wandb.Table(columns=["GBitOPs", chart.metric, "name"], data=[list(row) for row in chart.rows])
    return wandb.plot.scatter(table, "GBitOPs", chart.metric, title=f"{chart.metric} against GBitOPs")


def _known_settings(mode: str, job: Job) -> dict[str, Any]:
    """Settings that the installed version knows."""
    import wandb

    commit = job.environment.get("commit")
    wanted = {
        "console": "off",
        "silent": True,
        "disable_job_creation": True,
        "disable_code": True,
        "git_commit": None if commit is None else str(commit).removesuffix("-dirty"),
        "x_disable_stats": mode != "online",
        "x_transaction_log_flush_interval": 0.5,
        "init_timeout": INIT_TIMEOUT_SECONDS,
        "x_service_wait": INIT_TIMEOUT_SECONDS,
        "finish_timeout": FINISH_TIMEOUT_SECONDS,
        "finish_timeout_raises": True,
    }
    return {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """Let W&B keep its copies of artifacts' files beside the offline run that ``wandb sync`` takes them from."""
    before = os.environ.get("WANDB_DATA_DIR")
    if before is None:
        os.environ["WANDB_DATA_DIR"] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("WANDB_DATA_DIR", None)
