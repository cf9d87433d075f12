"""The stages of a run: each takes what the ones before it made, and keeps its result in the run directory."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tmpq_exp.calibrating import recalibrated
from tmpq_exp.config import UserError
from tmpq_exp.cost import ConvShape, is_eligible
from tmpq_exp.experiment import Experiment, examined_tiles, make_search, winograd_spec
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.module import Proxy, SearchModule
from tmpq_exp.search.objective import Objective
from tmpq_exp.search.trials import Trial
from tmpq_exp.seeding import stream_seed
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.scales import ConvWeight, input_sqnr_db, learn_scales, network_sqnr_db
from tmpq_exp.winograd.transform import WinogradScales, closed_form_scales, ineligible_reason, standard_scales

REPORTED_BITS = 8
"""Bits of all Winograd stages behind the reported SQNR."""


def winograd_scales(experiment: Experiment) -> list[dict[str, Any]]:
    """Learn and judge the transform scales of every reported tile, and of the tile in use.

    Returns:
        The ``winograd`` list of the report.
    """
    config = experiment.config.winograd
    results = []
    for m in examined_tiles(experiment.config):
        inputs = [experiment.task.weights_hash, asdict(config), m, experiment.config.seed]
        result = experiment.run.stage(f"winograd f{m}", inputs, [], partial(_learn_tile, experiment, m))
        results.append(result)
        if m == config.tile:
            scales = WinogradScales.from_json(
                result["scales"][config.scales if config.scales != "learned" else result["kept"]]
            )
            experiment.winograd[m] = winograd_spec(experiment.config, m), scales
    experiment.module.supernet.set_winograd(experiment.winograd)
    return results


def _learn_tile(experiment: Experiment, m: int) -> dict[str, Any]:
    config, spec = experiment.config.winograd, winograd_spec(experiment.config, m)
    convs = [shape for shape in experiment.layers if isinstance(shape, ConvShape)]
    eligible = [shape for shape in convs if is_eligible(shape)]
    reasons = {s.name: ineligible_reason(s.kernel_size, s.stride, s.dilation, s.groups) for s in convs}
    layers = [_conv_weight(experiment.task.unet, shape.name) for shape in eligible]
    seed = stream_seed(experiment.config.seed, "winograd", m) % 2**32
    scales = {"standard": standard_scales(spec.transform()), "closed_form": closed_form_scales(spec.transform())}
    kept = "closed_form"
    curve: tuple[float, ...] = ()
    if config.learning.num_steps and layers:
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
    no_figures: dict[str, float | None] = dict.fromkeys(("standard", "closed_form", "learned"))
    noise, activations = dict(no_figures), dict(no_figures)
    for kind, s in scales.items() if layers else ():
        noise[kind] = network_sqnr_db(layers, reported, s, seed, REPORTED_BITS)
        activations[kind] = statistics.median(
            input_sqnr_db(layer, inputs[layer.name], reported, s, REPORTED_BITS) for layer in layers
        )
    return {
        "m": m,
        "points": config.points,
        "eligible_layers": [shape.name for shape in eligible],
        "ineligible_layers": [{"name": name, "reason": reason} for name, reason in reasons.items() if reason],
        "sqnr_db": noise,
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
    num_timesteps = experiment.config.calibration.num_timesteps
    states = trajectory_states(experiment.task, 8, num_timesteps, 0)
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


def search(experiment: Experiment) -> tuple[Search, Objective]:
    """Run the search; candidates that were scored before a kill are answered from the trials."""
    algorithm = make_search(experiment)
    config = experiment.config.objective
    objective = experiment.objective("search", config.num_images)
    proxy = None
    total = algorithm.num_generations * algorithm.population_size
    if config.proxy is not None:
        cheap = experiment.objective("search", config.proxy_images, measures_quality=False)
        proxy = Proxy(cheap, config.proxy, config.promote_fraction)
        total += algorithm.num_generations * proxy.num_promoted(algorithm.population_size)
    trainer = experiment.trainer(
        "search", total, max_epochs=algorithm.num_generations, reload_dataloaders_every_n_epochs=1
    )
    with experiment.timed("search"):
        trainer.fit(SearchModule(algorithm, objective, proxy))
        for name, candidate in experiment.baselines().items():
            if name != "float_reference":
                objective.evaluate(candidate, "baseline", name=name)
    return algorithm, objective


def select(experiment: Experiment, algorithm: Search) -> Candidate:
    """The winner: the best of the finalists on images the search never saw.

    Raises:
        UserError: If no candidate of the search could be scored.
    """
    finalists = [scored.candidate for scored in algorithm.top(experiment.config.evaluation.num_finalists)]
    if not finalists:
        raise UserError("every candidate of the search failed; trials.jsonl says why under 'error'")
    if len(finalists) == 1:
        return finalists[0]
    objective = experiment.objective("selection", experiment.selection_images)
    with experiment.timed("select"), StageBar("select", len(finalists)) as bar:
        trials = []
        for candidate in finalists:
            trials.append(objective.evaluate(candidate, "selection"))
            bar.advance()
    best = min(range(len(finalists)), key=lambda i: trials[i].score(experiment.metric.name))
    return finalists[best]


@dataclass(frozen=True)
class Shipped:
    """The winner as it is shipped.

    Args:
        candidate: The winner.
        module: The supernet, or a network calibrated for the winner's own bits.
        other: The one of the two that is not shipped; None if nothing was calibrated again.
        selection: ``supernet`` and ``recalibrated`` -> the selection's score; empty if nothing was.
    """

    candidate: Candidate
    module: SupernetModule
    other: SupernetModule | None
    selection: dict[str, float]


def specialize(experiment: Experiment, winner: Candidate) -> Shipped:
    """Calibrate the winner for its own bits if that is asked for; ship what is better on the selection's images."""
    if not experiment.config.evaluation.recalibrate:
        return Shipped(winner, experiment.module, None, {})
    with experiment.timed("specialize"):
        own = recalibrated(experiment, winner)
        modules = {"supernet": experiment.module, "recalibrated": own}
        scores = {}
        for name, module in modules.items():
            objective = experiment.objective("selection", experiment.selection_images, module)
            scores[name] = objective.evaluate(winner, "selection").score(experiment.metric.name)
    if scores["recalibrated"] < scores["supernet"]:
        return Shipped(winner, own, experiment.module, scores)
    return Shipped(winner, experiment.module, own, scores)


