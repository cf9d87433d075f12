"""Frechet distance between generated images and a reference, on the features of any network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from scipy.linalg import LinAlgWarning
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
        """Add images in [0, 1], ``(N, C, H, W)``, where they are; the network follows them.

        They are rounded to uint8 first, as saved images would be.
        """
        features = self.network.to(images.device).features(to_uint8(images).float() / 255).double()
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
    """Squared Frechet distance between two Gaussians, by pytorch-fid.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        NeurIPS 2017, equation (6).
    """
    arguments: list[np.ndarray] = [a.mean.numpy(), a.covariance.numpy(), b.mean.numpy(), b.covariance.numpy()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)  # features that are always 0 make singular covariances
        warnings.filterwarnings("ignore", ".*disp. argument", DeprecationWarning)  # pytorch-fid with scipy 1.17
        return float(calculate_frechet_distance(*arguments))


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
        return frechet_distance(sums.statistics(), self.reference)

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
