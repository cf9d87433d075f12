"""Metrics on InceptionV3: FID in both implementations, sFID, KID and the Inception score."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from tmpq_exp.metrics.frechet import FrechetMetric
from tmpq_exp.metrics.inception import (
    PYTORCH_FID_URL,
    TORCH_FIDELITY_URL,
    PytorchFidInception,
    PytorchFidSpatial,
    TorchmetricsInception,
    torchmetrics_inception,
    weights_file,
)
from tmpq_exp.metrics.metric import Batch, Measurement, Metric, Place
from tmpq_exp.metrics.reference import ReferenceFolder, extractor_hash, open_reference
from tmpq_exp.zoo.weights import content_hash


def fid(weights: str | None = None, reference: str | None = None) -> FrechetMetric:
    """``fid``: Frechet distance on InceptionV3 as pytorch-fid computes it.

    Args:
        weights: File of pytorch-fid's weights; None looks into torch's hub folder.
        reference: Folder of images, or ``.npz`` with ``mu`` and ``sigma``.

    Raises:
        MissingWeights: If the weights are not there.
        ValueError: If the reference is no folder of images and no statistics of 2,048 features.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", NeurIPS 2017.
    """
    return _pytorch_fid("fid", PytorchFidInception, weights, reference, (("mu", "sigma"),))


def sfid(weights: str | None = None, reference: str | None = None) -> FrechetMetric:
    """``sfid``: Frechet distance on spatial features of pytorch-fid's InceptionV3.

    Args:
        weights: See ``fid``.
        reference: Folder of images, or ``.npz`` with ``mu_s`` and ``sigma_s`` as ADM's files have them (or ``mu`` and
            ``sigma`` of 2,023 features).

    Raises:
        MissingWeights, ValueError: See ``fid``.
    """
    keys = (("mu_s", "sigma_s"), ("mu", "sigma"))
    return _pytorch_fid("sfid", PytorchFidSpatial, weights, reference, keys)


def _pytorch_fid(
    name: str,
    extractor: type[PytorchFidInception],
    weights: str | None,
    reference: str | None,
    keys: tuple[tuple[str, str], ...],
) -> FrechetMetric:
    file = weights_file(name, weights, PYTORCH_FID_URL)
    found = open_reference(name, reference, extractor.num_features, keys=keys)
    return FrechetMetric(name, extractor(file), found, resize=extractor.resize, library=extractor.library)


def fid_torchmetrics(weights: str | None = None, reference: str | None = None) -> FrechetMetric:
    """``fid_torchmetrics``: Frechet distance on InceptionV3 as torchmetrics computes it; not comparable with ``fid``.

    Args:
        weights: File of torch-fidelity's weights; None looks into torch's hub folder.
        reference: See ``fid``.

    Raises:
        MissingWeights, ValueError: See ``fid``.
    """
    name, extractor = "fid_torchmetrics", TorchmetricsInception
    file = weights_file(name, weights, TORCH_FIDELITY_URL)
    found = open_reference(name, reference, 2048)
    network = torchmetrics_inception(file, "2048")
    return FrechetMetric(name, network, found, resize=extractor.resize, library=extractor.library)


class KernelDistance(Metric):
    """``kid``: squared maximum mean discrepancy with a cubic kernel on torchmetrics' InceptionV3, mean over subsets.

    Args:
        weights: See ``fid_torchmetrics``.
        reference: Folder of images; statistics do not say enough.
        subsets: Number of random subsets, at least 1.
        subset_size: Images of a subset, at least 2; fewer where there are not as many images.
        seed: Of the subsets.

    Raises:
        MissingWeights: If the weights are not there.
        ValueError: If a number is out of range, or the reference is no folder of images.

    References:
        Binkowski et al., "Demystifying MMD GANs", ICLR 2018; kernel and estimator of torchmetrics. Differs in that the
        subsets come from a seed, and that few images give smaller subsets instead of an error.
    """

    name = "kid"

    def __init__(
        self,
        weights: str | None = None,
        reference: str | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
        seed: int = 0,
    ) -> None:
        for key, value, low in (("subsets", subsets, 1), ("subset_size", subset_size, 2)):
            if value < low:
                raise ValueError(f"metrics.kid.{key} must be at least {low}, found {value}")
        file = weights_file(self.name, weights, TORCH_FIDELITY_URL)
        folder = open_reference(self.name, reference, 2048)
        if not isinstance(folder, ReferenceFolder):
            raise ValueError(f"evaluation.reference: kid needs a folder of images, found the statistics {reference}")
        self.folder, self.subsets, self.subset_size, self.seed = folder, subsets, subset_size, seed
        self.network: TorchmetricsInception = torchmetrics_inception(file, "2048")
        self.reference = torch.empty(0, 2048)

    @cached_property
    def extractor(self) -> str:
        """Hash of the feature network and what is done around it."""
        return extractor_hash(self.network, self.network.resize, self.network.library)

    @property
    def is_ready(self) -> bool:
        """Whether the reference's features are there."""
        return len(self.reference) > 0

    def make_ready(self, place: Place) -> None:
        """Features of the reference folder, from the cache or measured."""
        self.reference = self.folder.features(self.name, self.network, self.extractor, place)

    def start(self, *, resampled: bool = False) -> Measurement:
        """See ``Metric.start``."""
        return _Kernel(self)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Metric.fingerprint``."""
        return {
            "metric": self.name,
            "extractor": self.extractor,
            "reference": content_hash({"features": self.reference}),
            "resize": self.network.resize,
            "library": self.network.library,
            "subsets": [self.subsets, self.subset_size, self.seed],
        }


class _Kernel(Measurement):
    """Every image's features: the kernel compares single images, and no sums of theirs say enough."""

    def __init__(self, metric: KernelDistance) -> None:
        self._metric, self._features = metric, list[Tensor]()

    def update(self, batch: Batch) -> None:
        self._features.append(batch.features(self._metric.network).cpu())

    def value(self) -> float:
        metric, made = self._metric, torch.cat(self._features)
        return kernel_distance(metric.reference, made, metric.subsets, metric.subset_size, metric.seed)


