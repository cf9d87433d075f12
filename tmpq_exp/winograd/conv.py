"""The staged, simulated quantized Winograd convolution: input, weight, Hadamard and output stage, each a switch.

Shapes: B images, C input and K output channels, H x W pixels, P = B * tiles_h * tiles_w tiles, n = m + r - 1.
The transformed tensors are laid out for one batched GEMM over the n*n taps: U (n*n, K, C), V (n*n, C, P),
M (n*n, K, P). Quantized tensors hold ``integer * scale`` in float, so the GEMM equals the sum over groups of the
int32 products times their scales up to float rounding; ``winograd.integer`` computes the integers themselves.

References:
    Pan et al., "Data-Free Group-Wise Fully Quantized Winograd Convolution via Learnable Scales", CVPR 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from tmpq_exp.winograd.matrices import WinogradMatrices, transform_2d
from tmpq_exp.winograd.shaping import Feedback, feedback, output_error, pixel_covariance, tap_covariance
from tmpq_exp.winograd.spec import FLOAT_STAGES, Method, WinogradSpec, check_bits
from tmpq_exp.winograd.stages import StaticRanges, quantize_stage, static_range

__all__ = [
    "FLOAT_STAGES",
    "StaticRanges",
    "WinogradMatrices",
    "WinogradSpec",
    "WinogradWeights",
    "balanced_ranges",
    "measure_ranges",
    "transform_weights",
    "weight_feedback",
    "winograd_conv2d",
]

CHUNK_ELEMENTS = 2**20
"""Elements of a transformed tensor that a CPU works on at once, as whole images: about what its caches hold.

Measured at C = 64..256, 32 x 32, batch 16 on two cores: F(2,3) takes half the time of the whole batch at once, F(4,3)
two thirds, and 2**19 to 2**21 differ by less than 10 %.
"""


@dataclass(frozen=True)
class WinogradWeights:
    """A layer's weights after the weight stage, and what the other stages need to know of them.

    Args:
        u: U, quantized and dequantized, (n*n, K, C).
        balance: What V is divided by before its quantization, (n*n, C, 1, 1); None where channels are not balanced.
        v_feedback, m_feedback: Error feedback of V and M; None where they round to nearest.
    """

    u: Tensor
    balance: Tensor | None = None
    v_feedback: Feedback | None = None
    m_feedback: Feedback | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> WinogradWeights:
        """A copy with ``fn`` applied to every tensor."""
        v, m = (
            None if shaping is None else replace(shaping, C=fn(shaping.C))
            for shaping in (self.v_feedback, self.m_feedback)
        )
        return WinogradWeights(fn(self.u), None if self.balance is None else fn(self.balance), v, m)

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        held = [self.u, self.balance, *(f.C for f in (self.v_feedback, self.m_feedback) if f is not None)]
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def transform_weights(
    weight: Tensor,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    weight_bits: int,
    channel_ranges: Tensor | None = None,
) -> WinogradWeights:
    """Weight stage, done once: U = G w G^T, quantized per tap and output channel in groups along C.

    Args:
        weight: Float weights, (K, C, r, r).
        matrices: Of the spec's transform.
        spec: What is quantized, and how.
        weight_bits: 2..16, or ``FLOAT_BITS`` for no quantization.
        channel_ranges: For ``bqw_style``, other methods have no use for them: ranges of V by tap and channel, (n*n, C),
            such as ``StaticRanges.v`` of a spec with groups of 1. None takes them as equal, as they are for white
            input: weights alone then decide.

    Raises:
        ValueError: If ``weight`` is not (K, C, r, r) or ``weight_bits`` out of range.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (spec.r, spec.r):
        raise ValueError(f"weight must have shape (K, C, {spec.r}, {spec.r}), found {tuple(weight.shape)}")
    check_bits("weight_bits", weight_bits)
    num_out, num_in = weight.shape[:2]
    taps = weight.permute(2, 3, 0, 1).reshape(spec.r**2, num_out * num_in)
    u = transform_2d(matrices.G, taps, matrices.right_side.G).view(spec.n**2, num_out, num_in)
    balance = None
    if spec.method == Method.BQW_STYLE:
        balance = channel_balance(u.detach(), channel_ranges)
        u = u * balance[:, None, :]
    bits = spec.stage_bits("u", weight_bits)
    u = quantize_stage(u, "u", spec, bits, weight_feedback(matrices, spec) if "u" in spec.shaped_stages else None)
    if balance is not None:
        u = u / balance[:, None, :]
        balance = balance[:, :, None, None]
    v_feedback = _input_feedback(matrices, weight) if "v" in spec.shaped_stages else None
    m_feedback = feedback(_output_error(matrices)) if "m" in spec.shaped_stages else None
    return WinogradWeights(u, balance, v_feedback, m_feedback)


