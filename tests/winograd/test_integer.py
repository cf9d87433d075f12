"""The simulated path takes the integers that int8 operands and int32 accumulators take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.winograd import conv
from tmpq_exp.winograd.conv import (
    StaticRanges,
    WinogradMatrices,
    WinogradSpec,
    WinogradWeights,
    balanced_ranges,
    measure_ranges,
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
    "balanced": WinogradSpec(4, method="bqw_style"),
    "balanced, shaped M": WinogradSpec(6, method="bqw_style", shaped_stages=("m",)),
    "static": WinogradSpec(4, points="improved", act_scales="static"),
    "static, integer transforms": WinogradSpec(4, act_scales="static", transform_bits=8),
    "static, M of each tap": WinogradSpec(4, act_scales="static", m_scale="tap"),
    "static per tensor": WinogradSpec(4, act_scales="static", method="per_tensor"),
    "static per tap": WinogradSpec(2, act_scales="static", method="per_tap"),
    "static, shaped": WinogradSpec(4, act_scales="static", shaped_stages=("u", "v", "m")),
    "static, balanced": WinogradSpec(4, act_scales="static", method="bqw_style", transform_bits=10),
}


@dataclass(frozen=True)
class Layer:
    """A random layer with what its float64 stages need, and the input that it gets."""

    spec: WinogradSpec
    x: Tensor
    weight: Tensor
    matrices: WinogradMatrices
    weights: WinogradWeights
    ranges: StaticRanges | None


def random_layer(spec: WinogradSpec, c: int, k: int, size: tuple[int, int] = (9, 11), seed: int = 3) -> Layer:
    """Channels of uneven weights; static ranges are those of the first image, so that others' values are clamped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, c, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(k, c, 3, 3, generator=generator, dtype=torch.float64)
    weight *= torch.linspace(0.5, 2, c, dtype=torch.float64)[:, None, None]
    matrices = WinogradMatrices.from_scales(spec.transform(), dtype=torch.float64, transform_bits=spec.transform_bits)
    weights = transform_weights(weight, matrices, spec, 8)
    if not spec.is_static:
        return Layer(spec, x, weight, matrices, weights, None)
    ranges = measure_ranges(x[:1], replace(weights, balance=None), matrices, spec, 8, 1)
    if weights.balance is not None:
        single = replace(spec, group_size=1, method="groups")
        ranges = replace(ranges, v=measure_ranges(x[:1], replace(weights, balance=None), matrices, single, 8, 1).v)
        weights = transform_weights(weight, matrices, spec, 8, ranges.v)
    return Layer(spec, x, weight, matrices, weights, balanced_ranges(ranges, weights, spec))


