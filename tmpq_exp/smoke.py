"""What ``tier=smoke`` puts in the place of a preset's model, images and metric where none are given."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from tmpq_exp.config import UserError
from tmpq_exp.zoo.stand_ins import PIPELINES, StandInFeatures, classifier_stand_in, pipeline_stand_in

METRIC = "fd_stand_in"
"""Frechet distance on random features: it runs what a real one runs, and its figures mean nothing."""

FREE_METRICS = ("ssim", "latent_sqnr_db", "clip_score")
"""Further metrics that need no weights but those made here; the others are left out."""

POPULATION = 6
"""Candidates a generation."""

SHARES = ("num_parents", "num_mutants", "num_crossovers")
"""Settings of a search that shrink with its population."""


def with_stand_in(composed: DictConfig) -> DictConfig:
    """The configuration with a small model of the same family instead of one that is not given.

    The model, and what is measured on it, is made in ``paths.cache_dir`` once. All else stays as it is, so that the
    same code runs.

    Args:
        composed: Checked configuration with ``stand_in``.

    Returns:
        Another configuration; ``composed`` stays as it is.

    Raises:
        ValueError: If the search cannot be made small, or the family has no network of the depth asked for.
    """
    changed, cache_dir = copy.deepcopy(composed), Path(composed.paths.cache_dir)
    family = str(composed.stand_in)
    if family in PIPELINES:
        changes = _pipeline_changes(composed, pipeline_stand_in(family, cache_dir))
    else:
        folder = classifier_stand_in(family, int(composed.model.depth), cache_dir)
        changes = {"model.checkpoint": str(folder / "weights.safetensors"), "data.root": str(folder / "images")}
        changes |= {f"data.{key}": 32 for key in ("resize", "crop") if composed.data.get(key) is not None}
    with open_dict(changed):
        for key, value in changes.items():
            OmegaConf.update(changed, key, value, merge=False)
    print(f"tier=smoke: a small {family} with random weights stands in; its figures mean nothing", file=sys.stderr)
    return changed


def _pipeline_changes(composed: DictConfig, folder: Path) -> dict[str, Any]:
    network = {"_target_": f"{StandInFeatures.__module__}.{StandInFeatures.__qualname__}"}
    reference = str(folder / "reference")
    metric = {"_target_": "tmpq_exp.metrics.frechet.feature_frechet", "name": METRIC, "network": network}
    changes = {
        "model.path": str(folder / "pipeline"),
        "evaluation.metric": metric | {"reference": reference},
        "evaluation.reference": reference,
        "evaluation.further": [name for name in composed.evaluation.further if name in FREE_METRICS],
        "metrics.clip_score.path": str(folder / "clip"),
        **{f"search.{key}": value for key, value in small_search(dict(composed.search)).items()},
    }
    return changes | ({"model.prompts": str(folder / "prompts.txt")} if "prompts" in composed.model else {})


def small_search(settings: Mapping[str, Any]) -> dict[str, int]:
    """What of a search's settings shrinks, in proportion to its population; nothing where that is small.

    Raises:
        UserError: If the population is no number.
    """
    size = settings.get("population_size")
    if not isinstance(size, int):
        raise UserError(f"search.population_size must be an integer, found {size!r}")
    if size <= POPULATION:
        return {}
    shares = {key: settings[key] * POPULATION // size for key in SHARES if isinstance(settings.get(key), int)}
    return {"population_size": POPULATION, **shares} | ({"num_parents": 2} if "num_parents" in shares else {})
