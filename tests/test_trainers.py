"""Trainers of stages: one device each, whatever the trainer group shares the candidates over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import Config, UserError, from_plain, register_schema
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.trainers import group_trainer, num_ranks, own_device, single_device, stage_trainer


def config(*overrides: str) -> Config:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", ["paths.run_dir=unused", *overrides])
    resolved: Any = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    return from_plain(resolved)


DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=3")


@pytest.mark.parametrize(("overrides", "count"), [((), 1), (DDP, 3), (("trainer.devices=2",), 2)])
def test_a_stage_has_one_process_however_many_ranks_there_are(
    overrides: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    settings = config(*overrides)
    assert num_ranks(group_trainer(settings)) == count
    trainer = stage_trainer(settings, RunDirectory(tmp_path), "calibrate", 1, max_epochs=4)
    assert num_ranks(trainer) == 1
    assert trainer.max_epochs == 4
    assert own_device(settings) == trainer.strategy.root_device == torch.device("cpu")


def test_tasks_of_one_device_refuse_more() -> None:
    assert single_device(config()) == torch.device("cpu")
    with pytest.raises(UserError, match=r"runs on one device, found 3 devices; set trainer\.devices=1$"):
        single_device(config(*DDP))


def test_slurm_takes_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    trainer = config("trainer=slurm").trainer
    assert (trainer["devices"], trainer["num_nodes"], trainer["strategy"]) == (4, 2, "ddp")
