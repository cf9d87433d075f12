"""Quantization in numbers: rounding error, exact zero, ranges, and PyTorch's own fake quantization as oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmpq_exp.config import MAX_BITS, MIN_BITS
from tmpq_exp.quant.primitives import (
    RangeEstimator,
    dequantize,
    estimate_range,
    fake_quantize,
    fake_quantize_groups,
    integer_range,
    quantize,
    round_ste,
    scale_and_zero_point,
    sqnr_db,
    symmetric_scale,
)

BITS = st.integers(MIN_BITS, MAX_BITS)
FINITE = st.floats(-1e6, 1e6, width=32)
VALUES = st.lists(FINITE, min_size=2, max_size=30).map(torch.tensor)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, int, int]:
    scale, zero_point = scale_and_zero_point(x.min(), x.max(), bits, symmetric)
    return scale, zero_point, *integer_range(bits, symmetric)


@given(BITS)
def test_integer_ranges(bits: int) -> None:
    low, high = integer_range(bits, symmetric=False)
    assert (low, high - low + 1) == (0, 2**bits)
    low, high = integer_range(bits, symmetric=True)
    assert low == -high
    assert high - low + 1 == 2**bits - 1


@pytest.mark.parametrize("bits", [-1, 0, 1, 17, 32])
def test_bits_out_of_range_are_named(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits must be in 2..16, found {bits}"):
        integer_range(bits, symmetric=True)


@settings(deadline=None)
@given(VALUES, BITS, st.booleans())
def test_error_is_at_most_half_a_step_and_the_result_is_a_fixed_point(x: Tensor, bits: int, symmetric: bool) -> None:
    scale, zero_point, *limits = parameters(x, bits, symmetric)
    y = fake_quantize(x, scale, zero_point, *limits)
    # float32 keeps 2**-24 of a quotient that is at most 2**bits steps
    assert ((x - y).abs().max() <= scale * (0.5 + 2.0 ** (bits - 22))).item()
    assert torch.equal(fake_quantize(y, scale, zero_point, *limits), y)


@settings(deadline=None)
@given(VALUES, BITS, st.booleans())
def test_order_is_kept_and_zero_is_exact(x: Tensor, bits: int, symmetric: bool) -> None:
    scale, zero_point, *limits = parameters(x, bits, symmetric)
    y = fake_quantize(x.sort().values, scale, zero_point, *limits)
    assert (y.diff() >= 0).all()
    assert fake_quantize(torch.zeros(1), scale, zero_point, *limits).item() == 0
    integers = quantize(x, scale, zero_point, *limits)
    assert torch.equal(integers, integers.round())
    assert integers.min() >= limits[0]
    assert integers.max() <= limits[1]
    assert torch.equal(dequantize(integers, scale, zero_point).sort().values, y)


@settings(deadline=None)
@given(FINITE, FINITE, BITS, st.booleans())
def test_parameters_cover_the_range(a: float, b: float, bits: int, symmetric: bool) -> None:
    low, high = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero_point = scale_and_zero_point(low, high, bits, symmetric)
    quant_min, quant_max = integer_range(bits, symmetric)
    assert scale > 0
    assert quant_min <= zero_point <= quant_max
    assert zero_point == zero_point.round()
    assert not symmetric or zero_point == 0
    slack = scale * (0.5 + 2.0 ** (bits - 22))  # the zero point is rounded to an integer
    assert (quant_min - zero_point) * scale <= low + slack
    assert (quant_max - zero_point) * scale >= high - slack


def test_parameters_by_hand() -> None:
    scale, zero_point = scale_and_zero_point(torch.tensor([-1.0, 2.0, 0.0]), torch.tensor([3.0, 6.0, 0.0]), 2, False)
    torch.testing.assert_close(scale, torch.tensor([4 / 3, 2.0, 1.0]))
    assert zero_point.tolist() == [1, 0, 0]
    scale, zero_point = scale_and_zero_point(torch.tensor([-7.0, -1.0]), torch.tensor([3.0, 3.5]), 4, True)
    assert scale.tolist() == [1.0, 0.5]
    assert zero_point.tolist() == [0, 0]
    assert symmetric_scale(torch.tensor([7.0, 0.0]), 4).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_equals_pytorchs_fake_quantization(bits: int) -> None:
    x = random(3, 5, 7, 7)
    scale, zero_point = scale_and_zero_point(x.amin((0, 2, 3)), x.amax((0, 2, 3)), bits, symmetric=False)
    scale = 2.0 ** scale.log2().ceil()  # PyTorch multiplies by the reciprocal: equal where that is exact
    limits = integer_range(bits, symmetric=False)
    y = fake_quantize(x, scale.view(5, 1, 1), zero_point.view(5, 1, 1), *limits)
    assert torch.equal(y, torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 1, *limits))
    one, zero = scale[0], zero_point[0]
    expected = torch.fake_quantize_per_tensor_affine(x, float(one), int(zero), *limits)
    assert torch.equal(fake_quantize(x, one, zero, *limits), expected)


def test_equals_pytorchs_fake_quantization_up_to_ties_at_any_scale() -> None:
    x = random(10000)
    scale, zero_point, *limits = parameters(x, 8, symmetric=False)
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), *limits)
    y = fake_quantize(x, scale, zero_point, *limits)
    tie = ((x / scale).frac().abs() - 0.5).abs() < 1e-4
    torch.testing.assert_close(y[~tie], expected[~tie])
    assert tie.float().mean() < 1e-2


@given(VALUES)
def test_straight_through_rounding_gives_integers_and_passes_the_gradient(x: Tensor) -> None:
    x = x.requires_grad_()
    y = round_ste(x)
    assert torch.equal(y, x.detach().round())
    (gradient,) = torch.autograd.grad((y * torch.arange(len(x))).sum(), x)
    assert torch.equal(gradient, torch.arange(len(x)).float())


def test_gradient_passes_inside_the_range_and_stops_outside() -> None:
    x = torch.tensor([-3.0, 0.3, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), torch.tensor(1.0), *integer_range(3, False)).sum().backward()  # range -1..6
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 0]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 12), BITS, st.sampled_from([0, 1, 2]), st.booleans())
def test_groups_are_slices_quantized_alone(
    channels: int, group_size: int, bits: int, channel_dim: int, symmetric: bool
) -> None:
    shape = [3, 4, 2]
    shape[channel_dim] = channels
    x = random(*shape, seed=channels)
    shared = [d for d in range(3) if d not in (0, channel_dim)]
    y = fake_quantize_groups(x.clone(), channel_dim, group_size, shared, bits, symmetric=symmetric)
    dims = (*shared, channel_dim)
    for part, quantized in zip(x.split(group_size, channel_dim), y.split(group_size, channel_dim), strict=True):
        low, high = part.amin(dims, keepdim=True), part.amax(dims, keepdim=True)
        expected = fake_quantize(
            part, *scale_and_zero_point(low, high, bits, symmetric), *integer_range(bits, symmetric)
        )
        assert torch.equal(quantized, expected)
    leaf = x.clone().requires_grad_()
    differentiable = fake_quantize_groups(leaf, channel_dim, group_size, shared, bits, symmetric=symmetric)
    torch.testing.assert_close(differentiable.detach(), y)


def squared_error(x: Tensor, bits: int, symmetric: bool, estimator: RangeEstimator) -> Tensor:
    low, high = estimate_range(x, bits, symmetric=symmetric, estimator=estimator)
    scale, zero_point = scale_and_zero_point(low, high, bits, symmetric)
    y = fake_quantize(x, scale[:, None], zero_point[:, None], *integer_range(bits, symmetric))
    return (x - y).square().mean(1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), BITS, st.booleans(), st.floats(0.3, 4))
def test_mse_range_is_never_worse_than_minmax(seed: int, bits: int, symmetric: bool, tail: float) -> None:
    x = random(3, 50, seed=seed)
    x = x.sign() * x.abs() ** tail + 0.3
    mse, minmax = (squared_error(x, bits, symmetric, e) for e in (RangeEstimator.MSE, RangeEstimator.MINMAX))
    assert (mse <= minmax).all()


def test_mse_range_clips_an_outlier_that_minmax_keeps() -> None:
    x = random(1, 2000)
    x[0, 0] = 12.0
    ratio = squared_error(x, 4, True, RangeEstimator.MINMAX) / squared_error(x, 4, True, RangeEstimator.MSE)
    assert ratio.item() > 3


def test_percentile_by_hand() -> None:
    x = torch.stack([torch.arange(1000.0), -2 * torch.arange(1000.0)])[:, torch.randperm(1000)]
    low, high = estimate_range(x, 8, symmetric=False, estimator=RangeEstimator.PERCENTILE, percentile=99.0)
    assert high.tolist() == [989, -20]  # the 990th of 1,000 values in ascending order
    assert low.tolist() == [10, -1978]  # and the 990th in descending order
    low, high = estimate_range(x, 8, symmetric=False, estimator=RangeEstimator.PERCENTILE, percentile=100.0)
    assert torch.equal(low, x.amin(1))
    assert torch.equal(high, x.amax(1))
    low, high = estimate_range(x, 8, symmetric=False)
    assert torch.equal(low, x.amin(1))
    assert torch.equal(high, x.amax(1))


def test_sqnr_by_hand() -> None:
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, torch.tensor([3.0, 3.5])) == pytest.approx(20.0)
    assert sqnr_db(x, torch.zeros(2)) == pytest.approx(0.0)


@pytest.mark.parametrize("bits", [4, 6, 8, 10])
def test_uniform_noise_gains_six_db_a_bit(bits: int) -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = fake_quantize(x, *parameters(x, bits, symmetric=False))  # type: ignore[arg-type]
    assert sqnr_db(x, y) == pytest.approx(20 * math.log10(2**bits - 1), abs=0.15)
