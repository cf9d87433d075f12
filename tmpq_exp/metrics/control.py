"""Frechet distance at few images, with another schedule's images of the same seeds as control variate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.metrics.frechet import FrechetMetric, centred_interval
from tmpq_exp.metrics.metric import Batch, Measurement, Metric
from tmpq_exp.metrics.statistics import FeatureStatistics, JointSums

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
        return _Resampled(self) if resampled else _Controlled(self)

    def fingerprint(self) -> dict[str, Any]:
        """That of the distance, and the control."""
        return {**self.metric.fingerprint(), "metric": self.name, "control": self._facts}

    def distance(self, features: Tensor, weights: Tensor | None = None) -> float:
        """Distance of a candidate.

        Args:
            features: Of its images, ``(N, d)`` in float64 on the CPU, at least two.
            weights: How often each image counts, ``(N,)``; None counts each once.
        """
        sums = JointSums(features.shape[1])
        sums.add(features, self.features(), weights)
        return self.distance_of(sums)

    def distance_of(self, sums: JointSums) -> float:
        """Distance of a candidate of whose features these sums are known."""
        statistics, count = self.statistics(), sums.count
        shift, variances, covariances, differing = sums.moments()
        identity = torch.eye(len(variances), dtype=variances.dtype)
        total = variances.trace() + torch.finfo(variances.dtype).tiny
        common = covariances.trace() / total * identity
        ridge = RIDGE_IMAGES / count * total / len(identity) * identity
        slope = common + torch.linalg.solve(variances + ridge, covariances - variances @ common).T
        explained = slope @ covariances
        rest = differing - explained - explained.T + slope @ variances @ slope.T
        carried = (identity + slope) @ statistics.covariance @ (identity + slope).T
        return self.metric.distance(statistics.mean + shift, carried + rest)


class _Controlled(Measurement):
    """Running sums alone: memory does not grow with the number of images."""

    def __init__(self, metric: ControlledFrechet) -> None:
        self._metric, self._sums = metric, JointSums(metric.metric.network.num_features)
        self._control = metric.features()  # now: later, the same supernet is amid the candidate's images

    def update(self, batch: Batch) -> None:
        features, first = batch.features(self._metric.metric.network), self._sums.num_images
        self._sums.add(features, self._control[first : first + len(features)].to(features.device))

    def value(self) -> float:
        return self._metric.distance_of(self._sums)


class _Resampled(_Controlled):
    """Sums, and every image's features for the interval.

    Images are few and each is resampled by itself, so that sums of blocks would be as many matrices as images.
    """

    def __init__(self, metric: ControlledFrechet) -> None:
        super().__init__(metric)
        self._found = list[Tensor]()

    def update(self, batch: Batch) -> None:
        super().update(batch)
        self._found.append(batch.features(self._metric.metric.network).cpu())

    def interval(self, num_resamples: int, seed: int) -> tuple[float, float]:
        features = torch.cat(self._found)
        return centred_interval(lambda w: self._metric.distance(features, w), len(features), num_resamples, seed)
