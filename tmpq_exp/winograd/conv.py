"""The staged, simulated quantized Winograd convolution: input, weight, Hadamard and output stage, each a switch.

Shapes: B images, C input and K output channels, H x W pixels, P = B * tiles_h * tiles_w tiles, n = m + r - 1.
The transformed tensors are laid out for one batched GEMM over the n*n taps: U (n*n, K, C), V (n*n, C, P),
M (n*n, K, P). Quantized tensors hold ``integer * scale`` in float, so the GEMM equals the sum over groups of the
int32 products times their scales up to float rounding.

References:
    Pan et al., "Data-Free Group-Wise Fully Quantized Winograd Convolution via Learnable Scales", CVPR 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tmpq_exp.quant.allocation import FLOAT_BITS
from tmpq_exp.quant.primitives import fake_quantize_groups, integer_range
from tmpq_exp.winograd.transform import (
    PointsSpec,
    Transform,
    WinogradScales,
    build_transform,
    closed_form_scales,
    parse_points,
    to_tensor,
)

FLOAT_STAGES = {"quantize_input": False, "quantize_v": False, "quantize_u": False, "quantize_m": False}
"""Keyword arguments of ``WinogradSpec`` that switch every stage off: Winograd in float."""

CHUNK_ELEMENTS = 2**20
"""Elements of a transformed tensor that a CPU works on at once, as whole images: about what its caches hold.

