"""Learning lowers the output error of real blocks, and draws hold what they promise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tmpq_exp.config import CalibrationConfig, Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.attention_products import QuantAttentionProducts
from tmpq_exp.quant.blockwise import BlockwiseReconstruction, UnitRecord
from tmpq_exp.quant.layers import WeightedLayer
from tmpq_exp.quant.reconstruction import (
    bit_widths,
    nearest_choice,
    random_draw,
    reconstruction_loss,
    shuffled_draws,
    uniform_draw,
)
from tmpq_exp.quant.seams import find_seams
from tmpq_exp.quant.states import CalibrationState, trajectory_states
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.zoo.task import DiffusionTask

if TYPE_CHECKING:
    from tests.quant.conftest import Case

CPU = torch.device("cpu")
STATIC = QuantConfig(QuantizerConfig(Granularity.PER_CHANNEL, estimator="minmax"), QuantizerConfig(estimator="minmax"))
GROUPWISE = QuantConfig(
    QuantizerConfig(Granularity.PER_GROUP, symmetric=True, estimator="minmax"),
    QuantizerConfig(Granularity.PER_GROUP, symmetric=True, estimator="minmax"),
)


def low_bits(case: Case, config: QuantConfig = STATIC) -> Supernet:
    """Supernet of 5 and 4 bits, the softmax at 8 alone."""
    seams = find_seams(case.network, lambda network: network(**case.inputs(1)))
    softmax = [(8,) if name.endswith("products") else (5, 4) for name in (shape.name for shape in case.layers)]
    supernet = Supernet(case.network, case.layers, softmax, [(5, 4)] * len(case.layers), config, seams)
    case.observe(supernet)
    return supernet


def learn(
    case: Case,
    states: list[CalibrationState],
    last: str,
    tmp_path: Path,
    config: QuantConfig = STATIC,
    **settings: Any,
) -> tuple[Supernet, list[UnitRecord]]:
    """Reconstruct the units up to and with ``last``."""
    values = {
        "method": "uniform_prefix",
        "correct_means": False,
        "weight_learning_rate": 0.05,
        "act_learning_rate": 2e-3,
    } | settings
    supernet = low_bits(case, config)
    records: list[UnitRecord] = []
    with ActivationStore(2**30, tmp_path / "spill", CPU) as store:
        blockwise = BlockwiseReconstruction(supernet, states, CalibrationConfig(**values), 0, store)
        for index, unit in enumerate(blockwise.units):
            blockwise.begin(index)
            for name in blockwise.passes:
                records += blockwise.learn(index, name)
            blockwise.finish(index)
            if unit.name == last:
                break
    return supernet, records


@pytest.mark.parametrize("method", ["uniform_prefix", pytest.param("sampled", marks=pytest.mark.slow)])
def test_learning_lowers_the_error_of_real_blocks(
    digits: Case, task: DiffusionTask, method: str, tmp_path: Path
) -> None:
    states = trajectory_states(task, 8, 5, 0)
    settings = {"method": method, "weight_iterations": 60, "act_iterations": 20}
    supernet, records = learn(digits, states, "down_blocks.0.downsamplers.0.conv", tmp_path, **settings)
    found = {(record.unit, record.bits): record.loss_after / record.loss_before for record in records}
    assert len(found) == 10
    assert max(found.values()) <= 1
    for bits in (5, 4):
        assert found["down_blocks.0.resnets.0", bits] < 0.95
        assert found["down_blocks.0.downsamplers.0.conv", bits] < 0.95
    moved = supernet.network.get_submodule("down_blocks.0.resnets.0.conv1")
    assert isinstance(moved, WeightedLayer)
    quantizer, weight = moved.weight_quantizer, moved.float_layer.weight
    for bits in (5, 4):
        scale = quantizer.per_weight(quantizer.scale[quantizer.choice(bits)], weight)
        steps = (quantizer(weight, bits) - weight).abs() / scale
        assert 0.5 < steps.max() < 1.001 or steps.max() > 1.5  # some not to the nearest; beyond one only where clipped
        assert (steps > 0.51).float().mean() > 0.01
    untouched = supernet.network.get_submodule("conv_out")
    assert isinstance(untouched, WeightedLayer)
    assert not untouched.weight_quantizer.is_rounding_learned


def test_dynamic_quantizers_learn_their_roundings(cross_attention: Case, tmp_path: Path) -> None:
    inputs = cross_attention.inputs(4)
    states = [CalibrationState(inputs["sample"], 300, {"encoder_hidden_states": inputs["encoder_hidden_states"]})]
    last = "down_blocks.1.attentions.0.transformer_blocks.0"
    settings = {"weight_iterations": 40, "act_iterations": 5, "batch_size": 4}
    _, records = learn(cross_attention, states, last, tmp_path, GROUPWISE, **settings)
    block = [record for record in records if record.unit == last]
    assert {record.bits for record in block} == {5, 4}
    assert all(record.loss_after < 0.97 * record.loss_before for record in block)


def test_no_iterations_leave_everything_as_it_was(cross_attention: Case, tmp_path: Path) -> None:
    inputs = cross_attention.inputs(2)
    states = [CalibrationState(inputs["sample"], 300, {"encoder_hidden_states": inputs["encoder_hidden_states"]})]
    supernet, records = learn(cross_attention, states, "down_blocks.0.resnets.0", tmp_path)
    expected = low_bits(cross_attention).quantizer_state()
    assert all(torch.equal(value, expected[key]) for key, value in supernet.quantizer_state().items())
    assert all(record.loss_after == record.loss_before > 0 for record in records)


def test_reconstruction_loss_by_hand() -> None:
    output = torch.zeros(2, 3, 4, 5)
    assert reconstruction_loss(output, output + 2, 2.0).item() == pytest.approx(3 * 4)  # a sum over three channels
    assert reconstruction_loss(output, output - 2, 2.4).item() == pytest.approx(3 * 2**2.4)
    tokens = torch.zeros(2, 7, 3)
    assert reconstruction_loss(tokens, tokens + 2, 2.0).item() == pytest.approx(3 * 4)


def test_nearest_choice() -> None:
    assert nearest_choice((8, 6), 7) == 8
    assert nearest_choice((8, 6), 5) == 6
    assert nearest_choice((16,), 4) == 16


def test_draws(digits: Case) -> None:
    layers = low_bits(digits).layers
    assert bit_widths(layers) == (5, 4)
    draws = shuffled_draws(layers, 20, torch.Generator().manual_seed(0))
    assert len(draws) == 20
    for column, layer in enumerate(layers):
        weights = Counter(draw[column].weight_bits for draw in draws)
        assert weights == ({8: 20} if isinstance(layer, QuantAttentionProducts) else {5: 10, 4: 10})
        assert Counter(draw[column].act_bits for draw in draws) == {5: 10, 4: 10}
    pairs = {(setting.weight_bits, setting.act_bits) for draw in draws for setting in draw}
    assert pairs >= {(5, 5), (5, 4), (4, 5), (4, 4)}  # weights and activations are drawn apart
    assert draws == shuffled_draws(layers, 20, torch.Generator().manual_seed(0))
    assert random_draw(layers, torch.Generator().manual_seed(1)) != random_draw(
        layers, torch.Generator().manual_seed(2)
    )
    assert {setting.act_bits for setting in uniform_draw(layers, 4)} == {4}


def test_sampled_units_see_mixed_activations(cross_attention: Case, tmp_path: Path) -> None:
    supernet = low_bits(cross_attention)
    inputs = cross_attention.inputs(2)
    states = [CalibrationState(inputs["sample"], 300, {"encoder_hidden_states": inputs["encoder_hidden_states"]})] * 2
    with ActivationStore(2**30, tmp_path / "spill", CPU) as store:
        config = CalibrationConfig(method="sampled", correct_means=False)
        blockwise = BlockwiseReconstruction(supernet, states, config, 0, store)
        assert blockwise.passes == ("sampled",)
        unit = max(blockwise.units, key=lambda unit: len(unit.layers))
        draws = [blockwise.carried_draw(unit, "sampled", batch) for batch in range(2)]
        assert draws[0] != draws[1]
        assert draws == [blockwise.carried_draw(unit, "sampled", batch) for batch in range(2)]


def test_the_float_network_needs_no_gradient_and_gets_none(cross_attention: Case, tmp_path: Path) -> None:
    network = cross_attention.network
    network.requires_grad_(True)
    try:
        inputs = cross_attention.inputs(2)
        states = [CalibrationState(inputs["sample"], 300, {"encoder_hidden_states": inputs["encoder_hidden_states"]})]
        learn(cross_attention, states, "down_blocks.0.resnets.0", tmp_path, weight_iterations=2, act_iterations=2)
        gradients: list[Tensor] = [p.grad for p in network.parameters() if p.grad is not None]
        assert gradients == []
        assert all(parameter.requires_grad for parameter in network.parameters())
    finally:
        network.requires_grad_(False)
