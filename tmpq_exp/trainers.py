"""Owns the Trainers of a run's stages, and the devices that the trainer group names."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from tmpq_exp.config import Config, UserError
from tmpq_exp.progress import StageProgress
from tmpq_exp.rundir import RunDirectory


def stage_trainer(
    config: Config, run: RunDirectory, name: str, total: int, *, count_epochs: bool = False, **arguments: Any
) -> L.Trainer:
    """A Trainer from the trainer group, with a progress bar of ``total`` batches or epochs.

    Where the group names several devices it is of this process's own alone: one process drives a run's stages, the
    others work for it (see ``tmpq_exp.ranks``).
    """
    found = group_trainer(config)
    if num_ranks(found) > 1:
        device = found.strategy.root_device
        arguments |= {"devices": [device.index] if device.type == "cuda" else 1, "num_nodes": 1, "strategy": "auto"}
        arguments["plugins"] = [LightningEnvironment()]  # the cluster's would count the others in
    trainer: L.Trainer = instantiate(config.trainer)(
        callbacks=[StageProgress(name, total, count_epochs=count_epochs)], default_root_dir=run.path, **arguments
    )
    return trainer


def group_trainer(config: Config, **arguments: Any) -> L.Trainer:
    """The Trainer that the trainer group describes."""
    trainer: L.Trainer = instantiate(config.trainer)(**arguments)
    return trainer


def num_ranks(trainer: L.Trainer) -> int:
    """Processes of a Trainer, one a device, on all of its nodes."""
    return trainer.num_devices * trainer.num_nodes


def own_device(config: Config) -> torch.device:
    """The device of this process: the group's, of several the one of this rank.

    Raises:
        UserError: See ``_require_float32``.
    """
    trainer = group_trainer(config)
    _require_float32(trainer)
    device: torch.device = trainer.strategy.root_device
    return device


def single_device(config: Config) -> torch.device:
    """The device of the trainer group, where only one can be used.

    Raises:
        UserError: If the group has several devices; and see ``_require_float32``.
    """
    trainer = group_trainer(config)
    _require_float32(trainer)
    if num_ranks(trainer) != 1:
        raise UserError(
            f"trainer: this task runs on one device, found {num_ranks(trainer)} devices; set trainer.devices=1"
        )
    device: torch.device = trainer.strategy.root_device
    return device


def _require_float32(trainer: L.Trainer) -> None:
    """Refuse autocast: with 8 bits of mantissa a grid of 8 bits moves, and what is measured is no longer that grid."""
    if trainer.precision != "32-true":
        raise UserError(
            "trainer.precision must be 32-true where networks are quantized, whose integers would be rounded once "
            f"more, found {trainer.precision}; float networks can be trained with it (task=train)"
        )
