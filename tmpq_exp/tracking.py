"""Experiment tracking: what goes to Weights & Biases, and the promise that its troubles never stop a run."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

MODES = ("offline", "online", "disabled")
"""Modes of W&B that are accepted; only ``online`` uses the network."""


class Tracker(Protocol):
    """What a run tells about itself while it goes on."""

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """Log one record of ``trials.jsonl``."""

    def log_summary(self, report: Mapping[str, Any]) -> None:
        """Log the figures of a finished report."""

    def log_images(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Log picture files under the stems of their names."""

    def finish(self, exit_code: int = 0) -> None:
        """End the run; 0 is success."""


class NullTracker:
    """Tracker that keeps nothing."""

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_summary(self, report: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_images(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Do nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Do nothing."""


class WandbTracker:
    """One W&B run for one job.

    A resumed job starts a fresh W&B run and logs all its trials again: an offline run cannot be continued, and half a
    history is worse than two runs. Whatever goes wrong inside W&B is warned of once; from then on the tracker keeps
    nothing and the job goes on. ``trials.jsonl`` is the source of truth, not W&B.

    Args:
        project: W&B project.
        mode: ``offline`` (files only, no network, no prompt), ``online`` or ``disabled``.
        directory: Directory in which W&B makes its ``wandb/`` folder; it must exist.
        group: Group of the runs of one sweep; None for no group.
        job_type: Kind of job, such as ``run`` or ``train``.
        tags: Tags of the run.
        config: Configuration as plain data.
        name: Name of the run; None lets W&B choose.

    Raises:
        ValueError: If the mode is not one of ``MODES``.
    """

    def __init__(
        self,
        project: str,
        mode: str = "offline",
        directory: str | os.PathLike[str] = ".",
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, found {mode!r}")
        self._run: Any = None
        self._failed = False
        self._guarded(
            lambda: self._start(
                project=project,
                mode=mode,
                dir=os.fspath(directory),
                group=group,
                job_type=job_type,
                tags=list(tags),
                config=dict(config or {}),
                name=name,
            )
        )

    @property
    def directory(self) -> Path | None:
        """Directory of the offline run, what ``wandb sync`` takes; None if there is none."""
        if self._run is None or getattr(self._run, "disabled", False):
            return None
        return Path(self._run.dir).parent

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """Log a trial at its own index, so that order and gaps survive a resume.

        Args:
            record: Record of ``trials.jsonl``. Metrics that are null or not finite are left out.
        """
        values = {
            "trial/index": record["index"],
            "trial/phase": record["phase"],
            "trial/bitops": record["bitops"],
            "trial/macs": record["macs"],
            "trial/weight_bytes": record["weight_bytes"],
            **{f"trial/{name}": value for name, value in _finite(record["metrics"]).items()},
        }
        for name in ("name", "generation", "error"):
            if record.get(name) is not None:
                values[f"trial/{name}"] = record[name]
        self._guarded(lambda: self._run.log(values))

    def log_summary(self, report: Mapping[str, Any]) -> None:
        """Log the figures of the baselines and the best as the summary of the run.

        Args:
            report: Content of ``report.json``.
        """
        values: dict[str, Any] = {"search/num_evaluations": report["search"]["num_evaluations"]}
        for place, entry in [*((e["name"], e) for e in report["baselines"]), ("best", report["best"])]:
            values |= {f"{place}/{name}": value for name, value in _finite(entry["metrics"]).items()}
            values |= {f"{place}/{name}": entry[name] for name in ("bitops", "macs", "weight_bytes")}
        values |= {f"stage/{name}_seconds": seconds for name, seconds in _finite(report["stages"]).items()}
        values |= {f"fingerprint/{name}": value for name, value in report["fingerprint"].items()}
        self._guarded(lambda: self._run.summary.update(values))

    def log_images(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Log picture files.

        Args:
            paths: PNG files; each is logged as ``pictures/<stem of its name>``.
        """
        files = [Path(path) for path in paths]

        def log() -> None:
            import wandb

            self._run.log({f"pictures/{file.stem}": wandb.Image(str(file)) for file in files})

        self._guarded(log)

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run; a second call does nothing.

        W&B's service may write the offline file's last records for a moment longer; the end of the process waits.

        Args:
            exit_code: 0 marks the run finished, anything else failed.
        """
        self._guarded(lambda: self._run.finish(exit_code=exit_code))
        self._run, self._failed = None, True

    def _start(self, **arguments: Any) -> None:
        if not os.environ.get("WANDB_MODE"):
            os.environ.pop("WANDB_MODE", None)
        if arguments["mode"] != "online":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # crash reports need the network too
        import wandb

        wanted = {
            "console": "off",
            "silent": True,
            "disable_job_creation": True,
            "disable_code": True,
            "x_disable_stats": arguments["mode"] != "online",
            "x_transaction_log_flush_interval": 0.5,
        }
        known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
        self._run = wandb.init(**arguments, reinit="create_new", settings=wandb.Settings(**known))
        self._run.define_metric("trial/index", hidden=True)
        self._run.define_metric("trial/*", step_metric="trial/index")

    def _guarded(self, action: Callable[[], object]) -> None:
        """Run an action of W&B; at the first failure warn and stop tracking."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # W&B raises what it likes; none of it may end a run.
            self._failed = True
            warnings.warn(
                f"tracking with W&B stopped, the run goes on and trials.jsonl holds every trial: {error!r}",
                RuntimeWarning,
                stacklevel=3,
            )


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
