"""Owns the correction of a unit's mean error: roundings of its last layer are flipped until its channels' means fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tmpq_exp.quant.layers import QuantConv2d, WeightedLayer
from tmpq_exp.quant.primitives import integer_range
from tmpq_exp.quant.units import Unit

MAX_FLIPS = 64
"""Most roundings that are flipped for an output channel."""


def mean_flips(effects: Tensor, costs: Tensor, error: Tensor, max_flips: int = MAX_FLIPS) -> Tensor:
    """Which entries to flip, so that every row's error comes close to zero at little cost.

    Greedy: the entry of the least cost for each part of the error that it takes away, as long as one takes some.

    Args:
        effects: ``(K, J)``; what a flip adds to the error of its row; NaN where none is possible.
        costs: ``(K, J)``; what it costs, which may be negative.
        error: ``(K,)``.
        max_flips: Most flips in a row.

    Returns:
        ``(K, J)``, true where to flip.
    """
    effects, left = effects.double(), error.double()[:, None]
    flipped = torch.zeros_like(effects, dtype=torch.bool)
    for _ in range(max_flips):
        gained = left.abs() - (left + effects).abs()
        price = torch.where(gained > 0, costs / gained, torch.inf)  # NaN is above nothing
        price[flipped] = torch.inf
        best, place = price.min(dim=1, keepdim=True)
        chosen = best < torch.inf
        if not chosen.any():
            break
        flipped.scatter_(1, place, flipped.gather(1, place) | chosen)
        left = torch.where(chosen, left + effects.gather(1, place), left)
    return flipped


class InputMoments:
    """First and second moment of what each weight of a layer multiplies, over images and positions."""

    def __init__(self, layer: WeightedLayer) -> None:
        self.layer, self.num_calls = layer, 0
        self._first = self._second = torch.zeros(())

    @property
    def first(self) -> Tensor:
        """``(C * kernel area,)``, in the order of a row of the weight."""
        return self._first / self.num_calls

    @property
    def second(self) -> Tensor:
        """Likewise, of the squares."""
        return self._second / self.num_calls

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Look at every call; all calls count the same."""
        handle = self.layer.register_forward_pre_hook(lambda _, args: self._observe(args[0]))
        try:
            yield
        finally:
            handle.remove()

    def _observe(self, x: Tensor) -> None:
        layer, bits = self.layer, self.layer.setting.act_bits
        x = layer.act_quantizer(x, bits)
        self._first = self._first + self._mean(x)
        self._second = self._second + self._mean(x.square())
        self.num_calls += 1

    def _mean(self, values: Tensor) -> Tensor:
        """Mean of what each weight of a row meets; patches of the mean image give the same, and faster."""
        if isinstance(self.layer, QuantConv2d):
            conv = self.layer.float_layer
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            image = nn.functional.pad(values.mean(0, keepdim=True), conv._reversed_padding_repeated_twice, mode)
            return nn.functional.unfold(image, conv.kernel_size, conv.dilation, 0, conv.stride).mean((0, 2))
        return values.flatten(0, -2).mean(0)


def last_layer(unit: Unit, num_channels: int) -> WeightedLayer | None:
    """The last layer with weights that has as many output channels as the unit; None without one.

    Its output reaches the unit's through sums alone in residual, attention and transformer blocks.
    """
    for layer in reversed(unit.layers):
        if isinstance(layer, WeightedLayer) and layer.float_layer.weight.shape[0] == num_channels:
            grouped = isinstance(layer, QuantConv2d) and layer.float_layer.groups > 1
            return None if grouped else layer
    return None


@torch.no_grad()
def flip_roundings(layer: WeightedLayer, bits: int, moments: InputMoments, error: Tensor) -> None:
    """Flip roundings of a layer at one bit width against a mean error of its output.

    Args:
        layer: The layer; its quantizer has room for roundings.
        bits: Bit width.
        moments: Of its quantized inputs.
        error: Mean error of every output channel, ``(K,)``.

    References:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019: a quantized
        layer's mean error is taken away. Differs from it in that roundings do it, because all bit widths share the
        float biases.
    """
    weight, quantizer = layer.float_layer.weight.detach(), layer.weight_quantizer
    index = quantizer.calibrated_choice(bits)
    scale, zero_point = (
        quantizer.per_weight(rows[index], weight).expand_as(weight) for rows in (quantizer.scale, quantizer.zero_point)
    )
    low, high = integer_range(bits, quantizer.config.symmetric)
    up = quantizer.rounded_up(bits).view(weight.shape).to(weight.device)
    ratio = weight / scale
    fraction = ratio - ratio.floor()
    step = 1 - 2 * up.to(weight.dtype)
    integers = ratio.floor() + up + zero_point
    possible = (integers >= low) & (integers <= high) & (integers + step >= low) & (integers + step <= high)
    effects = torch.where(possible, step * scale, torch.nan).flatten(1) * moments.first
    costs = (step * (1 - 2 * fraction) * scale.square()).flatten(1) * moments.second
    flips = mean_flips(effects, costs, error).view(weight.shape)
    quantizer.set_rounding(bits, up.bool() ^ flips)
    layer.cache.clear()
