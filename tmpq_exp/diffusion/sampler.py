"""Deterministic samplers: pure step functions, one noise generator per image, any descending timestep sequence.

Coefficients are float64 Python numbers. A ``Sampler`` joins a schedule with a step function; ``sample`` runs it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from tmpq_exp.seeding import stream

Predictor = Callable[[Tensor, int, int], Tensor]
"""``(x_t, timestep, step_index) -> prediction``, shaped like ``x_t``; the timestep is the one the network is told."""

Step = Callable[[Tensor, Tensor, int], Tensor]
"""``(x_t, prediction, step_index) -> state at the next kept timestep``, called once a step and in order."""


class Prediction(str, Enum):
    """What a network predicts of ``x_t = sqrt(a) x_0 + sqrt(1 - a) noise``.

    ``v`` is ``sqrt(a) noise - sqrt(1 - a) x_0`` (Salimans, Ho, "Progressive Distillation", ICLR 2022, appendix D).
    """

    EPSILON = "epsilon"
    V = "v_prediction"


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


def denoised_and_noise(
    x: Tensor, prediction: Tensor, alpha_cumprod: float, kind: Prediction = Prediction.EPSILON
) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a prediction stands for.

    Args:
        x: State x_t, ``(B, C, H, W)``.
        prediction: The network's output, same shape.
        alpha_cumprod: Cumulative alpha of the timestep; in (0, 1), for ``v`` also 0.
        kind: What the network predicts.

    Returns:
        Predicted x_0, a fresh tensor, and predicted noise.
    """
    signal, sigma = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    if kind is Prediction.V:
        return x.mul(signal).sub_(prediction, alpha=sigma), x.mul(sigma).add_(prediction, alpha=signal)
    return x.sub(prediction, alpha=sigma).div_(signal), prediction


def ddim_step(
    x: Tensor,
    prediction: Tensor,
    alpha_cumprod: float,
    alpha_cumprod_next: float,
    *,
    clip_sample: bool,
    kind: Prediction = Prediction.EPSILON,
) -> Tensor:
    """One DDIM step with eta = 0, from a kept timestep to the next kept one.

    Args:
        x: State x_t, ``(B, C, H, W)``.
        prediction: The network's output, same shape.
        alpha_cumprod: Cumulative alpha of the current timestep, see ``denoised_and_noise``.
        alpha_cumprod_next: Cumulative alpha of the next kept timestep; 1 after the last one.
        clip_sample: Clip the predicted x_0 to [-1, 1] before going on, as pixel-space models are sampled.
        kind: What the network predicts.

    References:
        Song, Meng, Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, equation (12).
    """
    x0, noise = denoised_and_noise(x, prediction, alpha_cumprod, kind)
    if clip_sample:
        x0.clamp_(-1, 1)
    return x0.mul_(math.sqrt(alpha_cumprod_next)).add_(noise, alpha=math.sqrt(1 - alpha_cumprod_next))


def dpm_solver_pp_2m_step(
    x: Tensor,
    x0: Tensor,
    previous_x0: Tensor | None,
    alpha_cumprod: float,
    alpha_cumprod_next: float,
    alpha_cumprod_previous: float | None,
) -> Tensor:
    """One step of DPM-Solver++ (2M): second order from the predictions of two timesteps, first order without a second.

    With lambda = log(sqrt(a) / sqrt(1 - a)), h the step in lambda and r the step before it in units of h, the update is
    ``sigma' / sigma x - sqrt(a') (e^-h - 1) D`` with ``D = x0 + (x0 - previous_x0) / 2r``.

    Args:
        x: State x_t, ``(B, C, H, W)``.
        x0: Clean sample predicted at x_t.
        previous_x0: The one predicted a step before; None at the first step.
        alpha_cumprod: Cumulative alpha of the current timestep, in (0, 1).
        alpha_cumprod_next: Of the next kept timestep; 1 after the last one, which makes the step x0 itself.
        alpha_cumprod_previous: Of the timestep before; None at the first step.

    References:
        Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv 2211.01095,
        algorithm 2, in the midpoint form of diffusers.
    """
    if alpha_cumprod_next == 1:
        return x0.clone()
    sigma, sigma_next = math.sqrt(1 - alpha_cumprod), math.sqrt(1 - alpha_cumprod_next)
    step = _half_log_snr(alpha_cumprod_next) - _half_log_snr(alpha_cumprod)
    average = x0
    if previous_x0 is not None:
        assert alpha_cumprod_previous is not None
        ratio = (_half_log_snr(alpha_cumprod) - _half_log_snr(alpha_cumprod_previous)) / step
        average = x0 + (x0 - previous_x0) * (0.5 / ratio)
    return x.mul(sigma_next / sigma).sub_(average, alpha=math.sqrt(alpha_cumprod_next) * math.expm1(-step))


def _half_log_snr(alpha_cumprod: float) -> float:
    return 0.5 * (math.log(alpha_cumprod) - math.log1p(-alpha_cumprod))


def euler_step(x: Tensor, velocity: Tensor, time: float, time_next: float) -> Tensor:
    """One Euler step of a rectified flow, from noise at time 1 to data at time 0.

    Args:
        x: State, ``(B, C, H, W)``.
        velocity: Predicted data minus noise, same shape.
        time, time_next: Now and behind the step, ``1 >= time > time_next >= 0``.

    References:
        Liu, Gong, Liu, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", ICLR 2023,
        algorithm 1; here time runs down, as timesteps do.
    """
    return x.add(velocity, alpha=time - time_next)


