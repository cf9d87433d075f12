"""Per-image fidelity against the float model's image of the same seed."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio


def mean_psnr_db(images: Tensor, reference: Tensor) -> float:
    """Mean over images of each image's PSNR in dB; infinite where an image equals its reference.

    Args:
        images, reference: Images in [0, 1] of the same seeds in the same order, ``(N, C, H, W)``; not rounded.

    Raises:
        ValueError: If the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(f"images and reference must have one shape, found {images.shape} and {reference.shape}")
    return float(
        peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    )
