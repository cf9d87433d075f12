"""Pure functions of quantization: integer ranges, scales, rounding, and how a range is estimated.

Shapes: every function broadcasts ``scale`` and ``zero_point`` against ``x``; who calls decides what shares a scale.
Integers are kept in float tensors (exact up to 2**24), because that is what simulated quantization computes with.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TypeAlias

import torch
from torch import Tensor

from tmpq_exp.config import MAX_BITS, MIN_BITS

Limits: TypeAlias = tuple[int, int] | tuple[Tensor, Tensor]
"""Smallest and largest integer, as numbers or as tensors ``()``."""


class RangeEstimator(str, Enum):
    """How the clipping range of a tensor is chosen."""

    MINMAX = "minmax"
    MSE = "mse"
    PERCENTILE = "percentile"


def integer_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest integer: symmetric ``[-(2**(b-1)-1), 2**(b-1)-1]``, asymmetric ``[0, 2**b-1]``.

    Raises:
        ValueError: If ``bits`` lies outside 2..16.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in {MIN_BITS}..{MAX_BITS}, found {bits}")
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def scale_and_zero_point(low: Tensor, high: Tensor, bits: int | Limits, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Affine parameters whose integer range covers ``[low, high]``, widened to hold zero exactly.

    Args:
        low, high: Clipping range, any shape, ``low <= high``.
        bits: 2..16, or the ``integer_range`` of that many.
        symmetric: If so the zero point is 0 and the range is ``max(|low|, |high|)`` on both sides.

    Returns:
        ``(scale, zero_point)``, shaped like ``low``. The scale is never 0: a range that is a single zero gets scale 1.
    """
    quant_min, quant_max = _limits(bits, symmetric)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = torch.maximum(-low, high) / quant_max if symmetric else (high - low) / (quant_max - quant_min)
    tiny = torch.finfo(scale.dtype).tiny
    scale = torch.where(scale > tiny, scale, torch.ones_like(scale))
    zero_point = torch.zeros_like(scale) if symmetric else (quant_min - low / scale).round_()
    return scale, zero_point.clamp_(quant_min, quant_max)  # type: ignore[arg-type]


def _limits(bits: int | Limits, symmetric: bool) -> Limits:
    return integer_range(bits, symmetric) if isinstance(bits, int) else bits


def symmetric_scale(absmax: Tensor, bits: int) -> Tensor:
    """Scale of a symmetric quantizer from the largest magnitude; 1 where that is 0. Shape of ``absmax``."""
    quant_max = integer_range(bits, symmetric=True)[1]
    scale = absmax / quant_max
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))


def round_ste(x: Tensor) -> Tensor:
    """Round to nearest even; the gradient passes straight through."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Real -> integer (in a float tensor): ``clamp(round(x / scale) + zero_point, quant_min, quant_max)``."""
    return (round_ste(x / scale) + zero_point).clamp(quant_min, quant_max)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Integer -> real: ``(q - zero_point) * scale``."""
    return (q - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """``dequantize(quantize(x))``: the rounding error of quantization in real arithmetic."""
    return dequantize(quantize(x, scale, zero_point, quant_min, quant_max), scale, zero_point)


def fake_quantize_groups(
    x: Tensor,
    channel_dim: int,
    group_size: int,
    shared_dims: Sequence[int],
    bits: int | Limits,
    *,
    symmetric: bool = True,
) -> Tensor:
    """Dynamic fake quantization with one scale per group of channels, shared along ``shared_dims``.

    In place where no gradient is needed. The range is the group's largest magnitude, or its extreme values where it is
    not symmetric, so nothing is clipped; the gradient passes through the scale too, because the size of the rounding
    error depends on it.

    Args:
        x: Any shape; changed in place unless it needs a gradient.
        channel_dim: Dimension that is cut into groups, counted from the front.
        group_size: Channels of a group, at least 1; the last group may be shorter.
        shared_dims: Further dimensions over which a scale is shared, counted from the front.
        bits: 2..16, or the ``integer_range`` of that many.
        symmetric: Whether the zero point is 0.
    """
    num_channels = x.shape[channel_dim]
    group_size = min(group_size, num_channels)
    num_even = num_channels - num_channels % group_size
    in_place = not (torch.is_grad_enabled() and x.requires_grad)
    parts = []
    for start, length, size in ((0, num_even, group_size), (num_even, num_channels - num_even, 0)):
        if length == 0:
            continue
        part = x.narrow(channel_dim, start, length).unflatten(channel_dim, (-1, size or length))  # type: ignore[no-untyped-call]
        dims = [*(d + (d > channel_dim) for d in shared_dims), channel_dim + 1]
        low, high = _extremes(part, dims)
        scale, zero_point = scale_and_zero_point(low, high, bits, symmetric)
        quant_min, quant_max = _limits(bits, symmetric)
        if in_place:
            part.div_(scale).round_()
            if not symmetric:
                part.clamp_(quant_min - zero_point, quant_max - zero_point)
            part.mul_(scale)
        else:
            integers = round_ste(part / scale)
            if not symmetric:
                integers = integers.clamp(quant_min - zero_point, quant_max - zero_point)
            parts.append((integers * scale).flatten(channel_dim, channel_dim + 1))
    if in_place:
        return x
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=channel_dim)


def _extremes(x: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Extreme values over ``dims``, kept; one dimension after the other, which is faster than all at once."""
    high = low = x
    for dim in dims:
        high, low = high.amax(dim, keepdim=True), low.amin(dim, keepdim=True)
    return low, high


