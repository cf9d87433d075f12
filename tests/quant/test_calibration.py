"""Calibration finds the ranges that activations have, repeats under one seed, and keeps images close to float."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.config import CalibrationConfig, QuantConfig, QuantizerConfig
from tmpq_exp.cost import LinearShape
from tmpq_exp.diffusion.schedule import TimestepSpacing, spaced_timesteps
from tmpq_exp.metrics.fidelity import psnr_db
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.allocation import FLOAT_BITS, Candidate
from tmpq_exp.quant.blockwise import BlockwiseReconstruction, UnitRecord
from tmpq_exp.quant.calibration import CalibrationModule, UnitFiles
from tmpq_exp.quant.primitives import scale_and_zero_point
from tmpq_exp.quant.states import CalibrationState, trajectory_states
from tmpq_exp.quant.supernet import Supernet, SupernetModule
from tmpq_exp.zoo.task import DiffusionTask

if TYPE_CHECKING:
    from tests.quant.conftest import Case

CONFIG = CalibrationConfig("ranges", num_images=2, num_timesteps=3, max_values=1024)


@dataclass(frozen=True)
class Reconstructed:
    """What a calibration set, and its module."""

    state: dict[str, Tensor]
    module: CalibrationModule


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


def test_layer_and_timestep_with_nan_are_named(calibrate: Callable[[CalibrationModule], None]) -> None:
    found = [*states(0), *states(5)]
    found[1].x[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"layer first: .*NaN or infinity at timestep 5 "):
        calibrate(CalibrationModule(chain(), found, CONFIG, 0))
    supernet = chain()
    supernet.layers[0].float_layer.weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match=r"layer second: .*NaN or infinity at timestep 0 "):
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


class Killed(Exception):
    pass


class Kill(L.Callback):
    """Ends the process, as far as the module can tell, when an epoch begins."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise Killed


def reconstruct(case: Case, method: str, folder: Path, max_bytes: int = 2**30, kill: int = -1) -> Reconstructed:
    """Calibrate a network with block-wise reconstruction, as the pipeline does."""
    minmax = QuantizerConfig(estimator="minmax")
    supernet = case.supernet(QuantConfig(QuantizerConfig("per_channel", estimator="minmax"), minmax))
    inputs = case.inputs(2)
    conditioning = {key: value for key, value in inputs.items() if key not in ("sample", "timestep")}
    found = [CalibrationState(inputs["sample"] + t / 100, t, conditioning) for t in (5, 1)]
    config = CalibrationConfig(
        method=method,
        max_values=1024,
        weight_iterations=2,
        act_iterations=2,
        batch_size=2,
        weight_learning_rate=0.3,
        regularizer_weight=None,
        correct_means=True,
    )
    files = UnitFiles(folder / "calibration", "inputs")
    with ActivationStore(max_bytes, folder / "spill", torch.device("cpu")) as store:
        module = CalibrationModule(supernet, found, config, 0, store, files)
        trainer = L.Trainer(
            max_epochs=module.num_epochs,
            reload_dataloaders_every_n_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(folder),
            callbacks=[Kill(kill)],
        )
        with nullcontext() if kill < 0 else pytest.raises(Killed):
            trainer.fit(module)
    return Reconstructed({key: value.clone() for key, value in supernet.quantizer_state().items()}, module)


def same(a: Reconstructed, b: Reconstructed) -> bool:
    return a.state.keys() == b.state.keys() and all(torch.equal(a.state[key], b.state[key]) for key in a.state)


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Units that are learned, one entry a pass."""
    names: list[str] = []
    learn = BlockwiseReconstruction.learn

    def noting(self: BlockwiseReconstruction, index: int, name: int | str) -> list[UnitRecord]:
        names.append(self.units[index].name)
        return learn(self, index, name)

    monkeypatch.setattr(BlockwiseReconstruction, "learn", noting)
    return names


@pytest.mark.parametrize("method", [pytest.param("uniform_prefix", marks=pytest.mark.slow), "sampled"])
def test_a_killed_calibration_goes_on_behind_its_last_unit(
    cross_attention: Case, method: str, tmp_path: Path, learned: list[str]
) -> None:
    whole = reconstruct(cross_attention, method, tmp_path / "whole")
    all_learned, learned[:] = list(learned), []
    assert len(set(all_learned)) == whole.module.num_epochs - 1
    folder = tmp_path / "killed"
    reconstruct(cross_attention, method, folder, kill=9)
    first, learned[:] = list(learned), []
    assert 0 < len(first) < len(all_learned)
    resumed = reconstruct(cross_attention, method, folder)
    assert first + learned == all_learned
    assert same(resumed, whole)
    assert resumed.module.records == whole.module.records


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[int, Callable[[bytes], bytes]] = {
    0: lambda content: flipped(content, len(content) - 3),
    1: lambda content: b"",
    2: lambda content: content[: len(content) // 2],
    3: lambda content: content[:-1],
    4: lambda content: bytes(len(content)),
    6: lambda content: flipped(content, len(content) - 3),
    7: lambda content: flipped(content, content.index(b"loss_after") + 1),
}
"""What becomes of the file of a finished epoch."""


def test_finished_units_whose_files_are_damaged_are_learned_again(
    cross_attention: Case, tmp_path: Path, learned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = reconstruct(cross_attention, "sampled", tmp_path / "whole")
    all_learned, learned[:] = list(learned), []
    folder = tmp_path / "killed"
    reconstruct(cross_attention, "sampled", folder, kill=9)
    num_first, learned[:] = len(learned), []
    files = {epoch: folder / "calibration" / f"unit_{epoch:04d}.safetensors" for epoch in DAMAGES}
    for epoch, file in files.items():
        file.write_bytes(DAMAGES[epoch](file.read_bytes()))
    resumed = reconstruct(cross_attention, "sampled", folder)
    assert learned == [*(all_learned[epoch - 1] for epoch in DAMAGES if epoch), *all_learned[num_first:]]
    assert same(resumed, whole)
    assert resumed.module.records == whole.module.records
    said = capsys.readouterr().err.splitlines()
    for file, line in zip(files.values(), said, strict=True):
        assert f"{file} is " in line
        assert line.endswith("; what it held is found again")


def test_spilling_changes_nothing(cross_attention: Case, tmp_path: Path) -> None:
    kept = reconstruct(cross_attention, "uniform_prefix", tmp_path / "a")
    spilled = reconstruct(cross_attention, "uniform_prefix", tmp_path / "b", max_bytes=0)
    assert same(kept, spilled)
    assert not (tmp_path / "b" / "spill").exists()
    records = kept.module.records
    assert {record.bits for record in records} == {8, 6, 4}
    assert all(record.loss_after <= record.loss_before for record in records)


def test_files_of_another_calibration_are_not_taken(tmp_path: Path) -> None:
    state, records = {"scale": torch.ones(2)}, [UnitRecord("unit", 5, 2.0, 1.0)]
    UnitFiles(tmp_path, "one").write(3, state, records)
    found = UnitFiles(tmp_path, "one").read(3)
    assert found is not None
    assert torch.equal(found[0]["scale"], state["scale"])
    assert found[1] == records
    assert UnitFiles(tmp_path, "two").read(3) is None
    assert UnitFiles(tmp_path, "one").read(4) is None


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
    w8a8, w4a4 = (float(psnr_db(images(bits), reference).mean()) for bits in (8, 4))
    assert w8a8 > 30
    assert w4a4 < w8a8 - 10
