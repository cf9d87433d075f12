"""Frechet distance at few images, with another schedule's images of the same seeds as control variate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.metrics.frechet import FrechetMetric, centred_interval
from tmpq_exp.metrics.metric import Batch, Measurement, Metric
from tmpq_exp.metrics.statistics import FeatureStatistics

RIDGE_IMAGES = 256
"""Images at which the ridge of the regression is as large as the mean variance of a control's feature."""


class ControlledFrechet(Metric):
    """Frechet distance of few images, relative to a control whose statistics are known from many.

    Images of one seed resemble each other whatever the schedule and the bits. So a candidate's features are taken as
    those of the control at the same seeds plus a difference d: its mean is added to the control's mean over many
    images, and a regression of the difference on the control's features c carries the control's covariance over,

        m = m_c + mean(d),    C = (I + B) C_c (I + B)^T + R,    d = B c + r,    R = covariance of r.

    What chance did to the few seeds is common to both and drops out. B is shrunk towards the multiple of the identity
    that fits best, by a ridge: quantization draws all features together, which few images show well, while a full B
    wants many more than d. C is positive semidefinite whatever the regression finds.

    Differs from the methods' papers, which score candidates by the plain distance at few images.

    Args:
        metric: The distance, made ready.
        statistics: Gives those of the control's images, many.
        features: Gives those of the control's images at the seeds that are measured, ``(N, d)`` in float64.
        facts: What the control depends on, for the fingerprint.
    """

    def __init__(
        self,
        metric: FrechetMetric,
        statistics: Callable[[], FeatureStatistics],
        features: Callable[[], Tensor],
        facts: dict[str, Any],
    ) -> None:
        self.name, self.network, self.image_shape = f"{metric.name}_controlled", metric.network, metric.image_shape
        self.metric, self.statistics, self.features, self._facts = metric, statistics, features, facts

    def start(self, *, resampled: bool = False) -> Measurement:
        """See ``Metric.start``."""
        return _Controlled(self)

    def fingerprint(self) -> dict[str, Any]:
        """That of the distance, and the control."""
        return {**self.metric.fingerprint(), "metric": self.name, "control": self._facts}

    def distance(self, features: Tensor, weights: Tensor | None = None) -> float:
        """Distance of a candidate.

        Args:
            features: Of its images, ``(N, d)`` in float64 on the CPU, at least two.
            weights: How often each image counts, ``(N,)``; None counts each once.
        """
        statistics, control = self.statistics(), self.features()
        weights = torch.ones_like(features[:, 0]) if weights is None else weights
        count = weights.sum()
        difference = features - control
        shift = weights @ difference / count
        centred, control = difference - shift, control - weights @ control / count
        weighted = control.T * weights / (count - 1)
        variances, covariances = weighted @ control, weighted @ centred
        identity = torch.eye(len(variances), dtype=variances.dtype)
        total = variances.trace() + torch.finfo(variances.dtype).tiny
        common = covariances.trace() / total * identity
        ridge = RIDGE_IMAGES / count * total / len(identity) * identity
        slope = common + torch.linalg.solve(variances + ridge, covariances - variances @ common).T
        rest = centred - control @ slope.T
        carried = (identity + slope) @ statistics.covariance @ (identity + slope).T
        covariance = carried + (rest.T * weights) @ rest / (count - 1)
        return self.metric.distance(statistics.mean + shift, covariance)


class _Controlled(Measurement):
    def __init__(self, metric: ControlledFrechet) -> None:
        self._metric, self._found = metric, list[Tensor]()

    def update(self, batch: Batch) -> None:
        self._found.append(batch.features(self._metric.metric.network).cpu())

    def value(self) -> float:
        return self._metric.distance(torch.cat(self._found))

    def interval(self, num_resamples: int, seed: int) -> tuple[float, float]:
        features = torch.cat(self._found)
        return centred_interval(lambda w: self._metric.distance(features, w), len(features), num_resamples, seed)
