"""Deterministic samplers: pure step functions, one noise generator per image, any descending timestep sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tmpq_exp.seeding import stream

NoisePredictor = Callable[[Tensor, int, int], Tensor]
"""``(x_t, timestep, step_index) -> predicted noise``, shaped like ``x_t``."""


def initial_noise(shape: Sequence[int], image_indices: Sequence[int], seed: int) -> Tensor:
    """Unit Gaussian start states. Image i gets the same noise in any batch and in any order.

    Args:
        shape: Shape of one sample, ``(C, H, W)``.
        image_indices: Which images of the stream, each at least 0.
        seed: Seed of the image stream.

    Returns:
        ``(len(image_indices), C, H, W)`` on the CPU.

    References:
        One generator per image as in Karras et al., "Elucidating the Design Space of Diffusion-Based Generative
        Models", NeurIPS 2022, reference code.
    """
    return torch.stack([torch.randn(*shape, generator=stream(seed, "image", int(i))) for i in image_indices])


def ddim_step(
    x: Tensor, noise: Tensor, alpha_cumprod: float, alpha_cumprod_next: float, *, clip_sample: bool
) -> Tensor:
    """One DDIM step with eta = 0, from a kept timestep to the next kept one.

    Args:
        x: State x_t, ``(B, C, H, W)``.
        noise: Predicted noise, same shape.
        alpha_cumprod: Cumulative alpha of the current timestep, in (0, 1).
        alpha_cumprod_next: Cumulative alpha of the next kept timestep; 1 after the last one.
        clip_sample: Clip the predicted x_0 to [-1, 1] before going on, as pixel-space models are sampled.

    References:
        Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, equation (12).
    """
    x0 = x.sub(noise, alpha=math.sqrt(1 - alpha_cumprod)).div_(math.sqrt(alpha_cumprod))
    if clip_sample:
        x0.clamp_(-1, 1)
    return x0.mul_(math.sqrt(alpha_cumprod_next)).add_(noise, alpha=math.sqrt(1 - alpha_cumprod_next))


def ddim_sample(
    predict_noise: NoisePredictor,
    x: Tensor,
    timesteps: Sequence[int],
    alphas_cumprod: Tensor,
    *,
    clip_sample: bool,
    on_state: Callable[[Tensor, int], None] | None = None,
) -> Tensor:
    """Run DDIM over the kept timesteps.

    Args:
        predict_noise: Noise predictor.
        x: Start states, ``(B, C, H, W)``.
        timesteps: Kept timesteps, strictly descending.
        alphas_cumprod: ``(num_train_timesteps,)``, float64.
        clip_sample: See ``ddim_step``.
        on_state: Called with ``(x_t, timestep)`` before each prediction; calibration listens here.

    Returns:
        Predicted x_0, ``(B, C, H, W)``.
    """
    alphas = [float(alphas_cumprod[t]) for t in timesteps] + [1.0]
    for step_index, timestep in enumerate(timesteps):
        if on_state is not None:
            on_state(x, timestep)
        noise = predict_noise(x, timestep, step_index)
        x = ddim_step(x, noise, alphas[step_index], alphas[step_index + 1], clip_sample=clip_sample)
    return x
