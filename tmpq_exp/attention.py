"""Owns the two products of attention as a module, so that whoever reads or replaces layers finds them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class AttentionProducts(nn.Module):
    """softmax(q k^T / sqrt(d)) v, without weights.

    An attention module that calls it under the name ``products``, defined behind its projections, is laid out as
    ``tmpq_exp.trace`` lays out diffusers' own attention.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attended values.

        Args:
            q: ``(N, heads, queries, d)``.
            k: ``(N, heads, keys, d)``.
            v: ``(N, heads, keys, d_v)``.

        Returns:
            ``(N, heads, queries, d_v)``.
        """
        return F.scaled_dot_product_attention(q, k, v)
