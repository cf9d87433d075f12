"""What all stages of a run share, laid out and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate

from tmpq_exp.config import Config, UserError
from tmpq_exp.cost import AttentionShape, ConvShape, CostModel, LayerShape
from tmpq_exp.diffusion.schedule import (
    TimestepRule,
    TimestepSpacing,
    group_minima,
    spaced_timesteps,
    timestep_groups,
)
from tmpq_exp.metrics.frechet import FrechetMetric
from tmpq_exp.progress import StageProgress
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation, Candidate
from tmpq_exp.quant.supernet import SupernetModule, is_eligible
from tmpq_exp.recipe import task_layers
from tmpq_exp.rundir import RunDirectory, bad_input, digest
from tmpq_exp.search.evolution import EvolutionSearch
from tmpq_exp.search.objective import Objective, Protocol
from tmpq_exp.search.space import SearchSpace
from tmpq_exp.search.trials import Trial, TrialLog
from tmpq_exp.seeding import stream_seed
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.transform import WinogradScales
from tmpq_exp.zoo.task import DiffusionModel, DiffusionTask
from tmpq_exp.zoo.weights import content_hash

BASELINE_BITS = (8, 6)
"""Uniform bit widths that every report compares with."""


@dataclass
class Experiment:
    """What all stages of a run share.

    Args:
        config: Checked configuration.
        run: Run directory.
        task: Float task.
        metric: Quality metric.
        cost: Prices candidates.
        space: Search space.
        budget_bitops: Ceiling of a candidate.
        module: Supernet.
        trials: Evaluations so far.
        on_trial: Called with every new trial.
        device: Where images are made, the Trainer's.
    """

    config: Config
    run: RunDirectory
    task: DiffusionTask
    metric: FrechetMetric
    cost: CostModel
    space: SearchSpace
    budget_bitops: int
    module: SupernetModule
    trials: TrialLog
    on_trial: Callable[[Trial], None]
    device: torch.device
    winograd: dict[int, tuple[WinogradSpec, WinogradScales]] = field(default_factory=dict)
    calibration: list[dict[str, Any]] = field(default_factory=list)

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Layers in the order of every allocation."""
        return self.cost.layers

    def trainer(self, name: str, total: int, *, count_epochs: bool = False, **arguments: Any) -> L.Trainer:
        """A Trainer from the trainer group, with a progress bar of ``total`` batches or epochs."""
        trainer: L.Trainer = instantiate(self.config.trainer)(
            callbacks=[StageProgress(name, total, count_epochs=count_epochs)],
            default_root_dir=self.run.path,
            **arguments,
        )
        return trainer

    def uniform(self, timesteps: tuple[int, ...], weight_bits: int, act_bits: int) -> Candidate:
        """Direct candidate with the same bits everywhere; the softmax keeps its own unless all is float."""
        softmax = FLOAT_BITS if weight_bits == FLOAT_BITS else self.config.quant.softmax_bits
        weights = (softmax if isinstance(shape, AttentionShape) else weight_bits for shape in self.layers)
        num_layers = len(self.layers)
        return Candidate(
            timesteps, (Allocation(tuple(weights), (act_bits,) * num_layers, (DIRECT_TILE,) * num_layers),)
        )

    def quadratic(self, num_steps: int) -> tuple[int, ...]:
        """Quadratic schedule of this length."""
        return spaced_timesteps(self.task.num_train_timesteps, num_steps, TimestepSpacing.QUADRATIC)

    def baselines(self) -> dict[str, Candidate]:
        """Named baselines: the float reference, and float and uniform bits at K quadratic steps."""
        steps = self.quadratic(self.config.space.num_inference_steps)
        reference = self.quadratic(self.config.evaluation.reference_steps)
        named = {
            "float_reference": self.uniform(reference, FLOAT_BITS, FLOAT_BITS),
            "float_k": self.uniform(steps, FLOAT_BITS, FLOAT_BITS),
        }
        return named | {f"w{bits}a{bits}": self.uniform(steps, bits, bits) for bits in BASELINE_BITS}

    def objective(self, stream: str, num_images: int) -> Objective:
        """Objective on the image stream of this name; a Trainer's stage may have left the supernet on the CPU."""
        self.module.to(self.device)
        protocol = Protocol(num_images, stream_seed(self.config.seed, stream), self.config.evaluation.micro_batch)
        state = content_hash(self.module.supernet.quantizer_state())
        scales = {m: (asdict(spec), scales.to_json()) for m, (spec, scales) in self.winograd.items()}
        return Objective(
            self.module,
            self.metric,
            protocol,
            self.cost,
            self.trials,
            reference_candidate=self.baselines()["float_reference"],
            supernet_state=digest([asdict(self.config.quant), state, scales]),
            on_trial=self.on_trial,
        )


