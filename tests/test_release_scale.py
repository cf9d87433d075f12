"""The release's scale equals hand counts of what that code counts, and never touches the exact one."""

from __future__ import annotations

from tmpq_exp.cost import AttentionShape, ConvShape, LinearShape
from tmpq_exp.quant.allocation import DIRECT_TILE
from tmpq_exp.release_scale import release_bitops, release_macs


def test_layers_with_weights_count_two_images() -> None:
    conv = ConvShape("conv", 4, 6, (3, 3), (2, 2), (1, 1), (1, 1), 2, 5, 7)
    assert release_macs(conv) == 2 * (5 * 7 * 6 * 2 * 9)
    assert release_bitops(conv, 6, 5) == 2 * (5 * 7 * 6 * 2 * 9) * 30
    linear = LinearShape("transformer_blocks.0.ff.net.2", 3, 5, positions=7)
    assert release_macs(linear) == 2 * 3 * 5 * 7


def test_attention_over_pixels_counts_one_image_and_is_exact() -> None:
    layer = AttentionShape("input_blocks.4.1.products", heads=2, queries=9, keys=9, head_dim=4)
    assert release_macs(layer) == 2 * 9 * 9 * 8 == layer.macs
    assert release_bitops(layer, 8, 6) == 9 * 9 * 8 * (6 * 6 + 8 * 6) == layer.bitops(8, 6, DIRECT_TILE)


def test_attention_of_a_transformer_counts_n_c_squared() -> None:
    of_self = AttentionShape("1.transformer_blocks.0.attn1.products", heads=2, queries=9, keys=9, head_dim=4)
    crossed = AttentionShape("1.transformer_blocks.0.attn2.products", heads=2, queries=9, keys=5, head_dim=4)
    for layer in (of_self, crossed):
        assert release_macs(layer) == 2 * 9 * 8**2
        assert release_bitops(layer, 8, 6) == 9 * 8**2 * (6 * 6 + 8 * 6)
