"""Owns what a training run tells its tracker while it goes on: the curve of its loss."""

from __future__ import annotations

from typing import Any

import lightning as L

from tmpq_exp.tracking.tracker import Tracker
from tmpq_exp.zoo.training import TrainingModule

EVERY_STEPS = 50
"""Steps between two points of the curve: reading the loss off a GPU makes it wait."""


class TrainingCurve(L.Callback):
    """Logs the smoothed training loss and the learning rate every ``EVERY_STEPS`` steps.

    Args:
        tracker: Where to.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """One point of the curve, where it is time for one."""
        assert isinstance(pl_module, TrainingModule)
        step = trainer.global_step
        if step % EVERY_STEPS == 0:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._tracker.log_training(step, {"loss": float(pl_module.final_loss), "learning_rate": float(rate)})
