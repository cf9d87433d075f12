"""Which elements share a scale, by method, group size and stage; static scales; bits of each stage; memory."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.winograd.conv import (
    StaticRanges,
    WinogradMatrices,
    WinogradSpec,
    channel_balance,
    measure_ranges,
    transform_weights,
    winograd_conv2d,
)
from tmpq_exp.winograd.spec import ALL, FLOAT_STAGES, Layout, Method
from tmpq_exp.winograd.stages import dynamic_scale, static_range
from tmpq_exp.winograd.transform import WinogradScales, closed_form_scales


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def winograd(
    x: Tensor, weight: Tensor, spec: WinogradSpec, bits: int = 8, scales: WinogradScales | None = None
) -> Tensor:
    matrices = WinogradMatrices.from_scales(spec.transform(), scales, x.dtype, spec.transform_bits)
    return winograd_conv2d(x, transform_weights(weight, matrices, spec, bits), None, matrices, spec, bits, 1)


def db(x: Tensor, weight: Tensor, spec: WinogradSpec, **arguments: int) -> float:
    return sqnr_db(F.conv2d(x, weight, padding=1), winograd(x, weight, spec, **arguments))


@pytest.mark.parametrize(
    ("spec", "stage", "layout"),
    [
        (WinogradSpec(4), "input", Layout(1, 32, (2, 3))),
        (WinogradSpec(4), "v", Layout(1, 32)),
        (WinogradSpec(4), "u", Layout(2, 32)),
        (WinogradSpec(4, group_size=128), "m", Layout(1, 3, (0,))),
        (WinogradSpec(6, group_size="all"), "m", Layout(1, ALL, (0,))),
        (WinogradSpec(4, m_scale="tap"), "m", Layout(1, 32)),
        (WinogradSpec(4, method="per_tap"), "u", Layout(2, ALL, (1,))),
        (WinogradSpec(4, method="per_tap"), "m", Layout(1, ALL, (3,))),
        (WinogradSpec(4, method="per_tensor"), "v", Layout(1, ALL, (0, 3))),
        (WinogradSpec(4, method="per_tensor"), "u", Layout(2, ALL, (0, 1))),
    ],
)
def test_layout(spec: WinogradSpec, stage: str, layout: Layout) -> None:
    assert spec.layout(stage) == layout


@pytest.mark.parametrize("c", [16, 48, 320])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256, "all"])
def test_scales_of_ragged_groups_are_the_largest_of_their_members(c: int, group_size: int | str) -> None:
    v = random(36, c, 2, 3)
    spec = WinogradSpec(4, group_size=group_size)
    scale = dynamic_scale(v, "v", spec, 8)
    size = spec.group_channels or c
    for start in range(0, c, size):
        part = slice(start, start + size)
        expected = v[:, part].abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(scale[:, part], expected.expand_as(v[:, part]))
    static = static_range(v, "v", spec)
    assert static.shape == (36, c, 1, 1)
    torch.testing.assert_close(static * torch.ones_like(v), (scale * 127).amax((2, 3), keepdim=True).expand_as(v))


@pytest.mark.parametrize("method", [*Method])
@pytest.mark.parametrize("c", [16, 48, 320])
def test_every_method_takes_ragged_channels(method: Method, c: int) -> None:
    x, weight = random(2, c, 9, 10), random(5, c, 3, 3, seed=1)
    spec = WinogradSpec(2, method=method.value)
    assert 20 < db(x, weight, spec) < 45
    exact = winograd(x, weight, replace(spec, **FLOAT_STAGES))
    torch.testing.assert_close(exact, F.conv2d(x, weight, padding=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [*Method])
def test_an_image_does_not_feel_its_batch(method: Method) -> None:
    x, weight = random(3, 8, 12, 12), random(4, 8, 3, 3, seed=1)
    x[1:] *= 100
    spec = WinogradSpec(4, method=method.value, quantize_v=False)  # quantized x would put V on ties
    torch.testing.assert_close(winograd(x, weight, spec)[:1], winograd(x[:1], weight, spec), rtol=1e-9, atol=1e-9)


def test_finer_scales_are_better_on_uneven_channels() -> None:
    x, weight = random(2, 64, 12, 12), random(32, 64, 3, 3, seed=1)
    x *= torch.logspace(-1, 1, 64, dtype=torch.float64)[:, None, None]
    figures = [db(x, weight, replace(WinogradSpec(4), **change)) for change in (
        {"method": "per_tensor"}, {"method": "per_tap"}, {"group_size": 32})]  # fmt: skip
    assert figures == sorted(figures)
    assert figures[2] > figures[0] + 5
    sizes = [db(x, weight, WinogradSpec(4, group_size=g, quantize_m=False)) for g in ("all", 32, 8)]
    assert sizes == sorted(sizes)


def test_balancing_helps_uneven_weights_and_follows_its_formula() -> None:
    x, weight = random(2, 32, 12, 12), random(16, 32, 3, 3, seed=1)
    weight *= torch.logspace(-1, 1, 32, dtype=torch.float64)[:, None, None]
    plain, balanced = (db(x, weight, WinogradSpec(4, method=m, quantize_m=False)) for m in ("groups", "bqw_style"))
    assert balanced > plain + 1
    u, t = random(4, 5, 6), random(4, 6, seed=1).abs()
    omega = channel_balance(u, t)
    r = u.abs().amax(1)
    for tap in range(4):
        for channel in range(6):
            expected = (t[tap, channel] * r[tap].max() / (r[tap, channel] * t[tap].max())) ** 0.5
            assert float(omega[tap, channel]) == pytest.approx(float(expected))


def test_bits_of_each_stage_and_a_float_layer_is_float() -> None:
    x, weight = random(2, 16, 12, 12), random(8, 16, 3, 3, seed=1)
    float_spec = WinogradSpec(4, **FLOAT_STAGES)
    for stage, bits in (("input", "input_bits"), ("v", "v_bits"), ("u", "u_bits"), ("m", "m_bits")):
        one = replace(float_spec, **{f"quantize_{stage}": True})  # type: ignore[arg-type]
        ten, eight = (db(x, weight, replace(one, **{bits: b})) for b in (10, 8))  # type: ignore[arg-type]
        assert ten - eight == pytest.approx(12, abs=1.5)
    spec = WinogradSpec(4, input_bits=8, v_bits=8, u_bits=8, m_bits=FLOAT_BITS)
    assert db(x, weight, spec, bits=FLOAT_BITS) > 200


def test_static_scales_are_the_dynamic_ones_of_the_images_they_were_measured_on() -> None:
    x, weight = random(4, 40, 12, 12), random(8, 40, 3, 3, seed=1)
    for spec in (WinogradSpec(4), WinogradSpec(4, m_scale="tap"), WinogradSpec(4, shaped_stages=("v", "m"))):
        matrices = WinogradMatrices.from_scales(spec.transform(), dtype=torch.float64)
        weights = transform_weights(weight, matrices, spec, 8)
        halves = [measure_ranges(part, weights, matrices, spec, 8, 1) for part in (x[:2], x[2:])]
        ranges = halves[0].union(halves[1])
        assert ranges.input.shape == (1, 40, 1, 1)
        assert float(ranges.input.max()) == float(x.abs().max())
        reference = F.conv2d(x, weight, padding=1)
        static = sqnr_db(reference, winograd_conv2d(x, weights, None, matrices, spec, 8, 1, ranges))
        dynamic = sqnr_db(reference, winograd(x, weight, spec))
        assert dynamic - 8 < static < dynamic + 0.5
        assert not torch.equal(
            winograd_conv2d(3 * x, weights, None, matrices, spec, 8, 1, ranges),
            3 * winograd_conv2d(x, weights, None, matrices, spec, 8, 1, ranges),
        )


def test_static_scales_clamp() -> None:
    x, weight = torch.ones(1, 1, 8, 8, dtype=torch.float64), random(1, 1, 3, 3, seed=1)
    spec = WinogradSpec(4, quantize_v=False, quantize_u=False, quantize_m=False)
    matrices = WinogradMatrices.from_scales(spec.transform(), dtype=torch.float64)
    weights = transform_weights(weight, matrices, spec, 8)
    ones = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    y = winograd_conv2d(5 * x, weights, None, matrices, spec, 8, 1, StaticRanges(ones, ones, ones))
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=1), rtol=1e-9, atol=1e-9)


def test_columns_may_have_scales_of_their_own() -> None:
    x, weight = random(2, 16, 12, 12), random(8, 16, 3, 3, seed=1)
    closed = closed_form_scales(WinogradSpec(4).transform())
    other = tuple(s * f for s, f in zip(closed.s_g, (1, 2, 3, 4, 5, 6), strict=True))
    scales = WinogradScales(closed.s_b, closed.s_g, (closed.s_b, other))
    exact = winograd(x, weight, WinogradSpec(4, **FLOAT_STAGES), scales=scales)
    torch.testing.assert_close(exact, F.conv2d(x, weight, padding=1), rtol=1e-10, atol=1e-10)
    flipped = WinogradScales(closed.s_b, other, (closed.s_b, closed.s_g))
    tie_free = WinogradSpec(4, quantize_input=False)
    turned = winograd(x.mT.contiguous(), weight.mT.contiguous(), tie_free, scales=flipped).mT
    torch.testing.assert_close(winograd(x, weight, tie_free, scales=scales), turned, rtol=1e-9, atol=1e-9)
    assert db(x, weight, WinogradSpec(4)) > sqnr_db(
        F.conv2d(x, weight, padding=1), winograd(x, weight, WinogradSpec(4), scales=scales)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "best"}, "method must be one of groups, per_tensor, per_tap, bqw_style, fsq_style, found 'best'"),
        ({"m_scale": "image"}, "m_scale must be tile or tap, found 'image'"),
        ({"transform_bits": 3}, r"transform_bits must be in 4\.\.16 or None"),
        ({"shaped_stages": ("x",)}, "shaped_stages must be a list of u, v, m"),
        ({"shaped_stages": "uv"}, "shaped_stages must be a list of u, v, m"),
        ({"shaped_stages": ("u",), "method": "bqw_style"}, "shaped_stages of method bqw_style may hold m only"),
        ({"pixel_correlation": 1.0}, r"pixel_correlation must be in \[0, 1\), found 1.0"),
        ({"v_bits": 17}, "v_bits: bits must be in 2..16, found 17"),
        ({"group_size": "some"}, "group_size must be an integer of at least 1"),
    ],
)
def test_a_bad_spec_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WinogradSpec(4, **change)  # type: ignore[arg-type]


def test_a_spec_survives_json_and_old_ones_still_load() -> None:
    spec = WinogradSpec(4, points=("0", "1", "-1", "2", "-2", "inf"), group_size="all", shaped_stages=["m", "u"])
    assert WinogradSpec(**asdict(spec)) == spec
    assert WinogradSpec(**{**asdict(spec), "shaped_stages": list(spec.shaped_stages)}) == spec
    old = {"m": 4, "r": 3, "points": "standard", "group_size": 32, "m_bits": 8}
    assert WinogradSpec(**old) == WinogradSpec(4)  # type: ignore[arg-type]


@pytest.mark.parametrize("shaped_stages", [(), ("u", "v", "m")])
def test_memory_stays_below_eight_times_input_and_output(shaped_stages: tuple[str, ...]) -> None:
    x, weight = torch.randn(16, 64, 32, 32), torch.randn(64, 64, 3, 3)
    spec = WinogradSpec(4, shaped_stages=shaped_stages)
    matrices = WinogradMatrices.from_scales(spec.transform())
    weights = transform_weights(weight, matrices, spec, 8)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = winograd_conv2d(x, weights, None, matrices, spec, 8, 1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert y.nbytes <= peak <= 8 * (x.nbytes + y.nbytes) - x.nbytes
