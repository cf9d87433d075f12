"""Owns block-wise reconstruction: units in order, activations carried along, every bit width learned and judged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.quant.activations import ActivationStore, Stream
from tmpq_exp.quant.layers import WeightedLayer, layers_at
from tmpq_exp.quant.means import InputMoments, flip_roundings, last_layer
from tmpq_exp.quant.passes import Touched, in_rounds, touched
from tmpq_exp.quant.reconstruction import (
    Draw,
    UnitData,
    bit_widths,
    learn_unit,
    random_draw,
    shuffled_draws,
    uniform_draw,
    unit_error,
)
from tmpq_exp.quant.states import CalibrationState
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.quant.units import Unit, find_last_uses, find_units
from tmpq_exp.seeding import stream

SAMPLED = "sampled"
"""Name of the one pass of the variant that draws bit widths; a pass at uniform bits is named by them."""


@dataclass(frozen=True)
class UnitRecord:
    """Squared output error of a unit with all its layers at ``bits``, with estimated ranges and after learning.

    Args:
        unit: Name of the unit.
        bits: Bit width.
        loss_before, loss_after: See ``reconstruction_loss``; both behind the same quantized units.
    """

    unit: str
    bits: int
    loss_before: float
    loss_after: float


class BlockwiseReconstruction:
    """Learns a supernet's quantizers unit by unit: call ``begin``, ``learn_passes`` and ``finish``, in order.

    Args:
        supernet: Its ranges are estimated already.
        states: Inputs of the network.
        config: Method, iterations, batch size and learning rates.
        seed: Of every draw.
        store: Where activations are kept; its device is where the supernet is.
        share: Which of the passes are made here; the others' parameters are read from elsewhere.

    References:
        Li et al., "BRECQ", ICLR 2021: reconstruction block by block. Sun et al., "TMPQ-DM", arXiv 2404.09532: one
        parameter set a bit width, learned behind a network at that width (release) or at widths drawn at random
        (paper). Differs from the release in that every width has fresh moments and a schedule of its own, that
        learned parameters are kept only where they lower the error over all states, and in ``config.correct_means``.
    """

    def __init__(
        self,
        supernet: Supernet,
        states: Sequence[CalibrationState],
        config: CalibrationConfig,
        seed: int,
        store: ActivationStore,
        share: slice = slice(None),
    ) -> None:
        self.supernet, self.config, self.seed, self.store = supernet, config, seed, store
        probe = partial(states[0].first_image().run, device=store.device)
        self.units = find_units(supernet, probe)
        last_uses = find_last_uses(supernet, self.units, probe)
        self.widths = bit_widths(supernet.layers)
        self.passes: tuple[int | str, ...] = (SAMPLED,) if config.method == SAMPLED else self.widths
        make = partial(Stream, supernet, self.units, last_uses, states, store)
        self._float, self._streams = make(), {name: make() for name in self.passes[share]}

    def begin(self, index: int) -> None:
        """Compute what the unit shall give, its float output on float input, and make room for its roundings."""
        unit, config = self.units[index], self.config
        self._float.advance(lambda _, args, kwargs: unit.module(*args, **kwargs))
        for layer in unit.layers:
            if isinstance(layer, WeightedLayer) and (config.weight_iterations or config.correct_means):
                layer.weight_quantizer.start_rounding(layer.float_layer.weight.detach())

    def learn_passes(self, index: int) -> list[UnitRecord]:
        """Learn the parameters of a unit in all passes, one after the other.

        Returns:
            The records of ``learn``, pass by pass.
        """
        return [record for name in self.passes for record in self.learn(index, name)]

    def learn(self, index: int, name: int | str) -> list[UnitRecord]:
        """Learn the parameters of a unit in one pass; they are kept where they lower its error.

        A unit that sees the timestep alone, as those of a time embedding, stays as it is: it would learn the few
        calibrated timesteps by heart.

        Returns:
            A record for every bit width of the pass.
        """
        unit, config = self.units[index], self.config
        inputs = self._streams[name].inputs()
        try:
            data = UnitData(inputs, self._float.output(index), self.store.device, self._float.batch_size)
            widths = self.widths if isinstance(name, str) else (name,)
            judged = {bits: uniform_draw(unit.layers, bits) for bits in widths}
            before = {bits: unit_error(unit, data, draw)[0] for bits, draw in judged.items()}
            kept = {key: value.clone() for key, value in self.supernet.quantizer_state(unit.layers).items()}
            generator = stream(self.seed, "reconstruction", unit.name, name)
            if inputs.are_shared(self._float.batch_size):
                return [UnitRecord(unit.name, bits, loss, loss) for bits, loss in before.items()]
            draws = self._draws(unit, name, generator)
            error = sum(before.values()) / len(before)
            learn_unit(unit, data, draws, self._learned_at(unit, name), config, generator, error)
            records = []
            for bits, draw in judged.items():
                if config.correct_means:
                    after = self._correct_mean(unit, data, draw, before[bits])
                else:
                    after = unit_error(unit, data, draw)[0]
                if not after <= before[bits]:
                    self._restore(unit, kept, self._learned_at(unit, bits))
                    after = before[bits]
                records.append(UnitRecord(unit.name, bits, before[bits], after))
            return records
        finally:
            inputs.release(self.store)

    def _correct_mean(self, unit: Unit, data: UnitData, draw: Draw, most: float) -> float:
        """Flip roundings of the unit's last layer against the mean errors of its channels.

        They are kept where these fall and the squared output error is at most ``most``: the layer may run at a width of
        another pass here, which must not be left worse.

        Returns:
            Squared output error that the unit then has.
        """
        targets = data.targets
        layer = last_layer(unit, targets.shape[1 if targets.dim() == 4 else -1])
        if layer is None:
            return unit_error(unit, data, draw)[0]
        moments = InputMoments(layer)
        with moments.observing():
            squared, error = unit_error(unit, data, draw)
        before = layer.weight_quantizer.rounding.clone()
        flip_roundings(layer, draw[unit.layers.index(layer)].weight_bits, moments, error)
        squared_after, error_after = unit_error(unit, data, draw)
        if squared_after <= most and error_after.square().sum() <= error.square().sum():
            return squared_after
        layer.weight_quantizer.rounding = before
        layer.cache.clear()
        return squared

    def finish(self, index: int) -> None:
        """Carry the activations through the unit with the parameters it has now."""
        unit = self.units[index]

        def run(name: int | str, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            with layers_at(unit.layers, self.carried_draw(unit, name, batch)):
                output: Tensor = unit.module(*args, **kwargs)
            return output

        for name, activations in self._streams.items():
            activations.advance(partial(run, name))
            activations.drop_used()
        self._float.drop_used()

    def carried_draw(self, unit: Unit, name: int | str, batch: int) -> Draw:
        """Settings at which a completed unit gives the activations that later units see in a pass."""
        if isinstance(name, str):
            return random_draw(unit.layers, stream(self.seed, "carried", unit.name, batch))
        return uniform_draw(unit.layers, name)

    def rounds(self, index: int) -> list[list[int | str]]:
        """All passes over a unit; those of one round can be made side by side."""
        return in_rounds({name: self.touched(index, name) for name in self.passes})

    def touched(self, index: int, name: int | str) -> Touched:
        """Parameters of a unit that a pass at uniform bits has to do with."""
        assert isinstance(name, int), "a pass that draws its settings is the only one"
        unit = self.units[index]
        return touched(unit, uniform_draw(unit.layers, name), self._learned_at(unit, name), self.config)

    def _draws(self, unit: Unit, name: int | str, generator: torch.Generator) -> tuple[Sequence[Draw], Sequence[Draw]]:
        counts = self.config.weight_iterations, self.config.act_iterations
        if isinstance(name, str):
            weights, acts = (shuffled_draws(unit.layers, len(self.widths) * n, generator) for n in counts)
        else:
            weights, acts = ([uniform_draw(unit.layers, name)] * n for n in counts)
        return weights, acts

    def _learned_at(self, unit: Unit, name: int | str) -> Collection[int]:
        """Bit widths that are learned in a pass; widths that have no pass, as the softmax may have, in the first."""
        held = {bits for layer in unit.layers for bits in (*layer.weight_choices, *layer.act_choices)}
        if isinstance(name, str):
            return held
        return {name} | (held - set(self.widths) if name == self.widths[0] else set())

    def _restore(self, unit: Unit, kept: dict[str, Tensor], widths: Collection[int]) -> None:
        """Take back what was learned at these bit widths."""
        for name, quantizer in self.supernet.named_quantizers(unit.layers):
            for buffer, value in quantizer.named_buffers():
                for index, bits in enumerate(quantizer.bit_choices):
                    if bits in widths:
                        value[index] = kept[f"{name}.{buffer}"][index]
        self.supernet.quantizers_changed()
