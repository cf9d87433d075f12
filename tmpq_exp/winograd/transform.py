"""Exact algebra of Winograd's F(m, r): points, transform matrices in rationals, diagonal scales and noise gain.

F(m, r) computes m outputs of an r-tap correlation with n = m + r - 1 products, ``y = A_T [(G g) * (B_T d)]``. With
points in homogeneous form ``(f_i, g_i)``, a finite x being ``(x, 1)`` and infinity ``(1, 0)``, and the generalised
Vandermonde matrices ``V_c[i, k] = f_i**k * g_i**(c-1-k)``,

    A_T = V_m^T S_A        G = S_G V_r        B_T = S_B V_n^(-T)        exact  <=>  S_A S_B S_G = I

for any diagonal S_B and S_G. PyTorch is imported only where a matrix becomes a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Point: TypeAlias = tuple[Fraction, Fraction]
"""A point of the projective line, ``(x, 1)`` or ``INFINITY``."""
Matrix: TypeAlias = tuple[tuple[Fraction, ...], ...]
"""Rows of exact rationals."""
PointsSpec: TypeAlias = str | Sequence[str | int | float | Fraction]
"""``"standard"``, ``"improved"``, or n rationals and ``"inf"``."""

INFINITY: Point = (Fraction(1), Fraction(0))
MIN_M, MAX_M = 2, 8
MIN_R, MAX_R = 2, 5

_STANDARD_ORDER = ("0", "1", "-1", "2", "-2", "1/2", "-1/2", "3", "-3", "1/3", "-1/3")

STANDARD_POINTS: Mapping[int, tuple[str, ...]] = {n: (*_STANDARD_ORDER[: n - 1], "inf") for n in range(3, 13)}
"""The usual points by n = m + r - 1, in the order of the published matrices; n = 4, 6, 8 are F(2,3), F(4,3), F(6,3)."""

IMPROVED_POINTS: Mapping[tuple[int, int], tuple[str, ...]] = {
    (2, 3): STANDARD_POINTS[4],
    (3, 3): ("2/5", "-2/5", "5/4", "-5/4", "inf"),
    (4, 3): ("0", "2/3", "-2/3", "3/2", "-3/2", "inf"),
    (5, 3): ("2/7", "-2/7", "5/6", "-5/6", "7/4", "-7/4", "inf"),
    (6, 3): STANDARD_POINTS[8],
}
"""Small rationals near the least noise gain, by (m, r). For F(2,3) and F(6,3) the standard points are the best."""


def parse_points(spec: PointsSpec, m: int, r: int = 3) -> tuple[Point, ...]:
    """Points of F(m, r) from a name or from a list.

    Args:
        spec: ``"standard"``, ``"improved"``, or a sequence of n = m + r - 1 distinct points, each a rational (``2``,
            ``"2/3"``, ``0.75``, a ``Fraction``) or ``"inf"``. Floats stand for their shortest decimal.
        m: Outputs of a tile, 2..8.
        r: Taps of the kernel, 2..5.

    Raises:
        ValueError: If m or r is out of range, the name is unknown, or points repeat, are too few or too many, or
            cannot be read.
    """
    check_range("m", m, MIN_M, MAX_M)
    check_range("r", r, MIN_R, MAX_R)
    num_points = m + r - 1
    if isinstance(spec, str):
        if spec == "improved" and (m, r) not in IMPROVED_POINTS:
            known = ", ".join(f"F({a},{b})" for a, b in IMPROVED_POINTS)
            raise ValueError(f"points='improved' is known for {known}, found F({m},{r}); name the points themselves")
        if spec not in ("standard", "improved"):
            raise ValueError(f"points must be 'standard', 'improved' or a list of {num_points} points, found {spec!r}")
        spec = STANDARD_POINTS[num_points] if spec == "standard" else IMPROVED_POINTS[m, r]
    points = tuple(_parse_point(value) for value in spec)
    if len(points) != num_points:
        raise ValueError(f"points must have m + r - 1 = {num_points} entries for F({m},{r}), found {len(points)}")
    repeated = [format_point(p) for i, p in enumerate(points) if p in points[:i]]
    if repeated:
        raise ValueError(f"points must all differ, found {repeated[0]} more than once")
    return points


def format_point(point: Point) -> str:
    """A point as text that ``parse_points`` reads, such as ``"-2/3"`` or ``"inf"``."""
    return "inf" if point == INFINITY else str(point[0])


def _parse_point(value: object) -> Point:
    try:
        if isinstance(value, str) and value.strip().lower() in ("inf", "infinity", "∞"):
            return INFINITY
        if isinstance(value, float) and math.isinf(value):
            return INFINITY
        if isinstance(value, bool) or not isinstance(value, str | int | float | Fraction):
            raise ValueError
        return Fraction(str(value) if isinstance(value, float) else value), Fraction(1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"points must be rationals such as 2, '2/3' or 0.75, or 'inf', found {value!r}") from None


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no integer in ``low..high``.

    Raises:
        ValueError: Naming the parameter.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer in {low}..{high}, found {value!r}")


@dataclass(frozen=True)
class Transform:
    """F(m, r) on its points, without scales: all that is exact and fixed.

    Args:
        m: Outputs of a tile in one dimension.
        r: Taps of the kernel.
        points: The n = m + r - 1 points.
        V_m: Vandermonde matrix of m columns, (n, m): A_T without S_A, transposed.
        V_r: Vandermonde matrix of r columns, (n, r): G without S_G.
        V_n_inv_T: Inverse transpose of the square Vandermonde matrix, (n, n): B_T without S_B.
    """

    m: int
    r: int
    points: tuple[Point, ...]
    V_m: Matrix
    V_r: Matrix
    V_n_inv_T: Matrix

    @property
    def n(self) -> int:
        """Taps of the transformed tile in one dimension, m + r - 1."""
        return self.m + self.r - 1

    @property
    def name(self) -> str:
        """``F(m,r)``."""
        return f"F({self.m},{self.r})"


def build_transform(m: int, r: int = 3, points: PointsSpec = "standard") -> Transform:
    """The unscaled transform of F(m, r); built once for equal points.

    Raises:
        ValueError: As ``parse_points``.
    """
    return _build(m, r, parse_points(points, m, r))


@lru_cache(maxsize=256)
def _build(m: int, r: int, points: tuple[Point, ...]) -> Transform:
    square = vandermonde(points, m + r - 1)
    return Transform(m, r, points, vandermonde(points, m), vandermonde(points, r), transpose(inverse(square)))


def vandermonde(points: Sequence[Point], num_columns: int) -> Matrix:
    """Generalised Vandermonde matrix, ``[i, k] = f_i**k * g_i**(num_columns-1-k)``."""
    return tuple(tuple(f**k * g ** (num_columns - 1 - k) for k in range(num_columns)) for f, g in points)


def transpose(matrix: Matrix) -> Matrix:
    """Rows and columns exchanged."""
    return tuple(zip(*matrix, strict=True))


def inverse(matrix: Matrix) -> Matrix:
    """Exact inverse of a square regular matrix by Gauss-Jordan elimination."""
    size = len(matrix)
    rows = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        pivot = next(i for i in range(column, size) if rows[i][column] != 0)
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [value / rows[column][column] for value in rows[column]]
        for i in range(size):
            factor = rows[i][column]
            if i != column and factor != 0:
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    return tuple(tuple(row[size:]) for row in rows)


def standard_scales_exact(transform: Transform) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]]:
    """Diagonals ``(S_B, S_G)`` of the published matrices: S_B = f, S_G = 1/f, hence S_A = I.

    ``f_i`` is the product of ``a_i - a_k`` over the other finite points, and 1 at infinity: fractions end up in G.
    """
    finite = [f for f, g in transform.points if g != 0]
    s_b = tuple(
        math.prod((x - other for other in finite if other != x), start=Fraction(1)) if g != 0 else Fraction(1)
        for x, g in transform.points
    )
    return s_b, tuple(1 / value for value in s_b)


def exact_matrices(
    transform: Transform, s_b: Sequence[Fraction], s_g: Sequence[Fraction]
) -> tuple[Matrix, Matrix, Matrix]:
    """``(A_T, G, B_T)``, (m, n), (n, r) and (n, n), with the diagonals applied and S_A = (S_B S_G)^(-1)."""
    s_a = [1 / (b * g) for b, g in zip(s_b, s_g, strict=True)]
    A_T = transpose(_scale_rows(transform.V_m, s_a))
    return A_T, _scale_rows(transform.V_r, s_g), _scale_rows(transform.V_n_inv_T, s_b)


def _scale_rows(matrix: Matrix, scales: Sequence[Fraction]) -> Matrix:
    return tuple(tuple(scale * value for value in row) for row, scale in zip(matrix, scales, strict=True))


def to_tensor(matrix: Matrix) -> Tensor:
    """The matrix as a float64 tensor, each entry rounded once."""
    import torch

    return torch.tensor([[float(value) for value in row] for row in matrix], dtype=torch.float64)


@dataclass(frozen=True)
class WinogradScales:
    """Diagonals of S_B and S_G, n entries each; S_A follows from them.

    A tile is transformed from the left, along its rows' index, and from the right, along its columns' index; the
    diagonals of the right side are those of the left unless they are given.

    Args:
        s_b: Scale of each row of B_T; finite and not 0, of either sign.
        s_g: Scale of each row of G; likewise.
        columns: ``(s_b, s_g)`` of the transforms from the right; None where both sides share them.

    Raises:
        ValueError: If lengths differ or an entry is 0 or not finite.
    """

    s_b: tuple[float, ...]
    s_g: tuple[float, ...]
    columns: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __post_init__(self) -> None:
        named = [("s_b", self.s_b), ("s_g", self.s_g)]
        named += zip(("columns s_b", "columns s_g"), self.columns or (), strict=False)
        for name, values in named:
            if len(values) != len(self.s_b):
                raise ValueError(f"s_b and {name} must have equal length, found {len(self.s_b)} and {len(values)}")
            if any(value == 0 or not math.isfinite(value) for value in values):
                raise ValueError(f"{name} must hold finite numbers other than 0, found {list(values)}")

    @property
    def s_a(self) -> tuple[float, ...]:
        """Diagonal of S_A = (S_B S_G)^(-1), from the left."""
        return tuple(1 / (b * g) for b, g in zip(self.s_b, self.s_g, strict=True))

    def right(self) -> WinogradScales:
        """The scales of the transforms from the right, as if they were those of both sides."""
        return self if self.columns is None else WinogradScales(*self.columns)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, ready for ``json.dumps``; reading them back gives equal floats."""
        data: dict[str, Any] = {"s_b": list(self.s_b), "s_g": list(self.s_g)}
        return data if self.columns is None else {**data, "columns": [list(values) for values in self.columns]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WinogradScales:
        """Inverse of ``to_json``.

        Raises:
            ValueError: If a key is missing or an entry is not a number.
        """
        try:
            s_b, s_g = (tuple(float(v) for v in data[key]) for key in ("s_b", "s_g"))
            columns = data.get("columns")
            if columns is None:
                return cls(s_b, s_g)
            right_b, right_g = (tuple(float(v) for v in values) for values in columns)
            return cls(s_b, s_g, (right_b, right_g))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not Winograd scales: {error!r} while reading them") from error


def standard_scales(transform: Transform) -> WinogradScales:
    """``standard_scales_exact`` in floats."""
    s_b, s_g = standard_scales_exact(transform)
    return WinogradScales(tuple(float(v) for v in s_b), tuple(float(v) for v in s_g))


def closed_form_scales(transform: Transform) -> WinogradScales:
    """Unit rows: ``S_B = 1/|row of V_n^(-T)|``, ``S_G = 1/|row of V_r|``.

    White input and white weights then give every tap of the Hadamard product the same variance, so that a scale
    shared by all taps wastes no integers. Differs from the paper, which has learned scales only.
    """
    return WinogradScales(
        tuple(1 / norm for norm in _row_norms(transform.V_n_inv_T)),
        tuple(1 / norm for norm in _row_norms(transform.V_r)),
    )


def _row_norms(matrix: Matrix) -> list[float]:
    return [math.sqrt(sum(value * value for value in row)) for row in matrix]


def tap_std(transform: Transform, scales: WinogradScales) -> tuple[float, ...]:
    """Standard deviation of the Hadamard product at each of the n taps for white input and weights, one dimension."""
    norms = zip(_row_norms(transform.V_n_inv_T), _row_norms(transform.V_r), scales.s_b, scales.s_g, strict=True)
    return tuple(b * g * abs(s_b * s_g) for b, g, s_b, s_g in norms)


def range_map(transform: Transform, scales: WinogradScales) -> tuple[tuple[float, ...], ...]:
    """Standard deviation of the Hadamard product M at each of the n x n taps for white input and weights.

    The outer product of ``tap_std`` from the left and from the right: rank 1. Standard scales show a cross, rows and
    columns of taps far larger or smaller than the others; closed-form scales are flat, 1 everywhere.
    """
    columns = tap_std(transform, scales.right())
    return tuple(tuple(row * column for column in columns) for row in tap_std(transform, scales))


def num_tiles(height: int, width: int, m: int) -> int:
    """Output tiles of m x m pixels, those that the border cuts included."""
    return -(-height // m) * -(-width // m)


def multiplications_ratio(height: int, width: int, m: int, r: int = 3) -> float:
    """Multiplications of the direct convolution over those of F(m, r)'s Hadamard stage, above 1 where it saves.

    Tiles that the border cuts count whole: F(6,3) saves 5.06 on 6 x 6 pixels and 2.25 on 8 x 8. Transforms are not
    in it; ``cost`` has them in BitOPs.

    Args:
        height, width: Output pixels, at least 1.
        m: Outputs of a tile in one dimension.
        r: Taps of the kernel.
    """
    return height * width * r**2 / (num_tiles(height, width, m) * (m + r - 1) ** 2)


def noise_gain(transform: Transform) -> float:
    """Noise gain ``kappa = sum_i |a_i|^2 |b_i|^2 |g_i|^2 / (m r)`` of the rows of V_m, V_n^(-T) and V_r.

    White noise of equal relative power on every tap is amplified by kappa in one dimension and kappa**2 in two
    (20 log10 kappa dB). It depends on the points alone: the scales cancel.
    """
    norms = zip(*(_row_norms(v) for v in (transform.V_m, transform.V_n_inv_T, transform.V_r)), strict=True)
    return sum(((a * b * g) ** 2 for a, b, g in norms), start=0.0) / (transform.m * transform.r)


def ineligible_reason(
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    r: int = 3,
) -> str | None:
    """Why a convolution cannot run as F(m, r), or None where it can: r x r, stride 1, dilation 1, groups 1.

    The first reason that applies, such as ``"stride 2x2, needs 1x1"``.
    """
    for name, value, needed in (("kernel", kernel_size, r), ("stride", stride, 1), ("dilation", dilation, 1)):
        height, width = (value, value) if isinstance(value, int) else value
        if (height, width) != (needed, needed):
            return f"{name} {height}x{width}, needs {needed}x{needed}"
    return None if groups == 1 else f"groups {groups}, needs 1"
