"""Frechet distance between generated images and a reference, on the features of any network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tmpq_exp.data import to_uint8
from tmpq_exp.zoo.cifar import CifarClassifier
from tmpq_exp.zoo.digits import DigitsClassifier
from tmpq_exp.zoo.embedded import EmbeddedClassifier, embedded_file
from tmpq_exp.zoo.weights import content_hash, read_tensors, write_tensors


class FeatureNetwork(Protocol):
    """Anything with ``num_features`` and a map from images in [0, 1] to features."""

    num_features: int

    def features(self, images: Tensor) -> Tensor:
        """``(N, C, H, W) -> (N, num_features)``."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, for the fingerprint."""
        ...

    def to(self, device: torch.device) -> FeatureNetwork:
        """Itself, moved."""
        ...


FEATURE_BATCH = 500
"""Images a forward of the feature network, at most, where batches are not given."""


@torch.inference_mode()
def features_of(network: FeatureNetwork, images: Tensor) -> Tensor:
    """Features in float64 of images in [0, 1], rounded to uint8 first, as saved images would be."""
    features: Tensor = network.to(images.device).features(to_uint8(images).float() / 255)
    return features.double()


@dataclass(frozen=True)
class FeatureStatistics:
    """Gaussian fit of a set of features: mean ``(d,)`` and unbiased covariance ``(d, d)`` in float64."""

    mean: Tensor
    covariance: Tensor
    num_images: int

    def save(self, path: Path, source: str) -> None:
        """Write as safetensors; ``source`` says what the images were."""
        tensors = {"mean": self.mean, "covariance": self.covariance}
        write_tensors(path, tensors, {"num_images": str(self.num_images), "source": source})

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Inverse of ``save``.

        Raises:
            ValueError: If the file is missing, truncated, or holds other tensors.
        """
        tensors, metadata = read_tensors(path, "reference statistics")
        if tensors.keys() != {"mean", "covariance"} or "num_images" not in metadata:
            raise ValueError(
                f"reference statistics: {path} holds {sorted(tensors)}, expected mean and covariance, "
                "and num_images in its metadata"
            )
        mean, covariance, num_images = tensors["mean"], tensors["covariance"], metadata["num_images"]
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)) or not num_images.isdecimal():
            raise ValueError(
                f"reference statistics: {path} holds a mean {tuple(mean.shape)}, a covariance "
                f"{tuple(covariance.shape)} and num_images {num_images!r}, expected (d,), (d, d) and a number"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"reference statistics: {path} holds values that are not finite")
        return cls(mean.double(), covariance.double(), int(num_images))


class FeatureSums:
    """Running float64 sums of features; memory does not grow with the number of images."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self._sum = torch.zeros(network.num_features, dtype=torch.float64)
        self._outer = torch.zeros(network.num_features, network.num_features, dtype=torch.float64)
        self.num_images = 0

    @torch.inference_mode()
    def update(self, images: Tensor) -> None:
        """Add images in [0, 1], ``(N, C, H, W)``, where they are; the network follows them."""
        features = features_of(self.network, images)
        self._sum += features.sum(0).cpu()
        self._outer += (features.T @ features).cpu()
        self.num_images += len(images)

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance of what was added.

        Raises:
            ValueError: With fewer than two images.
        """
        if self.num_images < 2:
            raise ValueError(f"a covariance needs at least 2 images, found {self.num_images}")
        mean = self._sum / self.num_images
        covariance = (self._outer - self.num_images * torch.outer(mean, mean)) / (self.num_images - 1)
        return FeatureStatistics(mean.clone(), covariance, self.num_images)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Frechet distance between two Gaussians.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        NeurIPS 2017, equation (6).

    Differs from pytorch-fid in how the trace of the matrix root is found: see ``_distance``.
    """
    return _distance(a.mean, a.covariance, b, _root(b.covariance))


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = covariance, ``(d, d)``: its Cholesky factor, or where it is singular one by its eigenvalues.

    Eigenvalues below zero are rounding and count as zero.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return root
    found = torch.linalg.eigh(covariance)
    root = found.eigenvectors * found.eigenvalues.clamp(min=0).sqrt()
    return root


def _distance(mean: Tensor, covariance: Tensor, reference: FeatureStatistics, root: Tensor) -> float:
    """Distance to a reference whose root is known.

    The eigenvalues of C C_ref are those of R^T C R with R R^T = C_ref, which is symmetric: no general matrix root, and
    covariances without full rank need no correction.
    """
    values = torch.linalg.eigvalsh(root.T @ covariance @ root).clamp(min=0)
    traces = covariance.trace() + reference.covariance.trace() - 2 * values.sqrt().sum()
    return float((mean - reference.mean).square().sum() + traces)


