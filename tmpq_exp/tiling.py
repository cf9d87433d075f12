"""The Winograd stage: scales of every tile, how well they do, and the data-free rule for the tile of each layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tmpq_exp.choices import examined_tiles, used_tiles, winograd_spec
from tmpq_exp.cost import TRANSFORM_BITS, ConvShape, is_eligible
from tmpq_exp.experiment import Experiment
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.layers import LayerSetting, QuantConv2d, WeightedLayer, layers_at
from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.search.tile_rule import choose_tiles
from tmpq_exp.seeding import stream_seed
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.learning import learn_scales
from tmpq_exp.winograd.noise import noise
from tmpq_exp.winograd.scales import (
    ConvWeight,
    ScaleSet,
    fsq_style_scales,
    input_sqnr_db,
    network_sqnr_db,
    noise_seeds,
    read_scales,
    stage_sqnr_db,
    write_scales,
)
from tmpq_exp.winograd.spec import Method
from tmpq_exp.winograd.transform import closed_form_scales, ineligible_reason, range_map, standard_scales

REPORTED_BITS = 8
"""Bits of all Winograd stages behind the reported SQNR."""

STATES_FOR_SCALES = 8
"""Images of the float trajectory on which scales are judged."""

PICTURE_STREAM = 2
"""Stream of the noise behind the report's picture of stages."""


def winograd_scales(experiment: Experiment) -> list[dict[str, Any]]:
    """Learn and judge the transform scales of every reported tile and of those in use, and apply the data-free rule.

    Returns:
        The ``winograd`` list of the report.
    """
    config = experiment.config.winograd
    results, kept = [], {}
    for m in examined_tiles(experiment.config):
        inputs = [experiment.task.weights_hash, asdict(config), m, experiment.config.seed]
        result = experiment.run.stage(f"winograd f{m}", inputs, [], partial(_learn_tile, experiment, m))
        results.append(result)
        spec, name = winograd_spec(experiment.config, m), config.scales if config.scales != "learned" else "kept"
        kept[m] = spec, ScaleSet.from_json(result["scales"][name])
        if m in used_tiles(experiment.config):
            experiment.winograd[m] = spec, _scales_in_use(experiment, *kept[m])
            kept[m] = experiment.winograd[m]
    write_scales(experiment.run.winograd_scales, experiment.task.name, kept)
    experiment.module.supernet.set_winograd(experiment.winograd)
    if experiment.config.space.tiles:
        with experiment.timed("tile rule"):
            experiment.tile_rule = tile_rule(experiment)
    return results


def _scales_in_use(experiment: Experiment, spec: WinogradSpec, own: ScaleSet) -> ScaleSet:
    """Scales of a tile in use: those of another run, FSQ-style ones, or the network's ``own``."""
    config = experiment.config.winograd
    if config.scales_from is not None:
        return read_scales(Path(config.scales_from), spec)
    if spec.method != Method.FSQ_STYLE:
        return own
    seed = stream_seed(experiment.config.seed, "fsq", spec.m) % 2**32
    convs = [shape for shape in experiment.layers if isinstance(shape, ConvShape) and is_eligible(shape)]
    layers = [_conv_weight(experiment.task.unet, shape.name) for shape in convs]
    return ScaleSet(own.shared, {layer.name: fsq_style_scales(layer, spec, seed) for layer in layers})


