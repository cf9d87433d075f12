"""Error feedback keeps to the grid, predicts its gain, and reaches it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.winograd.conv import WinogradMatrices, WinogradSpec, transform_weights, winograd_conv2d
from tmpq_exp.winograd.shaping import feedback, output_error, pixel_covariance, shaped_round, tap_covariance


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size: int, seed: int) -> Tensor:
    root = random(size, size, seed=seed)
    return root @ root.t() + 0.1 * torch.eye(size)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([4, 8]))
def test_result_lies_on_the_grid_within_range(num_taps: int, seed: int, bits: int) -> None:
    x = random(num_taps, 3, 5, seed=seed)
    scale = x.abs().amax((1,), keepdim=True) / (2 ** (bits - 1) - 1)
    before = x.clone()
    rounded = shaped_round(x, scale, feedback(positive(num_taps, seed), torch.float64), bits)
    integers = rounded / scale
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-9)
    assert integers.abs().max() <= 2 ** (bits - 1) - 1 + 1e-9
    assert torch.equal(x, before)


def test_uncorrelated_taps_round_to_nearest() -> None:
    x, scale = random(6, 40), torch.full((6, 1), 0.1, dtype=torch.float64)
    diagonal = torch.diag(torch.rand(6, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(
        shaped_round(x, scale, feedback(diagonal, torch.float64), 8), (x / scale).round() * scale
    )
    assert feedback(diagonal).gain_db == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("num_taps", [4, 9, 16, 64])
def test_error_falls_by_the_predicted_gain(num_taps: int) -> None:
    H = positive(num_taps, seed=num_taps)
    shaping = feedback(H, torch.float64)
    x, scale = random(num_taps, 20000, seed=1), torch.full((num_taps, 1), 0.05, dtype=torch.float64)
    errors = [shaped_round(x, scale, shaping, 16) - x, (x / scale).round() * scale - x]
    shaped, nearest = (float(torch.einsum("tn,ts,sn->", e, H, e)) for e in errors)
    assert 10 * math.log10(nearest / shaped) == pytest.approx(shaping.gain_db, abs=0.3)
    assert shaping.gain_db > 1
    assert shaping.macs_per_tile == num_taps * (num_taps - 1) // 2


@pytest.mark.parametrize(("m", "least_db"), [(2, 8.5), (4, 14), (6, 11.5)])
def test_m_has_a_null_space_to_put_errors_in(m: int, least_db: float) -> None:
    matrices = WinogradMatrices.from_scales(WinogradSpec(m).transform())
    assert feedback(output_error(matrices.A_T, matrices.A_T)).gain_db > least_db


def test_covariance_of_taps_is_that_of_samples() -> None:
    B_T, covariance = random(4, 4), pixel_covariance(4, 0.7)
    patches = torch.linalg.cholesky(covariance) @ random(16, 200_000)
    taps = torch.kron(B_T, B_T) @ patches
    expected = tap_covariance(B_T, B_T, covariance)
    torch.testing.assert_close(taps @ taps.t() / 200_000, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))
    assert torch.equal(pixel_covariance(3, 0.0), torch.eye(9, dtype=torch.float64))


# Rows: m, points, dB with nearest rounding and with all three stages shaped; C = K = 64, 24 x 24, groups of 32.
SHAPED_TABLE = [
    (2, "standard", 35.0, 36.6),
    (4, "standard", 20.0, 28.6),
    (4, "improved", 26.8, 31.5),
    (6, "standard", 14.3, 22.5),
]


@pytest.mark.parametrize(("m", "points", "nearest", "shaped"), SHAPED_TABLE)
def test_shaped_int8_convolution_of_white_noise(m: int, points: str, nearest: float, shaped: float) -> None:
    x, weight = random(2, 64, 24, 24).float(), random(64, 64, 3, 3, seed=1).float()
    reference = F.conv2d(x, weight, padding=1)
    for stages, expected in (((), nearest), (("u", "v", "m"), shaped)):
        spec = WinogradSpec(m, points=points, shaped_stages=stages)
        matrices = WinogradMatrices.from_scales(spec.transform())
        weights = transform_weights(weight, matrices, spec, 8)
        y = winograd_conv2d(x, weights, None, matrices, spec, 8, 1)
        assert sqnr_db(reference, y) == pytest.approx(expected, abs=0.6)


def test_shaping_passes_gradients_through() -> None:
    spec = WinogradSpec(4, shaped_stages=("u", "v", "m"))
    x, weight = random(1, 4, 8, 8).requires_grad_(), random(3, 4, 3, 3, seed=1).requires_grad_()
    matrices = WinogradMatrices.from_scales(spec.transform(), dtype=torch.float64)
    y = winograd_conv2d(x, transform_weights(weight, matrices, spec, 8), None, matrices, spec, 8, 1)
    y.square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    reference = F.conv2d(x.detach(), weight.detach(), padding=1)
    assert sqnr_db(reference, y.detach()) > 25
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, padding=1).square().sum(), x)
    assert sqnr_db(expected, x.grad) > 20
