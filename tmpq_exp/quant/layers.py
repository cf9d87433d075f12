"""Quantized convolution and linear layers: float inside, every bit choice and tile at hand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from tmpq_exp.config import QuantConfig
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS
from tmpq_exp.quant.lru_cache import LRUCache
from tmpq_exp.quant.quantizer import ActQuantizer, Quantizer, WeightQuantizer
from tmpq_exp.winograd.conv import (
    StaticRanges,
    WinogradSpec,
    WinogradWeights,
    balanced_ranges,
    measure_ranges,
    transform_weights,
    winograd_conv2d,
)
from tmpq_exp.winograd.matrices import NetworkMatrices

Observer: TypeAlias = Callable[[ActQuantizer, Tensor], None]


@dataclass(frozen=True)
class LayerSetting:
    """What one layer does at present: bits of weights (of the softmax for attention) and activations, and tile."""

    weight_bits: int = FLOAT_BITS
    act_bits: int = FLOAT_BITS
    tile: int = DIRECT_TILE


FLOAT = LayerSetting()


class Learning(Protocol):
    """What stands in for quantizers whose parameters are being learned."""

    def weight(self, layer: WeightedLayer, bits: int) -> Tensor:
        """Quantized weight of a layer, differentiable in what is learned."""

    def act(self, quantizer: ActQuantizer, x: Tensor, bits: int) -> Tensor:
        """Quantized activations, differentiable in ``x`` and in what is learned."""


class KnownOutputs(Protocol):
    """What has outputs of a layer at hand."""

    def output(self, name: str, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """``compute(x)`` of the layer of this name, or what it returned for an equal ``x`` at the same setting."""


class QuantLayer(nn.Module):
    """A layer of the supernet.

    Args:
        name: Name in the layer list.
        cache: Where quantized weights are kept; one for all layers.
        weight_choices, act_choices: Bit widths to hold; float needs none.
    """

    def __init__(self, name: str, cache: LRUCache, weight_choices: Sequence[int], act_choices: Sequence[int]) -> None:
        super().__init__()
        self.name, self.cache = name, cache
        self.weight_choices, self.act_choices = tuple(weight_choices), tuple(act_choices)
        self.setting = FLOAT
        self.observer: Observer | None = None
        self.learning: Learning | None = None
        self.held_weight: Tensor | None = None

    @abstractmethod
    def act_quantizers(self) -> Iterator[ActQuantizer]:
        """Quantizers that calibration observes."""

    def weight_rows(self) -> tuple[WeightQuantizer, Tensor] | None:
        """The weight quantizer and the rows to estimate it from; None without weights."""
        return None

    def check(self, setting: LayerSetting) -> None:
        """Refuse a setting this layer cannot take.

        Raises:
            ValueError: If it holds no such bits, or there is no such tile; the layer is named.
        """
        tile = setting.tile
        if tile != DIRECT_TILE:  # its weights and activations are quantized in the Winograd domain, at any bits
            if tile not in self.tiles():
                raise ValueError(
                    f"tile {tile} is not possible at layer {self.name}, which takes {sorted(self.tiles())}"
                )
            return
        for kind, bits in (("weight", setting.weight_bits), ("act", setting.act_bits)):
            choices = self.weight_choices if kind == "weight" else self.act_choices
            if bits != FLOAT_BITS and bits not in choices:
                raise ValueError(
                    f"layer {self.name}: {kind}_bits must be one of {list(choices)} that were calibrated, found {bits}"
                )

    def tiles(self) -> Collection[int]:
        """Winograd tiles that this layer may take."""
        return ()

    def quantizers(self) -> Iterator[tuple[str, Quantizer]]:
        """Every quantizer with its name inside the layer."""
        for name, module in self.named_modules():
            if isinstance(module, Quantizer):
                yield name, module

    def act_bits(self, setting: LayerSetting) -> Iterator[tuple[ActQuantizer, int]]:
        """Every activation quantizer with its bits under a setting."""
        for quantizer in self.act_quantizers():
            yield quantizer, setting.act_bits

    def can_hold(self, setting: LayerSetting) -> bool:
        """Whether this setting is computed from tensors alone, the same code at any bits: see ``hold``."""
        return (
            self.observer is None
            and self.learning is None
            and setting.tile == DIRECT_TILE
            and FLOAT_BITS not in (setting.weight_bits, setting.act_bits)
        )

    def hold(self, setting: LayerSetting) -> None:
        """Keep at hand, as tensors, all that ``forward`` needs at this setting, so that it looks nothing up by bits.

        Compiled code is specialized on every number it meets, but not on the values of tensors: so one graph serves all
        bits.
        """
        for quantizer, bits in self.act_bits(setting):
            quantizer.hold(bits)

    def release(self) -> None:
        """Inverse of ``hold``."""
        self.held_weight = None
        for quantizer in self.act_quantizers():
            quantizer.held = None

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Run in float and show every activation that would be quantized to ``observer``."""
        self.observer = observer
        try:
            yield
        finally:
            self.observer = None

    def quantize_act(self, quantizer: ActQuantizer, x: Tensor) -> Tensor:
        """``x`` at the present activation bits."""
        if quantizer.held is not None:
            return quantizer.quantize_held(x)
        if self.observer is not None:
            self.observer(quantizer, x)
        return self._quantized(quantizer, x, self.setting.act_bits)

    def _quantized(self, quantizer: ActQuantizer, x: Tensor, bits: int) -> Tensor:
        if bits == FLOAT_BITS:
            return x
        return quantizer(x, bits) if self.learning is None else self.learning.act(quantizer, x, bits)


