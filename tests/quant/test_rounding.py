"""The formulas of soft rounding against values by hand, and learned scales against the gradients of a definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tmpq_exp.config import QuantConfig, QuantizerConfig
from tmpq_exp.quant.layers import QuantLinear
from tmpq_exp.quant.lru_cache import LRUCache
from tmpq_exp.quant.primitives import pack_bits, round_ste, unpack_bits
from tmpq_exp.quant.quantizer import ActQuantizer, WeightQuantizer
from tmpq_exp.quant.rounding import (
    LearnedScale,
    SoftRounding,
    annealed_beta,
    initial_logits,
    learnable_fake_quantize,
    rectified_sigmoid,
    rounding_regularizer,
)


def test_rectified_sigmoid_by_hand() -> None:
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4; stretched to (-0.1, 1.1) and cut off
    logits = torch.tensor([0.0, math.log(3), -math.log(3), 10.0, -10.0])
    torch.testing.assert_close(rectified_sigmoid(logits), torch.tensor([0.5, 0.8, 0.2, 1.0, 0.0]))


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_a_weight_starts_from_its_own_fraction(fraction: float) -> None:
    share = rectified_sigmoid(initial_logits(torch.tensor([fraction])))
    assert share.item() == pytest.approx(fraction, abs=1e-6)


def test_beta_falls_from_20_to_2_after_the_warm_up() -> None:
    assert annealed_beta(0.0) is None
    assert annealed_beta(0.199) is None
    assert annealed_beta(0.2) == 20
    assert annealed_beta(0.6) == pytest.approx(11)
    assert annealed_beta(1.0) == pytest.approx(2)


def test_regularizer_by_hand() -> None:
    # 1 - |2h - 1|^2: h = 1/2 gives 1, h = 3/4 gives 3/4, h = 0 and 1 give 0
    assert rounding_regularizer(torch.tensor([0.5, 0.75, 0.0, 1.0]), 2).item() == pytest.approx(1.75)
    assert rounding_regularizer(torch.tensor([0.75]), 4).item() == pytest.approx(1 - 1 / 16)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_packed_bits_come_back(values: list[bool]) -> None:
    packed = pack_bits(torch.tensor(values))
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(values) // 8)
    assert unpack_bits(packed, len(values)).tolist() == values


@pytest.mark.parametrize("shape", [(), (1, 3, 1, 1)])
def test_gradients_are_those_of_the_straight_through_definition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 4, generator=generator) * 2
    weights = torch.randn(2, 3, 4, 4, generator=generator)
    low, high = -5.5, 10.5  # no integers, so that no value lies on the edge

    def gradients(function: object) -> tuple[Tensor, ...]:
        leaves = x.clone().requires_grad_(), torch.full(shape, 0.3).requires_grad_()
        y = function(*leaves)  # type: ignore[operator]
        return y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)

    found = gradients(lambda x, scale: learnable_fake_quantize(x, scale, low, high))
    expected = gradients(lambda x, scale: round_ste(x / scale).clamp(low, high) * scale)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (found[1] == 0).any()  # some values were clipped


def linear_layer(granularity: str, symmetric: bool, bits: int, seam: int = 0) -> QuantLinear:
    float_layer = nn.Linear(7, 5)
    with torch.no_grad():
        float_layer.weight.copy_(torch.randn(5, 7, generator=torch.Generator().manual_seed(1)))
    config = QuantConfig(weight=QuantizerConfig(granularity, 3, symmetric))
    layer = QuantLinear(
        name="layer",
        cache=LRUCache(2**20),
        float_layer=float_layer,
        weight_choices=(8, bits),
        act_choices=(8,),
        config=config,
        seam=seam,
    )
    layer.weight_quantizer.estimate(layer.weight_rows()[1])
    layer.weight_quantizer.start_rounding(float_layer.weight.detach())
    return layer


CASES = [("per_tensor", True, 0), ("per_channel", False, 0), ("per_channel", False, 3), ("per_group", True, 0)]


@pytest.mark.parametrize(("granularity", "symmetric", "seam"), CASES)
@pytest.mark.parametrize("bits", [2, 5])
def test_hard_rounding_is_floor_or_one_above(granularity: str, symmetric: bool, seam: int, bits: int) -> None:
    layer = linear_layer(granularity, symmetric, bits, seam)
    weight, quantizer = layer.float_layer.weight.detach(), layer.weight_quantizer
    untouched = quantizer(weight, 8)
    rounding = SoftRounding(layer, bits, 0.01)
    with torch.no_grad():
        rounding.parameter.copy_(torch.randn(5, 7, generator=torch.Generator().manual_seed(2)))
    rounding.commit()
    index = quantizer.choice(bits)
    scale = quantizer.per_weight(quantizer.scale[index], weight)
    zero_point = quantizer.per_weight(quantizer.zero_point[index], weight)
    limits = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    above = torch.floor(weight / scale) + (rounding.parameter >= 0)
    expected = ((above + zero_point).clamp(*limits) - zero_point) * scale
    assert torch.equal(quantizer(weight, bits), expected)
    assert torch.equal(quantizer(weight, 8), untouched)


@pytest.mark.parametrize(("granularity", "symmetric", "seam"), CASES)
def test_a_rounding_that_was_not_learned_is_to_nearest(granularity: str, symmetric: bool, seam: int) -> None:
    layer = linear_layer(granularity, symmetric, 3, seam)
    weight = layer.float_layer.weight.detach()
    nearest = WeightQuantizer((8, 3), weight.shape, layer.weight_quantizer.config, seam)
    nearest.estimate(nearest.rows(weight))
    assert not nearest.is_rounding_learned
    for bits in (8, 3):
        assert torch.equal(layer.weight_quantizer(weight, bits), nearest(weight, bits))


def test_soft_weights_start_from_the_float_weights_within_the_range() -> None:
    layer = linear_layer("per_channel", False, 8)
    torch.testing.assert_close(SoftRounding(layer, 8, 0.01).weight(), layer.float_layer.weight, atol=1e-2, rtol=0)


def test_a_learned_scale_follows_a_cosine_and_stays_positive() -> None:
    quantizer = ActQuantizer((8,), 3, 1, QuantizerConfig())
    quantizer.estimate(torch.tensor([[-1.0, 2.0]]), (torch.tensor([-1.0]), torch.tensor([2.0])))
    start = quantizer.scale[0].clone()
    learned = LearnedScale(quantizer, 8)
    learned.num_steps = 4
    rates = []
    for _ in range(4):
        rates.append(learned.learning_rate(1.0))
        with torch.no_grad():
            learned.parameter.fill_(-1.0)
        learned.stepped()
    assert rates == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    learned.commit()
    torch.testing.assert_close(quantizer.scale[0], start / 16)
