"""Quantization of one stage's tensor: x, V, U or M, dynamic or static, rounded to nearest or shaped.

Shapes as in ``winograd.conv``: x (B, C, H, W), V (taps, C, B, tiles), U (taps, K, C), M (taps, K, B, tiles).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.primitives import fake_quantize_groups, integer_range, symmetric_scale
from tmpq_exp.winograd.shaping import Feedback, shaped_round
from tmpq_exp.winograd.spec import ALL, Layout, WinogradSpec


@dataclass(frozen=True)
class StaticRanges:
    """Largest magnitudes of a layer's activation stages, found beforehand: static scales.

    Args:
        input: Of x, (1, C, 1, 1).
        v: Of V, (taps or 1, C, 1, 1).
        m: Of M, (taps or 1, K, 1, 1).
    """

    input: Tensor
    v: Tensor
    m: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> StaticRanges:
        """A copy with ``fn`` applied to every tensor."""
        return StaticRanges(fn(self.input), fn(self.v), fn(self.m))

    def union(self, other: StaticRanges) -> StaticRanges:
        """Ranges that cover both."""
        return StaticRanges(
            torch.maximum(self.input, other.input), torch.maximum(self.v, other.v), torch.maximum(self.m, other.m)
        )


def quantize_stage(
    x: Tensor,
    stage: str,
    spec: WinogradSpec,
    bits: int,
    feedback: Feedback | None = None,
    absmax: Tensor | None = None,
) -> Tensor:
    """Fake quantization of a stage's tensor, in place where no gradient is needed and rounding is to nearest.

    Args:
        x: The tensor.
        stage: ``input``, ``v``, ``u`` or ``m``.
        spec: Decides which elements share a scale.
        bits: 2..16, or ``FLOAT_BITS`` for no quantization.
        feedback: Rounds with error feedback over the taps; None rounds each element to nearest.
        absmax: Static range, broadcastable to ``x``; values beyond it are clamped. None takes dynamic scales, the
            largest magnitude of those that share one.
    """
    if bits == FLOAT_BITS:
        return x
    layout = spec.layout(stage)
    if feedback is None and absmax is None:
        size = layout.group_size or x.shape[layout.channel_dim]
        return fake_quantize_groups(x, layout.channel_dim, size, layout.shared_dims, bits)
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    with torch.no_grad():
        rounded = _quantize_static(x, bits, feedback, absmax) if absmax is not None else None
        if rounded is None:
            assert feedback is not None
            parts = [
                shaped_round(part, symmetric_scale(group_absmax(part, dims), bits), feedback, bits).flatten(
                    dim, dim + 1
                )
                for part, dims, dim in group_views(x, layout)
            ]
            rounded = parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.channel_dim)
    return x + (rounded - x).detach() if needs_grad else rounded


def _quantize_static(x: Tensor, bits: int, feedback: Feedback | None, absmax: Tensor) -> Tensor:
    scale = symmetric_scale(absmax.to(x), bits)
    if feedback is not None:
        return shaped_round(x, scale, feedback, bits)
    largest = integer_range(bits, symmetric=True)[1]
    return x.div(scale).round_().clamp_(-largest, largest).mul_(scale)


def dynamic_scale(x: Tensor, stage: str, spec: WinogradSpec, bits: int) -> Tensor:
    """The dynamic scale of every element of a stage's tensor, expanded along its channels and broadcastable to it."""
    layout = spec.layout(stage)
    scales = []
    for part, dims, dim in group_views(x, layout):
        shape = list(part.shape)
        for reduced in dims:
            shape[reduced] = part.shape[dim + 1] if reduced == dim + 1 else 1
        scales.append(symmetric_scale(group_absmax(part, dims), bits).expand(shape).flatten(dim, dim + 1))
    return torch.cat(scales, dim=layout.channel_dim)


def static_range(x: Tensor, stage: str, spec: WinogradSpec) -> Tensor:
    """Largest magnitude of a stage's tensor by group of channels, over images and tiles or pixels: a static range.

    V and M keep a range a tap, unless the method shares scales over taps.
    """
    layout = spec.layout(stage)
    every = (0, 2, 3) if stage == "input" else (2, 3)
    ranges = []
    for part, dims, dim in group_views(
        x, Layout(layout.channel_dim, layout.group_size, tuple({*layout.shared_dims, *every}))
    ):
        absmax = group_absmax(part, dims)
        ranges.append(
            absmax.expand(*absmax.shape[: dim + 1], part.shape[dim + 1], *absmax.shape[dim + 2 :]).flatten(dim, dim + 1)
        )
    return torch.cat(ranges, dim=layout.channel_dim)


def group_views(x: Tensor, layout: Layout) -> Iterator[tuple[Tensor, list[int], int]]:
    """Views of the even groups and of a short last one, the channel dimension cut into (groups, channels of a group).

    Yields:
        ``(view, dims that share a scale, channel_dim)``.
    """
    dim = layout.channel_dim
    num_channels = x.shape[dim]
    size = num_channels if layout.group_size == ALL else min(layout.group_size, num_channels)
    num_even = num_channels - num_channels % size
    dims = [*(d + (d > dim) for d in layout.shared_dims), dim + 1]
    for start, length, group in ((0, num_even, size), (num_even, num_channels - num_even, num_channels - num_even)):
        if length:
            yield x.narrow(dim, start, length).unflatten(dim, (-1, group)), dims, dim  # type: ignore[no-untyped-call]


def group_absmax(x: Tensor, dims: list[int]) -> Tensor:
    """Largest magnitude over ``dims``, kept."""
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
