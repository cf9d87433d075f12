"""Calibration states are made once, kept by content, and refused where they belong to something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.diffusion.sampler import DDIM
from tmpq_exp.quant.states import cached_states, read_states, trajectory_states, write_states
from tmpq_exp.zoo.conditioning import ClassLabels
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import DiffusionTask
from tmpq_exp.zoo.weights import write_tensors

CONFIG = CalibrationConfig(num_images=2, num_timesteps=3)


def test_the_cache_gives_back_what_was_made(task: DiffusionTask, tmp_path: Path) -> None:
    made, path = cached_states(task, CONFIG, 0, tmp_path / "cache")
    stamp = path.stat().st_mtime_ns
    again, same = cached_states(task, CONFIG, 0, tmp_path / "cache")
    assert same == path
    assert path.stat().st_mtime_ns == stamp
    for state, expected, kept in zip(made, trajectory_states(task, 2, 3, 0), again, strict=True):
        assert state.timestep == expected.timestep == kept.timestep
        assert torch.equal(state.x, expected.x)
        assert torch.equal(kept.x, expected.x)
        assert torch.equal(kept.conditioning["class_labels"], expected.conditioning["class_labels"])


def test_every_setting_has_a_file_of_its_own(task: DiffusionTask, tmp_path: Path) -> None:
    configs = [(CONFIG, 0), (CONFIG, 1), (replace(CONFIG, num_images=1), 0), (replace(CONFIG, num_timesteps=2), 0)]
    assert len({cached_states(task, config, seed, tmp_path)[1] for config, seed in configs}) == 4


def test_a_given_file_is_taken(task: DiffusionTask, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    write_states(path, task, trajectory_states(task, 3, 2, 5))
    states, source = cached_states(task, replace(CONFIG, states=str(path)), 0, tmp_path / "cache")
    assert source == path
    assert [len(state.x) for state in states] == [3, 3]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "another model, found ddpm_digits, expected other"),
        ({"sampler": DDIM(torch.linspace(0.9, 0.1, 1000, dtype=torch.float64))}, "another schedule"),
        ({"sampler": DDIM(DigitsDDPM().alphas_cumprod(), clip_sample=True)}, "another sampler"),
        ({"sample_shape": (1, 8, 8)}, r"another shape, found \[1, 16, 16\], expected \[1, 8, 8\]"),
        ({"conditions": ClassLabels(5)}, "another conditions"),
        ({"guidance_scale": 2.0}, r"another guidance_scale, found 1\.0, expected 2\.0"),
    ],
)
def test_states_of_something_else_are_refused(
    task: DiffusionTask, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "states.safetensors"
    write_states(path, task, trajectory_states(task, 1, 1, 0))
    with pytest.raises(ValueError, match=message) as error:
        read_states(path, replace(task, **change))
    assert str(path) in str(error.value)


def test_states_of_other_weights_are_refused(task: DiffusionTask, tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    write_states(path, task, trajectory_states(task, 1, 1, 0))
    other = replace(task)
    object.__setattr__(other, "weights_hash", "0" * 16)
    with pytest.raises(ValueError, match="another weights"):
        read_states(path, other)


def test_other_files_are_refused(task: DiffusionTask, tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    with pytest.raises(ValueError, match="no file at"):
        read_states(path, task)
    write_tensors(path, {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="a file of task=states was expected"):
        read_states(path, task)
    write_states(path, task, trajectory_states(task, 1, 1, 0))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        read_states(path, task)
