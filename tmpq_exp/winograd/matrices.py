"""Transform matrices as tensors: scales applied, from the left and the right, in float or rounded to integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tmpq_exp.winograd.transform import Transform, WinogradScales, closed_form_scales, to_tensor


@dataclass(frozen=True)
class WinogradMatrices:
    """Transform matrices with their scales applied, as tensors of one dtype and device.

    Args:
        A_T: Output transform, (m, n).
        G: Weight transform, (n, r).
        B_T: Input transform, (n, n).
        right: The three that act from the right, where their scales are others; None where both sides share them.
    """

    A_T: Tensor
    G: Tensor
    B_T: Tensor
    right: WinogradMatrices | None = None

    @classmethod
    def from_scales(
        cls,
        transform: Transform,
        scales: WinogradScales | None = None,
        dtype: torch.dtype = torch.float32,
        transform_bits: int | None = None,
    ) -> WinogradMatrices:
        """Matrices for fixed scales, rounded once from float64; closed-form scales where none are given.

        Args:
            transform: The exact transform.
            scales: Diagonals of S_B and S_G.
            dtype: Of the result.
            transform_bits: Integer matrices of so many bits, see ``with_integers``; None leaves them float.

        Raises:
            ValueError: If the scales belong to another n.
        """
        scales = closed_form_scales(transform) if scales is None else scales
        if len(scales.s_b) != transform.n:
            raise ValueError(f"scales must have {transform.n} entries for {transform.name}, found {len(scales.s_b)}")
        sides = [
            cls.from_tensors(transform, *(torch.tensor(s, dtype=torch.float64) for s in (side.s_b, side.s_g)))
            for side in ((scales,) if scales.columns is None else (scales, scales.right()))
        ]
        matrices = sides[0] if len(sides) == 1 else replace(sides[0], right=sides[1])
        if transform_bits is not None:
            matrices = matrices.with_integers(transform, transform_bits)
        return matrices.to(dtype=dtype)

    @classmethod
    def from_tensors(cls, transform: Transform, s_b: Tensor, s_g: Tensor) -> WinogradMatrices:
        """Matrices of the dtype and device of the diagonals ``s_b`` and ``s_g``, (n,), differentiable in both."""
        V_m, V_r, V_n_inv_T = (to_tensor(v).to(s_b) for v in (transform.V_m, transform.V_r, transform.V_n_inv_T))
        return cls((V_m / (s_b * s_g)[:, None]).t(), V_r * s_g[:, None], V_n_inv_T * s_b[:, None])

    def with_integers(self, transform: Transform, bits: int) -> WinogradMatrices:
        """A_T and B_T as integers of ``bits`` bits times one scale a row, and the G that then errs least.

        An integer transform adds along a row, so a scale a row is what an integer kernel can have. Rows whose ratios
        are small integers stay exact. G acts on float weights before the network runs and needs no integers: it is
        the least-squares solution for the A_T and B_T that were rounded, and G itself where both are exact.

        The gradient passes straight through the rounding.
        """
        with torch.no_grad():
            A_T, B_T = (integers * scale for integers, scale in (integer_rows(x, bits) for x in (self.A_T, self.B_T)))
            G = _best_weight_transform(A_T, B_T, transform.r)
        right = None if self.right is None else self.right.with_integers(transform, bits)
        A_T, G, B_T = (x + (y - x).detach() for x, y in ((self.A_T, A_T), (self.G, G), (self.B_T, B_T)))
        return WinogradMatrices(A_T, G, B_T, right)

    @property
    def right_side(self) -> WinogradMatrices:
        """The matrices that act from the right."""
        return self if self.right is None else self.right

    @property
    def requires_grad(self) -> bool:
        """Whether any of them needs a gradient."""
        own = self.A_T.requires_grad or self.B_T.requires_grad or self.G.requires_grad
        return own or (self.right is not None and self.right.requires_grad)

    def map(self, fn: Callable[[Tensor], Tensor]) -> WinogradMatrices:
        """A copy with ``fn`` applied to every matrix."""
        right = None if self.right is None else self.right.map(fn)
        return WinogradMatrices(fn(self.A_T), fn(self.G), fn(self.B_T), right)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> WinogradMatrices:
        """A copy on another device or of another dtype."""
        return self.map(lambda x: x.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class NetworkMatrices:
    """Matrices of a network's layers: one for all of them, and those of layers with scales of their own.

    Args:
        shared: Of every layer that is not named.
        layers: By name of the layer.
    """

    shared: WinogradMatrices
    layers: Mapping[str, WinogradMatrices] = field(default_factory=dict)

    def of(self, name: str) -> WinogradMatrices:
        """The matrices of a layer."""
        return self.layers.get(name, self.shared)

    def map(self, fn: Callable[[Tensor], Tensor]) -> NetworkMatrices:
        """A copy with ``fn`` applied to every matrix."""
        return NetworkMatrices(self.shared.map(fn), {name: x.map(fn) for name, x in self.layers.items()})


def integer_rows(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and one scale a row whose product is nearest to the matrix.

    Every scale that puts the row's largest entry on an integer of the upper half of the range is tried; where the
    entries are proportional to integers of up to ``bits`` bits, one of them is exact.

    Args:
        matrix: (rows, columns), float.
        bits: 2..16, symmetric range.

    Returns:
        ``(integers, scale)``, (rows, columns) in the matrix's float type and (rows, 1).
    """
    largest = 2 ** (bits - 1) - 1
    tops = torch.arange(largest, largest // 2, -1, dtype=matrix.dtype, device=matrix.device)
    scales = matrix.abs().amax(dim=1)[:, None] / tops  # (rows, tried)
    scales = torch.where(scales > 0, scales, 1)
    errors = ((matrix[:, None] / scales[..., None]).round() * scales[..., None] - matrix[:, None]).square().sum(-1)
    scale = scales.gather(1, errors.argmin(dim=1, keepdim=True))
    return (matrix / scale).round(), scale


def transform_2d(left: Tensor, tiles: Tensor, right: Tensor | None = None) -> Tensor:
    """``left @ tile @ right.T`` of every tile as two GEMMs; ``right`` is ``left`` where it is not given.

    Args:
        left, right: (rows, columns).
        tiles: (columns**2, ...).

    Returns:
        (rows, rows, everything else).
    """
    rows, columns = left.shape
    half = (left @ tiles.reshape(columns, -1)).view(rows, columns, -1)
    return torch.bmm((left if right is None else right).expand(rows, rows, columns), half)


def _best_weight_transform(A_T: Tensor, B_T: Tensor, r: int) -> Tensor:
    """G of least squared error of ``sum_i A_T[j, i] B_T[i, l] G[i, k] = [l = j + k]``, (n, r)."""
    m, n = A_T.shape
    products = torch.einsum("ji,il->jli", A_T, B_T).reshape(m * n, n)
    j, k = torch.meshgrid(torch.arange(m), torch.arange(r), indexing="ij")
    wanted = torch.zeros(m, n, r, dtype=A_T.dtype, device=A_T.device)
    wanted[j, j + k, k] = 1
    G: Tensor = torch.linalg.lstsq(products, wanted.reshape(m * n, r)).solution
    return G
