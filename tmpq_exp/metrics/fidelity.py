"""Per-image fidelity against the float model's image of the same seed; images are compared as made, not rounded."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from tmpq_exp.metrics.metric import Batch, FeatureNetwork, PerImageMetric, paired

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels."""


def psnr_db(images: Tensor, reference: Tensor) -> Tensor:
    """Each image's PSNR in dB, ``(N,)``; infinite where an image equals its reference.

    Args:
        images, reference: Images in [0, 1] of the same seeds in the same order, ``(N, C, H, W)``, N at least 1.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(images, reference)
    found: Tensor = peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return found


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Each image's structural similarity, ``(N,)``, at most 1; windows of 11x11 pixels, Gaussian of 1.5.

    Args:
        images, reference: See ``psnr_db``; at least 6 pixels high and wide.

    Raises:
        ValueError: If the shapes differ, or images are smaller than half a window.

    References:
        Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 2004; by
        torchmetrics.
    """
    _check_shapes(images, reference)
    check_side("ssim", tuple(images.shape[1:]), SSIM_WINDOW // 2 + 1)
    found = structural_similarity_index_measure(
        images, reference, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=1.0, reduction="none"
    )
    assert isinstance(found, Tensor)
    return found.reshape(-1)


def latent_sqnr_db(latents: Tensor, reference: Tensor) -> Tensor:
    """Each image's signal to noise ratio in dB before the decoder, ``(N,)``; infinite where latents are equal.

    Args:
        latents, reference: Latents of the same seeds in the same order, ``(N, C, H, W)``; the signal is ``reference``.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(latents, reference)
    signal = reference.double().square().flatten(1).sum(1)
    noise = (latents.double() - reference.double()).square().flatten(1).sum(1)
    return 10 * torch.log10(signal / noise)


def check_side(name: str, shape: tuple[int, ...], smallest: int) -> None:
    """Refuse images ``(C, H, W)`` with a side of fewer pixels."""
    if min(shape[1:]) < smallest:
        raise ValueError(f"{name} takes images of at least {smallest}x{smallest} pixels, found {shape[1]}x{shape[2]}")


def _check_shapes(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape:
        raise ValueError(f"images and reference must have one shape, found {images.shape} and {reference.shape}")


class Psnr(PerImageMetric):
    """``psnr_db`` against the float reference at the same seeds."""

    name = "psnr_db"
    needs = frozenset({"reference"})

    def values(self, batch: Batch) -> Tensor:
        """See ``PerImageMetric.values``."""
        images, reference = paired(batch)
        return psnr_db(images, reference) if len(images) else images.new_empty(0)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Metric.fingerprint``."""
        return {"metric": self.name, "library": f"torchmetrics {version('torchmetrics')}"}


class Ssim(PerImageMetric):
    """``ssim`` against the float reference at the same seeds."""

    name = "ssim"
    needs = frozenset({"reference"})

    def check_images(self, shape: tuple[int, int, int]) -> None:
        """See ``Metric.check_images``."""
        check_side(self.name, shape, SSIM_WINDOW // 2 + 1)

    def values(self, batch: Batch) -> Tensor:
        """See ``PerImageMetric.values``."""
        images, reference = paired(batch)
        return ssim(images, reference) if len(images) else images.new_empty(0)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Metric.fingerprint``."""
        window = f"gaussian 1.5, {SSIM_WINDOW}x{SSIM_WINDOW}"
        return {"metric": self.name, "library": f"torchmetrics {version('torchmetrics')}", "window": window}


class LatentSqnr(PerImageMetric):
    """``latent_sqnr_db`` against the float reference at the same seeds; for pixel models of images in [-1, 1]."""

    name = "latent_sqnr_db"
    needs = frozenset({"latents"})

    def values(self, batch: Batch) -> Tensor:
        """See ``PerImageMetric.values``."""
        assert batch.latents is not None
        assert batch.reference_latents is not None
        reference = batch.reference_latents.to(batch.latents.device)
        return latent_sqnr_db(batch.latents[: len(reference)], reference)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Metric.fingerprint``."""
        return {"metric": self.name}


class FeatureError(PerImageMetric):
    """``feature_mse``: squared distance of an image's features to those of the float reference's image.

    Says how far a model's images are from another's at the same seeds, with little noise at few images; a cheap proxy
    where candidates are many.

    Args:
        network: The feature network; images reach it rounded to uint8, as for a Frechet distance.
    """

    name = "feature_mse"
    needs = frozenset({"reference"})

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network

    def values(self, batch: Batch) -> Tensor:
        """See ``PerImageMetric.values``."""
        if batch.reference is None or not len(batch.reference):
            return batch.images.new_empty(0)
        assert self.network is not None
        reference = batch.reference_features(self.network)
        return (batch.features(self.network)[: len(reference)] - reference).square().sum(1)

    def fingerprint(self) -> dict[str, Any]:
        """See ``Metric.fingerprint``; the network's weights stand in that of the metric it belongs to."""
        return {"metric": self.name}
