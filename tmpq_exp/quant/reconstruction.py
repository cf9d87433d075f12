"""Owns the learning of one unit: draws of bit widths, the loss of its output, and the steps that lower it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.quant.activations import UnitInputs, take_rows
from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.attention_products import QuantAttentionProducts
from tmpq_exp.quant.layers import LayerSetting, QuantLayer, WeightedLayer, layers_at
from tmpq_exp.quant.quantizer import ActQuantizer, Quantizer
from tmpq_exp.quant.rounding import Learned, LearnedScale, SoftRounding, learnable_fake_quantize
from tmpq_exp.quant.units import Unit, frozen

WEIGHT_NORM, ACT_NORM = 2.0, 2.4
"""Exponents of the output error for roundings and for activation scales."""

Draw = Sequence[LayerSetting]
"""A setting for every layer of a unit."""


@dataclass(frozen=True)
class UnitData:
    """What a unit learns from.

    Args:
        inputs: Its arguments behind the quantized units before it.
        targets: Output of the float unit behind float units, ``(N, ...)``.
        device: Where the unit runs.
        batch_size: Images a forward when all of them are looked at.
    """

    inputs: UnitInputs
    targets: Tensor
    device: torch.device
    batch_size: int

    def run(self, unit: Unit, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Output of the unit as it is set, and its target, for these images."""
        args, kwargs = self.inputs.rows(indices, self.device)
        return unit.module(*args, **kwargs), take_rows(self.targets, indices, self.device)


def reconstruction_loss(output: Tensor, target: Tensor, norm: float) -> Tensor:
    """``|output - target| ** norm``, summed over channels, averaged over images and positions.

    Args:
        output, target: ``(B, C, H, W)``, ``(B, N, C)`` or ``(B, C)``.
        norm: Exponent.

    References:
        Li et al., "BRECQ", ICLR 2021. Differs from its code in that the channels of tokens are their last dimension.
    """
    error = output - target
    powers = error.square() if norm == WEIGHT_NORM else error.abs().pow(norm)
    return powers.sum() * (output.shape[1 if output.dim() == 4 else -1] / output.numel())


def mean_error(output: Tensor, target: Tensor) -> Tensor:
    """Error of every channel, averaged over images and positions, ``(C,)``; shapes as in ``reconstruction_loss``."""
    return (output - target).mean((0, 2, 3) if output.dim() == 4 else tuple(range(output.dim() - 1)))


def nearest_choice(choices: Sequence[int], bits: int) -> int:
    """The bit width nearest to ``bits``; the larger of two."""
    return min(choices, key=lambda choice: (abs(choice - bits), -choice))


def uniform_draw(layers: Sequence[QuantLayer], bits: int) -> Draw:
    """Every layer at ``bits``, or at the nearest it has."""
    return [
        LayerSetting(nearest_choice(layer.weight_choices, bits), nearest_choice(layer.act_choices, bits))
        for layer in layers
    ]


