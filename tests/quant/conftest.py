"""Networks that the tests of the supernet share: the embedded digits U-Net and a small one with cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tmpq_exp.config import CalibrationConfig, Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.cost import AttentionShape, ConvShape, LayerShape, is_eligible
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation
from tmpq_exp.quant.calibration import CalibrationModule
from tmpq_exp.quant.layers import QuantLayer
from tmpq_exp.quant.quantizer import ActQuantizer
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.supernet import Supernet, SupernetModule
from tmpq_exp.trace import trace_layers
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import DiffusionTask, task_layers

BITS = (8, 6, 4)
FAST = QuantConfig(
    QuantizerConfig(Granularity.PER_CHANNEL, estimator="minmax"), QuantizerConfig(Granularity.PER_TENSOR)
)


@dataclass(frozen=True)
class Case:
    """A float network, its layers, and how it is called on a batch."""

    network: nn.Module
    layers: tuple[LayerShape, ...]
    inputs: Callable[[int], dict[str, Tensor]]
    made: dict[str, Supernet] = field(default_factory=dict)

    def run(self, network: nn.Module, batch: int = 2) -> Tensor:
        with torch.inference_mode():
            prediction: Tensor = network(**self.inputs(batch)).sample
        return prediction

    def uniform(self, bits: int, tile: int = DIRECT_TILE) -> Allocation:
        """The same bits everywhere, and a tile wherever one is possible."""
        tiles = (tile if self.is_eligible(i) else DIRECT_TILE for i in range(len(self.layers)))
        softmax = bits if bits == FLOAT_BITS else 8
        weights = (softmax if isinstance(shape, AttentionShape) else bits for shape in self.layers)
        return Allocation(tuple(weights), (bits,) * len(self.layers), tuple(tiles))

    def is_eligible(self, index: int) -> bool:
        shape = self.layers[index]
        return isinstance(shape, ConvShape) and is_eligible(shape)

    def supernet(self, config: QuantConfig = FAST) -> Supernet:
        num_layers = len(self.layers)
        return Supernet(self.network, self.layers, [BITS] * num_layers, [BITS] * num_layers, config)

    def calibrated(self, config: QuantConfig = FAST) -> Supernet:
        """Supernet with ranges of one batch; one for all tests, who leave its parameters as they find them."""
        supernet = self.made.get(repr(config))
        if supernet is None:
            supernet = self.made[repr(config)] = self.supernet(config)
            self.observe(supernet)
        supernet.set_winograd({})
        return supernet

    def observe(self, supernet: Supernet) -> None:
        for layer in supernet.layers:
            for quantizer in layer.act_quantizers():
                quantizer.start_observing()
        generator = torch.Generator().manual_seed(0)

        def observe(quantizer: ActQuantizer, x: Tensor) -> None:
            quantizer.observe(x, 1024, generator)

        with supernet.observing(observe):
            self.run(supernet, 4)
        for layer in supernet.layers:
            estimate(layer)


def estimate(layer: QuantLayer) -> None:
    for quantizer in layer.act_quantizers():
        quantizer.finish_observing()
    weights = layer.weight_rows()
    if weights is not None:
        weights[0].estimate(weights[1])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def task() -> DiffusionTask:
    return DigitsDDPM().task()


@pytest.fixture(scope="session")
def digits(task: DiffusionTask) -> Case:
    def inputs(batch: int) -> dict[str, Any]:
        return {"sample": random(batch, 1, 16, 16), "timestep": torch.full((batch,), 300)} | task.conditioning(
            range(batch)
        )

    return Case(task.unet, task_layers(task), inputs)


@pytest.fixture(scope="session")
def cross_attention() -> Case:
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()

    def inputs(batch: int) -> dict[str, Any]:
        return {
            "sample": random(batch, 2, 8, 8),
            "timestep": torch.full((batch,), 300),
            "encoder_hidden_states": random(batch, 5, 12, seed=1),
        }

    layers = trace_layers(network, lambda model: model(**inputs(1)))
    return Case(network.requires_grad_(False), layers, inputs)


@pytest.fixture(params=["digits", "cross_attention"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def calibrate(module: CalibrationModule) -> None:
    """One epoch without a Trainer."""
    module.on_train_epoch_start()
    for index in module.train_dataloader():
        module.training_step(index, index)
    module.on_train_epoch_end()


@pytest.fixture(scope="session")
def module(task: DiffusionTask, digits: Case) -> SupernetModule:
    """Supernet of the digits task, calibrated on a few short trajectories."""
    choices = [BITS] * len(digits.layers)
    module = SupernetModule(task, digits.layers, choices, choices, FAST)
    config = CalibrationConfig("ranges", num_images=4, num_timesteps=5, max_values=2048)
    calibrate(CalibrationModule(module.supernet, trajectory_states(task, 4, 5, 0), config, 0))
    return module


@pytest.fixture(name="calibrate")
def calibrate_fixture() -> Callable[[CalibrationModule], None]:
    return calibrate
