"""A run of task=classify on a small network and few images, as a user starts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.classification import Study, prepare
from tmpq_exp.classify import classify
from tmpq_exp.config import register_schema, to_config
from tmpq_exp.report.classification import all_rows
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.zoo.resnet import CifarResNet

CLASSES = ("cat", "dog", "ship")
STATIC = (
    "classification.tiles=[]",
    "classification.further=["
    "{name: dynamic, m: 4}, {name: static, m: 4, winograd: {act_scales: static}},"
    "{name: balanced, m: 4, winograd: {act_scales: static, method: bqw_style}}]",
)


def write_network(path: Path, depth: int) -> None:
    """Random weights of a CIFAR ResNet for three classes."""
    torch.manual_seed(0)
    network = CifarResNet(depth, len(CLASSES))
    with torch.no_grad():
        network.train()(torch.randn(64, 3, 12, 12))  # statistics of the norms, so that logits differ
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)


def write_inputs(folder: Path) -> Path:
    """Random weights of a ResNet-20 for three classes, and three folders of random images."""
    write_network(folder / "r20.th", 20)
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")
    return folder


def study(inputs: Path, directory: Path, *overrides: str, **changes: str) -> Study:
    """What ``run`` prepares before it learns or measures anything."""
    composed, resolved = composition(inputs, directory, *overrides, **changes)
    return prepare(to_config(composed), RunDirectory.claim(directory, resolved))


def run(inputs: Path, directory: Path, *overrides: str, **changes: str) -> None:
    """The command as a user gives it, in this process; an empty change leaves a key as it is."""
    composed, resolved = composition(inputs, directory, *overrides, **changes)
    classify(to_config(composed), resolved)


def composition(inputs: Path, directory: Path, *overrides: str, **changes: str) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration of ``run``, and the same resolved."""
    register_schema()
    GlobalHydra.instance().clear()
    given = {
        "experiment": "winograd/resnet_cifar",
        "model.checkpoint": f"{inputs}/r20.th",
        "data.root": f"{inputs}/images",
        "data.resize": "12",
        "data.crop": "12",
        "data.batch_size": "5",
        "winograd.learning.num_steps": "2",
        "logger": "none",
        "paths.run_dir": str(directory),
    }
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose(
            "config", [*(f"{key}={value}" for key, value in (given | changes).items() if value), *overrides]
        )
    resolved = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(resolved, dict)
    return composed, {str(key): value for key, value in resolved.items()}


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in all_rows(report)}
