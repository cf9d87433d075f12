"""Owns tracking into files beside the run, through Lightning's loggers: CSV tables and TensorBoard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from tmpq_exp.config.identity import flatten
from tmpq_exp.tracking.records import BIT_EDGES, bit_counts, trial_bits, trial_values
from tmpq_exp.tracking.tracker import Job, Results


class CsvTracker:
    """``csv/metrics.csv``, a row a trial or training step, and ``csv/summary/metrics.csv``, the final figures.

    Pictures and trials lie in the run directory anyway. A resumed job writes the tables anew, with all its trials.

    Args:
        job: The job; its directory gets the folder ``csv/``.
    """

    def __init__(self, job: Job) -> None:
        self._folder = _fresh(job.directory / "csv")
        self._logger = CSVLogger(job.directory, name="csv", version="", flush_logs_every_n_steps=1)
        self._logger.log_hyperparams(_hyperparameters(job))

    @property
    def notice(self) -> str | None:
        """Where the table is."""
        return f"csv     {self._folder / 'metrics.csv'}"

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """One row; its step is the trial's index."""
        self._logger.log_metrics(trial_values(record), step=record["index"])

    def log_training(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        self._logger.log_metrics({f"train/{name}": value for name, value in values.items()}, step=step)

    def log_results(self, results: Results) -> None:
        """One row with all figures."""
        summary = CSVLogger(self._folder, name="summary", version="", flush_logs_every_n_steps=1)
        summary.log_metrics(dict(results.summary), step=0)

    def finish(self, exit_code: int = 0) -> None:
        """Write what is not written yet."""
        self._logger.save()


class TensorBoardTracker:
    """``tensorboard/``: scalars and histograms of every trial under its index, final figures and pictures.

    A resumed job writes the folder anew, with all its trials.

    Args:
        job: The job; its directory gets the folder.
    """

    def __init__(self, job: Job) -> None:
        self._folder = _fresh(job.directory / "tensorboard")
        self._logger = TensorBoardLogger(job.directory, name="tensorboard", version="")
        self._logger.log_hyperparams(_hyperparameters(job), {})
        self._last_index = 0

    @property
    def notice(self) -> str | None:
        """The command that shows it."""
        return f"board   tensorboard --logdir {self._folder}"

    def log_trial(self, record: Mapping[str, Any]) -> None:
        """Numbers of a trial, and histograms of its bits."""
        self._last_index = record["index"]
        self._logger.log_metrics(_numbers(trial_values(record)), step=record["index"])
        for name, bits in trial_bits(record).items():
            self._log_bits(f"trial/{name}", bits, record["index"])
        self._logger.save()

    def log_training(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a training step."""
        self._logger.log_metrics({f"train/{name}": value for name, value in values.items()}, step=step)

    def log_results(self, results: Results) -> None:
        """Final figures, pictures, and bits of the best found, behind the last trial."""
        self._logger.log_metrics(_numbers(results.summary), step=self._last_index)
        for path in results.pictures:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._logger.experiment.add_image(f"pictures/{path.stem}", pixels, self._last_index, dataformats="HWC")
        for name, bits in results.bits.items():
            self._log_bits(f"best/{name}", bits, self._last_index)

    def finish(self, exit_code: int = 0) -> None:
        """Close the files; what job it was and how it ended stand in the run directory."""
        self._logger.finalize("success" if exit_code == 0 else "failed")

    def _log_bits(self, name: str, bits: Sequence[int], step: int) -> None:
        """One histogram with a bin for each bit width."""
        values = np.asarray(bits)
        counts = bit_counts(bits)
        self._logger.experiment.add_histogram_raw(
            name,
            min=float(values.min()),
            max=float(values.max()),
            num=len(values),
            sum=float(values.sum()),
            sum_squares=float((values**2).sum()),
            bucket_limits=list(BIT_EDGES[1:]),
            bucket_counts=counts,
            global_step=step,
        )


def _fresh(folder: Path) -> Path:
    """The folder without what an earlier start of the same job wrote there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _hyperparameters(job: Job) -> dict[str, Any]:
    """Configuration and environment under dotted names."""
    return {"kind": job.kind, **flatten(dict(job.config)), **flatten(dict(job.environment), "environment")}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
