"""Rounding of a tile's taps one after another, each taking up the error of those before it: noise shaping.

The output transform adds the taps of a tile, so the error that a rounding makes in one tap can be compensated in
another. With the error e of all T taps as a vector, the expected squared error of the output is e^T H e for a matrix H
that follows from the transforms alone. Write H = C^T D C with C unit lower triangular in the order of rounding:
rounding tap t to the grid point nearest to v_t - sum_{s<t} C_ts e_s makes every term of sum_t D_t (C e)_t^2 as small
as one step allows, sum_t D_t step_t^2 / 12 instead of sum_t H_tt step_t^2 / 12. For F(6,3) that is 7 to 12 dB.

References:
    Babai, "On Lovasz' lattice reduction and the nearest lattice point problem" (1986), the nearest-plane rule;
    Frantar et al., "GPTQ" (ICLR 2023), the same rule for the columns of a weight matrix with H from data. Differs from
    both: the vector is one Winograd tile, H needs no data, and the rule serves activations as well as weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tmpq_exp.quant.primitives import integer_range

RIDGE = 1e-6
"""Share of H's mean diagonal that is added to it: the output transform has a null space, where H is 0."""

BLOCK = 8
"""Taps whose errors reach each other one by one; the errors of earlier taps arrive by one GEMM a block."""


@dataclass(frozen=True)
class Feedback:
    """How the errors of earlier taps enter later ones.

    Args:
        order: Taps in the order of rounding.
        C: Unit lower triangular, (T, T), in that order.
        gain_db: How much smaller the output's error is than with plain rounding at equal steps.
    """

    order: tuple[int, ...]
    C: Tensor
    gain_db: float

    @property
    def macs_per_tile(self) -> int:
        """Multiplications a tile and channel that the feedback costs."""
        return len(self.order) * (len(self.order) - 1) // 2


def feedback(H: Tensor, dtype: torch.dtype = torch.float32) -> Feedback:
    """The order of rounding and the feedback that fit an error matrix.

    The order is found from its end: the last tap is the one whose error matters least, and before it always comes the
    tap that matters least given that those after it compensate.

    Args:
        H: Symmetric, positive semidefinite, (T, T).
        dtype: Of the feedback matrix.
    """
    H = H.detach().double()
    H = H + RIDGE * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
    order, left = [], H.clone()
    remaining = torch.ones(len(H), dtype=torch.bool, device=H.device)
    for _ in range(len(H)):
        tap = int(torch.where(remaining, left.diagonal(), math.inf).argmin())
        order.append(tap)
        remaining[tap] = False
        left = left - torch.outer(left[:, tap], left[tap]) / left[tap, tap]
    order.reverse()
    ordered = H[order][:, order]
    upper = torch.linalg.cholesky(ordered.flip(0, 1)).flip(0, 1)  # ordered = upper @ upper.T
    D = upper.diagonal().square()
    gain_db = 10 * math.log10(float(H.diagonal().sum() / D.sum()))
    return Feedback(tuple(order), (upper / upper.diagonal()).t().to(dtype).contiguous(), gain_db)


@torch.no_grad()
def shaped_round(x: Tensor, scale: Tensor, feedback: Feedback, bits: int) -> Tensor:
    """``integer * scale`` near ``x``, tap after tap with error feedback.

    Args:
        x: (T, ...); not changed.
        scale: Broadcastable to ``x``, above 0.
        feedback: Of T taps.
        bits: Symmetric integers of so many bits; what feedback pushes beyond the range is clamped, and the error of
            that is fed back too.
    """
    num_taps, largest = len(feedback.order), integer_range(bits, symmetric=True)[1]
    C = feedback.C.to(x)
    order = torch.tensor(feedback.order, device=x.device)
    values = x.index_select(0, order).view(num_taps, -1)
    errors = torch.empty_like(values)
    inner_shape = x.shape[1:]
    for start in range(0, num_taps, BLOCK):
        stop = min(start + BLOCK, num_taps)
        carried = C[start:stop, :start] @ errors[:start] if start else torch.zeros_like(values[start:stop])
        for t in range(start, stop):
            target = values[t] - carried[t - start]
            if t > start:
                target -= C[t, start:t] @ errors[start:t]
            step = scale[feedback.order[t] if scale.shape[0] > 1 else 0].expand(inner_shape)
            rounded = target.view(inner_shape).div_(step).round_().clamp_(-largest, largest).mul_(step).view(-1)
            torch.sub(rounded, values[t], out=errors[t])
            values[t] = rounded
    result = torch.empty_like(values).index_copy_(0, order, values)
    return result.view(x.shape)


def output_error(A_T: Tensor, A_T_right: Tensor) -> Tensor:
    """H of errors in M: the Gram matrix of the output transform over n*n taps, (T, T)."""
    left, right = (x.double().t() @ x.double() for x in (A_T, A_T_right))
    return torch.kron(left, right)


def tap_covariance(matrix: Tensor, matrix_right: Tensor, covariance: Tensor) -> Tensor:
    """Covariance of ``matrix @ d @ matrix_right.T`` over its n*n taps for d of this covariance, (T, T)."""
    both = torch.kron(matrix.double(), matrix_right.double())
    return both @ covariance.double() @ both.t()


def pixel_covariance(size: int, correlation: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Covariance of a size x size patch whose pixels correlate as ``correlation ** distance`` along each axis."""
    index = torch.arange(size, dtype=dtype)
    axis = torch.as_tensor(correlation, dtype=dtype) ** (index[:, None] - index).abs()
    return torch.kron(axis, axis)
