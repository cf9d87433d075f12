"""The stages of a run: each takes what the ones before it made, and keeps its result in the run directory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

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
from tmpq_exp.progress import StageBar, StageProgress
from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation, Candidate
from tmpq_exp.quant.calibration import CalibrationModule, trajectory_states
from tmpq_exp.quant.supernet import SupernetModule, is_eligible
from tmpq_exp.recipe import task_layers
from tmpq_exp.rundir import RunDirectory, bad_input, digest
from tmpq_exp.search.evolution import EvolutionSearch
from tmpq_exp.search.module import SearchModule
from tmpq_exp.search.objective import Objective, Protocol
from tmpq_exp.search.space import SearchSpace
from tmpq_exp.search.trials import Trial, TrialLog
from tmpq_exp.seeding import stream_seed
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.scales import ConvWeight, input_sqnr_db, learn_scales, network_sqnr_db
from tmpq_exp.winograd.transform import WinogradScales, closed_form_scales, ineligible_reason, standard_scales
from tmpq_exp.zoo.task import DiffusionModel, DiffusionTask
from tmpq_exp.zoo.weights import read_tensors, write_tensors

BASELINE_BITS = (8, 6)
"""Uniform bit widths that every report compares with."""

REPORTED_BITS = 8
"""Bits of all Winograd stages behind the reported SQNR."""


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

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Layers in the order of every allocation."""
        return self.cost.layers

    def trainer(self, name: str, total: int, **arguments: Any) -> L.Trainer:
        """A Trainer from the trainer group, with a progress bar of ``total`` units."""
        trainer: L.Trainer = instantiate(self.config.trainer)(
            callbacks=[StageProgress(name, total)], default_root_dir=self.run.path, **arguments
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
        state = {key: value.tolist() for key, value in self.module.supernet.quantizer_state().items()}
        scales = {m: (asdict(spec), scales.to_json()) for m, (spec, scales) in self.winograd.items()}
        return Objective(
            self.module,
            self.metric,
            protocol,
            self.cost,
            self.trials,
            reference_candidate=self.baselines()["float_reference"],
            supernet_state=digest([state, scales]),
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
    device = instantiate(config.trainer)().strategy.root_device
    experiment = Experiment(config, run, task, metric, cost, space, 0, module, trials, on_trial, device)
    experiment.budget_bitops = _budget_bitops(experiment)
    experiment.quadratic(config.evaluation.reference_steps)  # what is wrong fails here rather than after the search
    for m in _tiles(config):
        _spec(config, m)
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


def calibrate(experiment: Experiment) -> None:
    """Set all quantizers, or read them back if the same calibration was done before."""
    config, supernet = experiment.config, experiment.module.supernet
    choices = [[q.bit_choices for _, q in layer.quantizers()] for layer in supernet.layers]
    inputs = [experiment.task.weights_hash, asdict(config.calibration), asdict(config.quant), choices, config.seed]
    path = experiment.run.supernet

    def compute() -> None:
        experiment.module.to(experiment.device)
        states = trajectory_states(experiment.task, config.calibration, config.seed)
        module = CalibrationModule(supernet, states, config.calibration, config.seed)
        experiment.trainer("calibrate", len(states), max_epochs=1).fit(module)
        write_tensors(path, supernet.quantizer_state(), {"model": experiment.task.name, "inputs": digest(inputs)})

    experiment.run.stage("calibrate", inputs, [path], compute)
    with bad_input("; remove it to calibrate again"):
        state, metadata = read_tensors(path, "quantizers of the supernet")
        if metadata.get("inputs") != digest(inputs):
            raise ValueError(f"{path} was made by another calibration")
        supernet.load_quantizer_state(state, str(path))


def winograd_scales(experiment: Experiment) -> list[dict[str, Any]]:
    """Learn and judge the transform scales of every reported tile, and of the tile in use.

    Returns:
        The ``winograd`` list of the report.
    """
    config = experiment.config.winograd
    results = []
    for m in _tiles(experiment.config):
        inputs = [experiment.task.weights_hash, asdict(config), m, experiment.config.seed]
        result = experiment.run.stage(f"winograd f{m}", inputs, [], partial(_learn_tile, experiment, m))
        results.append(result)
        if m == config.tile:
            scales = WinogradScales.from_json(
                result["scales"][config.scales if config.scales != "learned" else result["kept"]]
            )
            experiment.winograd[m] = _spec(experiment.config, m), scales
    experiment.module.supernet.set_winograd(experiment.winograd)
    return results


def _tiles(config: Config) -> list[int]:
    """Tiles that are examined: the reported ones and the one in use."""
    return sorted({*config.winograd.report_tiles, *([config.winograd.tile] if config.winograd.tile else [])})


def _spec(config: Config, m: int) -> WinogradSpec:
    winograd = config.winograd
    stages = {name: getattr(winograd, name) for name in ("quantize_input", "quantize_v", "quantize_u", "quantize_m")}
    return WinogradSpec(m, points=winograd.points, group_size=winograd.group_size, m_bits=winograd.m_bits, **stages)


def _learn_tile(experiment: Experiment, m: int) -> dict[str, Any]:
    config, spec = experiment.config.winograd, _spec(experiment.config, m)
    convs = [shape for shape in experiment.layers if isinstance(shape, ConvShape)]
    eligible = [shape for shape in convs if is_eligible(shape)]
    reasons = {s.name: ineligible_reason(s.kernel_size, s.stride, s.dilation, s.groups) for s in convs}
    layers = [_conv_weight(experiment.task.unet, shape.name) for shape in eligible]
    seed = stream_seed(experiment.config.seed, "winograd", m) % 2**32
    scales = {"standard": standard_scales(spec.transform()), "closed_form": closed_form_scales(spec.transform())}
    kept = "closed_form"
    curve: tuple[float, ...] = ()
    if config.learning.num_steps:
        result = learn_scales(
            layers,
            spec,
            steps=config.learning.num_steps,
            lr=config.learning.learning_rate,
            seed=seed,
            trainer_factory=lambda **a: experiment.trainer(f"winograd F({m},3)", config.learning.num_steps, **a),
            initial=config.learning.init,
            layers_per_step=config.learning.layers_per_step,
        )
        scales, kept, curve = dict(result.scales), result.kept, result.curve
    reported = WinogradSpec(m, points=config.points)
    inputs = _layer_inputs(experiment, [shape.name for shape in eligible])
    activations = {
        kind: statistics.median(
            input_sqnr_db(layer, inputs[layer.name], reported, s, REPORTED_BITS) for layer in layers
        )
        for kind, s in scales.items()
    }
    return {
        "m": m,
        "points": config.points,
        "eligible_layers": [shape.name for shape in eligible],
        "ineligible_layers": [{"name": name, "reason": reason} for name, reason in reasons.items() if reason],
        "sqnr_db": {k: network_sqnr_db(layers, reported, s, seed, REPORTED_BITS) for k, s in scales.items()},
        "sqnr_db_activations": activations,
        "kept": kept,
        "scales": {kind: s.to_json() for kind, s in scales.items()},
        "curve_db": list(curve),
    }


def _conv_weight(network: nn.Module, name: str) -> ConvWeight:
    conv = network.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    padding = conv.padding
    assert isinstance(padding, tuple)
    height, width = padding
    return ConvWeight(name, conv.weight, (height, width))


@torch.inference_mode()
def _layer_inputs(experiment: Experiment, names: list[str]) -> dict[str, Tensor]:
    """Inputs of these layers on eight states in the middle of a float trajectory."""
    config = experiment.config.calibration
    states = trajectory_states(experiment.task, type(config)(8, config.num_timesteps, config.max_values), 0)
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
        timestep = torch.full((len(state.x),), state.timestep, device=state.x.device)
        network(state.x, timestep, **{key: value.to(state.x.device) for key, value in state.conditioning.items()})
    finally:
        for handle in handles:
            handle.remove()
    return found


def search(experiment: Experiment) -> tuple[EvolutionSearch, Objective]:
    """Run the search; candidates that were scored before a kill are answered from the trials."""
    algorithm = make_search(experiment)
    objective = experiment.objective("search", experiment.config.objective.num_images)
    total = algorithm.num_generations * algorithm.population_size
    trainer = experiment.trainer(
        "search", total, max_epochs=algorithm.num_generations, reload_dataloaders_every_n_epochs=1
    )
    with _timed(experiment, "search"):
        trainer.fit(SearchModule(algorithm, objective))
        for name, candidate in experiment.baselines().items():
            if name != "float_reference":
                objective.evaluate(candidate, "baseline", name=name)
    return algorithm, objective


def select(experiment: Experiment, algorithm: EvolutionSearch) -> Candidate:
    """The winner: the best of the finalists on images the search never saw.

    Raises:
        UserError: If no candidate of the search could be scored.
    """
    finalists = [scored.candidate for scored in algorithm.top(experiment.config.evaluation.num_finalists)]
    if not finalists:
        raise UserError("every candidate of the search failed; trials.jsonl says why under 'error'")
    if len(finalists) == 1:
        return finalists[0]
    objective = experiment.objective("selection", experiment.config.evaluation.num_images)
    with _timed(experiment, "select"), StageBar("select", len(finalists)) as bar:
        trials = []
        for candidate in finalists:
            trials.append(objective.evaluate(candidate, "selection"))
            bar.advance()
    best = min(range(len(finalists)), key=lambda i: trials[i].score(experiment.metric.name))
    return finalists[best]


def evaluate(experiment: Experiment, winner: Candidate) -> tuple[dict[str, Trial], Objective]:
    """Baselines and winner on the final images."""
    config = experiment.config.evaluation
    objective = experiment.objective("final", config.num_images)
    named = {**experiment.baselines(), "best": winner}
    trials = {}

    def predict(candidate: Candidate) -> Iterable[Tensor]:
        trainer = experiment.trainer(f"evaluate {name}", len(objective.protocol.micro_batches()))
        batches = objective.protocol.micro_batches()
        with experiment.module.requesting(candidate, batches, objective.protocol.seed):
            images: Any = trainer.predict(experiment.module, range(len(batches)))
        experiment.module.to(experiment.device)
        return list(images)

    with _timed(experiment, "evaluate"):
        for name, candidate in named.items():
            trials[name] = objective.evaluate(candidate, "final", name=name, images=predict)
    return trials, objective


@contextmanager
def _timed(experiment: Experiment, name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        experiment.run.add_stage_seconds(name, time.perf_counter() - start)