@bad_input()
def prepare(config: Config, run: RunDirectory, trials: TrialLog, on_trial: Callable[[Trial], None]) -> Experiment:
    """Load the float task, price it, lay out the search space and build the supernet.

    Raises:
        ValueError: If a checkpoint is bad, K exceeds the schedule, or the budget is below the cheapest candidate.
    """
    model = instantiate(config.model)
    if not isinstance(model, DiffusionModel):
        raise UserError(f"model: {type(model).__name__} makes no images and can only be trained (task=train)")
    task = model.task()
    metric: FrechetMetric = instantiate(config.evaluation.metric)
    cost = CostModel(task_layers(task))
    space = _search_space(config, task.num_train_timesteps, cost.layers)
    weight_choices = [
        (config.quant.softmax_bits,) if isinstance(shape, AttentionShape) else _with_baselines(config.space.weight_bits)
        for shape in cost.layers
    ]
    act_choices = [_with_baselines(config.space.act_bits)] * len(cost)
    module = SupernetModule(task, cost.layers, weight_choices, act_choices, config.quant)
    trainer: L.Trainer = instantiate(config.trainer)()
    if trainer.world_size != 1:
        raise UserError(
            f"trainer: candidates are scored by one process on one device, found {trainer.world_size} devices; "
            "set trainer.devices=1"
        )
    device = trainer.strategy.root_device
    experiment = Experiment(config, run, task, metric, cost, space, 0, module, trials, on_trial, device)
    experiment.budget_bitops = _budget_bitops(experiment)
    experiment.quadratic(config.evaluation.reference_steps)  # what is wrong fails here rather than after the search
    for m in examined_tiles(config):
        winograd_spec(config, m)
    make_search(experiment)
    return experiment


def _with_baselines(choices: list[int]) -> tuple[int, ...]:
    return tuple(sorted({*choices, *BASELINE_BITS}, reverse=True))


def _search_space(config: Config, num_train_timesteps: int, layers: tuple[LayerShape, ...]) -> SearchSpace:
    space, tile = config.space, config.winograd.tile
    groups = timestep_groups(num_train_timesteps, space.num_inference_steps, TimestepRule(space.groups))
    if not space.search_timesteps:
        groups = tuple(range(group[0], group[0] + 1) for group in groups)
    softmax = (config.quant.softmax_bits,)
    return SearchSpace(
        groups,
        tuple(softmax if isinstance(shape, AttentionShape) else tuple(space.weight_bits) for shape in layers),
        (tuple(space.act_bits),) * len(layers),
        tuple((tile if isinstance(shape, ConvShape) and is_eligible(shape) else DIRECT_TILE,) for shape in layers),
    )


def _budget_bitops(experiment: Experiment) -> int:
    budget = experiment.config.budget
    if budget.bitops is not None:
        return budget.bitops
    steps = experiment.quadratic(experiment.config.space.num_inference_steps)
    return experiment.cost.bitops(experiment.uniform(steps, budget.weight_bits, budget.act_bits))


def make_search(experiment: Experiment) -> EvolutionSearch:
    """The search algorithm, seeded with the quadratic schedule at the budget's bits where the space has them.

    Raises:
        ValueError: If the budget is below the cheapest candidate, or a setting of the search is out of range.
    """
    config, space = experiment.config, experiment.space
    budget = config.budget
    seeds = []
    if budget.weight_bits in config.space.weight_bits and budget.act_bits in config.space.act_bits:
        seeds.append(space.uniform(group_minima(space.timestep_groups), budget.weight_bits, budget.act_bits))
    search: EvolutionSearch = instantiate(config.search)(
        space,
        experiment.cost,
        experiment.budget_bitops,
        seed=stream_seed(config.seed, "evolution"),
        seed_candidates=tuple(seeds),
    )
    return search


def examined_tiles(config: Config) -> list[int]:
    """Tiles that are examined: the reported ones and the one in use."""
    return sorted({*config.winograd.report_tiles, *([config.winograd.tile] if config.winograd.tile else [])})


def winograd_spec(config: Config, m: int) -> WinogradSpec:
    winograd = config.winograd
    stages = {name: getattr(winograd, name) for name in ("quantize_input", "quantize_v", "quantize_u", "quantize_m")}
    return WinogradSpec(m, points=winograd.points, group_size=winograd.group_size, m_bits=winograd.m_bits, **stages)
