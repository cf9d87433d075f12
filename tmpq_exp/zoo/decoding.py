"""From the last state of a sampler to an image: nothing for pixel models, a float autoencoder for latent ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from tmpq_exp.zoo.weights import content_hash


class Decoder(ABC):
    """Turns clean states into images."""

    @abstractmethod
    def image_shape(self, sample_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """``(C, H, W)`` of an image whose state has this shape."""

    @abstractmethod
    def __call__(self, x0: Tensor) -> Tensor:
        """States ``(N, C, H, W)`` -> images around [-1, 1], where the states are; the decoder follows them."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What images depend on besides the states, as plain data."""


class Pixels(Decoder):
    """States are images."""

    def image_shape(self, sample_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """See ``Decoder.image_shape``."""
        return sample_shape

    def __call__(self, x0: Tensor) -> Tensor:
        """See ``Decoder.__call__``."""
        return x0

    def fingerprint(self) -> dict[str, Any]:
        """See ``Decoder.fingerprint``."""
        return {"kind": "pixels"}


class Autoencoder(Decoder):
    """Decoder of a latent diffusion model, in float; one image at a time, so that memory is that of one.

    Args:
        module: diffusers' ``AutoencoderKL`` or ``VQModel`` in eval mode: ``module.decode(latents).sample`` is an image.
        scaling_factor: What latents were multiplied with in training.
        downsampling: Pixels a latent pixel, along each side.
        channels: Channels of an image.
    """

    def __init__(self, module: nn.Module, scaling_factor: float, downsampling: int, channels: int = 3) -> None:
        self.module, self.scaling_factor = module, scaling_factor
        self.downsampling, self.channels = downsampling, channels

    def image_shape(self, sample_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """See ``Decoder.image_shape``."""
        _, height, width = sample_shape
        return self.channels, height * self.downsampling, width * self.downsampling

    def __call__(self, x0: Tensor) -> Tensor:
        """See ``Decoder.__call__``."""
        decode: Any = self.module.to(x0.device).decode
        return torch.cat([decode(latents / self.scaling_factor).sample for latents in torch.split(x0, 1)])

    def fingerprint(self) -> dict[str, Any]:
        """See ``Decoder.fingerprint``."""
        weights = content_hash(self.module.state_dict())
        return {"kind": "autoencoder", "weights": weights, "scaling_factor": self.scaling_factor}