def centred_interval(
    distance: Callable[[Tensor], float], num_images: int, num_resamples: int, seed: int
) -> tuple[float, float]:
    """Bootstrap interval of a distance over images, 95 %.

    A resample holds fewer distinct images and so lies higher than the distance itself; its quantiles are taken around
    the mean of the resamples and moved to the distance.

    Args:
        distance: Distance where each image counts as often as its weight says, ``(num_images,)`` in float64.
        num_images: Number of images.
        num_resamples: At least 2.
        seed: Of the resampling.

    References:
        Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Differs from its percentile interval
        by the centring.
    """
    rng = np.random.default_rng(seed)
    once = np.ones(num_images)
    weights = [once, *(rng.multinomial(num_images, once / num_images) for _ in range(num_resamples))]
    value, *resampled = [distance(torch.from_numpy(w).double()) for w in weights]
    low, high = np.quantile(resampled, (0.025, 0.975)) - np.mean(resampled)
    return float(value + low), float(value + high)


@dataclass(frozen=True)
class FrechetMetric:
    """Frechet distance on one feature network against one reference; lower is better.

    Args:
        name: Named after the feature network; ``fid`` is reserved for InceptionV3.
        network: Feature network in eval mode.
        reference: Statistics of the reference images under that network.
        image_shape: ``(C, H, W)`` of the images it takes; None takes any.
    """

    name: str
    network: FeatureNetwork
    reference: FeatureStatistics
    image_shape: tuple[int, int, int] | None = None

    def __call__(self, batches: Iterable[Tensor]) -> float:
        """Distance of images in [0, 1], given in batches of ``(N, C, H, W)``."""
        sums = FeatureSums(self.network)
        for images in batches:
            sums.update(images)
        found = sums.statistics()
        return self.distance(found.mean, found.covariance)

    def distance(self, mean: Tensor, covariance: Tensor) -> float:
        """Distance of a Gaussian with this mean ``(d,)`` and covariance ``(d, d)``."""
        return _distance(mean, covariance, self.reference, self._reference_root)

    @cached_property
    def _reference_root(self) -> Tensor:
        return _root(self.reference.covariance)

    def paired(self, images: Tensor, reference: Tensor) -> float:
        """Mean over images of the squared distance between an image's features and its reference image's.

        Says how far a model's images are from another's at the same seeds, with little noise at few images; a cheap
        proxy where candidates are many.

        Args:
            images, reference: Images in [0, 1] of the same seeds in the same order, ``(N, C, H, W)``.
        """
        distances = [
            (features_of(self.network, a) - features_of(self.network, b)).square().sum(1)
            for a, b in zip(torch.split(images, FEATURE_BATCH), torch.split(reference, FEATURE_BATCH), strict=True)
        ]
        return float(torch.cat(distances).mean())

    def interval(self, batches: Iterable[Tensor], num_resamples: int, seed: int) -> tuple[float, float]:
        """Bootstrap interval of the distance over images, 95 %.

        Args:
            batches: Images in [0, 1].
            num_resamples, seed: See ``centred_interval``.
        """
        features = torch.cat([features_of(self.network, images).cpu() for images in batches])
        return centred_interval(lambda w: self._weighted(features, w), len(features), num_resamples, seed)

    def _weighted(self, features: Tensor, weights: Tensor) -> float:
        """Distance where each image counts as often as its weight says."""
        mean = weights @ features / weights.sum()
        centred = features - mean
        return self.distance(mean, (centred.T * weights) @ centred / (weights.sum() - 1))

    def fingerprint(self) -> dict[str, str]:
        """Hashes of what the number depends on."""
        reference = {"mean": self.reference.mean, "covariance": self.reference.covariance}
        return {
            "metric": self.name,
            "extractor": content_hash(self.network.state_dict()),
            "reference": content_hash(reference),
        }


def digits_frechet(checkpoint: str | None = None, reference: str | None = None) -> FrechetMetric:
    """``fd_digits``: features of the embedded digits classifier, against all 1,797 UCI digits at 16x16.

    Args:
        checkpoint: Other classifier weights; the reference must then be theirs.
        reference: Other reference statistics, as safetensors.
    """
    return _frechet("fd_digits", DigitsClassifier(checkpoint), reference)


def cifar10_frechet(checkpoint: str | None = None, reference: str | None = None) -> FrechetMetric:
    """``fd_cifar10``: features of the embedded CIFAR-10 classifier, against the training images of cifar10-jpeg.

    Args:
        checkpoint, reference: See ``digits_frechet``.
    """
    return _frechet("fd_cifar10", CifarClassifier(checkpoint), reference)


def _frechet(name: str, classifier: EmbeddedClassifier, reference: str | None) -> FrechetMetric:
    network = classifier.load()
    path = Path(reference) if reference else embedded_file(classifier.name, "reference.safetensors")
    statistics = FeatureStatistics.load(path)
    if len(statistics.mean) != network.num_features:
        raise ValueError(
            f"reference statistics: {path} has {len(statistics.mean)} features, the network {network.num_features}"
        )
    return FrechetMetric(name, network, statistics, classifier.image_shape)
