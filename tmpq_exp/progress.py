"""Progress of long stages: one bar with ETA in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_SECONDS = 10.0

EXPECTED_WARNINGS = (
    r"TensorFloat32 tensor cores for float32 matrix multiplication",  # of inductor; products of matrices stay float32
    r".*configure_optimizers. returned .None.",  # calibration and search need no optimizer
    r"Found \d+ module\(s\) in eval mode at the start of training",  # networks are quantized as they are used
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6 with torch 2.15
    r".*does not have many workers",  # the data is in memory
    r"You passed in a .val_dataloader. but have no",  # a data module may hold out images that a recipe leaves alone
    r"Checkpoint directory .* exists and is not empty",  # training writes its checkpoints into the run directory
)
"""Warnings of libraries that say nothing here; the command line and the tests leave them out, and no others."""


def quiet_lightning() -> None:
    """Keep Lightning's hardware notes, tips and ``EXPECTED_WARNINGS`` out of the output."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


class StageBar:
    """Progress of one stage, as a context manager.

    Args:
        name: What is shown before the bar.
        total: Number of units.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._note = ""

    def __enter__(self) -> StageBar:
        self._start = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description:<16}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.name, total=self.total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.done:
            self._print(f"in {_duration(time.monotonic() - self._start)}")

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count finished units; ``note`` replaces the text behind the bar."""
        self.done += count
        self._note = self._note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self._note)
        elif time.monotonic() - self._last_line > LINE_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            remaining = (time.monotonic() - self._start) / self.done * (self.total - self.done)
            self._print(f"eta {_duration(remaining)}")

    def _print(self, timing: str) -> None:
        note = f"  {self._note}" if self._note else ""
        print(f"{self.name:<16} {self.done}/{self.total}  {timing}{note}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class StageProgress(ProgressBar):
    """One bar for all epochs of a Trainer's loop.

    Args:
        name: What is shown before the bar.
        total: Units of the whole stage; a batch counts one.
        note: Module attribute whose text is shown behind the bar.
        count_epochs: An epoch counts one, rather than a batch.
    """

    def __init__(self, name: str, total: int, note: str = "progress_note", *, count_epochs: bool = False) -> None:
        super().__init__()
        self._stage, self._note, self._count_epochs = StageBar(name, total), note, count_epochs

    def disable(self) -> None:
        """Lightning asks ranks above 0 to be silent."""
        self._stage.total = 0

    def _advance(self, module: L.LightningModule) -> None:
        if self._stage.total:
            self._stage.advance(1, getattr(module, self._note, None))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self._stage.__enter__()
        self._stage.done = trainer.current_epoch if self._count_epochs else trainer.global_step

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self._stage.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """One unit more."""
        if not self._count_epochs:
            self._advance(pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One unit more, where epochs count."""
        if self._count_epochs:
            self._advance(pl_module)

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """One unit more."""
        self._advance(pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the bar away, also after a failure."""
        self._stage.__exit__()
