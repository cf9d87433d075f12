"""Weights for the tests: random ones in files of the shape the libraries release theirs, drawn once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from pytorch_fid import inception
from torch import Tensor, nn


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random InceptionV3 weights in a file that both libraries read; activations keep their size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = inception.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(value, generator=generator)
        elif name.endswith(("bn.bias", "running_mean")):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


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
