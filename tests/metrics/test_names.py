"""Directions of metrics."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmpq_exp.metrics.names import higher_is_better, loss, value_of


@pytest.mark.parametrize("name", ["psnr_db", "ssim", "clip_score", "clip_digits", "inception_score", "latent_sqnr_db"])
def test_larger_is_better(name: str) -> None:
    assert higher_is_better(name)
    assert loss(name, 2.0) < loss(name, 1.0) < loss(name, None) == math.inf


@pytest.mark.parametrize("name", ["fid", "fid_torchmetrics", "sfid", "kid", "fd_digits", "lpips", "feature_mse"])
def test_smaller_is_better(name: str) -> None:
    assert not higher_is_better(name)
    assert loss(name, 1.0) < loss(name, 2.0) < loss(name, None) == math.inf


@given(st.sampled_from(["fid", "ssim"]), st.floats(allow_nan=False, allow_infinity=False) | st.none())
def test_a_loss_gives_its_value_back(name: str, value: float | None) -> None:
    assert value_of(name, loss(name, value)) == value
