"""A network whose convolutions are quantized: Winograd where a layer is eligible, direct and group-wise elsewhere."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.primitives import fake_quantize_groups
from tmpq_exp.winograd.conv import (
    StaticRanges,
    WinogradSpec,
    measure_ranges,
    transform_weights,
    winograd_conv2d,
)
from tmpq_exp.winograd.scales import ConvWeight, ScaleSet, as_scale_set, fsq_style_scales
from tmpq_exp.winograd.spec import ALL, Method
from tmpq_exp.winograd.transform import WinogradScales, closed_form_scales, ineligible_reason


@dataclass(frozen=True)
class Conversion:
    """A network with quantized convolutions, and which of them are Winograd.

    Args:
        network: The converted copy.
        winograd_layers: Names of the layers that run as F(m, r).
        direct_layers: Why each other convolution stayed direct, by name.
    """

    network: nn.Module
    winograd_layers: tuple[str, ...]
    direct_layers: dict[str, str]

    def summary(self) -> str:
        """One sentence: how many layers run as Winograd, and why the others do not."""
        total = len(self.winograd_layers) + len(self.direct_layers)
        text = f"{len(self.winograd_layers)} of {total} convolutions run as Winograd"
        if not self.direct_layers:
            return text
        reasons = Counter(self.direct_layers.values()).most_common()
        return f"{text}; direct: " + "; ".join(f"{count} with {reason}" for reason, count in reasons)


def eligible_layers(network: nn.Module, r: int = 3) -> tuple[list[ConvWeight], dict[str, str]]:
    """A network's eligible convolutions, and why each other one is not eligible, by name."""
    eligible, reasons = [], {}
    for name, conv in _convolutions(network):
        reason = _ineligible(conv, r)
        if reason is None:
            eligible.append(ConvWeight(name, conv.weight, _padding(conv)))
        else:
            reasons[name] = reason
    return eligible, reasons


def quantize_convolutions(
    network: nn.Module,
    spec: WinogradSpec | None,
    scales: WinogradScales | ScaleSet | None = None,
    *,
    weight_bits: int = 8,
    act_bits: int = 8,
    group_size: int = 32,
    seed: int = 0,
) -> Conversion:
    """A copy of a network with every convolution quantized; weights are shared where they are not transformed.

    Args:
        network: In eval mode, batch norms folded or not; never changed.
        spec: F(m, r) of eligible layers; None leaves all of them direct, the W8A8 baseline.
        scales: Closed form if None. Method ``fsq_style`` finds its own from noise where none are given.
        weight_bits, act_bits: 2..16, or ``FLOAT_BITS``.
        group_size: Channels that share a scale in direct layers, at least 1, or ``ALL``.
        seed: Of the noise that ``fsq_style`` measures on.
    """
    converted = copy.deepcopy(network)
    reasons: dict[str, str] = {}
    names: list[str] = []
    for name, conv in list(_convolutions(converted)):
        reason = "no tile chosen" if spec is None else _ineligible(conv, spec.r)
        if spec is None or reason is not None:
            reasons[name] = str(reason)
            layer: nn.Module = QuantizedDirect(conv, weight_bits, act_bits, group_size)
        else:
            names.append(name)
            layer = QuantizedWinograd(
                name, conv, spec, _scales_of(name, conv, spec, scales, seed), weight_bits, act_bits
            )
        parent, _, child = name.rpartition(".")
        setattr(converted.get_submodule(parent), child, layer)
    return Conversion(converted.eval(), tuple(names), reasons)


def _scales_of(
    name: str, conv: nn.Conv2d, spec: WinogradSpec, scales: WinogradScales | ScaleSet | None, seed: int
) -> WinogradScales:
    if scales is not None:
        return as_scale_set(scales).of(name)
    if spec.method == Method.FSQ_STYLE:
        return fsq_style_scales(ConvWeight(name, conv.weight, _padding(conv)), spec, seed)
    return closed_form_scales(spec.transform())


