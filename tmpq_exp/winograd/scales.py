"""Scales of a network's transforms, and how well they do on its own weights and random inputs.

References:
    Pan et al., "Data-Free Group-Wise Fully Quantized Winograd Convolution via Learnable Scales", CVPR 2025.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tmpq_exp.files import replace_file
from tmpq_exp.plain_data import parse_json_object
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.winograd.conv import WinogradMatrices, WinogradSpec, measure_ranges, transform_weights, winograd_conv2d
from tmpq_exp.winograd.matrices import NetworkMatrices
from tmpq_exp.winograd.noise import Noise, noise
from tmpq_exp.winograd.spec import FLOAT_STAGES
from tmpq_exp.winograd.transform import Transform, WinogradScales, closed_form_scales, format_point

HELD_OUT_STREAM = 1
SCALES_SCHEMA = 1


@dataclass(frozen=True)
class ConvWeight:
    """An eligible convolution of a network, all that its scales need of it.

    Args:
        name: Its name in the network.
        weight: Float weights, (K, C, r, r); never changed.
        padding: Zeros on every side of H and W.
    """

    name: str
    weight: Tensor
    padding: int | tuple[int, int] = 1


@dataclass(frozen=True)
class ScaleSet:
    """Scales of a network: one set for all layers, and those of layers that have their own.

    Args:
        shared: Of every layer that is not named.
        layers: By name of the layer.
    """

    shared: WinogradScales
    layers: Mapping[str, WinogradScales] = field(default_factory=dict)

    def of(self, name: str) -> WinogradScales:
        """The scales of a layer."""
        return self.layers.get(name, self.shared)

    def matrices(self, spec: WinogradSpec, name: str = "") -> WinogradMatrices:
        """The float32 matrices of a layer."""
        return WinogradMatrices.from_scales(spec.transform(), self.of(name), transform_bits=spec.transform_bits)

    def network_matrices(self, spec: WinogradSpec) -> NetworkMatrices:
        """The float32 matrices of all layers."""
        return NetworkMatrices(self.matrices(spec), {name: self.matrices(spec, name) for name in self.layers})

    def to_json(self) -> dict[str, Any]:
        """That of the shared scales, and under ``layers`` those of layers with their own."""
        data = self.shared.to_json()
        return {**data, "layers": {k: v.to_json() for k, v in self.layers.items()}} if self.layers else data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScaleSet:
        """Inverse of ``to_json``; scales without ``layers`` are those of all layers.

        Raises:
            ValueError: If these are no scales.
        """
        shared = WinogradScales.from_json(data)
        layers = data.get("layers", {})
        if not isinstance(layers, Mapping):
            raise ValueError(f"not Winograd scales: layers must be a mapping, found {type(layers).__name__}")
        return cls(shared, {name: WinogradScales.from_json(value) for name, value in layers.items()})


def as_scale_set(scales: WinogradScales | ScaleSet) -> ScaleSet:
    """Scales of one kind or the other as a set."""
    return scales if isinstance(scales, ScaleSet) else ScaleSet(scales)


def noise_seeds(seed: int, stream: int, length: int) -> list[int]:
    """Seeds of a stream of noise; a longer list starts with the same ones."""
    sequence = np.random.SeedSequence(seed, spawn_key=(stream,))
    return [int(value) for value in sequence.generate_state(length, np.uint32)]


def layer_sqnr_db(
    layer: ConvWeight,
    spec: WinogradSpec,
    scales: WinogradScales | ScaleSet,
    seed: int,
    bits: int = 8,
    kind: Noise | str = Noise.GAUSSIAN,
) -> float:
    """SQNR in dB of one layer's quantized Winograd convolution of unit noise, against float.

    With ``WinogradSpec(m, points=...)`` and the other defaults this is the figure that reports quote: the network's
    own weights, groups of 32, all stages int8.

    Args:
        layer: The layer.
        spec: Which F(m, r), and which stages are quantized.
        scales: Diagonals of S_B and S_G.
        seed: Of the noise; equal seeds give equal noise for every kind of scale.
        bits: Bits of x, V and U.
        kind: Kind of noise.
    """
    x = noise(layer.weight.shape[1], torch.Generator().manual_seed(seed), kind)
    return input_sqnr_db(layer, x, spec, scales, bits)


@torch.no_grad()
def input_sqnr_db(
    layer: ConvWeight, x: Tensor, spec: WinogradSpec, scales: WinogradScales | ScaleSet, bits: int
) -> float:
    """SQNR in dB of one layer's quantized Winograd convolution of this input, (B, C, H, W), against float."""
    weight = layer.weight.detach().float().cpu()
    matrices = as_scale_set(scales).matrices(spec, layer.name)
    weights = transform_weights(weight, matrices, spec, bits)
    estimate = winograd_conv2d(x, weights, None, matrices, spec, bits, layer.padding)
    return sqnr_db(F.conv2d(x, weight, padding=layer.padding), estimate)


def stage_sqnr_db(
    layer: ConvWeight, x: Tensor, spec: WinogradSpec, scales: WinogradScales | ScaleSet, bits: int = 8
) -> dict[str, float]:
    """SQNR in dB with each quantized stage alone, by stage, and with all of them under ``all``."""
    stages = [name for name in FLOAT_STAGES if getattr(spec, name)]
    alone = {name: replace(spec, **{**FLOAT_STAGES, name: True}) for name in stages}
    figures = {
        name.removeprefix("quantize_"): input_sqnr_db(layer, x, one, scales, bits) for name, one in alone.items()
    }
    return {**figures, "all": input_sqnr_db(layer, x, spec, scales, bits)}