def kernel_distance(reference: Tensor, made: Tensor, subsets: int, subset_size: int, seed: int) -> float:
    """Mean over random subsets of the unbiased squared maximum mean discrepancy with kernel ``(x.y / d + 1)^3``.

    Args:
        reference, made: Features, ``(N, d)`` and ``(M, d)``, at least 2 each.
        subsets: Number of subsets.
        subset_size: Images of a subset; the smaller set's size where that is less.
        seed: Of the subsets.
    """
    size = min(subset_size, len(reference), len(made))
    if size < 2:
        raise ValueError(f"kid needs at least 2 images, found {len(made)}")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        real = reference[torch.randperm(len(reference), generator=generator)[:size]].double()
        fake = made[torch.randperm(len(made), generator=generator)[:size]].double()
        found.append(poly_mmd(real, fake))
    return float(torch.stack(found).mean())


class InceptionScore(Metric):
    """``inception_score``: exponential of the mean divergence between an image's classes and all images'.

    Args:
        weights: See ``fid_torchmetrics``.
        splits: Parts of the images over whose scores the mean is taken, at least 1.

    Raises:
        MissingWeights: If the weights are not there.
        ValueError: If a number is out of range.

    References:
        Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016; logits without bias as torch-fidelity
        and torchmetrics do. Differs from theirs in that images are split in order, not shuffled: seeds are independent.
    """

    name = "inception_score"

    def __init__(self, weights: str | None = None, splits: int = 10) -> None:
        if splits < 1:
            raise ValueError(f"metrics.inception_score.splits must be at least 1, found {splits}")
        file = weights_file(self.name, weights, TORCH_FIDELITY_URL)
        self.splits = splits
        self.network: TorchmetricsInception = torchmetrics_inception(file, "logits_unbiased")

    @cached_property
    def extractor(self) -> str:
        """Hash of the network and what is done around it."""
        return extractor_hash(self.network, self.network.resize, self.network.library)

    def start(self, *, resampled: bool = False) -> Measurement:
        """See ``Metric.start``."""
        return _Score(self)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Metric.fingerprint``."""
        return {
            "metric": self.name,
            "extractor": self.extractor,
            "resize": self.network.resize,
            "library": self.network.library,
            "splits": self.splits,
        }


class _Score(Measurement):
    """Every image's logits: which part an image falls into depends on how many there will be."""

    def __init__(self, metric: InceptionScore) -> None:
        self._metric, self._logits = metric, list[Tensor]()

    def update(self, batch: Batch) -> None:
        self._logits.append(batch.features(self._metric.network).cpu())

    def value(self) -> float:
        return inception_score(torch.cat(self._logits), self._metric.splits)


def inception_score(logits: Tensor, splits: int) -> float:
    """Mean over ``splits`` parts, in order, of exp(mean over images of KL(p(class | image) || p(class))).

    Args:
        logits: ``(N, num_classes)``; with fewer images than splits every image is a part.
        splits: Number of parts.
    """
    log_probabilities = logits.double().log_softmax(1)
    scores = []
    for part in log_probabilities.chunk(splits):
        log_marginal = part.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64).log()
        scores.append((part.exp() * (part - log_marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