def channel_balance(u: Tensor, channel_ranges: Tensor | None = None) -> Tensor:
    """Omega of channel balancing, (taps, C): V is divided by it and U multiplied.

    ``Omega = sqrt(t R / (r T))`` with t and r the ranges of V's and U's channels at a tap, T and R those of the tap,
    so that every channel takes the same share of its tap's range in V as in U.

    Args:
        u: (taps, K, C).
        channel_ranges: t, (taps, C); None for equal ranges.

    References:
        Chikin and Kryzhanovskiy, CVPR 2022, as far as its formula was at hand. Differs from it in the Hadamard stage
        only being balanced, and in t from white noise where no data is given.
    """
    tiny = torch.finfo(u.dtype).tiny
    r = u.abs().amax(dim=1).clamp(min=tiny)
    t = torch.ones_like(r) if channel_ranges is None else channel_ranges.to(u).view_as(r).clamp(min=tiny)
    return (t / t.amax(dim=1, keepdim=True) * (r.amax(dim=1, keepdim=True) / r)).sqrt().clamp(1e-3, 1e3)


def weight_feedback(matrices: WinogradMatrices, spec: WinogradSpec) -> Feedback:
    """Feedback of U for input whose neighbouring pixels correlate as the spec assumes."""
    right = matrices.right_side
    covariance = pixel_covariance(spec.n, spec.pixel_correlation).to(matrices.B_T.device)
    inputs = tap_covariance(matrices.B_T.detach(), right.B_T.detach(), covariance)
    return feedback(_output_error(matrices) * inputs)


def _input_feedback(matrices: WinogradMatrices, weight: Tensor) -> Feedback:
    """Feedback of V for these weights."""
    right = matrices.right_side
    rows = weight.detach().double().flatten(2).flatten(0, 1)
    taps = tap_covariance(matrices.G.detach(), right.G.detach(), rows.t() @ rows / len(rows))
    return feedback(_output_error(matrices) * taps)


def _output_error(matrices: WinogradMatrices) -> Tensor:
    return output_error(matrices.A_T.detach(), matrices.right_side.A_T.detach())


