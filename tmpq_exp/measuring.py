"""Which metrics a run measures: those that its configuration names, checked against the model at the start."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from tmpq_exp.config import Config, UserError
from tmpq_exp.metrics.metric import Metric, MissingWeights
from tmpq_exp.zoo.conditioning import Prompts
from tmpq_exp.zoo.task import DiffusionTask


@dataclass(frozen=True)
class ChosenMetrics:
    """Metrics of a run.

    Args:
        quality: The one that the search goes by.
        further: Those reported beside it for baselines and winner.
        warnings: Why some that were asked for are left out.
    """

    quality: Metric
    further: tuple[Metric, ...]
    warnings: tuple[str, ...]


def quality_metric(config: Config) -> Metric:
    """The metric that the search goes by.

    Raises:
        ValueError: If its weights, reference or settings are bad.
    """
    metric: Metric = instantiate(config.metric_node(config.evaluation.metric))
    return metric


def chosen_metrics(config: Config, task: DiffusionTask) -> ChosenMetrics:
    """All metrics of a run; further ones whose weights are missing are left out with a warning.

    Raises:
        ValueError: If a metric does not fit the model, the first one's weights are missing, or settings are bad.
    """
    quality, further, warnings = quality_metric(config), list[Metric](), list[str]()
    for chosen in config.evaluation.further:
        try:
            further.append(instantiate(config.metric_node(chosen)))
        except InstantiationException as error:
            if not isinstance(error.__cause__, MissingWeights):
                raise
            warnings.append(f"left out of evaluation.further: {error.__cause__}")
    names = [metric.name for metric in (quality, *further)]
    if len(set(names)) < len(names):
        raise UserError(f"evaluation.further must not repeat a metric, found {', '.join(names)}")
    if config.objective.proxy == "feature_mse" and quality.network is None:
        raise UserError(
            f"objective.proxy: {quality.name} has no feature network behind feature_mse; choose psnr_db or null"
        )
    for key, metric in [("evaluation.metric", quality), *(("evaluation.further", metric) for metric in further)]:
        _check(key, metric, task)
    return ChosenMetrics(quality, tuple(further), tuple(warnings))


def _check(key: str, metric: Metric, task: DiffusionTask) -> None:
    """Refuse a metric that cannot measure the images of a model."""
    try:
        metric.check_images(task.image_shape)
    except ValueError as error:
        raise UserError(f"{key}: {error}, as model {task.name} makes them; choose another metric") from error
    if "prompts" in metric.needs and not isinstance(task.conditions, Prompts):
        raise UserError(f"{key}: {metric.name} compares images with prompts, and model {task.name} has none")
