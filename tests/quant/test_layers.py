"""Quantized layers equal the float computation on fake-quantized inputs and weights, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tmpq_exp.config import Granularity, QuantConfig, QuantizerConfig
from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.attention_products import QuantAttentionProducts
from tmpq_exp.quant.layers import FLOAT, LayerSetting, QuantConv2d, QuantLinear
from tmpq_exp.quant.lru_cache import LRUCache
from tmpq_exp.quant.primitives import fake_quantize, integer_range
from tmpq_exp.quant.quantizer import ActQuantizer, Quantizer
from tmpq_exp.winograd.conv import WinogradMatrices, WinogradSpec, transform_weights, winograd_conv2d
from tmpq_exp.winograd.matrices import NetworkMatrices
from tmpq_exp.winograd.transform import closed_form_scales, standard_scales

BITS = (8, 5, 4)
CAP = 2**20


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(quantizer: ActQuantizer, x: Tensor) -> None:
    quantizer.start_observing()
    quantizer.observe(x, 10**6, torch.Generator().manual_seed(0))
    quantizer.finish_observing()


def by_hand(quantizer: Quantizer, rows: Tensor, bits: int) -> Tensor:
    index = quantizer.bit_choices.index(bits)
    scale, zero_point = (buffer[index][:, None] for buffer in (quantizer.scale, quantizer.zero_point))
    return fake_quantize(rows, scale, zero_point, *integer_range(bits, quantizer.config.symmetric))


def quant_conv(conv: nn.Conv2d, x: Tensor, cache: LRUCache | None = None, **arguments: object) -> QuantConv2d:
    layer = QuantConv2d(
        name="conv",
        cache=cache or LRUCache(CAP),
        float_layer=conv,
        weight_choices=BITS,
        act_choices=BITS,
        config=arguments.pop("config", QuantConfig()),
        winograd=arguments.pop("winograd", {}),
    )
    calibrated(layer.act_quantizer, x)
    layer.weight_quantizer.estimate(layer.weight_rows()[1])
    return layer


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, stride=2, padding=(0, 2), bias=False),
        nn.Conv2d(4, 6, (1, 5), dilation=2, groups=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
    ],
    ids=["plain", "strided", "grouped", "circular"],
)
@torch.no_grad()
def test_convolution(conv: nn.Conv2d) -> None:
    x = random(2, 4, 12, 12)
    layer = quant_conv(conv, x)
    assert torch.equal(layer(x), conv(x))
    for weight_bits, act_bits in ((8, 4), (4, 8), (FLOAT_BITS, 5), (5, FLOAT_BITS)):
        layer.setting = LayerSetting(weight_bits, act_bits)
        weight, y = conv.weight, x
        if weight_bits != FLOAT_BITS:
            weight = by_hand(layer.weight_quantizer, weight.flatten(1), weight_bits).view_as(weight)
        if act_bits != FLOAT_BITS:
            y = by_hand(layer.act_quantizer, x.reshape(1, -1), act_bits).view_as(x)
        if conv.padding_mode == "circular":
            expected = F.conv2d(F.pad(y, (1, 1, 1, 1), mode="circular"), weight, conv.bias)
        else:
            expected = F.conv2d(y, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("granularity", list(Granularity))
@torch.no_grad()
def test_linear(granularity: Granularity) -> None:
    linear, x = nn.Linear(6, 5), random(2, 7, 6)
    config = QuantConfig(weight=QuantizerConfig(granularity, group_size=3, symmetric=True))
    layer = QuantLinear(
        name="linear",
        cache=LRUCache(CAP),
        float_layer=linear,
        weight_choices=BITS,
        act_choices=BITS,
        config=config,
    )
    calibrated(layer.act_quantizer, x)
    quantizer, rows = layer.weight_rows()
    quantizer.estimate(rows)
    assert torch.equal(layer(x), linear(x))
    layer.setting = LayerSetting(4, 5)
    weight = by_hand(quantizer, linear.weight.reshape(rows.shape), 4).view_as(linear.weight)
    expected = F.linear(by_hand(layer.act_quantizer, x.reshape(1, -1), 5).view_as(x), weight, linear.bias)
    assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_a_layer_takes_the_scales_of_its_name() -> None:
    conv, x, spec = nn.Conv2d(4, 6, 3, padding=1), random(2, 4, 12, 12), WinogradSpec(4)
    closed, standard = (
        WinogradMatrices.from_scales(spec.transform(), scales(spec.transform()))
        for scales in (closed_form_scales, standard_scales)
    )
    results = []
    for matrices in (
        NetworkMatrices(closed, {"conv": standard, "other": closed}),
        NetworkMatrices(standard),
        NetworkMatrices(closed, {"other": standard}),
    ):
        layer = quant_conv(conv, x, winograd={4: (spec, matrices)})
        layer.setting = LayerSetting(8, 8, 4)
        results.append(layer(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("padding", "padding_mode"), [(0, "zeros"), ((2, 1), "zeros"), ("same", "zeros"), (1, "circular"), (2, "reflect")]
)
@torch.no_grad()
def test_winograd_convolution(padding: int | str | tuple[int, int], padding_mode: str) -> None:
    conv, x = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=padding_mode), random(2, 4, 11, 11)
    spec = WinogradSpec(4)
    matrices = WinogradMatrices.from_scales(spec.transform())
    layer = quant_conv(conv, x, winograd={4: (spec, NetworkMatrices(matrices))})
    layer.setting = LayerSetting(5, 8, 4)
    u = transform_weights(conv.weight, matrices, spec, 5)
    if padding_mode == "zeros":
        pair = {0: (0, 0), "same": (1, 1)}.get(padding, padding)
        expected = winograd_conv2d(x, u, conv.bias, matrices, spec, 8, pair)
    else:
        padded = F.pad(x, (padding,) * 4, mode=padding_mode)
        expected = winograd_conv2d(padded, u, conv.bias, matrices, spec, 8)
    y = layer(x)
    assert torch.equal(y, expected)
    assert y.shape == conv(x).shape
    assert F.mse_loss(y, conv(x)) < 0.1 * conv(x).square().mean()


@pytest.mark.parametrize("symmetric", [True, False])
@torch.no_grad()
def test_direct_and_winograd_quantize_the_input_alike(symmetric: bool) -> None:
    conv, x = nn.Conv2d(6, 4, 3, padding=1), F.silu(random(2, 6, 8, 8))
    grouped = QuantizerConfig(Granularity.PER_GROUP, group_size=4, symmetric=symmetric)
    spec = WinogradSpec(2, group_size=4, quantize_v=False, quantize_u=False, quantize_m=False)
    matrices = NetworkMatrices(WinogradMatrices.from_scales(spec.transform()))
    layer = quant_conv(conv, x, config=QuantConfig(grouped, grouped), winograd={2: (spec, matrices)})
    layer.setting = LayerSetting(FLOAT_BITS, 4, 0)
    direct = layer(x)
    layer.setting = LayerSetting(FLOAT_BITS, 4, 2)
    torch.testing.assert_close(layer(x), direct, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(direct, conv(x), atol=1e-2)


def products_layer(attention: Attention, x: Tensor, context: Tensor | None, **kwargs: Tensor) -> QuantAttentionProducts:
    layer = QuantAttentionProducts(
        "attention.products",
        LRUCache(CAP),
        attention.processor,
        attention.to_q.out_features,
        BITS,
        BITS,
        QuantizerConfig(),
    )
    attention.set_processor(layer)
    for quantizer in layer.act_quantizers():
        quantizer.start_observing()
    with layer.observing(lambda q, value: q.observe(value, 10**6, torch.Generator().manual_seed(0))):
        attention(x, context, **kwargs)
    for quantizer in layer.act_quantizers():
        quantizer.finish_observing()
    return layer


@pytest.mark.parametrize("kind", ["self", "cross", "masked", "image"])
@torch.no_grad()
def test_attention_products(kind: str) -> None:
    is_image = kind == "image"
    arguments = {"norm_num_groups": 2, "residual_connection": True, "rescale_output_factor": 2.0} if is_image else {}
    context_dim = 6 if kind == "cross" else None
    attention = Attention(8, context_dim, heads=2, dim_head=5, bias=True, **arguments).eval()
    x = random(3, 8, 4, 4) if is_image else random(3, 9, 8)
    context = random(3, 4, 6, seed=1) if kind == "cross" else None
    kwargs = {"attention_mask": torch.where(random(6, 1, 9) > 1, -1e4, 0.0)} if kind == "masked" else {}
    expected_float = attention(x, context, **kwargs)
    layer = products_layer(attention, x, context, **kwargs)
    assert torch.equal(attention(x, context, **kwargs), expected_float)

    def quantized(quantizer: ActQuantizer, value: Tensor, bits: int) -> Tensor:
        return value if bits == FLOAT_BITS else by_hand(quantizer, value.reshape(1, -1), bits).view_as(value)

    def explicit(softmax_bits: int, act_bits: int) -> Tensor:
        tokens = attention.group_norm(x).flatten(2).transpose(1, 2) if is_image else x
        source = tokens if context is None else context
        q, k, v = (
            quantized(quantizer, projection(value), act_bits).unflatten(-1, (2, 5)).transpose(1, 2)
            for quantizer, projection, value in (
                (layer.q, attention.to_q, tokens),
                (layer.k, attention.to_k, source),
                (layer.v, attention.to_v, source),
            )
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(5)
        if kind == "masked":
            scores = scores + kwargs["attention_mask"].unflatten(0, (3, 2))
        heads = quantized(layer.softmax, scores.softmax(-1), softmax_bits) @ v
        out = attention.to_out[0](heads.transpose(1, 2).flatten(2))
        return (out.transpose(1, 2).reshape(x.shape) + x) / 2 if is_image else out

    for softmax_bits, act_bits in ((8, 5), (4, FLOAT_BITS), (FLOAT_BITS, 4)):
        layer.setting = LayerSetting(softmax_bits, act_bits)
        # A score that rounds the other way in the last bit moves one softmax entry by one step
        difference = (attention(x, context, **kwargs) - explicit(softmax_bits, act_bits)).abs()
        assert difference.median() < 1e-6
        assert difference.max() < 0.1
    layer.setting = FLOAT
    torch.testing.assert_close(explicit(FLOAT_BITS, FLOAT_BITS), expected_float, atol=1e-5, rtol=1e-5)
    assert torch.equal(attention(x, context, **kwargs), expected_float)


def test_observing_ends_also_after_an_exception() -> None:
    layer = quant_conv(nn.Conv2d(2, 2, 3), random(1, 2, 5, 5))
    seen: list[Tensor] = []
    with pytest.raises(RuntimeError), layer.observing(lambda _, x: seen.append(x)):
        layer(random(1, 3, 5, 5))
    assert len(seen) == 1
    assert layer.observer is None


@settings(deadline=None)
@given(st.integers(0, 100), st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), max_size=30))
def test_cache_holds_its_cap_and_drops_the_least_recently_used(cap: int, requests: list[tuple[int, int]]) -> None:
    cache, model, sizes = LRUCache(4 * cap), list[int](), dict[int, int]()
    misses = 0
    for name, size in requests:
        size = sizes.setdefault(name, size)
        value = cache.get((str(name), 8, 0), lambda name=name, size=size: torch.full((size,), float(name)))
        assert torch.equal(value, torch.full((size,), float(name)))
        if name in model:
            model.remove(name)
        else:
            misses += 1
        if size <= cap:
            model.append(name)
        while sum(sizes[n] for n in model) > cap:
            model.pop(0)
        assert cache.num_misses == misses
        assert cache.num_bytes == 4 * sum(sizes[n] for n in model) <= 4 * cap
    cache.clear()
    assert cache.num_bytes == 0


@torch.no_grad()
def test_switching_bits_quantizes_each_choice_once() -> None:
    x, cache = random(1, 4, 6, 6), LRUCache(CAP)
    layer = quant_conv(nn.Conv2d(4, 4, 3), x, cache)
    for _ in range(3):
        for bits in BITS:
            layer.setting = LayerSetting(bits, 8)
            layer(x)
    assert cache.num_misses == len(BITS)
    nothing = LRUCache(0)
    layer.cache = nothing
    layer(x)
    layer(x)
    assert nothing.num_misses == 2
    assert nothing.num_bytes == 0