class Sampler(ABC):
    """A schedule and the steps down it. Deterministic: noise enters at the start only."""

    @property
    @abstractmethod
    def schedule(self) -> Tensor:
        """A number a training timestep, ``(num_train_timesteps,)``, float64: with it two samplers are told apart."""

    @property
    @abstractmethod
    def description(self) -> str:
        """Name and settings, for fingerprints."""

    @abstractmethod
    def start(self, timesteps: Sequence[int]) -> Step:
        """Steps over these kept timesteps, strictly descending in 0..T-1; made anew for every batch of states."""

    @property
    def num_train_timesteps(self) -> int:
        """T, the length of the training schedule."""
        return len(self.schedule)

    def network_timestep(self, timestep: int) -> int:
        """What the network is told at a kept timestep."""
        return timestep


@dataclass(frozen=True, eq=False)
class NoiseScheduleSampler(Sampler):
    """What samplers of a variance-preserving schedule have in common.

    Args:
        alphas_cumprod: ``(num_train_timesteps,)``, float64, descending within (0, 1).
        prediction: What the network predicts.
        clip_sample: Whether the predicted x_0 is clipped to [-1, 1] at every step.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = Prediction.EPSILON
    clip_sample: bool = False

    @property
    def schedule(self) -> Tensor:
        """Cumulative alphas."""
        return self.alphas_cumprod


@dataclass(frozen=True, eq=False)
class DDIM(NoiseScheduleSampler):
    """DDIM with eta = 0, exact at any kept timesteps.

    Args:
        alphas_cumprod, prediction, clip_sample: See ``NoiseScheduleSampler``; under v-prediction the last cumulative
            alpha may be 0.
        final_alpha_cumprod: Cumulative alpha behind the last kept timestep: 1, or that of timestep 0 for models which
            are sampled so (``set_alpha_to_one: false``).
    """

    final_alpha_cumprod: float = 1.0

    @property
    def description(self) -> str:
        """See ``Sampler.description``."""
        final = "" if self.final_alpha_cumprod == 1 else f", final alpha {self.final_alpha_cumprod!r}"
        return f"ddim, eta 0, clip_sample {self.clip_sample}, {self.prediction.value}{final}"

    def start(self, timesteps: Sequence[int]) -> Step:
        """See ``Sampler.start``."""
        alphas = [*(float(self.alphas_cumprod[t]) for t in timesteps), self.final_alpha_cumprod]

        def step(x: Tensor, prediction: Tensor, step_index: int) -> Tensor:
            here, there = alphas[step_index : step_index + 2]
            return ddim_step(x, prediction, here, there, clip_sample=self.clip_sample, kind=self.prediction)

        return step


@dataclass(frozen=True, eq=False)
class DPMSolverPP2M(NoiseScheduleSampler):
    """DPM-Solver++ (2M) down to noise zero; its first and its last step are of first order.

    Args:
        alphas_cumprod, prediction, clip_sample: See ``NoiseScheduleSampler``.
    """

    @property
    def description(self) -> str:
        """See ``Sampler.description``."""
        return f"dpm-solver++ 2m midpoint, clip_sample {self.clip_sample}, {self.prediction.value}"

    def start(self, timesteps: Sequence[int]) -> Step:
        """See ``Sampler.start``."""
        alphas = [*(float(self.alphas_cumprod[t]) for t in timesteps), 1.0]
        previous: Tensor | None = None

        def step(x: Tensor, prediction: Tensor, step_index: int) -> Tensor:
            nonlocal previous
            here, there = alphas[step_index : step_index + 2]
            x0, _ = denoised_and_noise(x, prediction, here, self.prediction)
            if self.clip_sample:
                x0.clamp_(-1, 1)
            before = None if previous is None else alphas[step_index - 1]
            stepped = dpm_solver_pp_2m_step(x, x0, previous, here, there, before)
            previous = x0
            return stepped

        return step


@dataclass(frozen=True, eq=False)
class RectifiedFlowEuler(Sampler):
    """Euler steps of a rectified flow whose timestep t stands for time ``(t + 1) / T``.

    The first step starts at time 1, where the noise is, whichever timestep is kept first: so the steps always add up to
    1, and a flow whose paths are straight is solved exactly by any kept timesteps.

    Args:
        length: T, at least 1.

    References:
        Liu et al., "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation", ICLR
        2024, whose network is told ``T`` times the time, at ``trailing`` timesteps.
    """

    length: int = 1000

    @property
    def schedule(self) -> Tensor:
        """Times."""
        return torch.arange(1, self.length + 1, dtype=torch.float64) / self.length

    @property
    def description(self) -> str:
        """See ``Sampler.description``."""
        return "rectified flow, euler"

    def network_timestep(self, timestep: int) -> int:
        """See ``Sampler.network_timestep``."""
        return timestep + 1

    def start(self, timesteps: Sequence[int]) -> Step:
        """See ``Sampler.start``."""
        times = [1.0, *((t + 1) / self.length for t in timesteps[1:]), 0.0]

        def step(x: Tensor, prediction: Tensor, step_index: int) -> Tensor:
            return euler_step(x, prediction, *times[step_index : step_index + 2])

        return step


def sample(sampler: Sampler, predict: Predictor, x: Tensor, timesteps: Sequence[int]) -> Tensor:
    """Run a sampler over the kept timesteps.

    Args:
        sampler: Schedule and steps.
        predict: The network.
        x: Start states, ``(B, C, H, W)``.
        timesteps: Kept timesteps, strictly descending.

    Returns:
        Predicted x_0, ``(B, C, H, W)``.
    """
    step = sampler.start(timesteps)
    for step_index, timestep in enumerate(timesteps):
        x = step(x, predict(x, sampler.network_timestep(timestep), step_index), step_index)
    return x
