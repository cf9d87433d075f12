"""A quantized network as it is shipped: integers packed at their own bits, and floats only where they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Candidate
from tmpq_exp.quant.layers import WeightedLayer
from tmpq_exp.quant.supernet import Supernet

FLOATS, INTEGERS = "unet.", "packed."
"""Prefixes of keys in a file: of what stays float, and of packed integers; quantizers have none."""


@dataclass(frozen=True)
class PackedState:
    """Everything of a quantized network.

    Args:
        quantizers: ``Supernet.quantizer_state`` without learned roundings, which the integers hold.
        integers: ``<layer>.<bits>`` -> bytes, ``bits`` of them a value.
        floats: Parameters and buffers of the float network by name, but for the weights that integers stand for.
    """

    quantizers: dict[str, Tensor]
    integers: dict[str, Tensor]
    floats: dict[str, Tensor]

    @classmethod
    def of(cls, supernet: Supernet, network: nn.Module, candidate: Candidate) -> PackedState:
        """State of a supernet at the bits of a candidate.

        A layer that some step computes in float or in the Winograd domain keeps its float weights as well: the 8-bit
        integers of F(4, 3), 36 for every 9 weights, would take as many bytes.

        Args:
            supernet: Holds the candidate's bits.
            network: Its float network.
            candidate: What is shipped.
        """
        quantizers = {
            key: value[:, :0] if key.endswith(".rounding") else value
            for key, value in supernet.quantizer_state().items()
        }
        integers, floats = {}, dict(network.state_dict())
        for layer, bits in packed_bits(supernet, candidate).items():
            if FLOAT_BITS not in bits:
                del floats[f"{layer.name}.weight"]
            for width in bits - {FLOAT_BITS}:
                packed = layer.weight_quantizer.packed(layer.float_layer.weight.detach(), width)
                integers[f"{layer.name}.{width}"] = packed
        return cls(quantizers, integers, floats)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PackedState:
        """Inverse of ``tensors``."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

        quantizers = {key: value for key, value in tensors.items() if not key.startswith((FLOATS, INTEGERS))}
        return cls(quantizers, below(INTEGERS), below(FLOATS))

    def tensors(self) -> dict[str, Tensor]:
        """All of it under one name each."""
        integers = {f"{INTEGERS}{key}": value for key, value in self.integers.items()}
        return {**self.quantizers, **integers, **{f"{FLOATS}{key}": value for key, value in self.floats.items()}}

    def blank_weights(self, network: nn.Module) -> dict[str, Tensor]:
        """``floats`` with zeros for the weights of a network that integers stand for."""
        names = {f"{key.rpartition('.')[0]}.weight" for key in self.integers} - self.floats.keys()
        own = network.state_dict()
        return self.floats | {name: torch.zeros_like(own[name]) for name in names & own.keys()}

    def keep_integers(self, supernet: Supernet, candidate: Candidate) -> None:
        """Let the integers stand for the weights of a supernet; weights that were left out become their values.

        Raises:
            ValueError: If they are not those of the candidate's layers and bits.
        """
        integers = dict(self.integers)
        for layer, bits in packed_bits(supernet, candidate).items():
            quantizer, weight = layer.weight_quantizer, layer.float_layer.weight
            for width in sorted(bits - {FLOAT_BITS}):
                try:
                    quantizer.keep_packed(width, integers.pop(f"{layer.name}.{width}"))
                except (KeyError, ValueError) as error:
                    raise ValueError(f"integers of layer {layer.name} at {width} bits: {error}") from error
                if FLOAT_BITS not in bits:
                    with torch.no_grad():
                        weight.copy_(quantizer(weight, width))
        if integers:
            raise ValueError(f"integers of {next(iter(integers))} belong to no layer and bits of the candidate")
        supernet.quantizers_changed()


def packed_bits(supernet: Supernet, candidate: Candidate) -> dict[WeightedLayer, set[int]]:
    """Bits that each layer computes directly with; ``FLOAT_BITS`` among them where a step needs its float weights."""
    return {
        layer: {a.weight_bits[i] if a.tiles[i] == DIRECT_TILE else FLOAT_BITS for a in candidate.allocations}
        for i, layer in enumerate(supernet.layers)
        if isinstance(layer, WeightedLayer)
    }
