"""What a run lays out before it computes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tmpq_exp.__main__ import conf_dir
from tmpq_exp.config import register_schema, to_config
from tmpq_exp.experiment import Experiment, prepare
from tmpq_exp.rundir import RunDirectory
from tmpq_exp.search.trials import TrialLog


def laid_out(directory: Path, *overrides: str) -> Experiment:
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose("config", [f"paths.run_dir={directory}", *overrides])
    resolved: Any = OmegaConf.to_container(composed, resolve=True)
    run = RunDirectory.claim(directory, resolved)
    return prepare(to_config(composed), run, TrialLog(run.trials), on_trial=lambda trial: None)


@pytest.fixture(scope="module")
def joint_k(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return laid_out(tmp_path_factory.mktemp("joint_k") / "run", "experiment=cifar10_joint_k")


def test_w8a8_at_the_reference_steps_costs_ten_times_the_budget_of_joint_k(joint_k: Experiment) -> None:
    reference = joint_k.baselines()["w8a8_reference"]
    assert reference.timesteps == joint_k.standard_schedule(100)
    assert joint_k.cost.bitops(reference) == 10 * joint_k.budget_bitops


def test_joint_k_may_keep_more_steps_than_there_are_groups(joint_k: Experiment) -> None:
    assert (joint_k.space.steps.min_steps, joint_k.space.steps.max_steps) == (5, 20)
