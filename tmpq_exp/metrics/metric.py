"""What a metric is: it measures the images of one evaluation, batch by batch, and says what its figure depends on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from tmpq_exp.data import to_uint8
from tmpq_exp.metrics.names import higher_is_better


class MissingWeights(ValueError):
    """A metric's network has no weights here; the message says where they were looked for."""


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


@torch.inference_mode()
def features_of(network: FeatureNetwork, images: Tensor) -> Tensor:
    """Features in float64 of images in [0, 1], rounded to uint8 first, as saved images would be."""
    features: Tensor = network.to(images.device).features(to_uint8(images).float() / 255)
    return features.double()


@dataclass(frozen=True)
class Place:
    """Where metrics are made ready.

    Args:
        device: Where images will be made.
        cache_dir: Where what takes long is kept for other runs.
    """

    device: torch.device
    cache_dir: Path


@dataclass(frozen=True)
class Batch:
    """Images of an evaluation, one micro-batch in order.

    Args:
        images: ``(N, C, H, W)`` in [0, 1], finite, not rounded, on the device where they were made.
        reference: The float reference's images of the same seeds, for the first ``len(reference)`` of these.
        prompts: What each image should show; None for models without text.
        latents: What the images were decoded from; None where no metric needs them.
        reference_latents: The same of the float reference, for the first ones.
        reference_memo: Features of ``reference`` that were measured before; batches with the same one may share it.
    """

    images: Tensor
    reference: Tensor | None = None
    prompts: Sequence[str] | None = None
    latents: Tensor | None = None
    reference_latents: Tensor | None = None
    reference_memo: dict[int, Tensor] = field(default_factory=dict)
    _memo: dict[int, Tensor] = field(default_factory=dict)

    def features(self, network: FeatureNetwork) -> Tensor:
        """``features_of`` the images, measured once for all metrics that share the network."""
        if id(network) not in self._memo:
            self._memo[id(network)] = features_of(network, self.images)
        return self._memo[id(network)]

    def reference_features(self, network: FeatureNetwork) -> Tensor:
        """``features_of`` the reference's images."""
        if id(network) not in self.reference_memo:
            assert self.reference is not None
            self.reference_memo[id(network)] = features_of(network, self.reference.to(self.images.device))
        return self.reference_memo[id(network)]


class Measurement(ABC):
    """One figure in the making."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Take in the next images."""

    @abstractmethod
    def value(self) -> float:
        """The figure of all images so far; NaN where it is not defined.

        Raises:
            ValueError: If the images are too few or too degenerate for it.
        """

    def interval(self, num_resamples: int, seed: int) -> tuple[float, float] | None:
        """Bootstrap interval over images, 95 %; None if this metric has none."""
        return None


class Metric(ABC):
    """A figure of merit of a model's images.

    Class attributes:
        name: Name under which figures are kept; where larger values are better it starts as
            ``tmpq_exp.metrics.names.HIGHER_IS_BETTER`` lists.
        image_shape: ``(C, H, W)`` of the images it takes; None takes any.
        network: Feature network behind the cheap ``feature_mse``; None for metrics without features.
        needs: Which of ``reference``, ``prompts`` and ``latents`` it reads from a batch.
    """

    name: str
    image_shape: tuple[int, int, int] | None = None
    network: FeatureNetwork | None = None
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def higher_is_better(self) -> bool:
        """Whether larger values are better."""
        return higher_is_better(self.name)

    @property
    def is_ready(self) -> bool:
        """Whether ``make_ready`` has nothing to do."""
        return True

    def check_images(self, shape: tuple[int, int, int]) -> None:
        """Refuse images of a shape ``(C, H, W)`` that it cannot measure.

        Raises:
            ValueError: Naming the shape found and the one accepted.
        """
        if self.image_shape not in (None, shape):
            raise ValueError(f"{self.name} takes images of shape {self.image_shape}, found {shape}")

    def make_ready(self, place: Place) -> None:  # noqa: B027  most metrics have nothing to do
        """Do what must be done once and may take long, such as the statistics of a reference folder.

        Raises:
            ValueError: If a reference image cannot be used.
        """

    @abstractmethod
    def start(self, *, resampled: bool = False) -> Measurement:
        """Begin to measure; ``make_ready`` was called before.

        Args:
            resampled: Whether an interval will be asked for, for which features of every image are kept.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What its figures depend on besides the images, as plain data."""

    def __call__(self, batches: Iterable[Tensor]) -> float:
        """The figure of images in [0, 1], given in batches of ``(N, C, H, W)``.

        Raises:
            ValueError: If the metric needs more than images.
        """
        if self.needs:
            raise ValueError(f"{self.name} measures images beside their {' and '.join(sorted(self.needs))}, not alone")
        measurement = self.start()
        for images in batches:
            measurement.update(Batch(images))
        return measurement.value()


class PerImageMetric(Metric):
    """A metric that is the mean over images of a value each image has."""

    @abstractmethod
    def values(self, batch: Batch) -> Tensor:
        """One value an image, ``(N,)``; fewer where only the first have what it needs."""

    def start(self, *, resampled: bool = False) -> Measurement:
        """See ``Metric.start``."""
        return _Mean(self.values)


class _Mean(Measurement):
    """One number an image, from which the interval draws; no features."""

    def __init__(self, values: Callable[[Batch], Tensor]) -> None:
        self._values, self._found = values, list[Tensor]()

    @torch.inference_mode()
    def update(self, batch: Batch) -> None:
        self._found.append(self._values(batch).double().cpu())

    def value(self) -> float:
        return float(torch.cat(self._found).mean())

    def interval(self, num_resamples: int, seed: int) -> tuple[float, float] | None:
        values = torch.cat(self._found).numpy()
        rng = np.random.default_rng(seed)
        weights = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=num_resamples)
        low, high = np.quantile(weights @ values / len(values), (0.025, 0.975))
        return float(low), float(high)


def paired(batch: Batch) -> tuple[Tensor, Tensor]:
    """Images and the float reference's of the same seeds, as many as there are of the latter, which may be none."""
    if batch.reference is None or not len(batch.reference):
        return batch.images[:0], batch.images[:0]
    return batch.images[: len(batch.reference)], batch.reference.to(batch.images.device)