Measured at C = 64..256, 32 x 32, batch 16 on two cores: F(2,3) takes half the time of the whole batch at once, F(4,3)
two thirds, and 2**19 to 2**21 differ by less than 10 %.
"""


@dataclass(frozen=True)
class WinogradSpec:
    """Which F(m, r) is used, and what of it is quantized.

    Args:
        m: Outputs of a tile in one dimension, 2..8.
        r: Kernel size, 2..5.
        points: ``"standard"``, ``"improved"`` or n points, as ``parse_points`` reads them.
        group_size: Elements that share a scale, at least 1; a short last group is legal.
        quantize_input: Quantize x to ``act_bits``.
        quantize_v: Quantize the transformed input V to ``act_bits``.
        quantize_u: Quantize the transformed weights U to ``weight_bits``.
        quantize_m: Quantize the Hadamard product M to ``m_bits`` before the output transform.
        m_bits: 2..16, or ``FLOAT_BITS``.

    Raises:
        ValueError: If a value is out of its range.
    """

    m: int
    r: int = 3
    points: PointsSpec = "standard"
    group_size: int = 32
    quantize_input: bool = True
    quantize_v: bool = True
    quantize_u: bool = True
    quantize_m: bool = True
    m_bits: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.points, str):
            object.__setattr__(self, "points", tuple(self.points))
        parse_points(self.points, self.m, self.r)
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"group_size must be an integer of at least 1, found {self.group_size!r}")
        _check_bits("m_bits", self.m_bits)

    @property
    def n(self) -> int:
        """Taps of a tile in one dimension, m + r - 1."""
        return self.m + self.r - 1

    @property
    def m_group_channels(self) -> int:
        """Output channels that share a scale of M, together with all n*n taps of their tile."""
        return max(1, self.group_size // self.n**2)

    def transform(self) -> Transform:
        """The exact transform of this spec."""
        return build_transform(self.m, self.r, self.points)


def _check_bits(name: str, bits: int) -> None:
    if bits != FLOAT_BITS:
        try:
            integer_range(bits, symmetric=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}, or {FLOAT_BITS} for float") from None


@dataclass(frozen=True)
class WinogradMatrices:
    """Transform matrices with their scales applied, as tensors of one dtype and device.

    Args:
        A_T: Output transform, (m, n).
        G: Weight transform, (n, r).
        B_T: Input transform, (n, n).
    """

    A_T: Tensor
    G: Tensor
    B_T: Tensor

    @classmethod
    def from_scales(
        cls, transform: Transform, scales: WinogradScales | None = None, dtype: torch.dtype = torch.float32
    ) -> WinogradMatrices:
        """Matrices for fixed scales, rounded once from float64; closed-form scales where none are given.

        Raises:
            ValueError: If the scales belong to another n.
        """
        scales = closed_form_scales(transform) if scales is None else scales
        if len(scales.s_b) != transform.n:
            raise ValueError(f"scales must have {transform.n} entries for {transform.name}, found {len(scales.s_b)}")
        s_b, s_g = (torch.tensor(s, dtype=torch.float64) for s in (scales.s_b, scales.s_g))
        return cls.from_tensors(transform, s_b, s_g).to(dtype=dtype)

    @classmethod
    def from_tensors(cls, transform: Transform, s_b: Tensor, s_g: Tensor) -> WinogradMatrices:
        """Matrices of the dtype and device of the diagonals ``s_b`` and ``s_g``, (n,), differentiable in both."""
        V_m, V_r, V_n_inv_T = (to_tensor(v).to(s_b) for v in (transform.V_m, transform.V_r, transform.V_n_inv_T))
        return cls((V_m / (s_b * s_g)[:, None]).t(), V_r * s_g[:, None], V_n_inv_T * s_b[:, None])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> WinogradMatrices:
        """A copy on another device or of another dtype."""
        return WinogradMatrices(*(x.to(device=device, dtype=dtype) for x in (self.A_T, self.G, self.B_T)))


def transform_weights(weight: Tensor, matrices: WinogradMatrices, spec: WinogradSpec, weight_bits: int) -> Tensor:
    """Weight stage, done once: U = G w G^T, quantized per tap and output channel in groups along C.

    Args:
        weight: Float weights, (K, C, r, r).
        matrices: Of the spec's transform.
        spec: Only ``group_size`` and ``quantize_u`` matter here.
        weight_bits: 2..16, or ``FLOAT_BITS`` for no quantization.

    Returns:
        U, quantized and dequantized, (n*n, K, C).

    Raises:
        ValueError: If ``weight`` is not (K, C, r, r) or ``weight_bits`` out of range.
    """
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (spec.r, spec.r):
        raise ValueError(f"weight must have shape (K, C, {spec.r}, {spec.r}), found {tuple(weight.shape)}")
    _check_bits("weight_bits", weight_bits)
    num_out, num_in = weight.shape[:2]
    taps = weight.permute(2, 3, 0, 1).reshape(spec.r**2, num_out * num_in)
    u = _transform_2d(matrices.G, taps).view(spec.n**2, num_out, num_in)
    if not spec.quantize_u or weight_bits == FLOAT_BITS:
        return u
    return fake_quantize_groups(u, 2, spec.group_size, (), weight_bits)


def winograd_conv2d(
    x: Tensor,
    u: Tensor,
    bias: Tensor | None,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    act_bits: int,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """Convolution of stride 1 through F(m, r), with every stage that ``spec`` switches on quantized.

    All activation scales are dynamic and symmetric. x: one scale per image and group of channels. V: per tap and
    tile, groups along C. M: one scale over the n*n taps of a tile and ``spec.m_group_channels`` channels. Where no
    gradient is needed the stages work in place on their own buffers and, on a CPU, on a few images at a time, so
    that little more than input and output is held; otherwise up to 2 (n/m)**2 + 1 times the larger of the two.

    Args:
        x: Input, (B, C, H, W), any memory format.
        u: ``transform_weights``'s result, (n*n, K, C).
        bias: (K,), added in float, or None.
        matrices: Those of ``u``, in the dtype of ``x``.
        spec: The stages.
        act_bits: Bits of x and V, 2..16, or ``FLOAT_BITS`` for no quantization of either.
        padding: Zeros on every side of H and W.

    Returns:
        (B, K, H + 2 padding - r + 1, W + 2 padding - r + 1), contiguous.

    Raises:
        ValueError: If shapes do not fit, the padded input is smaller than the kernel, or ``act_bits`` is out of range.

    References:
        Pan et al., CVPR 2025, section 3. Differs from the paper, which leaves the layout of groups open: x has
        groups within one image, so that the integer input transform has one scale for all pixels it adds, and M's
        groups span all taps, because the output transform adds taps.
    """
    size = _output_size(x, u, spec, padding)
    _check_bits("act_bits", act_bits)
    tiles = (-(-size[0] // spec.m), -(-size[1] // spec.m))
    per_image = spec.n**2 * tiles[0] * tiles[1] * max(u.shape[1:])
    needs_grad = _needs_grad(x, u, bias, matrices)
    whole = needs_grad or x.device.type != "cpu"
    chunk = x.shape[0] if whole else max(1, CHUNK_ELEMENTS // per_image)
    out = [_convolve(images, u, matrices, spec, act_bits, padding, tiles) for images in torch.split(x, chunk)]
    y = (out[0] if len(out) == 1 else torch.cat(out))[:, :, : size[0], : size[1]].contiguous()
    if bias is None:
        return y
    return y + bias[:, None, None] if needs_grad else y.add_(bias[:, None, None])


def _needs_grad(x: Tensor, u: Tensor, bias: Tensor | None, matrices: WinogradMatrices) -> bool:
    tensors = (x, u, bias, matrices.A_T, matrices.B_T)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _convolve(
    x: Tensor,
    u: Tensor,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    act_bits: int,
    padding: int | tuple[int, int],
    tiles: tuple[int, int],
) -> Tensor:
    """All stages for a few images, without bias; the output has whole tiles."""
    v = _input_stage(x, matrices, spec, act_bits, padding, tiles)
    hadamard = torch.bmm(u, v)
    del v
    if spec.quantize_m and spec.m_bits != FLOAT_BITS:
        hadamard = fake_quantize_groups(hadamard, 1, spec.m_group_channels, (0,), spec.m_bits)
    y = _transform_2d(matrices.A_T, hadamard).view(spec.m, spec.m, u.shape[1], x.shape[0], *tiles)
    del hadamard
    return y.permute(3, 2, 4, 0, 5, 1).reshape(x.shape[0], u.shape[1], tiles[0] * spec.m, tiles[1] * spec.m)


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


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _input_stage(
    x: Tensor,
    matrices: WinogradMatrices,
    spec: WinogradSpec,
    act_bits: int,
    padding: int | tuple[int, int],
    tiles: tuple[int, int],
) -> Tensor:
    """x -> V, (n*n, C, P): pad, quantize, cut into overlapping tiles, transform, quantize."""
    pad_h, pad_w = _pair(padding)
    bottom, right = (
        tile * spec.m + spec.r - 1 - size - pad
        for tile, size, pad in zip(tiles, x.shape[2:], (pad_h, pad_w), strict=True)
    )
    padded = F.pad(x.contiguous(), (pad_w, right, pad_h, bottom))  # always a copy, so it may be changed in place
    if spec.quantize_input and act_bits != FLOAT_BITS:
        padded = fake_quantize_groups(padded, 1, spec.group_size, (2, 3), act_bits)
    windows = padded.unfold(2, spec.n, spec.m).unfold(3, spec.n, spec.m)
    columns = windows.permute(4, 5, 1, 0, 2, 3).reshape(spec.n**2, -1)
    del padded, windows
    v = _transform_2d(matrices.B_T, columns).view(spec.n**2, x.shape[1], -1)
    del columns
    if spec.quantize_v and act_bits != FLOAT_BITS:
        v = fake_quantize_groups(v, 1, spec.group_size, (), act_bits)
    return v


def _transform_2d(matrix: Tensor, tiles: Tensor) -> Tensor:
    """``matrix @ tile @ matrix.T`` of every tile: (columns**2, ...) to (rows, rows, everything else) as two GEMMs."""
    rows, columns = matrix.shape
    half = (matrix @ tiles.reshape(columns, -1)).view(rows, columns, -1)
    return torch.bmm(matrix.expand(rows, rows, columns), half)