def simulate(layer: Layer, dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and stages of the simulated path."""
    stages: dict[str, Tensor] = {}

    def record(x: Tensor, stage: str, *arguments: Any, **named: Any) -> Tensor:
        stages[stage] = quantize_stage(x, stage, *arguments, **named).clone()
        return stages[stage].clone()

    low = layer.weights.map(lambda tensor: tensor.to(dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "quantize_stage", record)
        matrices = layer.matrices.to(dtype=dtype)
        y = winograd_conv2d(layer.x.to(dtype), low, None, matrices, layer.spec, 8, 1, layer.ranges)
    return y, stages


def integer_stages(layer: Layer) -> tuple[IntegerStage, IntegerStage, IntegerStage]:
    """U, x and V in integers."""
    balance = layer.weights.balance
    u = integer_weights(layer.weight, layer.matrices, layer.spec, balance)
    image, v = integer_input(layer.x, layer.matrices, layer.spec, 1, layer.weights.v_feedback, balance, layer.ranges)
    assert u.integers.dtype == image.integers.dtype == v.integers.dtype == torch.int8
    return u, image, v


def assert_same_integers(stage: IntegerStage, simulated: Tensor, shaped: bool) -> IntegerStage:
    """Equal but for ties, which differ by one at most; returns the stage with the simulated path's ties.

    Where all that share a scale cancel, float rounding alone makes the scale: both are 0 but for that.
    """
    rounding = 1e-12 * stage.scale.max() / stage.scale  # of floats, in steps
    vanishing = rounding > 0.1
    assert not simulated[vanishing.expand_as(simulated)].abs().gt(1e-9 * stage.scale.max()).any()
    integers = (simulated / stage.scale).masked_fill(vanishing, 0)
    assert ((integers - integers.round()).abs() <= rounding).all()
    difference = (integers.round() - stage.integers.masked_fill(vanishing, 0)).abs()
    if shaped:  # a tie of the first tap moves those after it
        assert (difference > 0).double().mean() < 0.01
    else:
        assert not difference[~stage.near_ties(rounding)].any()
        assert difference.max() <= 1
    return replace(stage, integers=integers.round().to(torch.int8))


def assert_same_path(layer: Layer) -> None:
    """Every stage of the simulated path takes the integers of the integer path, and both end alike."""
    spec = layer.spec
    y, simulated = simulate(layer)
    u, image, v = integer_stages(layer)
    balance = 1 if layer.weights.balance is None else layer.weights.balance[..., 0].mT
    torch.testing.assert_close(u.integers * u.scale, layer.weights.u * balance, rtol=1e-12, atol=1e-12)
    assert_same_integers(image, simulated["input"], shaped=False)
    v = assert_same_integers(v, simulated["v"], "v" in spec.shaped_stages)
    m = integer_hadamard(u, v, spec, layer.weights.m_feedback, layer.ranges)
    m = assert_same_integers(m, simulated["m"], "m" in spec.shaped_stages)
    expected = integer_output(m, layer.matrices, spec, y.shape[2:])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * float(y.abs().max()))


@pytest.mark.parametrize("c", [16, 48])
@pytest.mark.parametrize("name", SPECS)
def test_every_stage_takes_the_integers_of_the_simulated_path(name: str, c: int) -> None:
    assert_same_path(random_layer(SPECS[name], c, 5))


bits = st.integers(2, 8)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.builds(
        WinogradSpec,
        st.integers(2, 6),
        group_size=st.sampled_from([1, 4, 32, 64, "all"]),
        method=st.sampled_from(["groups", "per_tensor", "per_tap", "bqw_style", "fsq_style"]),
        act_scales=st.sampled_from(["dynamic", "static"]),
        m_scale=st.sampled_from(["tile", "tap"]),
        transform_bits=st.sampled_from([None, 8, 10]),
        input_bits=bits,
        v_bits=bits,
        u_bits=bits,
        m_bits=bits,
    ),
    c=st.integers(1, 70),
    k=st.integers(1, 9),
    size=st.tuples(st.integers(3, 13), st.integers(3, 13)),
    seed=st.integers(0, 2**32 - 1),
)
def test_so_does_any_layer_by_any_layout(spec: WinogradSpec, c: int, k: int, size: tuple[int, int], seed: int) -> None:
    assert_same_path(random_layer(spec, c, k, size, seed))


def test_static_scales_clamp_integers_to_their_range() -> None:
    layer = random_layer(replace(SPECS["static"], input_bits=6, v_bits=5, m_bits=4), 32, 4)
    assert layer.ranges is not None
    low = replace(layer, ranges=layer.ranges.map(lambda limit: limit / 2))
    u, image, v = integer_stages(low)
    m = integer_hadamard(u, v, low.spec, None, low.ranges)
    assert [int(stage.integers.abs().max()) for stage in (image, v, m)] == [31, 15, 7]
    assert all(float(stage.quotient.abs().max()) > int(stage.integers.abs().max()) + 1 for stage in (image, v, m))
    assert_same_path(low)


@pytest.mark.parametrize("c", [16, 48, 320])
def test_float32_moves_few_integers_by_one(c: int) -> None:
    layer = random_layer(SPECS["F(4,3)"], c, 3)
    y, simulated = simulate(layer, torch.float32)
    u, _, v = integer_stages(layer)
    moved = (simulated["v"].double() / v.scale - v.integers).abs()
    assert moved.max() < 1.001
    assert (moved > 0.5).double().mean() < 1e-3
    expected = integer_output(integer_hadamard(u, v, layer.spec), layer.matrices, layer.spec, y.shape[2:])
    assert sqnr_db(expected, y) > 50


def test_integers_span_their_range() -> None:
    layer = random_layer(SPECS["fewer bits"], 32, 4)
    u, image, v = integer_stages(layer)
    m = integer_hadamard(u, v, layer.spec)
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
    for spec in (WinogradSpec(4, v_bits=9), WinogradSpec(4, quantize_v=False)):
        with pytest.raises(ValueError, match="spec must quantize every stage to at most 8 bits"):
            integer_input(x, WinogradMatrices.from_scales(spec.transform(), dtype=torch.float64), spec)


def test_a_balance_is_taken_where_channels_are_balanced_and_nowhere_else() -> None:
    layer = random_layer(SPECS["balanced"], 4, 3)
    groups = replace(layer.spec, method="groups")
    for spec, balance, found in ((layer.spec, None, "none"), (groups, layer.weights.balance, "one")):
        message = f"balance must be given for method bqw_style and no other, found {found} for {spec.method}"
        with pytest.raises(ValueError, match=message):
            integer_input(layer.x, layer.matrices, spec, 1, None, balance)
        with pytest.raises(ValueError, match=message):
            integer_weights(layer.weight, layer.matrices, spec, balance)
