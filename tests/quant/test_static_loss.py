"""What static activation scales cost on the embedded digits model: the figures of docs/winograd.md, which it prints."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from tmpq_exp.config import QuantConfig
from tmpq_exp.quant.layers import LayerSetting, QuantConv2d, layers_at
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.quant.states import CalibrationState, trajectory_states
from tmpq_exp.quant.static_ranges import RangesByLayer, measuring_ranges_for_all_bits
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.winograd.spec import WinogradSpec
from tmpq_exp.winograd.transform import closed_form_scales
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import task_layers

NUM_IMAGES, NUM_TIMESTEPS, SEED, BITS = 8, 5, 0, 8

CPU = torch.device("cpu")

FIGURES = {
    (2, "standard"): (37.3, 31.2, 31.6),
    (4, "standard"): (25.9, 19.3, 20.2),
    (4, "improved"): (32.2, 25.4, 26.9),
}
"""By tile and points, median SQNR of layers in dB: dynamic scales, static scales, static scales with ``bqw_style``."""


@pytest.fixture(scope="module")
def states() -> list[CalibrationState]:
    return trajectory_states(DigitsDDPM().task(), NUM_IMAGES, NUM_TIMESTEPS, SEED)


def winograd_layers(supernet: Supernet) -> list[QuantConv2d]:
    return [layer for layer in supernet.layers if isinstance(layer, QuantConv2d) and layer.tiles()]


def inputs_of(supernet: Supernet, state: CalibrationState) -> dict[str, Tensor]:
    """What each layer that may be Winograd gets in the float network."""
    found: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda layer, args: found.update({layer.name: args[0]}))
        for layer in winograd_layers(supernet)
    ]
    state.run(supernet, CPU)
    for handle in handles:
        handle.remove()
    return found


def median_sqnr_db(supernet: Supernet, inputs: dict[str, Tensor], m: int, ranges: RangesByLayer) -> float:
    supernet.set_ranges(ranges)
    figures = []
    for layer in winograd_layers(supernet):
        reference = layer(inputs[layer.name])
        with layers_at([layer], [LayerSetting(BITS, BITS, m)]):
            figures.append(sqnr_db(reference, layer(inputs[layer.name])))
    return statistics.median(figures)


@pytest.mark.parametrize(("m", "points"), FIGURES)
@torch.no_grad()
def test_the_documented_loss(m: int, points: str, states: list[CalibrationState]) -> None:
    task = DigitsDDPM().task()
    shapes = task_layers(task)
    choices = [(BITS,)] * len(shapes)
    supernet = Supernet(task.unet, shapes, choices, choices, QuantConfig()).eval()
    found = []
    for method in ("groups", "bqw_style"):
        spec = WinogradSpec(m, points=points, act_scales="static", method=method)
        supernet.set_winograd({m: (spec, closed_form_scales(spec.transform()))})
        inputs = inputs_of(supernet, states[len(states) // 2])
        with measuring_ranges_for_all_bits(supernet) as ranges:
            for state in states:
                state.run(supernet, CPU)
        found += [median_sqnr_db(supernet, inputs, m, {}), median_sqnr_db(supernet, inputs, m, ranges)]
    dynamic, static, _, balanced = found
    print(f"F({m},3), {points} points: dynamic {dynamic:.1f} dB, static {static:.1f}, with bqw_style {balanced:.1f}")
    assert (dynamic, static, balanced) == pytest.approx(FIGURES[m, points], abs=0.2)
