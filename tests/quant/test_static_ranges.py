"""Static ranges of a supernet: they are those of its float forward, layers use them, and a file gives them back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from tests.quant.conftest import random
from tmpq_exp.config import Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.layers import LayerSetting, QuantConv2d
from tmpq_exp.quant.lru_cache import LRUCache
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.quant.static_ranges import (
    load_ranges,
    measuring_ranges_for_all_bits,
    ranges_state,
    split_state,
    winograd_layers,
)
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.winograd.conv import StaticRanges, WinogradSpec, measure_ranges, transform_weights, winograd_conv2d
from tmpq_exp.winograd.matrices import NetworkMatrices, WinogradMatrices
from tmpq_exp.winograd.transform import closed_form_scales

if TYPE_CHECKING:
    from tests.quant.conftest import Case

AFFINE = QuantConfig(act=QuantizerConfig(Granularity.PER_GROUP, symmetric=False))
"""Activations that are quantized dynamically, with zero points, before a Winograd layer with dynamic scales."""


def of_spec(spec: WinogradSpec) -> WinogradMatrices:
    return WinogradMatrices.from_scales(spec.transform(), closed_form_scales(spec.transform()))


def winograd_layer(conv: nn.Conv2d, spec: WinogradSpec, ranges: dict[tuple[str, int], StaticRanges]) -> QuantConv2d:
    return QuantConv2d(
        name="conv",
        cache=LRUCache(2**20),
        float_layer=conv,
        weight_choices=(8,),
        act_choices=(8, 6),
        config=AFFINE,
        winograd={spec.m: (spec, NetworkMatrices(of_spec(spec)))},
        ranges=ranges,
    )


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("tile", [2, 4])
@torch.no_grad()
def test_a_layer_is_the_convolution_with_its_ranges(tile: int, mode: str) -> None:
    conv, x = nn.Conv2d(5, 6, 3, padding=1, padding_mode=mode), random(3, 5, 12, 12)
    spec = WinogradSpec(tile, act_scales="static")
    ranges: dict[tuple[str, int], StaticRanges] = {}
    layer = winograd_layer(conv, spec, ranges)
    found = ranges["conv", tile] = layer.measure_ranges(x, tile)
    padding = (1, 1)
    padded = x
    if mode == "circular":
        padded, padding = nn.functional.pad(x, (1, 1, 1, 1), mode=mode), (0, 0)
    plain = transform_weights(conv.weight, of_spec(spec), spec, FLOAT_BITS)
    expected = measure_ranges(padded, plain, of_spec(spec), spec, FLOAT_BITS, padding)
    for stage in ("input", "v", "m"):
        assert torch.equal(getattr(found, stage), getattr(expected, stage))
    layer.setting = LayerSetting(8, 6, tile)
    weights = transform_weights(conv.weight, of_spec(spec), spec, 8)
    assert torch.equal(
        layer(2 * x), winograd_conv2d(2 * padded, weights, conv.bias, of_spec(spec), spec, 6, padding, found)
    )
    ranges.clear()
    assert not torch.equal(
        layer(x), winograd_conv2d(padded, weights, conv.bias, of_spec(spec), spec, 6, padding, found)
    )


@torch.no_grad()
def test_ranges_of_v_balance_the_channels() -> None:
    conv, spec = nn.Conv2d(8, 6, 3, padding=1), WinogradSpec(4, act_scales="static", method="bqw_style")
    x = random(4, 8, 12, 12) * torch.logspace(-2, 1, 8)[:, None, None]  # channels of very different ranges
    ranges: dict[tuple[str, int], StaticRanges] = {}
    layer = winograd_layer(conv, spec, ranges)
    found = layer.measure_ranges(x, 4)
    by_channel = WinogradSpec(4, group_size=1)
    plain = transform_weights(conv.weight, of_spec(spec), by_channel, FLOAT_BITS)
    torch.testing.assert_close(found.v, measure_ranges(x, plain, of_spec(spec), by_channel, FLOAT_BITS, (1, 1)).v)
    layer.setting = LayerSetting(8, 8, 4)
    ranges["conv", 4] = found
    layer.cache.clear()
    weights = transform_weights(conv.weight, of_spec(spec), spec, 8, found.v)
    assert weights.balance is not None
    grouped = StaticRanges(found.input, (found.v / weights.balance).amax(1, keepdim=True).expand_as(found.v), found.m)
    y = layer(x)
    assert torch.equal(y, winograd_conv2d(x, weights, conv.bias, of_spec(spec), spec, 8, (1, 1), grouped))
    assert sqnr_db(conv(x), y) > 10


def static(case: Case, *tiles: int) -> Supernet:
    supernet = case.calibrated()
    specs = [WinogradSpec(m, act_scales="static") for m in tiles]
    supernet.set_winograd({spec.m: (spec, closed_form_scales(spec.transform())) for spec in specs})
    return supernet


def measured(case: Case, supernet: Supernet) -> dict[tuple[str, int], StaticRanges]:
    with measuring_ranges_for_all_bits(supernet) as found:
        assert torch.equal(case.run(supernet), case.run(case.network))  # all is float
    return dict(found)


def test_a_supernet_measures_every_eligible_layer_at_every_tile(case: Case) -> None:
    supernet = static(case, 2, 4)
    found = measured(case, supernet)
    eligible = {shape.name for i, shape in enumerate(case.layers) if case.is_eligible(i)}
    assert found.keys() == set(winograd_layers(supernet)) == {(name, m) for name in eligible for m in (2, 4)}
    with supernet.subnet(case.uniform(8, 4)):
        dynamic = case.run(supernet)
        supernet.set_ranges(found)
        y = case.run(supernet)
        assert not torch.equal(y, dynamic)
        assert sqnr_db(case.run(case.network), y) > 5
        supernet.set_ranges({})
        assert torch.equal(case.run(supernet), dynamic)


def test_more_states_widen_ranges(case: Case) -> None:
    supernet = static(case, 4)
    few = measured(case, supernet)
    with measuring_ranges_for_all_bits(supernet) as found:
        case.run(supernet, 4)
        case.run(supernet, 2)
    for key, ranges in few.items():
        assert (found[key].v >= ranges.v - 1e-4).all()


def test_a_file_gives_ranges_back(case: Case) -> None:
    supernet = static(case, 4)
    found = measured(case, supernet)
    quantizers, state = split_state(supernet.quantizer_state() | ranges_state(found))
    assert quantizers.keys() == supernet.quantizer_state().keys()
    assert len(state) == 3 * len(found)
    load_ranges(supernet, state, "some.file")
    assert all(torch.equal(supernet.ranges[key].m, ranges.m) for key, ranges in found.items())


def test_wrong_ranges_are_refused(case: Case) -> None:
    supernet = static(case, 4)
    state = ranges_state(measured(case, supernet))
    key = sorted(state)[-1]
    wrong: dict[str, dict[str, Tensor]] = {
        f"holds no {key}: winograd.act_scales is static": {k: v for k, v in state.items() if k != key},
        f"{key} has shape": state | {key: state[key][:, :1]},
        "must hold finite numbers": state | {key: state[key] * float("nan")},
        "must hold finite numbers from 0": state | {key: -state[key] - 1},
        "belongs to no Winograd layer with static scales": state | {"winograd.f6.nowhere.v": state[key]},
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=rf"some\.file.*{message}"):
            load_ranges(supernet, tensors, "some.file")
        assert not supernet.ranges
    spec = WinogradSpec(4)
    supernet.set_winograd({4: (spec, closed_form_scales(spec.transform()))})
    with pytest.raises(ValueError, match="belongs to no Winograd layer with static scales"):
        load_ranges(supernet, state, "some.file")
    load_ranges(supernet, {}, "some.file")
