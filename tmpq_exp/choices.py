"""What candidates may choose under a configuration: timesteps, bits and tiles; and what the supernet holds for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path

from tmpq_exp.config import Config, UserError, WinogradConfig
from tmpq_exp.cost import AttentionShape, ConvShape, LayerShape, is_eligible, saving_tiles
from tmpq_exp.diffusion.schedule import TimestepRule, standing_timestep, timestep_groups
from tmpq_exp.quant.allocation import DIRECT_TILE, Allocation
from tmpq_exp.recipe import read_candidate
from tmpq_exp.search.space import BitsPerStep, SearchSpace
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.zoo.task import DiffusionTask

WINOGRAD_KERNEL = 3
"""Kernel size of the convolutions that may run as Winograd."""


def held_bits(
    config: Config, space: SearchSpace, layers: Sequence[LayerShape]
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Bits of weights and activations that the supernet holds for each layer: the space's and the baselines'."""
    baselines = config.evaluation.baseline_bits

    def held(choices: tuple[int, ...], others: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({*choices, *others}, reverse=True))

    weights = [
        held(choices, [config.quant.softmax_bits] if isinstance(shape, AttentionShape) else baselines)
        for choices, shape in zip(space.weight_choices, layers, strict=True)
    ]
    return weights, [held(choices, baselines) for choices in space.act_choices]


def with_tile(allocation: Allocation, layers: Sequence[LayerShape], tile: int) -> Allocation:
    """The allocation with this tile at every eligible convolution."""
    tiles = (tile if isinstance(shape, ConvShape) and is_eligible(shape) else DIRECT_TILE for shape in layers)
    return replace(allocation, tiles=tuple(tiles))


def search_space(config: Config, task: DiffusionTask, layers: tuple[LayerShape, ...]) -> SearchSpace:
    """Timesteps, bits and tiles that candidates of a task may choose.

    Raises:
        ValueError: If K exceeds the schedule, or the recipe whose timesteps and bits are kept does not fit.
    """
    space, num_train_timesteps = config.space, task.num_train_timesteps
    tiles = tuple(_tile_choices(config, shape) for shape in layers)
    if space.recipe is not None:
        return _space_of_recipe(Path(space.recipe), layers, tiles)
    rule = TimestepRule.QUADRATIC if space.groups == "free" else TimestepRule(space.groups)
    groups = timestep_groups(num_train_timesteps, space.num_inference_steps, rule)
    num_steps = range(space.min_steps or len(groups), (space.max_steps or len(groups)) + 1)
    steps_per_group = (space.min_steps_per_group, space.max_steps_per_group)
    if not space.search_timesteps:
        groups = tuple(range(t, t + 1) for t in (standing_timestep(group, task.spacing) for group in groups))
    elif space.groups == "free":
        groups, steps_per_group = (range(num_train_timesteps),), (0, num_train_timesteps)
    softmax = (config.quant.softmax_bits,)
    return SearchSpace(
        groups,
        tuple(softmax if isinstance(shape, AttentionShape) else tuple(space.weight_bits) for shape in layers),
        (tuple(space.act_bits),) * len(layers),
        tiles,
        num_steps[0],
        num_steps[-1],
        *steps_per_group,
        BitsPerStep(space.bits_per_step),
    )


def _tile_choices(config: Config, shape: LayerShape) -> tuple[int, ...]:
    """Tiles that a layer may take."""
    if not isinstance(shape, ConvShape) or not is_eligible(shape):
        return (DIRECT_TILE,)
    space = config.space
    if not space.tiles:
        return (config.winograd.tile,)
    return saving_tiles(shape, space.tiles, max(space.weight_bits), max(space.act_bits))


def _space_of_recipe(path: Path, layers: Sequence[LayerShape], tiles: tuple[tuple[int, ...], ...]) -> SearchSpace:
    """Tiles alone, at the timesteps and bits of another run's recipe."""
    candidate = read_candidate(path, [shape.name for shape in layers])
    if len(candidate.allocations) > 1:
        raise UserError(f"space.recipe must be of a run with space.bits_per_step=shared, found {path}")
    (allocation,) = candidate.allocations
    return SearchSpace(
        tuple((timestep,) for timestep in reversed(candidate.timesteps)),
        tuple((bits,) for bits in allocation.weight_bits),
        tuple((bits,) for bits in allocation.act_bits),
        tiles,
    )


def examined_tiles(config: Config) -> list[int]:
    """Tiles that are examined: the reported ones, of those that listed points fit, and those in use."""
    winograd = config.winograd
    named = isinstance(winograd.points, str)
    reported = [m for m in winograd.report_tiles if named or len(winograd.points) == m + WINOGRAD_KERNEL - 1]
    return sorted({*reported, *used_tiles(config)})


def used_tiles(config: Config) -> list[int]:
    """Tiles that candidates may take, besides direct."""
    return sorted(set(config.space.tiles or [config.winograd.tile]) - {DIRECT_TILE})


def has_static_ranges(config: Config) -> bool:
    """Whether candidates may hold Winograd layers whose activation scales are static."""
    return bool(used_tiles(config)) and config.winograd.act_scales == "static"


def winograd_spec(config: Config, m: int) -> WinogradSpec:
    """The specification that the configuration asks for, at a tile."""
    return spec_of(config.winograd, m)


def spec_of(winograd: WinogradConfig, m: int) -> WinogradSpec:
    """The specification that these settings ask for, at a tile."""
    of_config = {field.name for field in fields(winograd)}
    shared = [field.name for field in fields(WinogradSpec) if field.name in of_config]
    return WinogradSpec(m, **{name: getattr(winograd, name) for name in shared})
