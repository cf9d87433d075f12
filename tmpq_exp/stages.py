"""The stages of a run: each takes what the ones before it made, and keeps its result in the run directory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tmpq_exp.config import UserError
from tmpq_exp.cost import ConvShape, is_eligible
from tmpq_exp.experiment import Experiment, examined_tiles, make_search, random_candidates, winograd_spec
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.activations import ActivationStore
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.calibration import CalibrationModule, UnitFiles
from tmpq_exp.quant.states import cached_states, trajectory_states
from tmpq_exp.rundir import bad_input, digest
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.evidence import best_so_far, evenly_spread, mean_interval, rank_correlation
from tmpq_exp.search.module import Proxy, SearchModule
from tmpq_exp.search.objective import PROXIES, Objective
from tmpq_exp.search.trials import Trial
from tmpq_exp.seeding import stream_seed
from tmpq_exp.winograd.conv import WinogradSpec
from tmpq_exp.winograd.scales import ConvWeight, input_sqnr_db, learn_scales, network_sqnr_db
from tmpq_exp.winograd.transform import WinogradScales, closed_form_scales, ineligible_reason, standard_scales
from tmpq_exp.zoo.weights import content_hash, read_tensors, write_tensors

RESULT_FREE = ("states", "max_cache_bytes")
"""Settings of the calibration that change nothing but where things are: states count by what they hold."""

REPORTED_BITS = 8
"""Bits of all Winograd stages behind the reported SQNR."""


def calibrate(experiment: Experiment) -> None:
    """Set all quantizers, or read them back if the same calibration was done before; goes on behind a killed one."""
    config, supernet = experiment.config, experiment.module.supernet
    experiment.module.to(experiment.device)
    with bad_input():
        states, source = cached_states(experiment.task, config.calibration, config.seed, Path(config.paths.cache_dir))
    choices = [[q.bit_choices for _, q in layer.quantizers()] for layer in supernet.layers]
    settings = {key: value for key, value in asdict(config.calibration).items() if key not in RESULT_FREE}
    seen = content_hash({f"{state.timestep}": state.x for state in states})
    inputs = [experiment.task.weights_hash, seen, settings, asdict(config.quant), choices, config.seed]
    path, folder = experiment.run.supernet, experiment.run.calibration

    def compute() -> list[dict[str, Any]]:
        files = UnitFiles(folder, digest(inputs))
        store = ActivationStore(config.calibration.max_cache_bytes, folder / "activations", experiment.device)
        with store, bad_input():
            module = CalibrationModule(supernet, states, config.calibration, config.seed, store, files)
            total = module.num_epochs
            experiment.trainer(
                "calibrate", total, count_epochs=True, max_epochs=total, reload_dataloaders_every_n_epochs=1
            ).fit(module)
        metadata = {"model": experiment.task.name, "inputs": digest(inputs), "states": str(source)}
        write_tensors(path, supernet.quantizer_state(), metadata)
        files.remove()
        return [asdict(record) for record in module.records]

    experiment.calibration = experiment.run.stage("calibrate", inputs, [path], compute)
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
    with _timed(experiment, "search"):
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
    objective = experiment.objective("selection", _selection_images(experiment))
    with _timed(experiment, "select"), StageBar("select", len(finalists)) as bar:
        trials = []
        for candidate in finalists:
            trials.append(objective.evaluate(candidate, "selection"))
            bar.advance()
    best = min(range(len(finalists)), key=lambda i: trials[i].score(experiment.metric.name))
    return finalists[best]


def _selection_images(experiment: Experiment) -> int:
    config = experiment.config.evaluation
    return config.num_images if config.selection_images is None else config.selection_images


def evaluate(experiment: Experiment, winner: Candidate) -> tuple[dict[str, Trial], Objective]:
    """Baselines and winner on the final images."""
    config = experiment.config.evaluation
    objective = experiment.objective("final", config.num_images, bootstrap=config.bootstrap)
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


def weigh(experiment: Experiment, algorithm: Search, objective: Objective, winner: Candidate) -> dict[str, Any]:
    """How far the search's figures can be trusted, by further evaluations.

    Args:
        experiment: The run.
        algorithm: The search, done.
        objective: What it scored with.
        winner: The chosen candidate.

    Returns:
        The ``evidence`` of the report; see ``tmpq_exp.report.EVIDENCE_KEYS``.
    """
    config, metric = experiment.config.evaluation, experiment.metric.name
    searched = [t for t in experiment.trials.of_phase("search") if objective.covers(t)]
    scores = {trial.key: trial.score(metric) for trial in searched}
    with _timed(experiment, "weigh"):
        noise = _score_noise(experiment, objective, winner)
        larger = _score_again(experiment, algorithm)
        random = _random_control(experiment, algorithm, objective) if config.random_control else []
    correlations = {"search score and score on more images of other seeds": rank_correlation(scores, larger)}
    for proxy in PROXIES:
        sign = -1 if proxy == "psnr_db" else 1
        values = {t.key: sign * v for t in searched if (v := t.metrics.get(proxy)) is not None}
        correlations[f"{proxy} and search score, same images"] = rank_correlation(values, scores)
    looked = {t.key: t for t in experiment.trials.of_phase("proxy")}
    chosen = experiment.config.objective.proxy
    if chosen is not None:
        values = {k: (-1 if chosen == "psnr_db" else 1) * t.score(chosen) for k, t in looked.items()}
        correlations["proxy and search score, of promoted candidates"] = rank_correlation(values, scores)
    return {
        "score_noise": noise,
        "rank_correlation": [{"between": name} | found for name, found in correlations.items()],
        "progress": {
            "search": best_so_far([trial.score(metric) for trial in searched]),
            "random": best_so_far([trial.score(metric) for trial in random]),
        },
    }


def _score_noise(experiment: Experiment, objective: Objective, winner: Candidate) -> dict[str, Any]:
    """The winner's score as the search measured it, its interval over images, and the same on other seeds."""
    config, metric = experiment.config.evaluation, experiment.metric
    own = objective.evaluate(winner, "search")
    others = []
    with StageBar("noise of the score", config.noise_seeds) as bar:
        for index in range(config.noise_seeds):
            again = experiment.objective(f"noise {index}", objective.protocol.num_images)
            others.append(again.evaluate(winner, "noise"))
            bar.advance()
    interval = None
    if config.bootstrap and own.error is None:
        images = objective.protocol.wanted(objective.images(winner))
        interval = list(metric.interval(images, config.bootstrap, objective.protocol.seed))
    scores = [trial.score(metric.name) for trial in (own, *others)]
    return {
        "num_images": objective.protocol.num_images,
        "seeds": [trial.seed for trial in (own, *others)],
        "scores": scores,
        "over_images": {"interval": interval, "num_resamples": config.bootstrap},
        "over_seeds": mean_interval([score for score in scores[1:] if math.isfinite(score)]),
    }


