"""Quantizers share scales as their granularity says, and compute what the primitives compute."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmpq_exp.config import Granularity, QuantizerConfig
from tmpq_exp.quant.primitives import fake_quantize, integer_range, scale_and_zero_point, symmetric_scale
from tmpq_exp.quant.quantizer import ActQuantizer, Quantizer, WeightQuantizer

PER_TENSOR, PER_CHANNEL, PER_GROUP = Granularity
BITS = (8, 4, 3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def calibrated(quantizer: ActQuantizer, x: Tensor, num_values: int = 10**6) -> ActQuantizer:
    quantizer.start_observing()
    quantizer.observe(x, num_values, generator())
    quantizer.finish_observing()
    return quantizer


def expected_slice(part: Tensor, bits: int, symmetric: bool) -> Tensor:
    scale, zero_point = scale_and_zero_point(part.min(), part.max(), bits, symmetric)
    return fake_quantize(part, scale, zero_point, *integer_range(bits, symmetric))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", list(Granularity))
@pytest.mark.parametrize("shape", [(6, 7, 3, 3), (5, 7)])
def test_weights_share_a_scale_where_granularity_says(
    granularity: Granularity, symmetric: bool, shape: tuple[int, ...]
) -> None:
    weight = random(*shape)
    config = QuantizerConfig(granularity, group_size=3, symmetric=symmetric, estimator="minmax")
    quantizer = WeightQuantizer(BITS, shape, config)
    quantizer.estimate(quantizer.rows(weight))
    sizes = {PER_TENSOR: shape[:2], PER_CHANNEL: (1, shape[1]), PER_GROUP: (1, 3)}[granularity]
    for bits in BITS:
        quantized = quantizer(weight, bits)
        for rows, out_rows in zip(weight.split(sizes[0]), quantized.split(sizes[0]), strict=True):
            for part, out in zip(rows.split(sizes[1], 1), out_rows.split(sizes[1], 1), strict=True):
                assert torch.equal(out, expected_slice(part, bits, symmetric))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from(BITS))
def test_a_short_last_group_and_a_group_larger_than_the_layer(num_in: int, group_size: int, bits: int) -> None:
    weight = random(2, num_in, 2, 2, seed=num_in)
    config = QuantizerConfig(PER_GROUP, group_size=group_size, symmetric=True, estimator="minmax")
    quantizer = WeightQuantizer((bits,), weight.shape, config)
    assert quantizer.num_rows == 2 * -(-num_in // group_size)
    quantizer.estimate(quantizer.rows(weight))
    expected = [
        torch.cat([expected_slice(part, bits, True) for part in row.split(group_size)]) for row in weight.unbind()
    ]
    assert torch.equal(quantizer(weight, bits), torch.stack(expected))


@pytest.mark.parametrize("granularity", list(Granularity))
def test_weights_keep_their_memory_format(granularity: Granularity) -> None:
    weight = random(4, 6, 3, 3)
    quantizer = WeightQuantizer((8,), weight.shape, QuantizerConfig(granularity, group_size=4))
    quantizer.estimate(quantizer.rows(weight))
    quantized = quantizer(weight.contiguous(memory_format=torch.channels_last), 8)
    assert quantized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(quantized, quantizer(weight, 8))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(2, 16), st.booleans(), st.floats(-3, 3), st.floats(1e-3, 1e3))
def test_the_fast_path_of_activations_equals_the_primitive(
    seed: int, bits: int, symmetric: bool, offset: float, size: float
) -> None:
    x = (random(2, 3, 4, 5, seed=seed) + offset) * size
    quantizer = calibrated(ActQuantizer((bits,), 3, 1, QuantizerConfig(symmetric=symmetric)), x)
    wide = 1.5 * x  # partly outside of the range
    before = wide.clone()
    limits = integer_range(bits, symmetric)
    expected = fake_quantize(wide, quantizer.scale[0], quantizer.zero_point[0], *limits)
    assert torch.equal(quantizer(wide, bits), expected)
    assert torch.equal(wide, before)


@pytest.mark.parametrize(("channel_dim", "shape"), [(1, (4, 3, 5, 5)), (-1, (4, 6, 3)), (-1, (4, 3))])
def test_channels_of_activations_have_ranges_of_their_own(channel_dim: int, shape: tuple[int, ...]) -> None:
    x = random(*shape) * torch.tensor([1.0, 10, 100]).view(-1, 1, 1) if channel_dim == 1 else random(*shape)
    config = QuantizerConfig(PER_CHANNEL, estimator="minmax")
    y = calibrated(ActQuantizer((4,), 3, channel_dim, config), x)(x, 4)
    for part, out in zip(x.unbind(channel_dim), y.unbind(channel_dim), strict=True):
        assert torch.equal(out, expected_slice(part, 4, False))


@pytest.mark.parametrize(("channel_dim", "shape"), [(1, (4, 7, 5, 5)), (-1, (4, 6, 7)), (-1, (4, 7))])
def test_dynamic_activations_have_one_scale_an_image_and_group(channel_dim: int, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    before = x.clone()
    quantizer = ActQuantizer((4,), 7, channel_dim, QuantizerConfig(PER_GROUP, group_size=3, symmetric=True))
    y = quantizer(x, 4)
    assert torch.equal(x, before)
    for image, out in zip(x, y, strict=True):
        channel = channel_dim - 1 if channel_dim > 0 else channel_dim
        for part, out_part in zip(image.split(3, channel), out.split(3, channel), strict=True):
            scale = symmetric_scale(part.abs().max(), 4)
            assert torch.equal(out_part, fake_quantize(part, scale, torch.zeros(1), *integer_range(4, True)))


@pytest.mark.parametrize("granularity", list(Granularity))
def test_activations_keep_their_memory_format(granularity: Granularity) -> None:
    x = random(2, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    quantizer = calibrated(ActQuantizer((8,), 6, 1, QuantizerConfig(granularity, group_size=4)), x)
    assert quantizer(x, 8).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_CHANNEL])
def test_activations_need_calibration(granularity: Granularity) -> None:
    quantizer = ActQuantizer((8,), 3, 1, QuantizerConfig(granularity))
    with pytest.raises(AssertionError, match="before calibration"):
        quantizer(random(1, 3, 2, 2), 8)
    quantizer.start_observing()
    with pytest.raises(ValueError, match="no activation was seen"):
        quantizer.finish_observing()


@pytest.mark.parametrize("granularity", list(Granularity))
def test_weights_need_calibration(granularity: Granularity) -> None:
    with pytest.raises(AssertionError, match="before calibration"):
        WeightQuantizer((8,), (4, 3), QuantizerConfig(granularity))(random(4, 3), 8)


def test_bits_that_are_not_held_are_named() -> None:
    quantizer = calibrated(ActQuantizer((8, 4), 3, 1, QuantizerConfig()), random(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"bits must be one of \[8, 4\] .* found 5"):
        quantizer(random(1, 3, 2, 2), 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_CHANNEL])
def test_values_that_are_not_finite_are_an_error(granularity: Granularity, bad: float) -> None:
    x = random(4, 3, 20, 20)
    x[2, 1, 3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        calibrated(ActQuantizer((8,), 3, 1, QuantizerConfig(granularity)), x, num_values=4)


def test_extreme_values_are_seen_however_few_are_kept() -> None:
    x = random(8, 3, 16, 16)
    quantizer = calibrated(ActQuantizer((8,), 3, 1, QuantizerConfig(estimator="minmax")), x, num_values=1)
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), 8, False)
    assert quantizer.scale.item() == scale
    assert quantizer.zero_point.item() == zero_point


def test_extreme_values_do_not_shift_a_percentile() -> None:
    generator = torch.Generator().manual_seed(0)
    quantizer = ActQuantizer((8,), 3, 1, QuantizerConfig(estimator="percentile", percentile=99.0, symmetric=True))
    quantizer.start_observing()
    for _ in range(20):  # many batches, few values kept of each
        quantizer.observe(torch.randn(8, 3, 64, 64, generator=generator), 400, generator)
    quantizer.finish_observing()
    assert quantizer.scale.item() * 127 == pytest.approx(2.326, rel=0.05)  # 99th percentile of a unit Gaussian


def test_new_parameters_take_effect_at_once() -> None:
    x = random(2, 3, 4, 4)
    quantizer = calibrated(ActQuantizer((8,), 3, 1, QuantizerConfig()), x)
    quantizer(x, 8)
    calibrated(quantizer, 5 * x)
    expected = fake_quantize(x, quantizer.scale[0], quantizer.zero_point[0], *integer_range(8, False))
    assert torch.equal(quantizer(x, 8), expected)


@pytest.mark.parametrize("kind", ["weight", "act"])
def test_take_copies_the_parameters_of_the_bits_that_both_hold(kind: str) -> None:
    def quantizer(choices: tuple[int, ...]) -> Quantizer:
        config = QuantizerConfig(PER_CHANNEL)
        return WeightQuantizer(choices, (3, 5), config) if kind == "weight" else ActQuantizer(choices, 3, 1, config)

    held, taken = quantizer(BITS), quantizer((3, 8))
    held.estimate(random(3, 40))
    taken.take(held)
    x = random(3, 5) if kind == "weight" else random(2, 3, 2, 2)
    for bits in (3, 8):
        assert torch.equal(taken(x, bits), held(x, bits))
    with pytest.raises(ValueError, match="found 6"):
        quantizer((6,)).take(held)