@contextmanager
def layers_at(layers: Sequence[QuantLayer], settings: Sequence[LayerSetting]) -> Iterator[None]:
    """Run layers at these settings; on leaving, they are as they were."""
    before = [layer.setting for layer in layers]
    try:
        for layer, setting in zip(layers, settings, strict=True):
            layer.setting = setting
        yield
    finally:
        for layer, setting in zip(layers, before, strict=True):
            layer.setting = setting


class WeightedLayer(QuantLayer):
    """Convolution or linear layer: one weight quantizer, one quantizer of the input.

    Args:
        name, cache: See ``QuantLayer``.
        float_layer: The float layer; its parameters are shared, not copied.
        num_inputs, channel_dim: Channels of the input and where they are.
        weight_choices, act_choices: Bit widths to hold; float needs none.
        config: Quantizer settings.
        seam: Input channels before the seam of a concatenation, 0 without one; see the quantizers.
    """

    def __init__(
        self,
        name: str,
        cache: LRUCache,
        float_layer: nn.Conv2d | nn.Linear,
        num_inputs: int,
        channel_dim: int,
        weight_choices: Sequence[int],
        act_choices: Sequence[int],
        config: QuantConfig,
        seam: int = 0,
    ) -> None:
        super().__init__(name, cache, weight_choices, act_choices)
        self.float_layer = float_layer
        self.weight_quantizer = WeightQuantizer(weight_choices, float_layer.weight.shape, config.weight, seam)
        self.act_quantizer = ActQuantizer(act_choices, num_inputs, channel_dim, config.act, seam)

    def act_quantizers(self) -> Iterator[ActQuantizer]:
        """The input's."""
        yield self.act_quantizer

    def weight_rows(self) -> tuple[WeightQuantizer, Tensor]:
        """See ``QuantLayer.weight_rows``."""
        return self.weight_quantizer, self.weight_quantizer.rows(self.float_layer.weight.detach())

    def hold(self, setting: LayerSetting) -> None:
        """See ``QuantLayer.hold``."""
        super().hold(setting)
        self.held_weight = self.quantized_weight(setting.weight_bits)

    def weight(self) -> Tensor:
        """Weights of direct computation at the present bits."""
        if self.held_weight is not None:
            return self.held_weight
        bits = self.setting.weight_bits
        if bits == FLOAT_BITS:
            return self.float_layer.weight
        return self.quantized_weight(bits) if self.learning is None else self.learning.weight(self, bits)

    def quantized_weight(self, bits: int) -> Tensor:
        """Weights of direct computation at these bits."""
        key = (self.name, bits, DIRECT_TILE)
        weight: Tensor = self.cache.get(key, lambda: self.weight_quantizer(self.float_layer.weight, bits))
        return weight


