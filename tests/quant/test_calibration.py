"""Calibration finds the ranges that activations have, repeats under one seed, and keeps images close to float."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.config import CalibrationConfig, QuantConfig, QuantizerConfig
from tmpq_exp.cost import LinearShape
from tmpq_exp.diffusion.schedule import TimestepSpacing, spaced_timesteps
from tmpq_exp.metrics.fidelity import mean_psnr_db
from tmpq_exp.quant.allocation import FLOAT_BITS, Candidate
from tmpq_exp.quant.calibration import CalibrationModule
from tmpq_exp.quant.primitives import scale_and_zero_point
from tmpq_exp.quant.states import CalibrationState, trajectory_states
from tmpq_exp.quant.supernet import Supernet, SupernetModule
from tmpq_exp.zoo.task import DiffusionTask

if TYPE_CHECKING:
    from tests.quant.conftest import Case

CONFIG = CalibrationConfig(num_images=2, num_timesteps=3, max_values=1024)


class Chain(nn.Module):
    """Two linear layers whose activations are known: x, then 2x + t."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.first.weight).mul_(2)

    def forward(self, x: Tensor, timestep: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.second(self.first(x) + timestep[:, None]))


def chain(estimator: str = "minmax", percentile: float = 99.99) -> Supernet:
    with torch.no_grad():
        network = Chain()
    layers = [LinearShape(name, 3, 3, 1) for name in ("first", "second")]
    config = QuantConfig(act=QuantizerConfig(estimator=estimator, percentile=percentile))
    return Supernet(network, layers, [(8, 4)] * 2, [(8, 4)] * 2, config)


def states(*timesteps: int) -> list[CalibrationState]:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    return [CalibrationState(x, timestep, {}) for timestep in timesteps]


def test_ranges_are_those_of_all_states(calibrate: Callable[[CalibrationModule], None]) -> None:
    supernet = chain()
    calibrate(CalibrationModule(supernet, states(0, 5), CONFIG, 0))
    x = states(0)[0].x
    for layer, low, high in zip(supernet.layers, (x.min(), 2 * x.min()), (x.max(), 2 * x.max() + 5), strict=True):
        for index, bits in enumerate((8, 4)):
            scale, zero_point = scale_and_zero_point(low, high, bits, symmetric=False)
            (quantizer,) = layer.act_quantizers()
            torch.testing.assert_close(quantizer.scale[index, 0], scale)
            assert quantizer.zero_point[index] == zero_point


def test_the_same_seed_gives_the_same_parameters(calibrate: Callable[[CalibrationModule], None]) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        supernet = chain("percentile", 80)
        nn.init.eye_(supernet.layers[1].float_layer.weight)
        calibrate(CalibrationModule(supernet, states(*range(30)), CONFIG, seed))
        return {key: value.clone() for key, value in supernet.quantizer_state().items()}

    first, again, other = state(0), state(0), state(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_a_layer_with_nan_is_named(calibrate: Callable[[CalibrationModule], None]) -> None:
    supernet = chain()
    supernet.layers[0].float_layer.weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"layer second: .*NaN"):
        calibrate(CalibrationModule(supernet, states(0), CONFIG, 0))


def test_a_trainer_does_the_same(calibrate: Callable[[CalibrationModule], None], tmp_path: object) -> None:
    by_trainer, by_hand = chain("mse"), chain("mse")
    by_trainer.load_state_dict(by_hand.state_dict())
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(CalibrationModule(by_trainer, states(0, 5), CONFIG, 3))
    calibrate(CalibrationModule(by_hand, states(0, 5), CONFIG, 3))
    for key, value in by_hand.quantizer_state().items():
        assert torch.equal(by_trainer.quantizer_state()[key], value)


def test_states_lie_on_the_float_trajectory(task: DiffusionTask) -> None:
    found = trajectory_states(task, 2, 3, 0)
    timesteps = spaced_timesteps(1000, 3, TimestepSpacing.TRAILING)
    assert tuple(state.timestep for state in found) == timesteps
    again = trajectory_states(task, 2, 3, 0)
    assert all(torch.equal(a.x, b.x) for a, b in zip(found, again, strict=True))
    assert all(state.x.shape == (2, 1, 16, 16) for state in found)
    assert not torch.equal(trajectory_states(task, 2, 3, 1)[0].x, found[0].x)
    # the first state is noise of unit variance and each later one is a copy of its own
    assert found[0].x.std().item() == pytest.approx(1, abs=0.1)
    assert len({state.x.data_ptr() for state in found}) == 3


def test_w8a8_images_are_close_to_float(module: SupernetModule, digits: Case) -> None:
    timesteps = spaced_timesteps(1000, 5, TimestepSpacing.QUADRATIC)

    def images(bits: int) -> Tensor:
        return module.images(Candidate(timesteps, (digits.uniform(bits),)), range(32), seed=1)

    reference = images(FLOAT_BITS)
    w8a8, w4a4 = (mean_psnr_db(images(bits), reference) for bits in (8, 4))
    assert w8a8 > 30
    assert w4a4 < w8a8 - 10
