"""Flipped roundings take a mean error away, by hand, as a property, and in a layer whose error is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tmpq_exp.config import CalibrationConfig, Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.quant import blockwise as blockwise_module
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.blockwise import BlockwiseReconstruction
from tmpq_exp.quant.layers import LayerSetting, QuantConv2d, layers_at
from tmpq_exp.quant.lru_cache import LRUCache
from tmpq_exp.quant.means import InputMoments, flip_roundings, last_layer, mean_flips
from tmpq_exp.quant.reconstruction import mean_error
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.zoo.task import DiffusionTask

if TYPE_CHECKING:
    from tests.quant.conftest import Case

STATIC = QuantConfig(QuantizerConfig(Granularity.PER_CHANNEL, estimator="minmax"), QuantizerConfig(estimator="minmax"))


def rows(*values: Sequence[float]) -> Tensor:
    return torch.tensor(values)


def test_the_cheapest_flips_are_taken_by_hand() -> None:
    # 0.5 is taken away by the second and third, of cost 1 a unit each; the first costs twice as much
    effects, costs = rows([-0.25, -0.25, -0.25]), rows([0.5, 0.25, 0.25])
    assert mean_flips(effects, costs, torch.tensor([0.5])).tolist() == [[False, True, True]]
    # one flip would overshoot by more than the error, one cannot be made, one goes the wrong way
    effects = rows([-1.1, torch.nan, 0.2])
    assert not mean_flips(effects, torch.zeros(1, 3), torch.tensor([0.5])).any()
    assert mean_flips(effects, torch.zeros(1, 3), torch.tensor([-0.25])).tolist() == [[False, False, True]]
    effects = torch.full((1, 9), -0.1)
    assert mean_flips(effects, torch.zeros(1, 9), torch.tensor([0.9]), max_flips=4).sum() == 4


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=12),
    st.floats(-3, 3),
)
def test_flips_never_raise_the_error(entries: list[tuple[float, float]], error: float) -> None:
    effects, costs = (torch.tensor([[entry[i] for entry in entries]], dtype=torch.float64) for i in (0, 1))
    before = torch.tensor([error], dtype=torch.float64)
    flips = mean_flips(effects, costs, before)
    left = before + (effects * flips).sum(1)
    assert left.abs() <= abs(error) + 1e-12
    unused = effects[~flips]
    assert not ((left + unused).abs() < left.abs() - 1e-12).any()


def layer_with_inputs(bits: int, stride: int, padding: int | str) -> tuple[QuantConv2d, Tensor]:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 5, 3, stride=stride, padding=padding).requires_grad_(False)
    layer = QuantConv2d(
        winograd={}, float_layer=conv, name="conv", cache=LRUCache(0), weight_choices=(bits,), act_choices=(bits,),
        config=STATIC,
    )  # fmt: skip
    x = torch.rand(8, 6, 7, 7)
    layer.act_quantizer.estimate(x.reshape(1, -1))
    quantizer, weight_rows = layer.weight_rows()
    quantizer.estimate(weight_rows)
    quantizer.start_rounding(conv.weight)
    return layer, x


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (1, "same"), (1, 0)])
def test_a_convolution_keeps_its_mean(stride: int, padding: int | str) -> None:
    bits = 4
    layer, x = layer_with_inputs(bits, stride, padding)
    target = layer(x)
    setting = LayerSetting(bits, bits)
    moments = InputMoments(layer)
    with layers_at([layer], [setting]):
        with moments.observing():
            before = mean_error(layer(x), target)
        flip_roundings(layer, bits, moments, before)
        after = mean_error(layer(x), target)
    assert (after.abs() <= before.abs() + 1e-6).all()
    assert after.square().sum() < 0.05 * before.square().sum()
    quantizer, weight = layer.weight_quantizer, layer.float_layer.weight
    scale = quantizer.per_weight(quantizer.scale[0], weight)
    steps = (quantizer(weight, bits) - weight).abs() / scale
    assert steps.max() < 1.001  # still the integer above or below


def test_the_moments_predict_what_a_flip_does() -> None:
    layer, x = layer_with_inputs(5, 1, 1)
    moments = InputMoments(layer)
    with layers_at([layer], [LayerSetting(5, 5)]):
        with moments.observing():
            before = layer(x).mean((0, 2, 3))
        quantizer, weight = layer.weight_quantizer, layer.float_layer.weight
        up = quantizer.rounded_up(5).view(weight.shape).clone()
        place = (2, 3, 0, 1)
        step = 1 - 2 * float(up[place])
        up[place] = ~up[place]
        quantizer.set_rounding(5, up)
        change = layer(x).mean((0, 2, 3)) - before
    predicted = step * quantizer.scale[0, 2] * moments.first[3 * 9 + 1]
    assert change[2].item() == pytest.approx(predicted.item(), rel=1e-3)
    assert change[[0, 1, 3, 4]].abs().max() < 1e-6


def test_the_last_layer_is_the_one_that_reaches_the_output(digits: Case, task: DiffusionTask, tmp_path: Path) -> None:
    supernet = digits.calibrated()
    with ActivationStore(2**30, tmp_path / "spill", torch.device("cpu")) as store:
        blockwise = BlockwiseReconstruction(supernet, trajectory_states(task, 2, 1, 0), CalibrationConfig(), 0, store)
    units = {unit.name: unit for unit in blockwise.units}
    attention = last_layer(
        units["mid_block.attentions.0"], units["mid_block.attentions.0"].layers[0].float_layer.in_features
    )
    assert attention is not None
    assert attention.name == "mid_block.attentions.0.to_out.0"
    conv = last_layer(units["conv_out"], 1)
    assert conv is not None
    assert conv.name == "conv_out"
    assert last_layer(units["conv_out"], 7) is None


@pytest.mark.parametrize("method", ["uniform_prefix", "sampled"])
def test_a_pass_that_does_not_help_leaves_no_flips(
    digits: Case, task: DiffusionTask, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = [(8, 5) if shape.name == "conv_in" else (8, 5, 4) for shape in digits.layers]  # at 4 it runs at 5
    supernet = Supernet(digits.network, digits.layers, choices, [(8, 5, 4)] * len(choices), STATIC)
    digits.observe(supernet)
    flipped = []
    errors = iter(range(1, 1000))

    def flip(layer: QuantConv2d, bits: int, *_: object) -> None:
        layer.weight_quantizer.rounding[layer.weight_quantizer.choice(bits)] ^= 1
        flipped.append(bits)

    monkeypatch.setattr(blockwise_module, "flip_roundings", flip)
    monkeypatch.setattr(blockwise_module, "unit_error", lambda *_: (float(next(errors)), torch.zeros(1)))
    config = CalibrationConfig(method=method)
    with ActivationStore(2**30, tmp_path / "spill", torch.device("cpu")) as store:
        blockwise = BlockwiseReconstruction(supernet, trajectory_states(task, 2, 1, 0), config, 0, store)
        index = [unit.name for unit in blockwise.units].index("conv_in")
        for earlier in range(index):
            blockwise.begin(earlier)
            blockwise.finish(earlier)
        blockwise.begin(index)
        layers = blockwise.units[index].layers
        before = {key: value.clone() for key, value in supernet.quantizer_state(layers).items()}
        records = blockwise.learn_passes(index)
        after = supernet.quantizer_state(layers)
    assert flipped == [8, 5, 5]
    assert [record.loss_after for record in records] == [record.loss_before for record in records]
    assert [key for key, value in after.items() if not value.equal(before[key])] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uniform_prefix", "sampled"])
def test_corrected_networks_have_less_mean_error(
    digits: Case, task: DiffusionTask, method: str, tmp_path: Path
) -> None:
    states = trajectory_states(task, 8, 5, 0)

    def error(correct: bool) -> float:
        softmax = [(8,) if shape.name.endswith("products") else (5,) for shape in digits.layers]
        supernet = Supernet(digits.network, digits.layers, softmax, [(5,)] * len(digits.layers), STATIC)
        digits.observe(supernet)
        config = CalibrationConfig(method=method, weight_iterations=5, weight_learning_rate=0.3, correct_means=correct)
        with ActivationStore(2**30, tmp_path / "spill", torch.device("cpu")) as store:
            blockwise = BlockwiseReconstruction(supernet, states, config, 0, store)
            for index in range(len(blockwise.units)):
                blockwise.begin(index)
                for name in blockwise.passes:
                    blockwise.learn(index, name)
                blockwise.finish(index)
        errors = []
        for state in states:
            reference = digits_output(supernet, state)
            with supernet.subnet(digits.uniform(5)):
                errors.append(mean_error(digits_output(supernet, state), reference))
        return float(torch.stack(errors).mean(0).abs().sum())

    def digits_output(supernet: Supernet, state: object) -> Tensor:
        with torch.no_grad():
            output: Tensor = state.run(supernet, torch.device("cpu")).sample  # type: ignore[attr-defined]
        return output

    assert error(True) < 0.5 * error(False)
