"""Random inputs that stand in for data: white Gaussian, white uniform and 1/f noise, all of unit variance."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

NOISE_BATCH, NOISE_SIZE = 2, 24
"""Images, and pixels a side, of the noise that a layer sees; 24 is a multiple of the tiles 2, 3, 4, 6 and 8."""


class Noise(str, Enum):
    """A kind of random input.

    ``gaussian`` is the paper's. ``uniform`` has no tails. ``pink`` is Gaussian with an amplitude spectrum of 1/f over
    spatial frequency f, as natural images have: neighbouring pixels correlate, channels do not.
    """

    GAUSSIAN = "gaussian"
    UNIFORM = "uniform"
    PINK = "pink"


def noise(num_channels: int, generator: torch.Generator, kind: Noise | str = Noise.GAUSSIAN) -> Tensor:
    """Noise of expected mean 0 and variance 1, (``NOISE_BATCH``, C, ``NOISE_SIZE``, ``NOISE_SIZE``), float32, CPU.

    Args:
        num_channels: C, at least 1.
        generator: On the CPU.
        kind: Which noise.
    """
    shape = (NOISE_BATCH, num_channels, NOISE_SIZE, NOISE_SIZE)
    kind = Noise(kind)
    if kind is Noise.UNIFORM:
        return (torch.rand(shape, generator=generator) * 2 - 1) * math.sqrt(3)
    white = torch.randn(shape, generator=generator)
    return white if kind is Noise.GAUSSIAN else _pink(white)


def _pink(white: Tensor) -> Tensor:
    """White noise filtered by 1/f; the zero frequency gets the gain of the lowest one."""
    size = white.shape[-1]
    vertical, horizontal = torch.fft.fftfreq(size), torch.fft.rfftfreq(size)
    frequency = torch.hypot(vertical[:, None], horizontal[None, :]).clamp(min=1 / size)
    twice = torch.full_like(horizontal, 2.0)  # rfft holds each pair of conjugates once
    twice[0] = 1.0
    twice[-1] = 1.0 if size % 2 == 0 else 2.0
    gain = 1 / frequency
    gain /= ((gain.square() * twice).sum() / size**2).sqrt()
    pink: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=white.shape[-2:])
    return pink