def _score_again(experiment: Experiment, algorithm: Search) -> dict[str, float]:
    """Scores on the images of the selection, of candidates from the best to the worst of the search."""
    config = experiment.config.evaluation
    ranked = {scored.candidate.key(): scored.candidate for scored in algorithm.top(10**9)}
    chosen = evenly_spread(list(ranked), config.ranked_candidates)
    objective = experiment.objective("selection", _selection_images(experiment))
    scores = {}
    with StageBar("check of the ranking", len(chosen)) as bar:
        for key in chosen:
            scores[key] = objective.evaluate(ranked[key], "selection").score(experiment.metric.name)
            bar.advance()
    return scores


def _random_control(experiment: Experiment, algorithm: Search, objective: Objective) -> list[Trial]:
    """As many random candidates as the search scored, by the same protocol and under the same budget."""
    count = sum(1 for trial in experiment.trials.of_phase("search") if objective.covers(trial))
    candidates = random_candidates(experiment, count)
    trials = []
    with StageBar("random search", len(candidates)) as bar:
        for candidate in candidates:
            trials.append(objective.evaluate(candidate, "random"))
            bar.advance()
    return trials


@contextmanager
def _timed(experiment: Experiment, name: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        experiment.run.add_stage_seconds(name, time.perf_counter() - start)
