"""Frechet distance at few images, with another schedule's images of the same seeds as control variate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tmpq_exp.metrics.frechet import FeatureStatistics, FrechetMetric, centred_interval, features_of

RIDGE_IMAGES = 256
"""Images at which the ridge of the regression is as large as the mean variance of a control's feature."""


@dataclass(frozen=True)
class ControlVariate:
    """Frechet distance of a candidate from few images, relative to a control whose statistics are known from many.

    Images of one seed resemble each other whatever the schedule and the bits. So a candidate's features are taken as
    those of the control at the same seeds plus a difference: its mean is added to the control's mean over many images,
    and a regression of the difference on the control's features carries the control's covariance over,

        m = m_c + mean(d),    C = (I + B) C_c (I + B)^T + R,    d = B c + r,    R = covariance of r.

    What chance did to the few seeds is common to both and drops out. B is shrunk towards the multiple of the identity
    that fits best, by a ridge: quantization draws all features together, which few images show well, while a full B
    wants many more than d. C is positive semidefinite whatever the regression finds.

    Differs from the methods' papers, which score candidates by the plain distance at few images.

    Args:
        metric: The distance.
        statistics: Of the control's images, many.
    """

    metric: FrechetMetric
    statistics: FeatureStatistics

    def distance(self, features: Tensor, control: Tensor, weights: Tensor | None = None) -> float:
        """Distance of the candidate.

        Args:
            features: Of the candidate's images, ``(N, d)`` in float64, at least two.
            control: Of the control's images of the same seeds, ``(N, d)``.
            weights: How often each image counts, ``(N,)``; None counts each once.
        """
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
        carried = (identity + slope) @ self.statistics.covariance @ (identity + slope).T
        return self.metric.distance(self.statistics.mean + shift, carried + (rest.T * weights) @ rest / (count - 1))

    def interval(self, features: Tensor, control: Tensor, num_resamples: int, seed: int) -> tuple[float, float]:
        """Bootstrap interval of ``distance`` over the few images, 95 %; see ``FrechetMetric.interval``."""
        return centred_interval(lambda w: self.distance(features, control, w), len(features), num_resamples, seed)

    def features(self, batches: Iterable[Tensor]) -> Tensor:
        """Features of images in [0, 1], ``(N, d)`` in float64 on the CPU."""
        return torch.cat([features_of(self.metric.network, images).cpu() for images in batches])