def layers_sqnr_db(
    layers: Sequence[ConvWeight],
    spec: WinogradSpec,
    scales: WinogradScales | ScaleSet,
    seed: int,
    bits: int = 8,
    kind: Noise | str = Noise.GAUSSIAN,
) -> dict[str, float]:
    """``layer_sqnr_db`` by name; every layer has its own held-out noise, apart from that of learning."""
    seeds = noise_seeds(seed, HELD_OUT_STREAM, len(layers))
    return {
        layer.name: layer_sqnr_db(layer, spec, scales, layer_seed, bits, kind)
        for layer, layer_seed in zip(layers, seeds, strict=True)
    }


def network_sqnr_db(
    layers: Sequence[ConvWeight],
    spec: WinogradSpec,
    scales: WinogradScales | ScaleSet,
    seed: int,
    bits: int = 8,
    kind: Noise | str = Noise.GAUSSIAN,
) -> float:
    """Median over layers of ``layers_sqnr_db``."""
    return statistics.median(layers_sqnr_db(layers, spec, scales, seed, bits, kind).values())


@torch.no_grad()
def fsq_style_scales(
    layer: ConvWeight, spec: WinogradSpec, seed: int, kind: Noise | str = Noise.GAUSSIAN
) -> WinogradScales:
    """Scales whose output transform undoes a row and a column factor of every tap's range of M.

    The range of each tap of M is measured on noise, its logarithm fitted by a row and a column term (the mean over
    each), and both folded into S_G: M is divided by row_i * col_j, and A_T multiplies it again.

    Args:
        layer: The layer.
        spec: Which F(m, r).
        seed: Of the noise.
        kind: Kind of noise.

    References:
        Chen et al. (NeurIPS 2023), as far as it was at hand. Differs from it in measuring on noise, without data.
    """
    transform = spec.transform()
    plain = WinogradSpec(spec.m, spec.r, spec.points, group_size="all", m_scale="tap", **FLOAT_STAGES)
    matrices = WinogradMatrices.from_scales(transform)
    weights = transform_weights(layer.weight.detach().float().cpu(), matrices, plain, 8)
    x = noise(layer.weight.shape[1], torch.Generator().manual_seed(seed), kind)
    ranges = measure_ranges(x, weights, matrices, plain, 8, layer.padding).m.flatten(1).amax(dim=1).double()
    log_range = ranges.clamp(min=torch.finfo(torch.float32).tiny).log().view(spec.n, spec.n)
    return _divided(transform, log_range.mean(dim=1), log_range.mean(dim=0) - log_range.mean())


def _divided(transform: Transform, log_rows: Tensor, log_columns: Tensor) -> WinogradScales:
    """Closed-form scales whose M is divided by row and column factors."""
    closed = closed_form_scales(transform)
    rows, columns = (
        tuple(s / f for s, f in zip(closed.s_g, factor.exp().tolist(), strict=True))
        for factor in (log_rows, log_columns)
    )
    return WinogradScales(closed.s_b, rows, (closed.s_b, columns))


def write_scales(path: Path, model: str, tiles: Mapping[int, tuple[WinogradSpec, ScaleSet]]) -> None:
    """Scales as a JSON file that ``read_scales`` reads, so that another network can use them.

    Args:
        path: The file.
        model: Name of the network that they were learned on.
        tiles: By tile, the specification and the scales in use.
    """
    data = {
        "schema": SCALES_SCHEMA,
        "model": model,
        "tiles": {
            str(m): {"points": [format_point(p) for p in spec.transform().points], "r": spec.r, **_plain(spec, scales)}
            for m, (spec, scales) in tiles.items()
        },
    }
    replace_file(path, (json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def _plain(spec: WinogradSpec, scales: ScaleSet) -> dict[str, Any]:
    return {"spec": asdict(spec), "scales": scales.to_json()}


def read_scales(path: Path, spec: WinogradSpec, layers: Collection[str] | None = None) -> ScaleSet:
    """Scales of a spec's tile and points from a file of ``write_scales``.

    Layers that have scales of their own there keep them where this network has a layer of the same name; every other
    layer takes the shared ones.

    Args:
        path: The file.
        spec: Which tile, with which points.
        layers: Names of this network's eligible layers; None where the file is known to be of this network.

    Raises:
        ValueError: If the file cannot be read, or holds no scales for this tile or for these points, or if it holds
            scales for single layers, none of which this network has.
    """
    try:
        content = parse_json_object(path.read_bytes())
        tiles = content["tiles"]
        entry = tiles.get(str(spec.m))
        points = None if entry is None else list(entry["points"])
        scales = None if entry is None else ScaleSet.from_json(entry["scales"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} holds no Winograd scales: {type(error).__name__}: {error}") from error
    wanted = [format_point(point) for point in spec.transform().points]
    if scales is None:
        raise ValueError(f"{path} holds scales for the tiles {', '.join(tiles) or 'none'}, not for {spec.m}")
    if points != wanted:
        raise ValueError(f"{path} holds scales of F({spec.m},{spec.r}) for the points {points}, not for {wanted}")
    if len(scales.shared.s_b) != spec.n:
        raise ValueError(f"{path} holds {len(scales.shared.s_b)} scales for tile {spec.m}, {spec.n} are needed")
    if layers is not None and scales.layers and scales.layers.keys().isdisjoint(layers):
        named = f"{next(iter(scales.layers))}{' and others' if len(scales.layers) > 1 else ''}"
        raise ValueError(
            f"{path} holds scales for single layers of {content.get('model')}, {named}, none of which this network "
            "has; scales that were learned without winograd.learning.per_layer are for any network"
        )
    return scales
