"""Which passes over a unit may be made side by side, and how their parameters come together again.

A pass at one bit width looks at, and may change, parameters of another one where a layer lacks its width: a softmax has
one width for all. Such passes keep their order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tmpq_exp.config import CalibrationConfig
from tmpq_exp.quant.layers import WeightedLayer
from tmpq_exp.quant.quantizer import ActQuantizer, Quantizer
from tmpq_exp.quant.reconstruction import Draw
from tmpq_exp.quant.units import Unit

Parameters = frozenset[tuple[str, int]]
"""Quantizers, as ``<layer>/<quantizer>``, each with the place of a bit choice: one row of each of its buffers."""


@dataclass(frozen=True)
class Touched:
    """Parameters of a unit that a pass has to do with.

    Args:
        read: What it looks at.
        written: What it may change, a part of that.
    """

    read: Parameters
    written: Parameters


def touched(unit: Unit, draw: Draw, learned: Collection[int], config: CalibrationConfig) -> Touched:
    """Parameters that a pass at the same settings throughout has to do with.

    Args:
        unit: The unit.
        draw: The settings.
        learned: Bit widths that are learned in the pass.
        config: What is learned at all. Means are corrected at the settings, whether they are learned or not.
    """
    bits_at: dict[Quantizer, int] = {}
    for layer, setting in zip(unit.layers, draw, strict=True):
        bits_at.update(layer.act_bits(setting))
        if isinstance(layer, WeightedLayer):
            bits_at[layer.weight_quantizer] = setting.weight_bits
    read, written = set(), set()
    for layer in unit.layers:
        for name, quantizer in layer.quantizers():
            bits = bits_at[quantizer]
            parameter = (f"{layer.name}/{name}", quantizer.choice(bits))
            read.add(parameter)
            if isinstance(quantizer, ActQuantizer):
                is_written = bits in learned and config.act_iterations > 0 and not quantizer.is_dynamic
            else:
                is_written = config.correct_means or (bits in learned and config.weight_iterations > 0)
            if is_written:
                written.add(parameter)
    return Touched(frozenset(read), frozenset(written))


def in_rounds(passes: Mapping[int | str, Touched]) -> list[list[int | str]]:
    """Passes in their order, cut wherever one looks at what another of the same round may change.

    Those of a round can be made side by side, each on the parameters before the round.
    """
    rounds: list[list[int | str]] = []
    written: set[tuple[str, int]] = set()
    for name, parameters in passes.items():
        if not rounds or written & parameters.read:
            rounds.append([])
            written = set()
        rounds[-1].append(name)
        written |= parameters.written
    return rounds


def merged(state: Mapping[str, Tensor], others: Sequence[tuple[Mapping[str, Tensor], Parameters]]) -> dict[str, Tensor]:
    """A quantizer state with parameters that were learned elsewhere.

    Args:
        state: See ``Supernet.quantizer_state``; it is left as it is.
        others: States of the same quantizers, each with the parameters to take from it.
    """
    result = {key: value.clone() for key, value in state.items()}
    for other, parameters in others:
        for key, value in result.items():
            quantizer, _, _ = key.rpartition(".")
            for name, row in parameters:
                if name == quantizer:
                    value[row] = other[key][row].to(value.device)
    return result
