"""The quantized Winograd convolution on integers: int8 operands, int32 accumulators, float only where it rescales.

Where channels are balanced, the integers of V and U are those of V / balance and U * balance, whose product is that of
V and U: the Hadamard stage never sees the balance.

The oracle of ``winograd.conv``, which computes the same with floats that hold ``integer * scale``. Both take the same
scales and the same roundings. So, stage by stage, given equal integers before it, a stage has equal integers after it,
except where a quotient lies within float rounding of the middle between two integers: there the last bit of the
rescale decides, and the two differ by one, and except where all that share a scale cancel to 0: there rounding of
floats is all that is left, and its scale as small. Given equal integers of M, the outputs are equal to float rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tmpq_exp.quant.primitives import integer_range, symmetric_scale
from tmpq_exp.winograd.conv import StaticRanges, weight_feedback
from tmpq_exp.winograd.matrices import WinogradMatrices, integer_rows, transform_2d
from tmpq_exp.winograd.shaping import Feedback
from tmpq_exp.winograd.spec import ALL, Method, WinogradSpec
from tmpq_exp.winograd.stages import dynamic_scale, quantize_stage

MAX_OPERAND_BITS = 8


@dataclass(frozen=True)
class IntegerStage:
    """A stage's integers and their scales: ``integers * scale`` is the stage's tensor, balanced where channels are.

    Args:
        integers: int8.
        scale: float64, broadcastable to the integers.
        quotient: What was rounded, before error feedback and before a static range clamped it, float64.
    """

    integers: Tensor
    scale: Tensor
    quotient: Tensor

    def near_ties(self, tolerance: Tensor) -> Tensor:
        """Where the quotient is the middle between two integers, or as near to it as ``tolerance``, in steps."""
        return (self.quotient.frac().abs() - 0.5).abs() < tolerance


@torch.no_grad()
def integer_input(
    x: Tensor,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    padding: int = 0,
    feedback: Feedback | None = None,
    balance: Tensor | None = None,
    ranges: StaticRanges | None = None,
) -> tuple[IntegerStage, IntegerStage]:
    """x and V in integers: int8 pixels, int32 sums of the input transform, int8 V.

    Args:
        x: (B, C, H, W), float64.
        matrices: Of the spec, in float64, and integer where the spec says so.
        spec: Quantizes x and V to at most 8 bits.
        padding: Zeros on every side.
        feedback: Error feedback of V.
        balance: What V is divided by, (taps, C, 1, 1), where the method is ``bqw_style``.
        ranges: Static scales, as ``winograd_conv2d`` takes them: one range for all that share a scale. None takes
            dynamic ones.

    Returns:
        x with its padding, (B, C, H', W'), and V, (taps, C, B, tiles).

    Raises:
        ValueError: If the spec leaves a stage float or above 8 bits, or balances channels and there is no balance,
            or the other way round.
    """
    _check_balance(spec, balance)
    tiles = tile_counts(x.shape[2:], spec, padding)
    extra = [n * spec.m + spec.r - 1 - side - padding for n, side in zip(tiles, x.shape[2:], strict=True)]
    image = _to_integers(
        F.pad(x, (padding, extra[1], padding, extra[0])), "input", spec, None if ranges is None else ranges.input
    )
    windows = image.integers.unfold(2, spec.n, spec.m).unfold(3, spec.n, spec.m)
    columns = windows.permute(4, 5, 1, 0, 2, 3).flatten(4)  # n n C B tiles
    sums = _transformed(columns, matrices.B_T, matrices.right_side.B_T, spec)
    v = sums * image.scale.permute(1, 0, 2, 3).flatten(2)
    v = v if balance is None else v / balance
    return image, _to_integers(v, "v", spec, None if ranges is None else ranges.v, feedback)


@torch.no_grad()
def integer_weights(
    weight: Tensor, matrices: WinogradMatrices, spec: WinogradSpec, balance: Tensor | None = None
) -> IntegerStage:
    """U in integers, (taps, K, C).

    Args:
        weight: (K, C, r, r), float64.
        matrices, spec, balance: As for ``integer_input``; U is multiplied by the balance.

    Raises:
        ValueError: As ``integer_input``.
    """
    _check_balance(spec, balance)
    num_out, num_in = weight.shape[:2]
    taps = weight.permute(2, 3, 0, 1).reshape(spec.r**2, -1)
    u = transform_2d(matrices.G, taps, matrices.right_side.G).view(-1, num_out, num_in)
    u = u if balance is None else u * balance[..., 0].mT
    feedback = weight_feedback(matrices, spec) if "u" in spec.shaped_stages else None
    return _to_integers(u, "u", spec, feedback=feedback)


@torch.no_grad()
def integer_hadamard(
    u: IntegerStage,
    v: IntegerStage,
    spec: WinogradSpec,
    feedback: Feedback | None = None,
    ranges: StaticRanges | None = None,
) -> IntegerStage:
    """M in integers: int8 x int8 products in int32 over each group, rescaled and added over groups, then int8.

    Args:
        u: ``integer_weights``'s U.
        v: ``integer_input``'s V.
        spec, ranges: As there.
        feedback: Error feedback of M.
    """
    taps, num_channels, batch, num_tiles = v.integers.shape
    group = spec.layout("v").group_size
    group = num_channels if group == ALL else group
    total = torch.zeros(taps, u.integers.shape[1], batch, num_tiles, dtype=v.scale.dtype)
    u_scale, v_scale = u.scale.expand_as(u.integers), v.scale.expand_as(v.integers)
    for first in range(0, num_channels, group):
        part = slice(first, first + group)
        accumulator = torch.bmm(u.integers[:, :, part].int(), v.integers[:, part].flatten(2).int())
        assert accumulator.dtype == torch.int32
        total += accumulator.view_as(total) * (u_scale[:, :, first, None, None] * v_scale[:, None, first])
    return _to_integers(total, "m", spec, None if ranges is None else ranges.m, feedback)


@torch.no_grad()
def integer_output(m: IntegerStage, matrices: WinogradMatrices, spec: WinogradSpec, size: Sequence[int]) -> Tensor:
    """The output, (B, K, *size), float64: int32 sums of the output transform, rescaled once.

    Where the taps of M have scales of their own the output transform adds floats.
    """
    integers = m.integers.view(spec.n, spec.n, *m.integers.shape[1:])
    A_T, right = matrices.A_T, matrices.right_side.A_T
    if spec.method == Method.PER_TAP or spec.m_scale == "tap":
        y = torch.einsum("ai,ijkbt,cj->ackbt", A_T, integers * m.scale.expand_as(m.integers).view_as(integers), right)
    else:
        y = _transformed(integers, A_T, right, spec) * m.scale
    tiles = [-(-side // spec.m) for side in size]
    y = y.view(spec.m, spec.m, *m.integers.shape[1:3], *tiles).permute(3, 2, 4, 0, 5, 1)
    return y.reshape(*y.shape[:2], tiles[0] * spec.m, tiles[1] * spec.m)[:, :, : size[0], : size[1]]


def tile_counts(size: Sequence[int], spec: WinogradSpec, padding: int) -> list[int]:
    """Tiles along each axis of an input of this size."""
    return [-(-(side + 2 * padding - spec.r + 1) // spec.m) for side in size]


def _check_balance(spec: WinogradSpec, balance: Tensor | None) -> None:
    if (spec.method == Method.BQW_STYLE) != (balance is not None):
        found = "none" if balance is None else "one"
        raise ValueError(f"balance must be given for method bqw_style and no other, found {found} for {spec.method}")


def _to_integers(
    x: Tensor, stage: str, spec: WinogradSpec, absmax: Tensor | None = None, feedback: Feedback | None = None
) -> IntegerStage:
    bits = spec.stage_bits(stage, MAX_OPERAND_BITS)
    if bits > MAX_OPERAND_BITS:
        raise ValueError(f"spec must quantize every stage to at most {MAX_OPERAND_BITS} bits, found {spec}")
    scale = dynamic_scale(x, stage, spec, bits) if absmax is None else symmetric_scale(absmax, bits)
    quotient = x / scale
    if feedback is None:
        least, largest = integer_range(bits, symmetric=True)
        integers = quotient.round().clamp(least, largest)
    else:
        integers = quantize_stage(x.clone(), stage, spec, bits, feedback, absmax) / scale
    return IntegerStage(integers.round().to(torch.int8), scale, quotient)


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
