"""The BitOPs that the TMPQ-DM authors' published code counts, for comparing with figures on that scale only.

That code probes the network once with a batch of two images. Convolutions and linear layers count the whole batch, the
products of attention one image. In a transformer block the two axes of an image's tokens are mistaken for each other,
so that each product, of self-attention and of cross-attention alike, counts n C^2 for n query tokens of C channels.
The number of steps, and the second call of guidance, count nothing.
"""

from __future__ import annotations

from tmpq_exp.cost import AttentionShape, LayerShape
from tmpq_exp.quant.allocation import DIRECT_TILE

PROBE_BATCH = 2

TRANSFORMER_MARK = "transformer_blocks"
"""Part of the path of every layer in a transformer block, in the original code as in diffusers."""


def release_macs(shape: LayerShape) -> int:
    """MACs that the release counts for a layer."""
    if not isinstance(shape, AttentionShape):
        return PROBE_BATCH * shape.macs
    channels = shape.heads * shape.head_dim
    if TRANSFORMER_MARK in shape.name.split("."):
        return 2 * shape.queries * channels**2
    return 2 * shape.queries**2 * channels


def release_bitops(shape: LayerShape, weight_bits: int, act_bits: int) -> int:
    """BitOPs that the release counts for a layer; of attention, ``weight_bits`` are those of the softmax."""
    macs = release_macs(shape)
    if isinstance(shape, AttentionShape):
        return macs // 2 * act_bits * (act_bits + weight_bits)
    return shape.bitops(weight_bits, act_bits, DIRECT_TILE) * PROBE_BATCH
