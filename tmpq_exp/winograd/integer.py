"""The quantized Winograd convolution on integers: int8 operands, int32 accumulators, float only where it rescales.

The oracle of ``winograd.conv``, which computes the same with floats that hold ``integer * scale``. Both take the same
scales and roundings, and so give the same integers at every stage, except where a quotient lies within float rounding
of the middle between two integers: there the last bit of the rescale decides, and the integers may differ by one. With
no such quotient the results are equal to float rounding (1e-12 of the largest output in float64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tmpq_exp.winograd.matrices import WinogradMatrices, integer_rows
from tmpq_exp.winograd.shaping import Feedback
from tmpq_exp.winograd.spec import ALL, Method, WinogradSpec
from tmpq_exp.winograd.stages import dynamic_scale, quantize_stage

MAX_OPERAND_BITS = 8


@dataclass(frozen=True)
class IntegerStage:
    """A stage's integers and their scales: ``integers * scale`` is the stage's tensor.

    Args:
        integers: int8.
        scale: float64, broadcastable to the integers.
        tie_distance: Least distance of a quotient from the middle between two integers, in integers; at least 0.
    """

    integers: Tensor
    scale: Tensor
    tie_distance: float


@dataclass(frozen=True)
class IntegerResult:
    """What the integer path computed.

    Args:
        y: (B, K, H', W'), float64.
        input, u, v, m: The stages.
    """

    y: Tensor
    input: IntegerStage
    u: IntegerStage
    v: IntegerStage
    m: IntegerStage


@torch.no_grad()
def integer_winograd_conv2d(
    x: Tensor,
    u: Tensor,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    padding: int = 0,
    v_feedback: Feedback | None = None,
    m_feedback: Feedback | None = None,
) -> IntegerResult:
    """Convolution with all four stages on int8; with ``spec.transform_bits`` the transforms are integer as well.

    Slow and plain: it is there to be compared with.

    Args:
        x: (B, C, H, W), float64.
        u: ``transform_weights``'s U, in float64: already ``int8 * scale``.
        matrices: Of the spec, in float64, and integer where the spec says so.
        spec: All stages quantized to at most 8 bits; not ``bqw_style``.
        padding: Zeros on every side.
        v_feedback, m_feedback: Error feedback of the weights, see ``WinogradWeights``.

    Raises:
        ValueError: If the spec leaves a stage float or above 8 bits, or balances channels.
    """
    bits = {stage: spec.stage_bits(stage, MAX_OPERAND_BITS) for stage in ("input", "u", "v", "m")}
    if max(bits.values()) > MAX_OPERAND_BITS or spec.method == Method.BQW_STYLE:
        raise ValueError(f"spec must quantize every stage to at most 8 bits without channel balancing, found {spec}")
    m, n, right = spec.m, spec.n, matrices.right_side
    size = [side + 2 * padding - spec.r + 1 for side in x.shape[2:]]
    tiles = [-(-side // m) for side in size]
    extra = [count * m + spec.r - 1 - side - padding for count, side in zip(tiles, x.shape[2:], strict=True)]
    x = F.pad(x, (padding, extra[1], padding, extra[0]))
    image = _to_integers(x, "input", spec, bits["input"])
    windows = image.integers.unfold(2, n, m).unfold(3, n, m).permute(4, 5, 1, 0, 2, 3).flatten(4)  # n n C B tiles
    v_real = _transformed(windows, matrices.B_T, right.B_T, spec) * image.scale.permute(1, 0, 2, 3).flatten(2)
    v = _to_integers(v_real, "v", spec, bits["v"], v_feedback)
    weights = _to_integers(u, "u", spec, bits["u"], rounded=True)
    m_real = _grouped_products(weights, v, spec)
    products = _to_integers(m_real, "m", spec, bits["m"], m_feedback)
    if spec.method == Method.PER_TAP or spec.m_scale == "tap":  # the output transform adds taps of different scales
        values = (products.integers * products.scale).view(n, n, *products.integers.shape[1:])
        y = torch.einsum("ai,ijkbt,cj->ackbt", matrices.A_T, values, right.A_T)
    else:
        y = _transformed(products.integers.view(n, n, *products.integers.shape[1:]), matrices.A_T, right.A_T, spec)
        y = (y * products.scale).view(m, m, *y.shape[1:])
    y = y.view(*y.shape[:4], *tiles).permute(3, 2, 4, 0, 5, 1).reshape(x.shape[0], -1, tiles[0] * m, tiles[1] * m)
    return IntegerResult(y[:, :, : size[0], : size[1]], image, weights, v, products)


def _to_integers(
    x: Tensor, stage: str, spec: WinogradSpec, bits: int, feedback: Feedback | None = None, rounded: bool = False
) -> IntegerStage:
    scale = dynamic_scale(x, stage, spec, bits)
    quotient = x / scale
    if feedback is None:
        integers = quotient.round()
    else:
        integers = (quantize_stage(x.clone(), stage, spec, bits, feedback) / scale).round()
    distance = 0.5 if rounded else float((quotient.frac().abs() - 0.5).abs().min())
    return IntegerStage(integers.to(torch.int8), scale, distance)


def _transformed(tiles: Tensor, left: Tensor, right: Tensor, spec: WinogradSpec) -> Tensor:
    """``left @ tile @ right.T`` of int8 tiles (n, n, ...): int32 sums where the matrices are integers, (taps, ...)."""
    if spec.transform_bits is None:
        return torch.einsum("ai,ij...,cj->ac...", left, tiles.to(left.dtype), right).flatten(0, 1)
    (a, a_scale), (c, c_scale) = (integer_rows(matrix, spec.transform_bits) for matrix in (left, right))
    half = torch.stack([_weighted_sum(tiles, row) for row in a.int()])
    whole = torch.stack([_weighted_sum(half.transpose(0, 1), row) for row in c.int()], dim=1)
    assert whole.dtype == torch.int32
    scales = (a_scale * c_scale.t()).flatten()
    return whole.flatten(0, 1).to(left.dtype) * scales.view(-1, *(1,) * (whole.dim() - 2))


def _weighted_sum(tiles: Tensor, row: Tensor) -> Tensor:
    """Sum of ``tiles[i] * row[i]`` in int32."""
    return (tiles.int() * row.view(-1, *(1,) * (tiles.dim() - 1))).sum(dim=0, dtype=torch.int32)


def _grouped_products(u: IntegerStage, v: IntegerStage, spec: WinogradSpec) -> Tensor:
    """M in float64, (taps, K, B, tiles): int32 sums over the channels of a group, rescaled and added over groups."""
    taps, num_channels, batch, num_tiles = v.integers.shape
    group = spec.layout("v").group_size or num_channels
    group = num_channels if group == ALL else group
    total = torch.zeros(taps, u.integers.shape[1], batch, num_tiles, dtype=v.scale.dtype)
    u_scale = u.scale.expand(taps, u.integers.shape[1], num_channels)
    v_scale = v.scale.expand(taps, num_channels, batch, num_tiles)
    for first in range(0, num_channels, group):
        part = slice(first, first + group)
        accumulator = torch.bmm(u.integers[:, :, part].int(), v.integers[:, part].flatten(2).int())
        assert accumulator.dtype == torch.int32
        scale = u_scale[:, :, first, None, None] * v_scale[:, None, first]
        total += accumulator.view_as(total) * scale
    return total