class QuantConv2d(WeightedLayer):
    """Convolution, direct or Winograd.

    Args:
        winograd: Specification and matrices of every tile this layer may take; empty if it is not eligible.
        ranges: Static ranges by layer and tile; activation scales are dynamic where there are none.
        **arguments: See ``WeightedLayer``.
    """

    float_layer: nn.Conv2d

    def __init__(
        self,
        *,
        winograd: Mapping[int, tuple[WinogradSpec, NetworkMatrices]],
        float_layer: nn.Conv2d,
        ranges: Mapping[tuple[str, int], StaticRanges] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(float_layer=float_layer, num_inputs=float_layer.in_channels, channel_dim=1, **arguments)
        self.winograd, self.ranges = winograd, {} if ranges is None else ranges

    def tiles(self) -> Collection[int]:
        """See ``QuantLayer.tiles``."""
        return self.winograd.keys()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, K, H', W')``."""
        if self.setting.tile != DIRECT_TILE:
            return self._winograd_forward(x)
        x = self.quantize_act(self.act_quantizer, x)
        y: Tensor = self.float_layer._conv_forward(x, self.weight(), self.float_layer.bias)
        return y

    def _winograd_forward(self, x: Tensor) -> Tensor:
        setting, bias = self.setting, self.float_layer.bias
        spec, of_layers = self.winograd[setting.tile]
        weights = self._winograd_weights(setting.weight_bits, setting.tile)
        ranges = self.ranges.get((self.name, setting.tile))
        x, padding = self._padded(x)
        if ranges is not None:
            ranges = balanced_ranges(ranges, weights, spec)
        elif self._quantizes_input(spec):
            x, spec = self.quantize_act(self.act_quantizer, x), replace(spec, quantize_input=False)
        return winograd_conv2d(x, weights, bias, of_layers.of(self.name), spec, setting.act_bits, padding, ranges)

    def measure_ranges(self, x: Tensor, tile: int) -> StaticRanges:
        """Static ranges of x, V and M at a tile for inputs ``(B, C, H, W)``, no stage quantized, whatever the setting.

        Where the method balances channels, V's are those of every channel before: the balance follows from them.
        """
        spec, of_layers = self.winograd[tile]
        weights, matrices = self._winograd_weights(FLOAT_BITS, tile), of_layers.of(self.name)
        x, padding = self._padded(x)
        if weights.balance is None:
            return measure_ranges(x, weights, matrices, spec, FLOAT_BITS, padding)
        weights = replace(weights, balance=None)
        found = measure_ranges(x, weights, matrices, spec, FLOAT_BITS, padding)
        by_channel = measure_ranges(x, weights, matrices, replace(spec, group_size=1), FLOAT_BITS, padding)
        return replace(found, v=by_channel.v)

    def _winograd_weights(self, bits: int, tile: int) -> WinogradWeights:
        spec, of_layers = self.winograd[tile]
        matrices, ranges = of_layers.of(self.name), self.ranges.get((self.name, tile))
        by_channel = None if ranges is None else ranges.v
        return self.cache.get(
            (self.name, bits, tile),
            lambda: transform_weights(self.float_layer.weight, matrices, spec, bits, by_channel),
        )

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input and the zeros it still needs: other kinds of padding are put on here."""
        conv = self.float_layer
        left, _, top, _ = conv._reversed_padding_repeated_twice  # numbers, also where padding is "same"
        if conv.padding_mode == "zeros":
            return x, (top, left)
        return nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)

    def _quantizes_input(self, spec: WinogradSpec) -> bool:
        """Whether x goes through the layer's own quantizer, as in direct computation: a dynamic one with zero points.

        An integer input transform takes off the zero point first; padding is exact zero either way.
        """
        own = self.act_quantizer
        follows = spec.quantize_input and spec.input_bits is None
        return follows and own.is_dynamic and not own.config.symmetric


class QuantLinear(WeightedLayer):
    """Linear layer on ``(..., C)``."""

    float_layer: nn.Linear

    def __init__(self, *, float_layer: nn.Linear, **arguments: Any) -> None:
        super().__init__(float_layer=float_layer, num_inputs=float_layer.in_features, channel_dim=-1, **arguments)
        self.known: KnownOutputs | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C) -> (..., K)``."""
        return self._linear(x) if self.known is None else self.known.output(self.name, x, self._linear)

    def _linear(self, x: Tensor) -> Tensor:
        x = self.quantize_act(self.act_quantizer, x)
        return nn.functional.linear(x, self.weight(), self.float_layer.bias)
