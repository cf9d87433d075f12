"""Top-1 accuracy and its binomial interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import NormalDist

import torch
from torch import Tensor, nn


@torch.inference_mode()
def count_correct(
    network: nn.Module, batches: Iterable[tuple[Tensor, ...]], on_batch: Callable[[], None] = lambda: None
) -> int:
    """Number of images whose largest logit is that of their label.

    Args:
        network: Maps images to logits; its device is where it runs. Logits of NaN count as wrong.
        batches: ``(images, labels)``.
        on_batch: Called after each batch.
    """
    device = next(network.parameters()).device
    correct = 0
    for images, labels in batches:
        logits = network(images.to(device)).cpu()
        correct += int(((logits.argmax(1) == labels) & ~logits.isnan().any(1)).sum())
        on_batch()
    return correct


def wilson_interval(num_correct: int, num_images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, in [0, 1].

    Args:
        num_correct: From 0 to ``num_images``.
        num_images: At least 1.
        confidence: In (0, 1).

    Raises:
        ValueError: If an argument is out of range.

    References:
        E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    if num_images < 1 or not 0 <= num_correct <= num_images:
        raise ValueError(
            f"num_correct must be in 0..num_images and num_images at least 1, found {num_correct} of {num_images}"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), found {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, weight = num_correct / num_images, z * z / num_images
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)
