"""Frechet distance between generated images and a reference, on the features of any network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tmpq_exp.metrics.metric import Batch, FeatureNetwork, Measurement, Metric, Place
from tmpq_exp.metrics.reference import ReferenceFolder, extractor_hash, open_reference
from tmpq_exp.metrics.statistics import FeatureStatistics, FeatureSums
from tmpq_exp.zoo.cifar import CifarClassifier
from tmpq_exp.zoo.clip import DigitsCLIP
from tmpq_exp.zoo.digits import DigitsClassifier
from tmpq_exp.zoo.embedded import EmbeddedClassifier, embedded_file
from tmpq_exp.zoo.weights import content_hash


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
    distance: Callable[[Tensor], float], num_counted: int, num_resamples: int, seed: int
) -> tuple[float, float]:
    """Bootstrap interval of a distance over images, 95 %.

    A resample holds fewer distinct images and so lies higher than the distance itself; its quantiles are taken around
    the mean of the resamples and moved to the distance.

    Args:
        distance: Distance where each image, or each block of images, counts as often as its weight says,
            ``(num_counted,)`` in float64.
        num_counted: Number of images or blocks.
        num_resamples: At least 2.
        seed: Of the resampling.

    References:
        Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13. Differs from its percentile interval
        by the centring.
    """
    rng = np.random.default_rng(seed)
    once = np.ones(num_counted)
    weights = [once, *(rng.multinomial(num_counted, once / num_counted) for _ in range(num_resamples))]
    value, *resampled = [distance(torch.from_numpy(w).double()) for w in weights]
    low, high = np.quantile(resampled, (0.025, 0.975)) - np.mean(resampled)
    return float(value + low), float(value + high)


class FrechetMetric(Metric):
    """Frechet distance on one feature network against one reference; lower is better.

    Args:
        name: Named after the feature network; ``fid`` is reserved for InceptionV3.
        network: Feature network in eval mode.
        reference: Statistics of the reference images under that network, or the folder that holds the images.
        image_shape: ``(C, H, W)`` of the images it takes; None takes any.
        resize: What the network does to the size of images, for the fingerprint.
        library: Where the network's code comes from, with its version, for the fingerprint.
    """

    network: FeatureNetwork

    def __init__(
        self,
        name: str,
        network: FeatureNetwork,
        reference: FeatureStatistics | ReferenceFolder,
        image_shape: tuple[int, int, int] | None = None,
        *,
        resize: str = "none",
        library: str = "tmpq_exp",
    ) -> None:
        self.name, self.network, self.image_shape = name, network, image_shape
        self.resize, self.library, self._reference = resize, library, reference

    @cached_property
    def extractor(self) -> str:
        """Hash of the feature network and what is done around it."""
        return extractor_hash(self.network, self.resize, self.library)

    @property
    def reference(self) -> FeatureStatistics:
        """Statistics of the reference; those of a folder are there after ``make_ready``."""
        assert isinstance(self._reference, FeatureStatistics), "measured before make_ready"
        return self._reference

    @cached_property
    def reference_root(self) -> Tensor:
        """See ``_root``."""
        return _root(self.reference.covariance)

    @property
    def is_ready(self) -> bool:
        """Whether the statistics are there."""
        return isinstance(self._reference, FeatureStatistics)

    def make_ready(self, place: Place) -> None:
        """Statistics of a reference folder, from the cache or measured."""
        if isinstance(self._reference, ReferenceFolder):
            self._reference = self._reference.statistics(self.name, self.network, self.extractor, place)

    def start(self, *, resampled: bool = False) -> Measurement:
        """See ``Metric.start``."""
        return _Resampled(self) if resampled else _Summed(self)

    def distance(self, mean: Tensor, covariance: Tensor) -> float:
        """Distance of a Gaussian with this mean ``(d,)`` and covariance ``(d, d)``."""
        return _distance(mean, covariance, self.reference, self.reference_root)

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of what the number depends on."""
        return {
            "metric": self.name,
            "extractor": self.extractor,
            "reference": self._reference_hash,
            "resize": self.resize,
            "library": self.library,
        }

    @cached_property
    def _reference_hash(self) -> str:
        return content_hash({"mean": self.reference.mean, "covariance": self.reference.covariance})


MAX_BLOCKS = 512
BLOCK_BYTES = 2**28
"""Most blocks of a bootstrap, and most memory for their sums."""


class _Summed(Measurement):
    """Running sums alone: memory does not grow with the number of images."""

    def __init__(self, metric: FrechetMetric) -> None:
        self._metric, self._sums = metric, FeatureSums(metric.network)

    def update(self, batch: Batch) -> None:
        self._sums.add(batch.features(self._metric.network))

    def value(self) -> float:
        found = self._sums.statistics()
        return self._metric.distance(found.mean, found.covariance)


