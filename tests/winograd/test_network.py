"""Networks with quantized convolutions: what runs as Winograd, what stays direct and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.network import (
    QuantizedDirect,
    QuantizedWinograd,
    eligible_layers,
    measuring_ranges,
    quantize_convolutions,
)
from tmpq_exp.winograd.scales import ScaleSet
from tmpq_exp.winograd.spec import FLOAT_STAGES
from tmpq_exp.winograd.transform import closed_form_scales, multiplications_ratio, standard_scales

pytestmark = pytest.mark.usefixtures("_seed")


@pytest.fixture
def _seed() -> None:
    torch.manual_seed(0)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 48, 3, stride=2, padding=1),
        nn.Sequential(nn.Conv2d(48, 20, 3, padding="same", padding_mode="circular"), nn.Conv2d(20, 20, 3, groups=4)),
        nn.Conv2d(20, 8, 3, dilation=2, bias=False),
        nn.Conv2d(8, 8, 1),
    ).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 20, 22)


@torch.no_grad()
def test_float_bits_give_the_float_network() -> None:
    float_network, x = network(), images()
    spec = WinogradSpec(4, **FLOAT_STAGES)
    converted = quantize_convolutions(float_network, spec, weight_bits=FLOAT_BITS, act_bits=FLOAT_BITS)
    torch.testing.assert_close(converted.network(x), float_network(x), rtol=1e-4, atol=1e-4)
    assert isinstance(float_network[0], nn.Conv2d)


@torch.no_grad()
def test_eligible_layers_run_as_winograd_and_the_others_say_why() -> None:
    float_network, x = network(), images()
    converted = quantize_convolutions(float_network, WinogradSpec(4))
    assert converted.winograd_layers == ("0", "3.0")
    assert converted.direct_layers == {
        "2": "stride 2x2, needs 1x1",
        "3.1": "groups 4, needs 1",
        "4": "dilation 2x2, needs 1x1",
        "5": "kernel 1x1, needs 3x3",
    }
    assert converted.summary().startswith("2 of 6 convolutions run as Winograd; direct: 1 with stride 2x2, needs 1x1;")
    assert isinstance(converted.network.get_submodule("3.0"), QuantizedWinograd)
    assert isinstance(converted.network.get_submodule("3.1"), QuantizedDirect)
    assert 15 < sqnr_db(float_network(x), converted.network(x)) < 45
    eligible, reasons = eligible_layers(float_network)
    assert [layer.name for layer in eligible] == list(converted.winograd_layers)
    assert eligible[1].padding == (1, 1)
    assert reasons == converted.direct_layers


@torch.no_grad()
def test_the_direct_baseline_is_better_than_winograd() -> None:
    float_network, x = network(), images()
    figures = [
        sqnr_db(float_network(x), quantize_convolutions(float_network, spec, group_size=size).network(x))
        for spec, size in ((None, 16), (None, 0), (WinogradSpec(6), 16))
    ]
    assert figures[0] > 35
    assert figures[0] >= figures[1] - 0.5 > figures[2]


@torch.no_grad()
@pytest.mark.parametrize("method", ["groups", "per_tensor", "per_tap", "bqw_style", "fsq_style"])
def test_every_method_runs(method: str) -> None:
    float_network, x = network(), images()
    converted = quantize_convolutions(float_network, WinogradSpec(2, method=method)).network
    assert sqnr_db(float_network(x), converted(x)) > 20


@torch.no_grad()
def test_layers_take_their_own_scales() -> None:
    x, spec = images(), WinogradSpec(4)
    closed, standard = (f(spec.transform()) for f in (closed_form_scales, standard_scales))
    float_network = network()
    own = quantize_convolutions(float_network, spec, ScaleSet(closed, {"3.0": standard})).network
    for name, scales in (("0", closed), ("3.0", standard)):
        alike = quantize_convolutions(float_network, spec, scales).network
        y = x if name == "0" else torch.randn(1, 48, 9, 9)
        assert torch.equal(own.get_submodule(name)(y), alike.get_submodule(name)(y))


@torch.no_grad()
def test_measured_ranges_make_scales_static() -> None:
    float_network, x = network(), images()
    converted = quantize_convolutions(float_network, WinogradSpec(4)).network
    dynamic = converted(x)
    with measuring_ranges(converted):
        assert torch.equal(converted(x), dynamic)
    static = converted(x)
    assert not torch.equal(static, dynamic)
    assert sqnr_db(float_network(x), static) > 12
    assert not torch.allclose(converted(50 * x), converted(100 * x), rtol=1e-3)
    layer = converted.get_submodule("0")
    clipped = layer(100 * x) - layer.conv.bias[:, None, None]
    assert float(clipped.abs().max()) < 20 * float(float_network[0](x).abs().max())
    with measuring_ranges(converted):
        converted(100 * x)
    assert float(layer(100 * x).abs().max()) > 50 * float(float_network[0](x).abs().max())


@torch.no_grad()
def test_a_network_moves_as_a_whole() -> None:
    float_network, x = network().double(), images().double()
    spec = WinogradSpec(4, shaped_stages=("u", "v", "m"))
    converted = quantize_convolutions(float_network.float(), spec).network
    with measuring_ranges(converted):
        converted(x.float())
    y = converted.double()(x)
    assert y.dtype == torch.float64
    assert sqnr_db(float_network.double()(x), y) > 15


def test_an_ineligible_layer_is_refused_by_name() -> None:
    conv = nn.Conv2d(4, 4, 3, stride=2)
    spec = WinogradSpec(4)
    with pytest.raises(ValueError, match=r"layer 'down' cannot run as F\(4,3\): stride 2x2, needs 1x1"):
        QuantizedWinograd("down", conv, spec, closed_form_scales(spec.transform()), 8, 8)


BORDERS = [(2, 8, 8, 2.25), (4, 8, 8, 4.0), (6, 6, 6, 5.0625), (6, 8, 8, 2.25), (4, 7, 9, 63 * 9 / (6 * 36))]


@pytest.mark.parametrize(("m", "height", "width", "expected"), BORDERS)
def test_border_tiles_count_whole(m: int, height: int, width: int, expected: float) -> None:
    assert multiplications_ratio(height, width, m) == pytest.approx(expected)
