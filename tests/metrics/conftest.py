"""Weights for the tests: random ones in files of the shape the libraries release theirs, drawn once."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn


def natural_images(count: int, size: int, seed: int, channels: int = 3) -> Tensor:
    """Smooth random images in [0, 1], already rounded to bytes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    return (smooth * 255).round() / 255


def save(images: Tensor, folder: Path) -> Path:
    """Write images as PNG files."""
    folder.mkdir()
    for index, image in enumerate((images * 255).round().to(torch.uint8)):
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(folder / f"{index:04}.png")
    return folder