def random_draw(layers: Sequence[QuantLayer], generator: torch.Generator) -> Draw:
    """Bit widths drawn for every layer, weights and activations independently."""

    def drawn(choices: Sequence[int]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    return [LayerSetting(drawn(layer.weight_choices), drawn(layer.act_choices)) for layer in layers]


def shuffled_draws(layers: Sequence[QuantLayer], count: int, generator: torch.Generator) -> list[Draw]:
    """``count`` random draws in which every layer has each of its bit widths equally often, but for a remainder."""

    def column(choices: Sequence[int]) -> list[int]:
        order = torch.randperm(count, generator=generator).tolist()
        return [choices[place % len(choices)] for place in order]

    columns = [zip(column(layer.weight_choices), column(layer.act_choices), strict=True) for layer in layers]
    return [[LayerSetting(*pair) for pair in row] for row in zip(*columns, strict=True)]


def bit_widths(layers: Iterable[QuantLayer]) -> tuple[int, ...]:
    """All bit widths of weights and activations, descending; the softmax has its own."""
    found: set[int] = set()
    for layer in layers:
        found |= {*layer.act_choices, *(() if isinstance(layer, QuantAttentionProducts) else layer.weight_choices)}
    return tuple(sorted(found, reverse=True))


class UnitLearning:
    """Stands in for the quantizers of a unit while some of their parameters are learned; see ``layers.Learning``."""

    def __init__(self) -> None:
        self._roundings: dict[tuple[str, int], SoftRounding] = {}
        self._scales: dict[tuple[Quantizer, int], LearnedScale] = {}
        self._limits: dict[tuple[Quantizer, int, int], tuple[Any, Any]] = {}

    def learn_roundings(
        self, layers: Sequence[QuantLayer], draws: Iterable[Draw], widths: Collection[int], regularizer: float
    ) -> None:
        """Learn the rounding of every weight at every bit width of these draws, as far as it is one of ``widths``.

        Args:
            layers, draws, widths: See ``learn_unit``.
            regularizer: Weight of the regularizer, of its sum over the weights.
        """
        for draw in draws:
            for layer, setting in zip(layers, draw, strict=True):
                bits = setting.weight_bits
                key = (layer.name, bits)
                if isinstance(layer, WeightedLayer) and bits in widths and key not in self._roundings:
                    self._roundings[key] = SoftRounding(layer, bits, regularizer)

    def learn_scales(self, layers: Sequence[QuantLayer], draws: Iterable[Draw], widths: Collection[int]) -> None:
        """Learn the scale of every static activation at every bit width of these draws, if it is one of ``widths``."""
        for draw in draws:
            for layer, setting in zip(layers, draw, strict=True):
                for quantizer, bits in _act_bits(layer, setting):
                    if not quantizer.is_dynamic and bits in widths and (quantizer, bits) not in self._scales:
                        self._scales[quantizer, bits] = LearnedScale(quantizer, bits)

    @property
    def learned(self) -> list[Learned]:
        """All that is learned."""
        return [*self._roundings.values(), *self._scales.values()]

    def drawn(self, layers: Sequence[QuantLayer], draw: Draw) -> list[Learned]:
        """What is learned at these settings."""
        found: list[Learned | None] = []
        for layer, setting in zip(layers, draw, strict=True):
            found.append(self._roundings.get((layer.name, setting.weight_bits)))
            found.extend(self._scales.get(key) for key in _act_bits(layer, setting))
        return [learned for learned in found if learned is not None]

    def weight(self, layer: WeightedLayer, bits: int) -> Tensor:
        """See ``layers.Learning``."""
        rounding = self._roundings.get((layer.name, bits))
        return layer.quantized_weight(bits) if rounding is None else rounding.weight()

    def act(self, quantizer: ActQuantizer, x: Tensor, bits: int) -> Tensor:
        """See ``layers.Learning``."""
        if quantizer.is_dynamic:
            return quantizer(x, bits)  # type: ignore[no-any-return]
        learned = self._scales.get((quantizer, bits))
        rows = quantizer.scale[quantizer.choice(bits)] if learned is None else learned.parameter
        key = (quantizer, bits, x.dim())
        if key not in self._limits:
            self._limits[key] = quantizer.integer_limits(bits, x)
        return learnable_fake_quantize(x, quantizer.per_activation(rows, x), *self._limits[key])

    @contextmanager
    def active(self, layers: Sequence[QuantLayer]) -> Iterator[None]:
        """Let these layers use it."""
        try:
            for layer in layers:
                layer.learning = self
            yield
        finally:
            for layer in layers:
                layer.learning = None


def _act_bits(layer: QuantLayer, setting: LayerSetting) -> list[tuple[ActQuantizer, int]]:
    """Activation quantizers of a layer with their bits at a setting, without those that are float."""
    pairs = [
        (quantizer, setting.weight_bits if quantizer is getattr(layer, "softmax", None) else setting.act_bits)
        for quantizer in layer.act_quantizers()
    ]
    return [(quantizer, bits) for quantizer, bits in pairs if bits != FLOAT_BITS]


def learn_unit(
    unit: Unit,
    data: UnitData,
    draws: tuple[Sequence[Draw], Sequence[Draw]],
    widths: Collection[int],
    config: CalibrationConfig,
    generator: torch.Generator,
    error: float,
) -> None:
    """Learn the roundings of a unit, commit them, then learn its activation scales, and commit them.

    Args:
        unit: The unit; its quantizers are changed.
        data: Inputs and targets.
        draws: Settings of every step, for the roundings and for the scales.
        widths: What is learned at these bit widths; what the draws hold at others stays as it is.
        config: Batch size, learning rates, and the regularizer's weight.
        generator: Which images a step sees.
        error: The unit's loss before; what the regularizer is measured by if the configuration gives it no weight.

    References:
        Li et al., "BRECQ", ICLR 2021: block by block, roundings before activation scales. Differs from it in that the
        unit's activations are quantized while its roundings are learned, which gave lower errors on the embedded model,
        and, where its weight is null, in a regularizer that begins as large as the error: at 0.01 a weight it outweighs
        the error of small blocks by orders of magnitude.
    """
    regularizer = config.regularizer_weight
    if regularizer is None:
        num_weights = sum(x.float_layer.weight.numel() for x in unit.layers if isinstance(x, WeightedLayer))
        regularizer = error / max(1, num_weights)
    for norm, steps, rate in (
        (WEIGHT_NORM, draws[0], config.weight_learning_rate),
        (ACT_NORM, draws[1], config.act_learning_rate),
    ):
        learning = UnitLearning()
        if norm == WEIGHT_NORM:
            learning.learn_roundings(unit.layers, steps, widths, regularizer)
        else:
            learning.learn_scales(unit.layers, steps, widths)
        if steps and learning.learned:
            _descend(unit, data, learning, steps, norm, rate, config.batch_size, generator)
            for learned in learning.learned:
                learned.commit()


def _descend(
    unit: Unit,
    data: UnitData,
    learning: UnitLearning,
    draws: Sequence[Draw],
    norm: float,
    rate: float,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Adam on what is learned. One optimizer is as good as one each: whatever was not drawn has no gradient, and Adam
    leaves it and its moments alone."""
    groups: dict[Learned, dict[str, Any]] = {learned: {"params": [learned.parameter]} for learned in learning.learned}
    for draw in draws:
        for learned in learning.drawn(unit.layers, draw):
            learned.num_steps += 1
    optimizer = torch.optim.Adam(list(groups.values()), lr=rate)
    indices = torch.randint(len(data.targets), (len(draws), batch_size), generator=generator)
    with torch.enable_grad(), frozen(unit.module), learning.active(unit.layers):
        for draw, batch in zip(draws, indices, strict=True):
            drawn = learning.drawn(unit.layers, draw)
            with layers_at(unit.layers, draw):
                output, target = data.run(unit, batch)
            loss = reconstruction_loss(output, target, norm)
            for learned in drawn:
                penalty = learned.penalty()
                loss = loss if penalty is None else loss + penalty
                groups[learned]["lr"] = learned.learning_rate(rate)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for learned in drawn:
                learned.stepped()


@torch.no_grad()
def unit_error(unit: Unit, data: UnitData, draw: Draw) -> tuple[float, Tensor]:
    """Error of a unit at these settings over all images: see ``reconstruction_loss`` and ``mean_error``."""
    total, mean = 0.0, torch.zeros((), device=data.device)
    with layers_at(unit.layers, draw):
        for batch in torch.arange(len(data.targets)).split(data.batch_size):  # type: ignore[no-untyped-call]
            output, target = data.run(unit, batch)
            total += len(batch) * float(reconstruction_loss(output, target, WEIGHT_NORM))
            mean = mean + len(batch) * mean_error(output, target)
    return total / len(data.targets), mean / len(data.targets)