def winograd_conv2d(
    x: Tensor,
    weights: WinogradWeights,
    bias: Tensor | None,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    act_bits: int,
    padding: int | tuple[int, int] = 0,
    ranges: StaticRanges | None = None,
) -> Tensor:
    """Convolution of stride 1 through F(m, r), with every stage that ``spec`` switches on quantized.

    Scales are symmetric. With groups, x has one per image and group of channels; V one per tap and tile, in groups
    along C; M one over the n*n taps of a tile and ``spec.m_group_channels`` channels. Where no gradient is needed the
    stages work in place on their own buffers and, on a CPU, on a few images at a time, so that little more than input
    and output is held; otherwise up to 2 (n/m)**2 + 1 times the larger of the two.

    Args:
        x: Input, (B, C, H, W), any memory format.
        weights: ``transform_weights``'s result.
        bias: (K,), added in float, or None.
        matrices: Those of the weights, in the dtype of ``x``.
        spec: The stages.
        act_bits: Bits of x and V unless the spec has its own, 2..16, or ``FLOAT_BITS`` for no quantization of either.
        padding: Zeros on every side of H and W.
        ranges: Static scales of x, V and M, as ``measure_ranges`` finds them; None takes dynamic ones.

    Returns:
        (B, K, H + 2 padding - r + 1, W + 2 padding - r + 1), contiguous.

    Raises:
        ValueError: If shapes do not fit, the padded input is smaller than the kernel, or ``act_bits`` is out of range.

    References:
        Pan et al., CVPR 2025, section 3. Differs from the paper, which leaves the layout of groups open: x has
        groups within one image, so that the integer input transform has one scale for all pixels it adds, and M's
        groups span all taps, because the output transform adds taps.
    """
    u = weights.u
    size = _output_size(x, u, spec, padding)
    check_bits("act_bits", act_bits)
    tiles = (-(-size[0] // spec.m), -(-size[1] // spec.m))
    needs_grad = torch.is_grad_enabled() and (
        matrices.requires_grad or any(t is not None and t.requires_grad for t in (x, u, bias))
    )
    whole = needs_grad or x.device.type != "cpu"
    chunk = x.shape[0] if whole else _fitting_images(u, spec, tiles)
    out = [
        _convolve(images, weights, matrices, spec, act_bits, padding, tiles, ranges) for images in torch.split(x, chunk)
    ]
    y = (out[0] if len(out) == 1 else torch.cat(out))[:, :, : size[0], : size[1]].contiguous()
    if bias is None:
        return y
    return y + bias[:, None, None] if needs_grad else y.add_(bias[:, None, None])


@torch.no_grad()
def measure_ranges(
    x: Tensor,
    weights: WinogradWeights,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    act_bits: int,
    padding: int | tuple[int, int] = 0,
) -> StaticRanges:
    """Static ranges of x, V and M for these inputs; ``StaticRanges.union`` joins those of several batches.

    A few images are looked at at a time, on every device, so that little memory is held.

    Args: see ``winograd_conv2d``.
    """
    size = _output_size(x, weights.u, spec, padding)
    tiles = (-(-size[0] // spec.m), -(-size[1] // spec.m))
    chunk = _fitting_images(weights.u, spec, tiles)
    found = (_measure(images, weights, matrices, spec, act_bits, padding, tiles) for images in torch.split(x, chunk))
    return reduce(StaticRanges.union, found)


def balanced_ranges(ranges: StaticRanges, weights: WinogradWeights, spec: WinogradSpec) -> StaticRanges:
    """Ranges for weights that balance channels, whose V is divided before it is quantized; others' stay as they are.

    Args:
        ranges: With those of V before it is divided, one a tap and channel: what ``channel_ranges`` of
            ``transform_weights`` takes.
        weights: Balanced or not.
        spec: Decides which channels share a scale.
    """
    if weights.balance is None:
        return ranges
    return replace(ranges, v=static_range(ranges.v / weights.balance, "v", spec))


def _measure(
    x: Tensor,
    weights: WinogradWeights,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    act_bits: int,
    padding: int | tuple[int, int],
    tiles: tuple[int, int],
) -> StaticRanges:
    """``measure_ranges`` of a few images."""
    padded = _pad(x, spec, padding, tiles)
    x_range = static_range(padded, "input", spec)
    padded = quantize_stage(padded, "input", spec, spec.stage_bits("input", act_bits))
    v = _balanced(_transform_input(padded, matrices, spec), weights)
    v_range = static_range(v, "v", spec)
    v = quantize_stage(v, "v", spec, spec.stage_bits("v", act_bits), weights.v_feedback)
    return StaticRanges(x_range, v_range, static_range(_hadamard(v, weights), "m", spec))


def _convolve(
    x: Tensor,
    weights: WinogradWeights,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    act_bits: int,
    padding: int | tuple[int, int],
    tiles: tuple[int, int],
    ranges: StaticRanges | None,
) -> Tensor:
    """All stages for a few images, without bias; the output has whole tiles."""
    limits = (None, None, None) if ranges is None else (ranges.input, ranges.v, ranges.m)
    padded = _pad(x, spec, padding, tiles)
    padded = quantize_stage(padded, "input", spec, spec.stage_bits("input", act_bits), absmax=limits[0])
    v = _balanced(_transform_input(padded, matrices, spec), weights)
    del padded
    v = quantize_stage(v, "v", spec, spec.stage_bits("v", act_bits), weights.v_feedback, limits[1])
    m = _hadamard(v, weights)
    del v
    m = quantize_stage(m, "m", spec, spec.stage_bits("m", act_bits), weights.m_feedback, limits[2])
    y = transform_2d(matrices.A_T, m, matrices.right_side.A_T)
    y = y.view(spec.m, spec.m, weights.u.shape[1], x.shape[0], *tiles)
    del m
    return y.permute(3, 2, 4, 0, 5, 1).reshape(x.shape[0], -1, tiles[0] * spec.m, tiles[1] * spec.m)


def _output_size(x: Tensor, u: Tensor, spec: WinogradSpec, padding: int | tuple[int, int]) -> tuple[int, int]:
    fits = x.dim() == 4 and u.dim() == 3 and u.shape[0] == spec.n**2 and x.shape[1] == u.shape[2]
    if not fits or x.shape[0] == 0:
        raise ValueError(
            f"x and u must have shapes (B, C, H, W) and ({spec.n**2}, K, C) with equal C and B of at least 1, "
            f"found {tuple(x.shape)} and {tuple(u.shape)}"
        )
    pad_h, pad_w = _pair(padding)
    height, width = x.shape[2] + 2 * pad_h - spec.r + 1, x.shape[3] + 2 * pad_w - spec.r + 1
    if min(pad_h, pad_w) < 0 or min(height, width) < 1:
        raise ValueError(
            f"padding must be at least 0 and leave an input of at least {spec.r}x{spec.r}, "
            f"found {padding} for {x.shape[2]}x{x.shape[3]}"
        )
    return height, width


def _fitting_images(u: Tensor, spec: WinogradSpec, tiles: tuple[int, int]) -> int:
    """Images whose V and M have at most ``CHUNK_ELEMENTS``; at least 1."""
    return max(1, CHUNK_ELEMENTS // (spec.n**2 * tiles[0] * tiles[1] * max(u.shape[1:])))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _pad(x: Tensor, spec: WinogradSpec, padding: int | tuple[int, int], tiles: tuple[int, int]) -> Tensor:
    """x with its own padding and what whole tiles need; always a copy, so it may be changed in place."""
    pad_h, pad_w = _pair(padding)
    bottom, right = (
        tile * spec.m + spec.r - 1 - size - pad
        for tile, size, pad in zip(tiles, x.shape[2:], (pad_h, pad_w), strict=True)
    )
    return F.pad(x.contiguous(), (pad_w, right, pad_h, bottom))


def _transform_input(padded: Tensor, matrices: WinogradMatrices, spec: WinogradSpec) -> Tensor:
    """Padded x -> V, (n*n, C, B, tiles): cut into overlapping tiles, transform."""
    windows = padded.unfold(2, spec.n, spec.m).unfold(3, spec.n, spec.m)
    columns = windows.permute(4, 5, 1, 0, 2, 3).reshape(spec.n**2, -1)
    batch, channels = padded.shape[:2]
    del padded, windows
    return transform_2d(matrices.B_T, columns, matrices.right_side.B_T).view(spec.n**2, channels, batch, -1)


def _balanced(v: Tensor, weights: WinogradWeights) -> Tensor:
    return v if weights.balance is None else v / weights.balance


def _hadamard(v: Tensor, weights: WinogradWeights) -> Tensor:
    """U V of every tap, (n*n, K, B, tiles)."""
    v = v if weights.balance is None else v * weights.balance
    return torch.bmm(weights.u, v.flatten(2)).view(*weights.u.shape[:2], *v.shape[2:])
