"""Static ranges of a supernet's Winograd layers: how they are found, and their names in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from tmpq_exp.quant.allocation import DIRECT_TILE, Candidate
from tmpq_exp.quant.layers import QuantConv2d
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.winograd.conv import StaticRanges, WinogradSpec

PREFIX = "winograd."
"""Of keys in a file: ``winograd.f<m>.<layer>.<input, v or m>``; a quantizer's key has a slash instead."""

STAGES = tuple(field.name for field in fields(StaticRanges))

RangesByLayer = Mapping[tuple[str, int], StaticRanges]
"""Ranges by name of the layer and tile."""


def winograd_layers(supernet: Supernet) -> Iterator[tuple[str, int]]:
    """Every layer with every tile that it may take at present."""
    for layer in supernet.layers:
        for m in layer.tiles():
            yield layer.name, m


def used_layers(candidate: Candidate, layers: Sequence[str]) -> set[tuple[str, int]]:
    """Layers, of these names, that some step of a candidate computes as Winograd, each with its tile."""
    tiles = {pair for allocation in candidate.allocations for pair in zip(layers, allocation.tiles, strict=True)}
    return {(name, m) for name, m in tiles if m != DIRECT_TILE}


@contextmanager
def measuring_ranges_for_all_bits(supernet: Supernet) -> Iterator[RangesByLayer]:
    """Float forwards inside find ranges of every layer that may be Winograd, at every tile it may take.

    They are those of unquantized x, V and M, and so hold at any bits, which a search varies by layer.
    ``winograd.network.measuring_ranges``, whose bits are fixed, differs: it looks behind the quantized stages before.

    Yields:
        What was found so far.
    """
    found: dict[tuple[str, int], StaticRanges] = {}

    def measure(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, QuantConv2d)
        for m in layer.tiles():
            ranges, key = layer.measure_ranges(args[0], m), (layer.name, m)
            found[key] = found[key].union(ranges) if key in found else ranges

    handles = [layer.register_forward_pre_hook(measure) for layer in supernet.layers if layer.tiles()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def ranges_state(ranges: RangesByLayer) -> dict[str, Tensor]:
    """Ranges under one name each, ``winograd.f4.conv_in.v`` for V of layer ``conv_in`` at tile 4."""
    return {_key(*of, stage): getattr(found, stage) for of, found in ranges.items() for stage in STAGES}


def split_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors as those of quantizers, and those of ``ranges_state``."""
    own = {key: value for key, value in state.items() if key.startswith(PREFIX)}
    return {key: value for key, value in state.items() if key not in own}, own


def load_ranges(
    supernet: Supernet, state: Mapping[str, Tensor], source: str, used: Iterable[tuple[str, int]] | None = None
) -> None:
    """Inverse of ``ranges_state``, for a supernet that has its tiles.

    Args:
        supernet: Gets the ranges.
        state: What ``ranges_state`` gave.
        source: Where it is from, for messages.
        used: Layers and tiles that run; None takes all. Those whose ``act_scales`` is static must have ranges.

    Raises:
        ValueError: If ranges are missing, belong to no layer in use, do not fit or are not finite; ``source`` is named.
    """
    layers = {layer.name: layer for layer in supernet.layers}
    pairs = winograd_layers(supernet) if used is None else used
    static = [(name, m) for name, m in pairs if supernet.winograd[m][0].is_static]
    shapes: dict[str, tuple[int, ...]] = {}
    for name, m in static:
        layer = layers[name]
        assert isinstance(layer, QuantConv2d)
        of_stages = _shapes(supernet.winograd[m][0], *layer.float_layer.weight.shape[:2])
        shapes |= {_key(name, m, stage): shape for stage, shape in of_stages.items()}
    for key, shape in shapes.items():
        if key not in state:
            raise ValueError(f"{source} holds no {key}: winograd.act_scales is static, so it needs ranges")
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{source}: {key} has shape {tuple(state[key].shape)}, expected {shape}")
        if not state[key].is_floating_point() or not state[key].isfinite().all() or (state[key] < 0).any():
            raise ValueError(f"{source}: {key} must hold finite numbers from 0 on")
    strange = sorted(state.keys() - shapes.keys())
    if strange:
        raise ValueError(f"{source} holds {strange[0]}, which belongs to no Winograd layer with static scales")
    supernet.set_ranges(
        {(name, m): StaticRanges(*(state[_key(name, m, stage)] for stage in STAGES)) for name, m in static}
    )


def _key(name: str, m: int, stage: str) -> str:
    return f"{PREFIX}f{m}.{name}.{stage}"


def _shapes(spec: WinogradSpec, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
    """Of a layer's ranges by stage; a tap has its own unless the method shares scales over taps."""
    v, m = (1 if 0 in spec.layout(stage).shared_dims else spec.n**2 for stage in ("v", "m"))
    return {"input": (1, num_in, 1, 1), "v": (v, num_in, 1, 1), "m": (m, num_out, 1, 1)}
