"""What all stages of a run share, laid out and checked before anything is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate

from tmpq_exp.config import Config, UserError
from tmpq_exp.cost import AttentionShape, ConvShape, CostModel, LayerShape, is_eligible
from tmpq_exp.diffusion.schedule import (
    TimestepRule,
    TimestepSpacing,
    group_minima,
    spaced_timesteps,
    timestep_groups,
)
from tmpq_exp.metrics.frechet import FrechetMetric
from tmpq_exp.progress import StageProgress
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.rundir import RunDirectory, bad_input, digest
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.objective import Objective, Protocol
from tmpq_exp.search.random import RandomSearch
from tmpq_exp.search.space import BitsPerStep, SearchSpace
from tmpq_exp.search.trials import Trial, TrialLog
from tmpq_exp.seeding import stream_seed
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.transform import WinogradScales
from tmpq_exp.zoo.task import CostedModel, DiffusionModel, DiffusionTask, TrainableModel, task_layers
from tmpq_exp.zoo.weights import content_hash


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
        return Candidate(timesteps, (self.cost.uniform(weight_bits, act_bits, self.config.quant.softmax_bits),))

    def schedule(self, num_steps: int, spacing: TimestepSpacing) -> tuple[int, ...]:
        """Schedule of this length and spacing."""
        return spaced_timesteps(self.task.num_train_timesteps, num_steps, spacing)

    def quadratic(self, num_steps: int) -> tuple[int, ...]:
        """Quadratic schedule of this length."""
        return self.schedule(num_steps, TimestepSpacing.QUADRATIC)

    @property
    def selection_images(self) -> int:
        """Images on which finalists are compared."""
        config = self.config.evaluation
        return config.num_images if config.selection_images is None else config.selection_images

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside for a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.run.add_stage_seconds(name, time.perf_counter() - start)

    @property
    def search_seed(self) -> int:
        """Seed of what the search draws and of the images it scores."""
        return self.config.seed if self.config.search_seed is None else self.config.search_seed

    def seed_timesteps(self) -> tuple[int, ...]:
        """Smallest timestep of each group at K steps; without groups the quadratic schedule."""
        space = self.config.space
        rule = TimestepRule.UNIFORM if space.groups == "uniform" else TimestepRule.QUADRATIC
        return group_minima(timestep_groups(self.task.num_train_timesteps, space.num_inference_steps, rule))

    def baselines(self) -> dict[str, Candidate]:
        """Named baselines: the float reference, float at K quadratic steps, and uniform bits at K steps.

        Schedules that coincide stand once, under their first name.
        """
        config = self.config.evaluation
        steps = self.quadratic(self.config.space.num_inference_steps)
        reference = self.quadratic(config.reference_steps)
        named = {
            "float_reference": self.uniform(reference, FLOAT_BITS, FLOAT_BITS),
            "float_k": self.uniform(steps, FLOAT_BITS, FLOAT_BITS),
        }
        for bits in config.baseline_bits:
            named[f"w{bits}a{bits}"] = self.uniform(steps, bits, bits)
            for spacing in config.baseline_spacings:
                other = self.uniform(self.schedule(len(steps), TimestepSpacing(spacing)), bits, bits)
                if other not in named.values():
                    named[f"w{bits}a{bits}_{spacing}"] = other
        return named

    def objective(
        self, stream: str, num_images: int, module: SupernetModule | None = None, **arguments: Any
    ) -> Objective:
        """Objective on the image stream of this name; a Trainer's stage may have left the network on the CPU.

        Args:
            stream: Name of the image stream; that of ``search`` follows the search's seed.
            num_images: Images a candidate.
            module: Network that makes them; None takes the supernet.
            arguments: Further ones of ``Objective``.
        """
        module = (module or self.module).to(self.device)
        seed = self.search_seed if stream == "search" else self.config.seed
        protocol = Protocol(num_images, stream_seed(seed, stream), self.config.evaluation.micro_batch)
        state = content_hash(module.supernet.quantizer_state())
        scales = {m: (asdict(spec), scales.to_json()) for m, (spec, scales) in self.winograd.items()}
        return Objective(
            module,
            self.metric,
            protocol,
            self.cost,
            self.trials,
            reference_candidate=self.baselines()["float_reference"],
            state=digest([asdict(self.config.quant), state, scales]),
            on_trial=self.on_trial,
            **arguments,
        )


@bad_input()
def prepare(config: Config, run: RunDirectory, trials: TrialLog, on_trial: Callable[[Trial], None]) -> Experiment:
    """Load the float task, price it, lay out the search space and build the supernet.

    Raises:
        ValueError: If a checkpoint is bad, K exceeds the schedule, or the budget is below the cheapest candidate.
    """
    model = instantiate(config.model)
    if not isinstance(model, DiffusionModel):
        raise UserError(f"model: {_what_it_is_for(model)}")
    task = model.task()
    metric: FrechetMetric = instantiate(config.evaluation.metric)
    if metric.image_shape not in (None, task.sample_shape):
        raise UserError(
            f"evaluation: {metric.name} takes images of shape {metric.image_shape}, model {task.name} makes "
            f"{task.sample_shape}; choose another evaluation"
        )
    cost = CostModel(task_layers(task))
    space = _search_space(config, task.num_train_timesteps, cost.layers)
    weight_bits, act_bits = (
        _with_baselines(config, bits) for bits in (config.space.weight_bits, config.space.act_bits)
    )
    softmax = (config.quant.softmax_bits,)
    weight_choices = [softmax if isinstance(shape, AttentionShape) else weight_bits for shape in cost.layers]
    act_choices = [act_bits] * len(cost)
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


def _what_it_is_for(model: Any) -> str:
    """Why a model of the model group makes no images, and which tasks it is there for."""
    if isinstance(model, TrainableModel):
        return f"{model.name} makes no images and can only be trained (task=train)"
    if isinstance(model, CostedModel):
        return f"{model.name} is an architecture without weights; it is there for task=cost only"
    return f"{type(model).__name__} makes no images; task=run needs a DiffusionModel"


def _with_baselines(config: Config, choices: list[int]) -> tuple[int, ...]:
    return tuple(sorted({*choices, *config.evaluation.baseline_bits}, reverse=True))


def _search_space(config: Config, num_train_timesteps: int, layers: tuple[LayerShape, ...]) -> SearchSpace:
    space, tile = config.space, config.winograd.tile
    rule = TimestepRule.QUADRATIC if space.groups == "free" else TimestepRule(space.groups)
    groups = timestep_groups(num_train_timesteps, space.num_inference_steps, rule)
    num_steps = range(space.min_steps or len(groups), (space.max_steps or len(groups)) + 1)
    steps_per_group = (space.min_steps_per_group, space.max_steps_per_group)
    if not space.search_timesteps:
        groups = tuple(range(group[0], group[0] + 1) for group in groups)
    elif space.groups == "free":
        groups, steps_per_group = (range(num_train_timesteps),), (0, num_train_timesteps)
    softmax = (config.quant.softmax_bits,)
    return SearchSpace(
        groups,
        tuple(softmax if isinstance(shape, AttentionShape) else tuple(space.weight_bits) for shape in layers),
        (tuple(space.act_bits),) * len(layers),
        tuple((tile if isinstance(shape, ConvShape) and is_eligible(shape) else DIRECT_TILE,) for shape in layers),
        num_steps[0],
        num_steps[-1],
        *steps_per_group,
        BitsPerStep(space.bits_per_step),
    )


def _budget_bitops(experiment: Experiment) -> int:
    budget = experiment.config.budget
    if budget.bitops is not None:
        return budget.bitops
    steps = experiment.quadratic(experiment.config.space.num_inference_steps)
    return experiment.cost.bitops(experiment.uniform(steps, budget.weight_bits, budget.act_bits))


def make_search(experiment: Experiment) -> Search:
    """The search algorithm, seeded with the schedule of the budget at the budget's bits where the space has them.

    Raises:
        ValueError: If the budget is below the cheapest candidate, or a setting of the search is out of range.
    """
    config, space = experiment.config, experiment.space
    budget = config.budget
    seeds = []
    if budget.weight_bits in config.space.weight_bits and budget.act_bits in config.space.act_bits:
        timesteps = experiment.seed_timesteps()
        if space.steps.contains(timesteps):
            seeds.append(space.uniform(timesteps, budget.weight_bits, budget.act_bits))
    search: Search = instantiate(config.search)(
        space,
        experiment.cost,
        experiment.budget_bitops,
        seed=stream_seed(experiment.search_seed, "evolution"),
        seed_candidates=tuple(seeds),
    )
    return search


def random_candidates(experiment: Experiment, count: int) -> tuple[Candidate, ...]:
    """Random candidates under the run's budget, none twice."""
    search = RandomSearch(
        experiment.space,
        experiment.cost,
        experiment.budget_bitops,
        population_size=count,
        num_generations=1,
        seed=stream_seed(experiment.search_seed, "random search"),
    )
    return search.ask()


def examined_tiles(config: Config) -> list[int]:
    """Tiles that are examined: the reported ones and the one in use."""
    return sorted({*config.winograd.report_tiles, *([config.winograd.tile] if config.winograd.tile else [])})


def winograd_spec(config: Config, m: int) -> WinogradSpec:
    winograd = config.winograd
    stages = {name: getattr(winograd, name) for name in ("quantize_input", "quantize_v", "quantize_u", "quantize_m")}
    return WinogradSpec(m, points=winograd.points, group_size=winograd.group_size, m_bits=winograd.m_bits, **stages)