def _learn_tile(experiment: Experiment, m: int) -> dict[str, Any]:
    config, spec = experiment.config.winograd, winograd_spec(experiment.config, m)
    convs = [shape for shape in experiment.layers if isinstance(shape, ConvShape)]
    eligible = [shape for shape in convs if is_eligible(shape)]
    reasons = {s.name: ineligible_reason(s.kernel_size, s.stride, s.dilation, s.groups) for s in convs}
    layers = [_conv_weight(experiment.task.unet, shape.name) for shape in eligible]
    seed = stream_seed(experiment.config.seed, "winograd", m) % 2**32
    closed = ScaleSet(closed_form_scales(spec.transform()))
    scales = {"standard": ScaleSet(standard_scales(spec.transform())), "closed_form": closed, "kept": closed}
    kept = "closed_form"
    curve: tuple[float, ...] = ()
    if config.learning.num_steps and layers:
        result = learn_scales(
            layers,
            spec,
            num_steps=config.learning.num_steps,
            learning_rate=config.learning.learning_rate,
            seed=seed,
            trainer_factory=lambda **a: experiment.trainer(f"winograd F({m},3)", a["max_steps"], **a),
            initial=config.learning.init,
            layers_per_step=config.learning.layers_per_step,
            noise_kind=config.learning.noise,
            per_layer=config.learning.per_layer,
            separate_columns=config.learning.separate_columns,
        )
        scales, kept, curve = dict(result.scales), result.kept, result.curve
    reported = WinogradSpec(m, points=config.points)
    inputs = _layer_inputs(experiment, [shape.name for shape in eligible])
    figures: dict[str, dict[str, float | None]] = {
        place: dict.fromkeys(("standard", "closed_form", "learned", "kept")) for place in ("noise", "inputs", "run")
    }
    for kind, s in scales.items() if layers else ():
        figures["noise"][kind] = network_sqnr_db(layers, reported, s, seed, REPORTED_BITS)
        figures["run"][kind] = network_sqnr_db(layers, spec, s, seed, REPORTED_BITS)
        figures["inputs"][kind] = statistics.median(
            input_sqnr_db(layer, inputs[layer.name], reported, s, REPORTED_BITS) for layer in layers
        )
    after = {place: of_kinds.pop("kept") for place, of_kinds in figures.items()}
    pictures = pictured(layers, spec, scales["standard"], scales["kept"], seed) if layers else {}
    return {
        "m": m,
        "points": config.points,
        "eligible_layers": [shape.name for shape in eligible],
        "ineligible_layers": [{"name": name, "reason": reason} for name, reason in reasons.items() if reason],
        "sqnr_db": figures["noise"],
        "sqnr_db_activations": figures["inputs"],
        "sqnr_db_configured": figures["run"],
        "sqnr_db_kept": {"noise": after["noise"], "activations": after["inputs"], "configured": after["run"]},
        "kept": kept,
        "scales": {kind: s.to_json() for kind, s in scales.items()},
        "curve_db": list(curve),
        **pictures,
    }


def pictured(
    layers: Sequence[ConvWeight], spec: WinogradSpec, standard: ScaleSet, kept: ScaleSet, seed: int
) -> dict[str, Any]:
    """What reports draw: M's range over the taps before and after scaling, and the SQNR of every stage and layer.

    Scales of layers that have their own are pictured by the geometric mean of their maps.
    """
    maps = {
        name: np.log([range_map(spec.transform(), scales.of(layer.name)) for layer in layers])
        for name, scales in (("standard", standard), ("kept", kept))
    }
    by_stage: dict[str, list[float]] = {}
    for layer, layer_seed in zip(layers, noise_seeds(seed, PICTURE_STREAM, len(layers)), strict=True):
        x = noise(layer.weight.shape[1], torch.Generator().manual_seed(layer_seed))
        for stage, value in stage_sqnr_db(layer, x, spec, kept, REPORTED_BITS).items():
            by_stage.setdefault(stage, []).append(value)
    return {
        "range_map": {name: np.exp(values.mean(axis=0)).tolist() for name, values in maps.items()},
        "stage_sqnr_db": by_stage,
    }