class _Resampled(_Summed):
    """Sums, and every image's features for the interval.

    Which block an image falls into depends on how many there will be. And sums of B blocks take as much memory as the
    features of B d images: of 33,000 at 64 features (512 blocks), of 41,000 at 2,048 (20 blocks).
    """

    def __init__(self, metric: FrechetMetric) -> None:
        super().__init__(metric)
        self._features = list[Tensor]()

    def update(self, batch: Batch) -> None:
        super().update(batch)
        self._features.append(batch.features(self._metric.network).cpu())

    def interval(self, num_resamples: int, seed: int) -> tuple[float, float]:
        """See ``centred_interval``; images are resampled in random blocks, whose sums are made once."""
        features = torch.cat(self._features)
        order = torch.from_numpy(np.random.default_rng([seed, len(features)]).permutation(len(features)))
        blocks = [features[part] for part in order.tensor_split(self._num_blocks(*features.shape))]
        counts = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
        sums = torch.stack([block.sum(0) for block in blocks])
        outers = torch.stack([block.T @ block for block in blocks])

        def distance(weights: Tensor) -> float:
            count = weights @ counts
            mean = weights @ sums / count
            outer = torch.tensordot(weights, outers, dims=1)
            return self._metric.distance(mean, (outer - count * torch.outer(mean, mean)) / (count - 1))

        return centred_interval(distance, len(blocks), num_resamples, seed)

    @staticmethod
    def _num_blocks(num_images: int, num_features: int) -> int:
        """Blocks whose sums fit into the memory for them: an image each where there are few."""
        fitting = BLOCK_BYTES // (8 * num_features**2)
        return min(num_images, max(20, min(MAX_BLOCKS, fitting)))


class _ModuleFeatures(nn.Module):
    """A module that maps images in [0, 1] to features by its forward, as a feature network."""

    def __init__(self, module: nn.Module, num_features: int) -> None:
        super().__init__()
        self.module, self.num_features = module, num_features

    def features(self, images: Tensor) -> Tensor:
        """See ``FeatureNetwork.features``."""
        features: Tensor = self.module(images).flatten(1)
        return features


def feature_frechet(
    name: str,
    network: nn.Module,
    reference: str | None = None,
    num_features: int | None = None,
    image_shape: Sequence[int] | None = None,
) -> FrechetMetric:
    """Frechet distance on any feature module, for a ``_target_`` of one's own.

    Args:
        name: Named after the network; not ``fid`` or ``sfid``, which mean InceptionV3.
        network: Maps images in [0, 1] to features, by its method ``features`` or else by its forward; it is set to
            eval mode.
        reference: Folder of images, or statistics as ``.npz`` (``mu``, ``sigma``) or safetensors.
        num_features: Features of an image; None takes the network's attribute of that name.
        image_shape: ``(C, H, W)`` of the images it takes; None takes any.

    Raises:
        ValueError: If the name is taken, the number of features is unknown, or the reference does not fit.
    """
    if name.startswith(("fid", "sfid")):
        raise ValueError(f"name must be that of the feature network; fid and sfid mean InceptionV3, found {name!r}")
    count = getattr(network, "num_features", None) if num_features is None else num_features
    if not isinstance(count, int):
        raise ValueError(f"num_features must be given for {type(network).__name__}, which has no such attribute")
    extractor: Any = network.eval() if hasattr(network, "features") else _ModuleFeatures(network.eval(), count)
    shape = None if image_shape is None else (image_shape[0], image_shape[1], image_shape[2])
    found = open_reference(name, reference, count, image_shape=shape)
    return FrechetMetric(name, extractor, found, shape, library=type(network).__module__)


def digits_frechet(checkpoint: str | None = None, reference: str | None = None) -> FrechetMetric:
    """``fd_digits``: features of the embedded digits classifier, against all 1,797 UCI digits at 16x16.

    Args:
        checkpoint: Other classifier weights; the reference must then be theirs.
        reference: Other reference: a folder of images, or statistics as ``.npz`` or safetensors.
    """
    return _frechet("fd_digits", DigitsClassifier(checkpoint), reference)


def cifar10_frechet(checkpoint: str | None = None, reference: str | None = None) -> FrechetMetric:
    """``fd_cifar10``: features of the embedded CIFAR-10 classifier, against the training images of cifar10-jpeg.

    Args:
        checkpoint, reference: See ``digits_frechet``.
    """
    return _frechet("fd_cifar10", CifarClassifier(checkpoint), reference)


def clip_digits_frechet(checkpoint: str | None = None, reference: str | None = None) -> FrechetMetric:
    """``fd_clip_digits``: image embeddings of ``clip_digits``, against scenes drawn for the embedded prompts.

    Args:
        checkpoint, reference: See ``digits_frechet``.
    """
    return _frechet("fd_clip_digits", DigitsCLIP(checkpoint), reference)


def _frechet(name: str, model: EmbeddedClassifier | DigitsCLIP, reference: str | None) -> FrechetMetric:
    network = model.load()
    path = reference or str(embedded_file(model.name, "reference.safetensors"))
    shape = model.image_shape
    found = open_reference(name, path, network.num_features, image_shape=shape)
    return FrechetMetric(name, network, found, shape)
