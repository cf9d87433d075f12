"""The stages of a run: each takes what the ones before it made, and keeps its result in the run directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor

from tmpq_exp.calibrating import recalibrated
from tmpq_exp.config import UserError
from tmpq_exp.experiment import Experiment, make_search
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.executor import evaluate_all
from tmpq_exp.search.module import Proxy, SearchModule
from tmpq_exp.search.objective import Objective
from tmpq_exp.search.trials import Trial


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
        trainer.fit(SearchModule(algorithm, objective, experiment.executor, proxy))
        named = {name: c for name, c in experiment.baselines().items() if name != "float_reference"}
        with StageBar("baselines", len(named)) as bar:
            for _ in evaluate_all(experiment.executor, objective, [*named.values()], "baseline", names=[*named]):
                bar.advance()
    return algorithm, objective


def select(experiment: Experiment, algorithm: Search) -> Candidate:
    """The winner: the best of the finalists on images the search never saw.

    Finalists are the best of the search and what it started from, uniform bits at the budget.

    Raises:
        UserError: If no candidate of the search could be scored.
    """
    finalists = [scored.candidate for scored in algorithm.top(experiment.config.evaluation.num_finalists)]
    if not finalists:
        raise UserError("every candidate of the search failed; trials.jsonl says why under 'error'")
    finalists += [c for c in algorithm.seed_candidates if c not in finalists and algorithm.budget.is_feasible(c)]
    if len(finalists) == 1:
        return finalists[0]
    objective = experiment.objective("selection", experiment.selection_images)
    with experiment.timed("select"), StageBar("select", len(finalists)) as bar:
        scores = {}
        for trial in evaluate_all(experiment.executor, objective, finalists, "selection"):
            scores[trial.key] = trial.score(objective.score.name)
            bar.advance()
    return min(finalists, key=lambda candidate: scores[candidate.key()])


@dataclass(frozen=True)
class Shipped:
    """The winner as it is shipped.

    Args:
        candidate: The winner.
        module: The supernet, or a network calibrated for the winner's own bits.
        other: The one of the two that is not shipped; None if nothing was calibrated again.
        selection: ``supernet`` and ``recalibrated`` -> the score on the selection's images; empty if nothing was.
    """

    candidate: Candidate
    module: SupernetModule
    other: SupernetModule | None
    selection: dict[str, float | None]


def specialize(experiment: Experiment, winner: Candidate) -> Shipped:
    """Calibrate the winner for its own bits if that is asked for; ship what is better on the selection's images."""
    if not experiment.config.evaluation.recalibrate:
        return Shipped(winner, experiment.module, None, {})
    with experiment.timed("specialize"):
        own = recalibrated(experiment, winner)
        modules = {"supernet": experiment.module, "recalibrated": own}
        trials = {}
        for name, module in modules.items():
            objective = experiment.objective("selection", experiment.selection_images, module)
            trials[name] = objective.evaluate(winner, "selection")
    metric = objective.score.name
    found = {name: trial.metrics.get(metric) for name, trial in trials.items()}
    if trials["recalibrated"].score(metric) < trials["supernet"].score(metric):
        return Shipped(winner, own, experiment.module, found)
    return Shipped(winner, experiment.module, own, found)


def evaluate(experiment: Experiment, shipped: Shipped) -> tuple[dict[str, Trial], Objective]:
    """Baselines and winner on the final images: ``best`` as it is shipped, ``best_other`` as it is not."""
    named = {name: (candidate, experiment.module) for name, candidate in experiment.baselines().items()}
    named["best"] = shipped.candidate, shipped.module
    if shipped.other is not None:
        named["best_other"] = shipped.candidate, shipped.other
    trials = {}
    with experiment.timed("evaluate"):
        for name, (candidate, module) in named.items():
            objective = final_objective(experiment, module)
            shared = module is experiment.module and not experiment.executor.is_local
            feed = partial(_share if shared else _predict, experiment, module, objective, name)
            trials[name] = objective.evaluate(candidate, "final", name=name, feed=feed)
    return trials, final_objective(experiment, shipped.module)


def final_objective(experiment: Experiment, module: SupernetModule) -> Objective:
    """What baselines and winner are measured by: all metrics, with intervals of the first."""
    config = experiment.config.evaluation
    return experiment.objective(
        "final", config.num_images, module, bootstrap=config.bootstrap, further=experiment.further
    )


def _predict(
    experiment: Experiment,
    module: SupernetModule,
    objective: Objective,
    name: str,
    candidate: Candidate,
    take: Callable[[Tensor], None],
) -> None:
    """Images of the objective's protocol, made by a Trainer and handed on where they are; none is kept."""
    batches = objective.protocol.micro_batches()
    trainer = experiment.trainer(f"evaluate {name}", len(batches))
    trainer.callbacks.append(_HandingOn(take))  # type: ignore[attr-defined]
    try:
        with module.requesting(candidate, batches, objective.protocol.seed):
            trainer.predict(module, range(len(batches)), return_predictions=False)
    finally:
        module.to(experiment.device)


def _share(
    experiment: Experiment,
    module: SupernetModule,
    objective: Objective,
    name: str,
    candidate: Candidate,
    take: Callable[[Tensor], None],
) -> None:
    """The same, with the micro-batches shared out over the workers."""
    protocol = objective.protocol
    with StageBar(f"evaluate {name}", len(protocol.micro_batches())) as bar:
        for images in experiment.executor.images(candidate, protocol):
            take(images.to(module.device))
            bar.advance()


class _HandingOn(L.Callback):
    """Gives every predicted batch to a function."""

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        self._take = take

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """See ``_HandingOn``."""
        self._take(outputs)