class QuantizedWinograd(nn.Module):
    """An eligible convolution as quantized F(m, r); activation scales are dynamic until ranges were measured.

    Args:
        name: Of the layer, for messages.
        conv: The float layer.
        spec: The stages.
        scales: Of the transforms.
        weight_bits, act_bits: 2..16, or ``FLOAT_BITS``.
    """

    def __init__(
        self,
        name: str,
        conv: nn.Conv2d,
        spec: WinogradSpec,
        scales: WinogradScales,
        weight_bits: int,
        act_bits: int,
    ) -> None:
        super().__init__()
        reason = _ineligible(conv, spec.r)
        if reason is not None:
            raise ValueError(f"layer {name!r} cannot run as F({spec.m},{spec.r}): {reason}")
        self.conv, self.spec, self.act_bits = conv, spec, act_bits
        self.matrices = ScaleSet(scales).matrices(spec).to(device=conv.weight.device)
        with torch.no_grad():
            self.weights = transform_weights(conv.weight, self.matrices, spec, weight_bits)
        self.ranges: StaticRanges | None = None
        self.measuring = False

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedWinograd:
        """Move, as ``to`` does, and take along what is no parameter or buffer."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.matrices, self.weights = self.matrices.map(fn), self.weights.map(fn)
        self.ranges = None if self.ranges is None else self.ranges.map(fn)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, K, H', W')``."""
        x, padding = _padded(self.conv, x)
        if self.measuring:
            found = measure_ranges(x, self.weights, self.matrices, self.spec, self.act_bits, padding)
            self.ranges = found if self.ranges is None else self.ranges.union(found)
        ranges = None if self.measuring else self.ranges
        return winograd_conv2d(
            x, self.weights, self.conv.bias, self.matrices, self.spec, self.act_bits, padding, ranges
        )


class QuantizedDirect(nn.Module):
    """A convolution with weights and input quantized in groups of channels, the input dynamically.

    Args:
        conv: The float layer; its weights stay, a quantized copy is used.
        weight_bits, act_bits: 2..16, or ``FLOAT_BITS``.
        group_size: Channels that share a scale, at least 1, or ``ALL``; a short last group is legal.
    """

    def __init__(self, conv: nn.Conv2d, weight_bits: int, act_bits: int, group_size: int) -> None:
        super().__init__()
        self.conv, self.act_bits, self.group_size = conv, act_bits, group_size
        weight = conv.weight.detach().clone()
        if weight_bits != FLOAT_BITS:
            weight = fake_quantize_groups(weight, 1, self._size(weight), (2, 3), weight_bits)
        self.register_buffer("weight", weight, persistent=False)

    def _size(self, x: Tensor) -> int:
        return x.shape[1] if self.group_size == ALL else self.group_size

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, K, H', W')``."""
        if self.act_bits != FLOAT_BITS:
            x = fake_quantize_groups(x.clone(), 1, self._size(x), (2, 3), self.act_bits)
        y: Tensor = self.conv._conv_forward(x, self.get_buffer("weight"), self.conv.bias)
        return y


@contextmanager
def measuring_ranges(network: nn.Module) -> Iterator[None]:
    """Forwards inside measure static ranges of every Winograd layer, which then uses them instead of dynamic scales."""
    layers = [layer for layer in network.modules() if isinstance(layer, QuantizedWinograd)]
    for layer in layers:
        layer.ranges, layer.measuring = None, True
    try:
        yield
    finally:
        for layer in layers:
            layer.measuring = False


def _convolutions(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            yield name, module


def _ineligible(conv: nn.Conv2d, r: int) -> str | None:
    kernel, stride, dilation = ((v[0], v[1]) for v in (conv.kernel_size, conv.stride, conv.dilation))
    return ineligible_reason(kernel, stride, dilation, conv.groups, r)


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    left, _, top, _ = conv._reversed_padding_repeated_twice  # numbers, also where padding is "same"
    return top, left


def _padded(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The input and the zeros it still needs: other kinds of padding are put on here."""
    if conv.padding_mode == "zeros":
        return x, _padding(conv)
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)