def pack_bits(mask: Tensor) -> Tensor:
    """Booleans of any shape -> bytes ``(ceil(n / 8),)`` in contiguous order, the first value in the lowest bit."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Inverse of ``pack_bits``: the first ``count`` values, as booleans."""
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).bool().view(-1)[:count]


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Integers of any shape in 0..2**bits - 1 -> bytes ``(ceil(n bits / 8),)``, one value right behind the other."""
    flat = values.reshape(-1, 1).to(torch.int32)
    return pack_bits(flat >> torch.arange(bits, dtype=torch.int32, device=flat.device) & 1)


def unpack_integers(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of ``pack_integers``: the first ``count`` values, int32."""
    digits = unpack_bits(packed, count * bits).view(count, bits)
    values = torch.zeros(count, dtype=torch.int32, device=packed.device)
    for position in range(bits):
        values += digits[:, position].int() << position
    return values


def sqnr_db(reference: Tensor, estimate: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, ``10 log10(|reference|^2 / |reference - estimate|^2)``, in float64.

    Returns ``inf`` where the two are equal.
    """
    reference, estimate = reference.double(), estimate.double()
    noise = (reference - estimate).square().sum()
    return float(10 * torch.log10(reference.square().sum() / noise)) if noise > 0 else float("inf")


def estimate_range(
    x: Tensor,
    bits: int,
    *,
    symmetric: bool,
    estimator: RangeEstimator = RangeEstimator.MINMAX,
    percentile: float = 99.99,
    num_mse_candidates: int = 60,
    extremes: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipping range of each row of ``x``.

    Args:
        x: ``(rows, values)``; what shares a scale is one row.
        bits: 2..16; only ``mse`` depends on it.
        symmetric: Whether the quantizer is symmetric; only ``mse`` depends on it.
        estimator: ``minmax``: the extreme values. ``percentile``: the two-sided percentile of the values.
            ``mse``: the min-max range shrunk by the factor of least squared error.
        percentile: In (50, 100]; share of values kept below the upper end, and likewise above the lower end.
        num_mse_candidates: Factors tried by ``mse``, from 1 downwards in equal steps to 0.2.
        extremes: ``(low, high)`` of each row, ``(rows,)``, if ``x`` is only a sample of it; None takes those of ``x``.

    Returns:
        ``(low, high)``, each ``(rows,)``.
    """
    low, high = (x.amin(dim=1), x.amax(dim=1)) if extremes is None else extremes
    if estimator is RangeEstimator.PERCENTILE:
        upper = _kth_percentile(x, percentile)
        lower = -_kth_percentile(-x, percentile)
        return torch.maximum(lower, low), torch.minimum(upper, high)
    if estimator is RangeEstimator.MSE:
        return _mse_range(x, low, high, bits, symmetric, num_mse_candidates)
    return low, high


def _kth_percentile(x: Tensor, percentile: float) -> Tensor:
    k = max(1, min(x.shape[1], round(x.shape[1] * percentile / 100)))
    return x.kthvalue(k, dim=1).values


def _mse_range(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, num: int) -> tuple[Tensor, Tensor]:
    quant_min, quant_max = integer_range(bits, symmetric)
    best_error = torch.full_like(low, float("inf"))
    best_low, best_high = low, high
    for factor in torch.linspace(1.0, 0.2, num).tolist():
        scale, zero_point = scale_and_zero_point(low * factor, high * factor, bits, symmetric)
        error = (fake_quantize(x, scale[:, None], zero_point[:, None], quant_min, quant_max) - x).square().mean(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low = torch.where(better, low * factor, best_low)
        best_high = torch.where(better, high * factor, best_high)
    return best_low, best_high
