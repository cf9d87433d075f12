"""The simulated path takes the integers that int8 operands and int32 accumulators take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.winograd import conv
from tmpq_exp.winograd.conv import (
    WinogradMatrices,
    WinogradSpec,
    WinogradWeights,
    transform_weights,
    winograd_conv2d,
)
from tmpq_exp.winograd.integer import IntegerStage, integer_hadamard, integer_input, integer_output, integer_weights
from tmpq_exp.winograd.matrices import integer_rows
from tmpq_exp.winograd.spec import FLOAT_STAGES
from tmpq_exp.winograd.stages import quantize_stage

SPECS = {
    "F(2,3)": WinogradSpec(2),
    "F(4,3)": WinogradSpec(4, points="improved"),
    "F(6,3)": WinogradSpec(6),
    "integer transforms of 8 bits": WinogradSpec(4, points="improved", transform_bits=8),
    "integer transforms of 10 bits": WinogradSpec(6, transform_bits=10),
    "one group": WinogradSpec(4, group_size="all"),
    "M of each tap": WinogradSpec(4, m_scale="tap", group_size=64),
    "per tensor": WinogradSpec(4, method="per_tensor"),
    "per tap": WinogradSpec(4, method="per_tap"),
    "fewer bits": WinogradSpec(4, input_bits=6, v_bits=5, u_bits=7, m_bits=4),
    "shaped": WinogradSpec(4, points="improved", shaped_stages=("u", "v", "m")),
    "shaped, integer transforms": WinogradSpec(4, shaped_stages=("v", "m"), transform_bits=8),
}


def simulate(
    spec: WinogradSpec, c: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, IntegerStage, Tensor, dict[str, Tensor], WinogradWeights, WinogradMatrices]:
    """Input, integer weights, output and stages of the simulated path."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, c, 9, 11, generator=generator, dtype=torch.float64)
    weight = torch.randn(k, c, 3, 3, generator=generator, dtype=torch.float64)
    matrices = WinogradMatrices.from_scales(spec.transform(), dtype=torch.float64, transform_bits=spec.transform_bits)
    weights = transform_weights(weight, matrices, spec, 8)
    u = integer_weights(weight, matrices, spec)
    assert u.integers.dtype == torch.int8
    torch.testing.assert_close(u.integers * u.scale, weights.u, rtol=1e-12, atol=1e-12)
    stages: dict[str, Tensor] = {}

    def record(x: Tensor, stage: str, *arguments: Any, **named: Any) -> Tensor:
        stages[stage] = quantize_stage(x, stage, *arguments, **named).clone()
        return stages[stage].clone()

    monkeypatch.setattr(conv, "quantize_stage", record)
    low = replace(weights, u=weights.u.to(dtype))
    y = winograd_conv2d(x.to(dtype), low, None, matrices.to(dtype=dtype), spec, 8, 1)
    return x, u, y, stages, weights, matrices


def assert_same_integers(stage: IntegerStage, simulated: Tensor, shaped: bool) -> IntegerStage:
    """Equal but for ties, which differ by one at most; returns the stage with the simulated path's ties."""
    integers = simulated / stage.scale
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-9)
    difference = (integers.round() - stage.integers).abs()
    if shaped:  # a tie of the first tap moves those after it
        assert (difference > 0).double().mean() < 0.01
    else:
        assert not difference[~stage.near_ties()].any()
        assert difference.max() <= 1
    return replace(stage, integers=integers.round().to(torch.int8))


@pytest.mark.parametrize("c", [16, 48])
@pytest.mark.parametrize("name", SPECS)
def test_every_stage_takes_the_integers_of_the_simulated_path(
    name: str, c: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]
    x, u, y, simulated, weights, matrices = simulate(spec, c, 5, torch.float64, monkeypatch)
    image, v = integer_input(x, matrices, spec, 1, weights.v_feedback)
    assert image.integers.dtype == v.integers.dtype == torch.int8
    assert_same_integers(image, simulated["input"], shaped=False)
    v = assert_same_integers(v, simulated["v"], "v" in spec.shaped_stages)
    m = assert_same_integers(
        integer_hadamard(u, v, spec, weights.m_feedback), simulated["m"], "m" in spec.shaped_stages
    )
    expected = integer_output(m, matrices, spec, y.shape[2:])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * float(y.abs().max()))


@pytest.mark.parametrize("c", [16, 48, 320])
def test_float32_moves_few_integers_by_one(c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["F(4,3)"]
    x, u, y, simulated, _, matrices = simulate(spec, c, 3, torch.float32, monkeypatch)
    _, v = integer_input(x, matrices, spec, 1)
    moved = (simulated["v"].double() / v.scale - v.integers).abs()
    assert moved.max() < 1.001
    assert (moved > 0.5).double().mean() < 1e-3
    expected = integer_output(integer_hadamard(u, v, spec), matrices, spec, y.shape[2:])
    assert sqnr_db(expected, y) > 50


def test_integers_span_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["fewer bits"]
    x, u, _, _, _, matrices = simulate(spec, 32, 4, torch.float64, monkeypatch)
    image, v = integer_input(x, matrices, spec, 1)
    m = integer_hadamard(u, v, spec)
    assert [int(stage.integers.abs().max()) for stage in (image, v, m)] == [31, 15, 7]


def test_rows_of_small_integers_stay_exact() -> None:
    rows = torch.tensor([[4.0, 0, -5, 0, 1, 0], [0, 0, 0, 0, 0, 0], [27, 18, 12, 8, 0, 1]], dtype=torch.float64) / 7
    integers, scale = integer_rows(rows, 8)
    torch.testing.assert_close(integers * scale, rows, rtol=1e-14, atol=1e-14)
    assert integers.abs().max() <= 127
    irrational = torch.tensor([[1.0, 2**0.5, 3**0.5]], dtype=torch.float64)
    errors = [float((i * s - irrational).abs().max()) for i, s in (integer_rows(irrational, b) for b in (8, 10))]
    assert errors[1] < errors[0] < 1 / 127


@pytest.mark.parametrize(
    ("points", "bits", "least_db"), [("standard", 8, 38), ("improved", 8, 50), ("improved", 10, 62)]
)
def test_integer_transforms_alone_cost_little(points: str, bits: int, least_db: float) -> None:
    spec = WinogradSpec(4, points=points, transform_bits=bits, **FLOAT_STAGES)
    matrices = WinogradMatrices.from_scales(spec.transform(), dtype=torch.float64, transform_bits=bits)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(8, 8, s, s, generator=generator, dtype=torch.float64) for s in (12, 3))
    y = winograd_conv2d(x, transform_weights(weight, matrices, spec, 8), None, matrices, spec, 8, 1)
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    assert 10 * float(torch.log10(expected.square().sum() / (y - expected).square().sum())) > least_db


def test_other_specs_are_refused() -> None:
    x = torch.ones(1, 2, 8, 8, dtype=torch.float64)
    for spec in (WinogradSpec(4, v_bits=9), WinogradSpec(4, quantize_v=False), WinogradSpec(4, method="bqw_style")):
        with pytest.raises(ValueError, match="spec must quantize every stage to at most 8 bits"):
            integer_input(x, WinogradMatrices.from_scales(spec.transform(), dtype=torch.float64), spec)
