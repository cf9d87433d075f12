"""LPIPS against the float model's image of the same seed, where the weights of its backbone are at hand."""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision import models

from tmpq_exp.metrics.fidelity import check_side
from tmpq_exp.metrics.inception import rgb, weights_file
from tmpq_exp.metrics.metric import Batch, PerImageMetric, paired
from tmpq_exp.zoo.weights import content_hash, read_state_dict

BACKBONES = {
    "alex": models.AlexNet_Weights.IMAGENET1K_V1,
    "vgg": models.VGG16_Weights.IMAGENET1K_V1,
    "squeeze": models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}
"""Backbone -> torchvision's weights of it; the linear layers on top come with torchmetrics."""

SMALLEST_IMAGE = 32
"""Side in pixels below which the backbones' poolings leave nothing."""

LPIPS_BATCH = 50
"""Images a forward, at most."""


class Lpips(PerImageMetric):
    """``lpips``: distance of deep features to those of the float reference at the same seeds; lower is better.

    Args:
        weights: torchvision's file of the backbone's weights; None looks into torch's hub folder.
        backbone: ``alex``, ``vgg`` or ``squeeze``.

    Raises:
        MissingWeights: If the weights are not there.
        ValueError: If the backbone is none of these, or the file holds other weights.

    References:
        Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018; by
        torchmetrics, whose class downloads the backbone and unpickles it, which is why its network is filled here.
    """

    name = "lpips"
    needs = frozenset({"reference"})

    def __init__(self, weights: str | None = None, backbone: str = "alex") -> None:
        if backbone not in BACKBONES:
            raise ValueError(f"metrics.lpips.backbone must be one of {', '.join(BACKBONES)}, found {backbone!r}")
        file = weights_file(self.name, weights, BACKBONES[backbone].url)
        self.backbone = backbone
        self.perceptual = _LPIPS(net=backbone, pnet_rand=True)  # type: ignore[arg-type]
        state = read_state_dict(file, "backbone of lpips")
        own = self.perceptual.net.state_dict()
        # layers are named slice.<index>.<rest> there and features.<index>.<rest> in torchvision
        skipped = 2 if backbone == "squeeze" else 1
        named = {key: "features." + key.split(".", skipped)[-1] for key in own}
        for key, name in named.items():
            if name not in state or state[name].shape != own[key].shape:
                raise ValueError(
                    f"backbone of lpips: {file} is not torchvision's {backbone}: {name} is missing or differs"
                )
        self.perceptual.net.load_state_dict({key: state[name] for key, name in named.items()})

    @cached_property
    def _weights_hash(self) -> str:
        return content_hash(self.perceptual.state_dict())

    def check_images(self, shape: tuple[int, int, int]) -> None:
        """See ``Metric.check_images``."""
        check_side(self.name, shape, SMALLEST_IMAGE)

    def values(self, batch: Batch) -> Tensor:
        """See ``PerImageMetric.values``."""
        images, reference = paired(batch)
        if not len(images):
            return images.new_empty(0)
        network = self.perceptual.to(images.device)
        parts = zip(torch.split(rgb(images), LPIPS_BATCH), torch.split(rgb(reference), LPIPS_BATCH), strict=True)
        return torch.cat([network(a, b, normalize=True).flatten() for a, b in parts])

    def fingerprint(self) -> dict[str, Any]:
        """See ``Metric.fingerprint``."""
        return {
            "metric": self.name,
            "extractor": self._weights_hash,
            "backbone": self.backbone,
            "library": f"torchmetrics {version('torchmetrics')}",
        }