def tile_rule(experiment: Experiment) -> Candidate | None:
    """The data-free baseline: the tiles of least noise under the budget, at the schedule of the baselines.

    Weights have uniform bits and so have activations: of those at which some choice of tiles fits the budget, the
    highest, first by the lower of the two. Noise is the sum over layers of the
    error's power over the output's, each measured on noise by the layer as a candidate would run it. The budget is that
    of the search, in BitOPs with transforms. One in MACs (``budget.macs``) is kept at W8A8 alone: MACs do not fall with
    bits.

    Returns:
        The candidate, or None where no uniform bits fit.
    """
    config, cost = experiment.config, experiment.cost
    timesteps = experiment.standard_schedule(config.space.num_inference_steps)
    seeds = noise_seeds(stream_seed(config.seed, "tile rule") % 2**32, 0, len(cost))
    calls = len(timesteps) * cost.calls_per_step
    held = _bits_of_all(experiment.module.supernet)
    pairs = product(*held) if config.budget.macs is None else [(TRANSFORM_BITS, TRANSFORM_BITS)]
    for weight_bits, act_bits in sorted(pairs, key=lambda pair: (min(pair), pair), reverse=True):
        direct = experiment.uniform(timesteps, weight_bits, act_bits)
        (allocation,) = direct.allocations
        bitops = [
            {tile: cost.layer_bitops(index, allocation.weight_bits[index], act_bits, tile) for tile in tiles}
            for index, tiles in enumerate(experiment.space.tile_choices)
        ]
        if calls * sum(min(of_layer.values()) for of_layer in bitops) > experiment.budget_bitops:
            continue  # before anything is measured
        noises = []
        for index, tiles in enumerate(experiment.space.tile_choices):
            layer, powers = experiment.module.supernet.layers[index], [0.0]
            if isinstance(layer, QuantConv2d) and len(tiles) > 1:
                settings = [LayerSetting(allocation.weight_bits[index], act_bits, tile) for tile in tiles]
                powers = _noise_powers(layer, settings, seeds[index], config.winograd.learning.noise)
            noises.append(dict(zip(tiles, powers, strict=True)))
        chosen = choose_tiles(noises, bitops, experiment.budget_bitops // calls)
        assert chosen is not None, "the cheapest tiles fit"
        return replace(direct, allocations=(replace(allocation, tiles=chosen),))
    return None


def _bits_of_all(supernet: Supernet) -> tuple[set[int], set[int]]:
    """Bits that every layer holds for its weights, if it has any, and for its activations."""
    weights = [set(layer.weight_choices) for layer in supernet.layers if isinstance(layer, WeightedLayer)]
    return set.intersection(*weights), set.intersection(*(set(layer.act_choices) for layer in supernet.layers))


@torch.inference_mode()
def _noise_powers(layer: QuantConv2d, settings: Sequence[LayerSetting], seed: int, kind: str) -> list[float]:
    """Power of a convolution's error over that of its float output, on noise, at each of these settings."""
    weight = layer.float_layer.weight
    x = noise(weight.shape[1], torch.Generator().manual_seed(seed), kind).to(weight.device)
    reference = layer(x)
    powers = []
    for setting in settings:
        with layers_at([layer], [setting]):
            powers.append(10 ** (-sqnr_db(reference, layer(x)) / 10))
    return powers


def _conv_weight(network: nn.Module, name: str) -> ConvWeight:
    conv = network.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    padding = conv.padding
    assert isinstance(padding, tuple)
    height, width = padding
    return ConvWeight(name, conv.weight, (height, width))


@torch.inference_mode()
def _layer_inputs(experiment: Experiment, names: list[str]) -> dict[str, Tensor]:
    """Inputs of these layers on a few states in the middle of a float trajectory."""
    num_timesteps = experiment.config.calibration.num_timesteps
    states = trajectory_states(experiment.task, STATES_FOR_SCALES, num_timesteps, 0)
    state = states[len(states) // 2]
    found: dict[str, Tensor] = {}
    network = experiment.task.unet
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _, args, __, name=name: found.update({name: args[0].cpu()})
        )
        for name in names
    ]
    try:
        state.run(network, state.x.device)
    finally:
        for handle in handles:
            handle.remove()
    return found
