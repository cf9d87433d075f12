"""The stage that weighs a search: how noisy its score is, how far its ranking holds, what chance alone would find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tmpq_exp.calibrating import recalibrated
from tmpq_exp.experiment import Experiment, random_candidates
from tmpq_exp.metrics.names import value_of
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.search.algorithm import Search
from tmpq_exp.search.evidence import best_so_far, evenly_spread, mean_interval, rank_correlation
from tmpq_exp.search.executor import evaluate_all
from tmpq_exp.search.objective import PROXIES, Objective
from tmpq_exp.search.trials import Trial


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
    config, metric = experiment.config.evaluation, objective.score.name
    searched = [t for t in experiment.trials.of_phase("search") if objective.covers(t)]
    scores = {trial.key: trial.score(metric) for trial in searched}
    with experiment.timed("weigh"):
        noise = _score_noise(experiment, objective, winner)
        larger = _score_again(experiment, algorithm)
        random = _random_control(experiment, algorithm, objective) if config.random_control else []
        own = _recalibrated_scores(experiment, algorithm, objective)
    correlations = {"search score and score on more images of other seeds": rank_correlation(scores, larger)}
    if own:
        name = "scores of the supernet and of subnets calibrated for their own bits, same images"
        correlations[name] = rank_correlation(scores, own)
    for proxy in PROXIES:
        values = {trial.key: trial.score(proxy) for trial in searched if proxy in trial.metrics}
        correlations[f"{proxy} and search score, same images"] = rank_correlation(values, scores)
    looked = {t.key: t for t in experiment.trials.of_phase("proxy")}
    chosen = experiment.config.objective.proxy
    if chosen is not None:
        values = {key: trial.score(chosen) for key, trial in looked.items()}
        correlations["proxy and search score, of promoted candidates"] = rank_correlation(values, scores)
    return {
        "score_noise": noise,
        "rank_correlation": [{"between": name} | found for name, found in correlations.items()],
        "progress": {
            "search": _progress(metric, searched),
            "random": _progress(metric, random),
        },
    }


def _progress(metric: str, trials: Sequence[Trial]) -> list[float | None]:
    """Best value of the metric after each trial."""
    scores = best_so_far([trial.score(metric) for trial in trials])
    return [None if score is None else value_of(metric, score) for score in scores]


def _score_noise(experiment: Experiment, objective: Objective, winner: Candidate) -> dict[str, Any]:
    """The winner's score as the search measured it, its interval over images, and the same on other seeds."""
    config, metric = experiment.config.evaluation, objective.score.name
    own = objective.evaluate(winner, "search")
    others = []
    with StageBar("noise of the score", config.noise_seeds) as bar:
        for index in range(config.noise_seeds):
            again = experiment.objective(f"noise {index}", objective.protocol.num_images)
            others.append(again.evaluate(winner, "noise"))
            bar.advance()
    interval = None
    if config.bootstrap and own.error is None:
        interval = objective.interval(winner, config.bootstrap)
    scores = [trial.metrics.get(metric) for trial in (own, *others)]
    return {
        "num_images": objective.protocol.num_images,
        "seeds": [trial.seed for trial in (own, *others)],
        "scores": scores,
        "over_images": {"interval": interval, "num_resamples": config.bootstrap},
        "over_seeds": mean_interval([score for score in scores[1:] if score is not None]),
    }


def _score_again(experiment: Experiment, algorithm: Search) -> dict[str, float]:
    """Scores on the images of the selection, of candidates from the best to the worst of the search."""
    config = experiment.config.evaluation
    ranked = {scored.candidate.key(): scored.candidate for scored in algorithm.top(10**9)}
    chosen = evenly_spread(list(ranked), config.ranked_candidates)
    objective = experiment.objective("selection", experiment.selection_images)
    candidates, scores = [ranked[key] for key in chosen], {}
    with StageBar("check of the ranking", len(chosen)) as bar:
        for trial in evaluate_all(experiment.executor, objective, candidates, "selection"):
            scores[trial.key] = trial.score(objective.score.name)
            bar.advance()
    return {key: scores[key] for key in chosen}


def _recalibrated_scores(experiment: Experiment, algorithm: Search, objective: Objective) -> dict[str, float]:
    """Search scores of candidates from the best to the worst, each calibrated for its own bits."""
    ranked = {scored.candidate.key(): scored.candidate for scored in algorithm.top(10**9)}
    chosen = evenly_spread(list(ranked), experiment.config.evaluation.recalibrated_candidates)
    scores = {}
    for key in chosen:
        module = recalibrated(experiment, ranked[key])
        again = experiment.objective("search", objective.protocol.num_images, module)
        scores[key] = again.evaluate(ranked[key], "recalibrated").score(again.score.name)
    return scores


def _random_control(experiment: Experiment, algorithm: Search, objective: Objective) -> list[Trial]:
    """As many random candidates as the search scored, by the same protocol and under the same budget."""
    count = sum(1 for trial in experiment.trials.of_phase("search") if objective.covers(trial))
    candidates = random_candidates(experiment, count)
    found = {}
    with StageBar("random search", len(candidates)) as bar:
        for trial in evaluate_all(experiment.executor, objective, candidates, "random"):
            found[trial.key] = trial
            bar.advance()
    return [found[candidate.key()] for candidate in candidates]