def evaluate(experiment: Experiment, shipped: Shipped) -> tuple[dict[str, Trial], Objective]:
    """Baselines and winner on the final images: ``best`` as it is shipped, ``best_other`` as it is not."""
    config = experiment.config.evaluation
    named = {name: (candidate, experiment.module) for name, candidate in experiment.baselines().items()}
    named["best"] = shipped.candidate, shipped.module
    if shipped.other is not None:
        named["best_other"] = shipped.candidate, shipped.other
    trials = {}
    with experiment.timed("evaluate"):
        for name, (candidate, module) in named.items():
            objective = experiment.objective("final", config.num_images, module, bootstrap=config.bootstrap)
            predict = partial(_predict, experiment, module, objective, name)
            trials[name] = objective.evaluate(candidate, "final", name=name, images=predict)
    return trials, experiment.objective("final", config.num_images, shipped.module, bootstrap=config.bootstrap)


def _predict(
    experiment: Experiment, module: SupernetModule, objective: Objective, name: str, candidate: Candidate
) -> list[Tensor]:
    """Images of the objective's protocol, made by a Trainer."""
    batches = objective.protocol.micro_batches()
    trainer = experiment.trainer(f"evaluate {name}", len(batches))
    with module.requesting(candidate, batches, objective.protocol.seed):
        images: Any = trainer.predict(module, range(len(batches)))
    module.to(experiment.device)
    return list(images)
