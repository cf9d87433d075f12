"""Owns what is learned of a quantizer, as pure formulas and thin objects: soft rounding and activation scales."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.quant.layers import WeightedLayer
from tmpq_exp.quant.primitives import integer_range
from tmpq_exp.quant.quantizer import ActQuantizer

ZETA, GAMMA = 1.1, -0.1
"""Upper and lower end of the stretched sigmoid."""

BETA_START, BETA_END = 20.0, 2.0
"""Exponent of the regularizer, before and after annealing."""

WARM_UP = 0.2
"""Share of the iterations without regularizer."""


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """Share in [0, 1] by which a weight is rounded up.

    References:
        Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, equation (23).
    """
    return torch.sigmoid(logits).mul(ZETA - GAMMA).add(GAMMA).clamp(0, 1)


def initial_logits(fraction: Tensor) -> Tensor:
    """Inverse of ``rectified_sigmoid``: logits at which a weight starts from its own fraction, in [0, 1)."""
    return torch.logit((fraction - GAMMA) / (ZETA - GAMMA))


def annealed_beta(progress: float) -> float | None:
    """Exponent at this share of the iterations, in [0, 1]; None during the warm-up.

    References:
        Nagel et al. 2020 anneal from high to low; linearly from 20 to 2 after 20 % of the iterations as in Li et al.,
        "BRECQ", ICLR 2021.
    """
    if progress < WARM_UP:
        return None
    return BETA_START + (BETA_END - BETA_START) * (progress - WARM_UP) / (1 - WARM_UP)


def rounding_regularizer(share: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 share - 1| ** beta)``: 0 where every share is 0 or 1.

    References:
        Nagel et al. 2020, equation (24).
    """
    return (1 - share.mul(2).sub(1).abs().pow(beta)).sum()


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with gradients for the input and, if it needs one, the scale.

    Rounding passes the gradient straight through; beyond the integer range none reaches the input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio, scale)
        ctx.limits = low, high
        return ratio.round().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        ratio, scale = ctx.saved_tensors
        low, high = ctx.limits
        rounded = ratio.round()
        inside = (rounded >= low) & (rounded <= high)
        for_input = gradient * inside
        for_scale = None
        if ctx.needs_input_grad[1]:
            for_scale = (gradient * rounded.clamp_(low, high)).sub_(for_input * ratio).sum_to_size(scale.shape)
        return for_input, for_scale, None, None


def learnable_fake_quantize(x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
    """``clamp(round(x / scale), low, high) * scale`` with straight-through gradients for ``x`` and ``scale``.

    Args:
        x: Any shape.
        scale: Broadcasts against ``x``.
        low, high: Integer range less the zero point; numbers, or tensors that broadcast against ``x``.

    References:
        Esser et al., "Learned Step Size Quantization", ICLR 2020, equation (3), without its gradient scaling.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, low, high)
    return result


class Learned(ABC):
    """A parameter of one quantizer at one bit width while it is learned.

    It is stepped only when its bit width is drawn, and its schedules run over its own steps.
    """

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter.requires_grad_()
        self.num_steps = self.num_drawn = 0

    @property
    def progress(self) -> float:
        """Share of its own steps that are done."""
        return self.num_drawn / self.num_steps

    def penalty(self) -> Tensor | None:
        """What is added to the loss; None for nothing."""
        return None

    @abstractmethod
    def learning_rate(self, initial: float) -> float:
        """Learning rate of the next step."""

    @abstractmethod
    def stepped(self) -> None:
        """To be called after every step."""

    @abstractmethod
    def commit(self) -> None:
        """Set the quantizer to what was learned."""


class SoftRounding(Learned):
    """Weights of a layer at one bit width between their two integers; scale and zero point stay.

    Args:
        layer: The layer; its quantizer has room for roundings.
        bits: Bit width.
        regularizer: Weight of the regularizer.
    """

    def __init__(self, layer: WeightedLayer, bits: int, regularizer: float) -> None:
        self.layer, self.bits, self.regularizer = layer, bits, regularizer
        weight, quantizer = layer.float_layer.weight.detach(), layer.weight_quantizer
        index = quantizer.calibrated_choice(bits)
        self._scale, zero_point = (
            quantizer.per_weight(rows[index], weight) for rows in (quantizer.scale, quantizer.zero_point)
        )
        quant_min, quant_max = integer_range(bits, quantizer.config.symmetric)
        ratio = weight / self._scale
        self._floor, self._low, self._high = ratio.floor(), quant_min - zero_point, quant_max - zero_point
        super().__init__(initial_logits(ratio - self._floor))
        self._share = torch.empty(0)

    def weight(self) -> Tensor:
        """Weights with the present shares, differentiable in the logits."""
        self._share = rectified_sigmoid(self.parameter)
        return (self._floor + self._share).clamp(self._low, self._high) * self._scale

    def penalty(self) -> Tensor | None:
        """The regularizer of the shares that ``weight`` used last."""
        beta = annealed_beta(self.progress)
        return None if beta is None else rounding_regularizer(self._share, beta) * self.regularizer

    def learning_rate(self, initial: float) -> float:
        """Constant."""
        return initial

    def stepped(self) -> None:
        """One step more."""
        self.num_drawn += 1

    def commit(self) -> None:
        """Round up where the share is at least one half."""
        self.layer.weight_quantizer.set_rounding(self.bits, self.parameter.detach() >= 0)
        self.layer.cache.clear()


class LearnedScale(Learned):
    """Scale of static activations at one bit width; the zero point stays.

    Args:
        quantizer: The quantizer.
        bits: Bit width.
    """

    def __init__(self, quantizer: ActQuantizer, bits: int) -> None:
        self.quantizer, self.bits = quantizer, bits
        super().__init__(quantizer.scale[quantizer.calibrated_choice(bits)].clone())
        self._smallest = self.parameter.detach() / 16

    def learning_rate(self, initial: float) -> float:
        """Half a cosine from ``initial`` to 0."""
        return initial * (1 + math.cos(math.pi * self.progress)) / 2

    @torch.no_grad()
    def stepped(self) -> None:
        """One step more; a scale never shrinks below a sixteenth of its start."""
        self.num_drawn += 1
        torch.maximum(self.parameter, self._smallest, out=self.parameter)

    @torch.no_grad()
    def commit(self) -> None:
        """Set the scale."""
        self.quantizer.scale[self.quantizer.choice(self.bits)] = self.parameter.detach()
        self.quantizer.forget_parameters()
