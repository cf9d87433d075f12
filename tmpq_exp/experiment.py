"""What all stages of a run share, laid out and checked before anything is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from torch import Tensor

from tmpq_exp.batch_size import fitting_micro_batch
from tmpq_exp.choices import examined_tiles, held_bits, search_space, used_tiles, winograd_spec, with_tile
from tmpq_exp.config import Config, UserError
from tmpq_exp.config.identity import digest
from tmpq_exp.cost import TRANSFORM_BITS, ConvShape, CostModel, LayerShape, is_eligible, with_error_feedback
from tmpq_exp.diffusion.schedule import (
    TimestepRule,
    TimestepSpacing,
    spaced_timesteps,
    standing_timestep,
    timestep_groups,
)
from tmpq_exp.measuring import chosen_metrics
from tmpq_exp.metrics.frechet import FrechetMetric
from tmpq_exp.metrics.metric import Metric, Place
from tmpq_exp.quant.allocation import FLOAT_BITS, Candidate
from tmpq_exp.quant.static_ranges import ranges_state
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.rundir import RunDirectory, bad_input
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.executor import Executor, LocalExecutor
from tmpq_exp.search.objective import Objective
from tmpq_exp.search.protocol import Control, Protocol
from tmpq_exp.search.random import RandomSearch
from tmpq_exp.search.space import SearchSpace
from tmpq_exp.search.trials import Trial, TrialLog
from tmpq_exp.seeding import stream_seed
from tmpq_exp.trainers import own_device, stage_trainer
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.scales import ScaleSet, read_scales
from tmpq_exp.zoo.task import (
    ClassificationModel,
    CostedModel,
    DiffusionModel,
    DiffusionTask,
    TrainableModel,
    task_layers,
)
from tmpq_exp.zoo.weights import content_hash, read_tensors


@dataclass
class Experiment:
    """What all stages of a run share.

    Args:
        config: Checked configuration.
        run: Run directory.
        task: Float task.
        metric: Quality metric.
        further: Metrics reported beside it for baselines and winner.
        warnings: What a reader of the figures must know, found while the run was laid out.
        cost: Prices candidates.
        space: Search space.
        budget_bitops: Ceiling of a candidate.
        module: Supernet.
        trials: Evaluations so far.
        on_trial: Called with every new trial.
        device: Where images are made, the Trainer's.
        micro_batch: Images a forward.
        winograd: Specification and scales of the tiles in use.
        tile_rule: Where tiles are searched, the candidate of the data-free rule for them; None if none fits.
        calibration: Losses of block-wise calibration.
        executor: Who measures the supernet's candidates; this process unless another is set.
    """

    config: Config
    run: RunDirectory
    task: DiffusionTask
    metric: Metric
    cost: CostModel
    space: SearchSpace
    budget_bitops: int
    module: SupernetModule
    trials: TrialLog
    on_trial: Callable[[Trial], None]
    device: torch.device
    micro_batch: int
    winograd: dict[int, tuple[WinogradSpec, ScaleSet]] = field(default_factory=dict)
    tile_rule: Candidate | None = None
    further: tuple[Metric, ...] = ()
    warnings: tuple[str, ...] = ()
    calibration: list[dict[str, Any]] = field(default_factory=list)
    executor: Executor = field(init=False)
    _objectives: dict[tuple[Any, ...], Objective] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.executor = LocalExecutor(self.module)

    def earlier(self, path: Path, inputs: str, kind: str) -> Path | None:
        """The file that a run to be reused has of a stage whose file here is ``path``, if its inputs were the same.

        Args:
            path: In this run's directory.
            inputs: Digest of the stage's inputs, which its file's metadata holds.
            kind: What the file should hold, for messages.

        Raises:
            UserError: If such a file is damaged.
        """
        relative = path.relative_to(self.run.path)
        files = (Path(directory) / relative for directory in self.config.reuse)
        with bad_input():
            return next((f for f in files if f.exists() and read_tensors(f, kind)[1].get("inputs") == inputs), None)

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Layers in the order of every allocation."""
        return self.cost.layers

    def trainer(self, name: str, total: int, *, count_epochs: bool = False, **arguments: Any) -> L.Trainer:
        """See ``stage_trainer``."""
        return stage_trainer(self.config, self.run, name, total, count_epochs=count_epochs, **arguments)

    def uniform(self, timesteps: tuple[int, ...], weight_bits: int, act_bits: int) -> Candidate:
        """Direct candidate with the same bits everywhere; the softmax keeps its own unless all is float."""
        return Candidate(timesteps, (self.cost.uniform(weight_bits, act_bits, self.config.quant.softmax_bits),))

    def schedule(self, num_steps: int, spacing: TimestepSpacing) -> tuple[int, ...]:
        """Schedule of this length and spacing."""
        return spaced_timesteps(self.task.num_train_timesteps, num_steps, spacing)

    def standard_schedule(self, num_steps: int) -> tuple[int, ...]:
        """Schedule of this length as the task lays it."""
        return self.schedule(num_steps, self.task.spacing)

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

    def ready_metrics(self) -> None:
        """Make the metrics ready: features of reference images, from the cache or measured.

        Raises:
            UserError: If a reference image cannot be read, or has another size than the others.
        """
        waiting = [metric for metric in (self.metric, *self.further) if not metric.is_ready]
        if waiting:
            with self.timed("references"):
                make_ready(self.config, self.device, waiting)

    @property
    def search_seed(self) -> int:
        """Seed of what the search draws and of the images it scores."""
        return self.config.seed if self.config.search_seed is None else self.config.search_seed

    def seed_timesteps(self) -> tuple[int, ...]:
        """One timestep of each group at K steps, see ``standing_timestep``; without groups of each quadratic one."""
        space = self.config.space
        rule = TimestepRule.UNIFORM if space.groups == "uniform" else TimestepRule.QUADRATIC
        groups = timestep_groups(self.task.num_train_timesteps, space.num_inference_steps, rule)
        return tuple(standing_timestep(group, self.task.spacing) for group in reversed(groups))

    def baselines(self) -> dict[str, Candidate]:
        """Named baselines: the float reference, float at K steps, and uniform bits at K steps.

        If asked for, W8A8 at the reference's steps (``w8a8_reference``).
        Where tiles are searched, also W8A8 with one tile at all eligible layers, and the data-free rule. Schedules that
        coincide stand once, under their first name.
        """
        config = self.config.evaluation
        steps = self.standard_schedule(self.config.space.num_inference_steps)
        reference = self.standard_schedule(config.reference_steps)
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
        for tile in filter(None, self.config.space.tiles):
            allocation = with_tile(named["w8a8"].allocations[0], self.layers, tile)
            named[f"w8a8_f{tile}"] = Candidate(steps, (allocation,))
        if config.quantized_reference:
            named["w8a8_reference"] = self.uniform(reference, 8, 8)
        return named if self.tile_rule is None else named | {"winograd_rule": self.tile_rule}

    def objective(
        self, stream: str, num_images: int, module: SupernetModule | None = None, **arguments: Any
    ) -> Objective:
        """Objective on the image stream of this name.

        Args:
            stream: Name of the image stream; that of ``search`` follows the search's seed.
            num_images: Images a candidate.
            module: Network that makes them; None takes the supernet.
            arguments: Further ones of ``Objective``.
        """
        seed = self.search_seed if stream == "search" else self.config.seed
        config = self.config.evaluation
        protocol = Protocol(num_images, stream_seed(seed, stream), self.micro_batch, config.paired_images)
        return self.objective_under(protocol, module, controlled=stream != "final", **arguments)

    def objective_under(
        self, protocol: Protocol, module: SupernetModule | None = None, *, controlled: bool, **arguments: Any
    ) -> Objective:
        """Objective under a protocol; a Trainer's stage may have left the network on the CPU.

        Those of the supernet are made once: stages that look at the same images share what stands beside them.

        Args:
            protocol: Which images.
            module: Network that makes them; None takes the supernet.
            controlled: Whether the control stands beside them, where there is one.
            arguments: Further ones of ``Objective``.
        """
        module = (module or self.module).to(self.device)
        key = (protocol, controlled, *sorted(arguments.items()))
        if module is self.module and key in self._objectives:
            return self._objectives[key]
        state = content_hash(module.supernet.quantizer_state())
        scales = {m: (asdict(spec), scales.to_json()) for m, (spec, scales) in self.winograd.items()}
        ranges = [content_hash(ranges_state(module.supernet.ranges))] if module.supernet.ranges else []
        objective = Objective(
            module,
            self.metric,
            protocol,
            self.cost,
            self.trials,
            reference_candidate=self.baselines()["float_reference"],
            state=digest([asdict(self.config.quant), state, scales, *ranges]),
            on_trial=self.on_trial,
            control=self.control if controlled else None,
            images=self._images if module is self.module else None,
            **arguments,
        )
        if module is self.module:
            self._objectives[key] = objective
        return objective

    def _images(self, candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        """Images of the supernet, by whoever makes them."""
        self.module.to(self.device)
        for images in self.executor.images(candidate, protocol):
            yield images.to(self.device)

    @cached_property
    def control(self) -> Control | None:
        """The float model at K steps; None without control variate, or where the metric is no Frechet distance."""
        num_images = self.config.objective.control_images
        if num_images == 0 or not isinstance(self.metric, FrechetMetric):
            return None
        protocol = Protocol(num_images, stream_seed(self.config.seed, "control"), self.micro_batch)
        return Control(self._images, self.metric, self.uniform(self.seed_timesteps(), FLOAT_BITS, FLOAT_BITS), protocol)


@bad_input()
def make_ready(config: Config, device: torch.device, metrics: Iterable[Metric]) -> None:
    """Make metrics ready on a device; see ``Experiment.ready_metrics``."""
    place = Place(device, Path(config.paths.cache_dir))
    for metric in metrics:
        metric.make_ready(place)


@bad_input()
def prepare(config: Config, run: RunDirectory, trials: TrialLog, on_trial: Callable[[Trial], None]) -> Experiment:
    """Load the float task, price it, lay out the search space and build the supernet.

    Raises:
        ValueError: If a checkpoint is bad, K exceeds the schedule, or the budget is below the cheapest candidate or in
            MACs where not all bits are 8.
    """
    model = instantiate(config.model)
    if not isinstance(model, DiffusionModel):
        raise UserError(f"model: {_what_it_is_for(model)}")
    task = model.task()
    metrics = chosen_metrics(config, task)
    cost = CostModel(with_error_feedback(task_layers(task), config.winograd.shaped_stages), task.calls_per_step)
    space = search_space(config, task, cost.layers)
    weight_choices, act_choices = held_bits(config, space, cost.layers)
    module = SupernetModule(task, cost.layers, weight_choices, act_choices, config.quant)
    device = own_device(config)
    images = _micro_batch(config, run, cost, device)
    experiment = Experiment(
        config, run, task, metrics.quality, cost, space, 0, module, trials, on_trial, device, images
    )
    experiment.further, experiment.warnings = metrics.further, metrics.warnings
    experiment.budget_bitops = _budget_bitops(experiment)
    eligible = [shape.name for shape in cost.layers if isinstance(shape, ConvShape) and is_eligible(shape)]
    experiment.standard_schedule(config.evaluation.reference_steps)  # what is wrong fails here, not after the search
    for m in examined_tiles(config):
        spec = winograd_spec(config, m)
        if m in used_tiles(config) and config.winograd.scales_from is not None:
            read_scales(Path(config.winograd.scales_from), spec, eligible)
    make_search(experiment)
    return experiment


def _micro_batch(config: Config, run: RunDirectory, cost: CostModel, device: torch.device) -> int:
    """Images a forward: as configured, else as many as memory sufficed for when the run first started.

    Then no more than a candidate of the search has: the last forward is a whole one too.
    """
    if config.evaluation.micro_batch is not None:
        return config.evaluation.micro_batch
    found = run.stage("micro batch", [], [], lambda: fitting_micro_batch(cost.layers, cost.calls_per_step, device))
    return min(int(found), config.objective.num_images)


def _what_it_is_for(model: Any) -> str:
    """Why a model of the model group makes no images, and which tasks it is there for."""
    if isinstance(model, TrainableModel):
        return f"{model.name} makes no images and can only be trained (task=train)"
    if isinstance(model, CostedModel):
        return f"{model.name} is an architecture without weights; it is there for task=cost only"
    if isinstance(model, ClassificationModel):
        return f"{model.name} is a classifier; it is there for task=classify only"
    return f"{type(model).__name__} makes no images; task=run needs a DiffusionModel"


def _budget_bitops(experiment: Experiment) -> int:
    budget = experiment.config.budget
    if budget.bitops is not None:
        return budget.bitops
    if budget.macs is not None:
        return _bitops_of_macs(budget.macs, experiment.space)
    steps = experiment.standard_schedule(experiment.config.space.num_inference_steps)
    return experiment.cost.bitops(experiment.uniform(steps, budget.weight_bits, budget.act_bits))


def _bitops_of_macs(macs: int, space: SearchSpace) -> int:
    """What so many MACs are in BitOPs where no layer has other bits than the transforms of Winograd layers."""
    found = sorted({bits for choices in (*space.weight_choices, *space.act_choices) for bits in choices})
    if found != [TRANSFORM_BITS]:
        raise ValueError(
            f"budget.macs counts where all bits are {TRANSFORM_BITS} (space.weight_bits, space.act_bits, "
            f"quant.softmax_bits, and those of space.recipe), found {found}; give budget.bitops"
        )
    return macs * TRANSFORM_BITS**2


def make_search(experiment: Experiment) -> Search:
    """The search algorithm, seeded with the schedule of the budget: at its bits where the space has them, and with bits
    that are lowered from the highest where layers cost most.

    Raises:
        ValueError: If the budget is below the cheapest candidate, or a setting of the search is out of range.
    """
    config, space = experiment.config, experiment.space
    budget = config.budget
    timesteps, seeds = experiment.seed_timesteps(), []
    if space.steps.contains(timesteps):
        if budget.weight_bits in config.space.weight_bits and budget.act_bits in config.space.act_bits:
            seeds.append(space.uniform(timesteps, budget.weight_bits, budget.act_bits))
        seeds.append(space.uniform(timesteps, max(config.space.weight_bits), max(config.space.act_bits)))
        if experiment.tile_rule is not None:
            seeds.append(replace(experiment.tile_rule, timesteps=timesteps))
    seeds = [seed for seed in seeds if space.contains(seed)][: config.search.get("population_size")]
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
