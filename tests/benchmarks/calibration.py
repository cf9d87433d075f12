"""How long calibration of the embedded model takes, and what ten times as many iterations would gain."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import lightning as L
import torch
from hydra import compose, initialize_config_dir

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import CalibrationConfig, Config, register_schema, to_config
from tmpq_exp.cost import AttentionShape
from tmpq_exp.progress import quiet_lightning
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.blockwise import UnitRecord
from tmpq_exp.quant.calibration import CalibrationModule
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import task_layers

RATIO_BITS = 5


@cache
def demo_config(method: str = "uniform_prefix") -> Config:
    """The default configuration with this method's demo iterations."""
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return to_config(compose("config", [f"calibration={method}", "paths.run_dir=unused"]))


def calibrate(calibration: CalibrationConfig, bits: Sequence[int]) -> tuple[float, list[UnitRecord]]:
    """Seconds and records of a calibration of ddpm_digits at these bit widths, from states to the last unit."""
    quiet_lightning()
    config = demo_config()
    task = DigitsDDPM().task()
    layers = task_layers(task)
    softmax = config.quant.softmax_bits
    weights = [(softmax,) if isinstance(shape, AttentionShape) else tuple(bits) for shape in layers]
    supernet = SupernetModule(task, layers, weights, [tuple(bits)] * len(layers), config.quant).supernet
    start = time.perf_counter()
    states = trajectory_states(task, calibration.num_images, calibration.num_timesteps, 0)
    with (
        tempfile.TemporaryDirectory() as folder,
        ActivationStore(calibration.max_cache_bytes, Path(folder) / "spill", torch.device("cpu")) as store,
    ):
        module = CalibrationModule(supernet, states, calibration, 0, store)
        trainer = L.Trainer(
            max_epochs=module.num_epochs,
            reload_dataloaders_every_n_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module)
    return time.perf_counter() - start, module.records


def demo_seconds(calibration: CalibrationConfig) -> tuple[float, int]:
    """Seconds at the bit widths of the default space, and the number of units."""
    seconds, records = calibrate(calibration, demo_config().space.weight_bits)
    return seconds, len({record.unit for record in records})


def loss_ratio(calibration: CalibrationConfig, factor: int = 10) -> float:
    """Reconstruction loss at W5A5 over that of ``factor`` times as many iterations: geometric mean over units."""
    more = replace(
        calibration,
        weight_iterations=factor * calibration.weight_iterations,
        act_iterations=factor * calibration.act_iterations,
    )
    few, many = (calibrate(settings, [RATIO_BITS])[1] for settings in (calibration, more))
    logs = [math.log(a.loss_after / b.loss_after) for a, b in zip(few, many, strict=True)]
    return math.exp(sum(logs) / len(logs))
