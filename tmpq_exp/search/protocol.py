"""Which images an evaluation makes, who makes them, and what stands beside a candidate's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from tmpq_exp.metrics.control import ControlledFrechet
from tmpq_exp.metrics.frechet import FrechetMetric
from tmpq_exp.metrics.metric import features_of
from tmpq_exp.metrics.statistics import FeatureStatistics, FeatureSums
from tmpq_exp.progress import StageBar
from tmpq_exp.quant.allocation import Candidate
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.search.evaluation import Made
from tmpq_exp.search.memory import with_less_memory


@dataclass(frozen=True)
class Protocol:
    """Which images an evaluation makes.

    Args:
        num_images: Number of images.
        seed: Seed of the image stream; search, selection and final evaluation have different ones.
        micro_batch: Images a forward.
        paired_images: Images, the first of them, that are compared with the float reference's of the same seeds.
    """

    num_images: int
    seed: int
    micro_batch: int
    paired_images: int = 256

    def micro_batches(self) -> list[range]:
        """Image indices of every forward; the last one is whole too, so that an image never depends on their number."""
        return [range(i, i + self.micro_batch) for i in range(0, self.num_images, self.micro_batch)]

    def paired(self) -> Protocol:
        """The same with no more images than are compared with the float reference's."""
        return replace(self, num_images=min(self.num_images, self.paired_images))

    def wanted(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """These micro-batches without the images beyond ``num_images``."""
        missing = self.num_images
        for images in batches:
            yield images[:missing]
            missing -= len(images)


Images = Callable[[Candidate, Protocol], Iterator[Tensor]]
"""Makes the images of a candidate under a protocol: one whole micro-batch after the other, each in [0, 1]."""


def images_by(module: SupernetModule) -> Images:
    """Images that a network makes here."""

    def images(candidate: Candidate, protocol: Protocol) -> Iterator[Tensor]:
        for indices in protocol.micro_batches():
            yield module.images(candidate, indices, protocol.seed)

    return images


class Control:
    """A schedule whose images of the same seeds stand beside every candidate's, to take chance out of the score.

    Args:
        images: Makes the images.
        metric: Quality metric, made ready.
        candidate: The schedule, float.
        protocol: Which images its statistics come from; other seeds than any candidate's.
    """

    def __init__(self, images: Images, metric: FrechetMetric, candidate: Candidate, protocol: Protocol) -> None:
        self.images, self.metric, self.candidate, self.protocol = images, metric, candidate, protocol

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Of its own images, measured at first use."""

        def measure(micro_batch: int) -> FeatureStatistics:
            protocol, sums = replace(self.protocol, micro_batch=micro_batch), FeatureSums(self.metric.network)
            with StageBar("control images", len(protocol.micro_batches())) as bar:
                for images in self._images(protocol):
                    sums.update(images)
                    bar.advance()
            return sums.statistics()

        return with_less_memory("control images", self.protocol.micro_batch, measure)[0]

    def under(self, protocol: Protocol) -> ControlledFrechet:
        """The metric of candidates under a protocol."""
        facts = {"schedule": self.candidate.key(), "images": self.protocol.num_images, "seed": self.protocol.seed}

        def measure(micro_batch: int) -> Tensor:
            images = self._images(replace(protocol, micro_batch=micro_batch))
            return torch.cat([features_of(self.metric.network, some).cpu() for some in images])

        found = cache(lambda: with_less_memory("control images", protocol.micro_batch, measure)[0])
        return ControlledFrechet(self.metric, lambda: self.statistics, found, facts)

    def _images(self, protocol: Protocol) -> Iterator[Tensor]:
        yield from protocol.wanted(self.images(self.candidate, protocol))


@dataclass(frozen=True)
class Beside:
    """What every candidate of an objective is compared with; made once, and given to all that measure candidates.

    Args:
        reference: The float reference's images of the first seeds.
        control_statistics: Of the control's many images; None without control.
        control_features: Of the control's images at the measured seeds, ``(N, d)``; None without control.
    """

    reference: Made
    control_statistics: FeatureStatistics | None = None
    control_features: Tensor | None = None
