"""The original U-Net has the published parameters, computes attention as PyTorch does, and costs what hands count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tmpq_exp.cost import AttentionShape, ConvShape, LayerShape, LinearShape
from tmpq_exp.trace import trace_layers
from tmpq_exp.zoo.compvis import (
    AttentionBlock,
    CompVisUNet,
    CrossAttention,
    GatedFeedForward,
    SpatialTransformer,
    timestep_embedding,
)
from tmpq_exp.zoo.task import unet_layers

SMALL: dict[str, Any] = {"in_channels": 2, "channels": 32, "multipliers": [1, 2], "attention_at": [2]}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, int] | None]] = {
    "attention blocks": ({"num_heads": 2}, None),
    "head channels, scale and shift, residual resampling": (
        {"head_channels": 16, "scale_shift_norm": True, "residual_resampling": True},
        None,
    ),
    "spatial transformers": ({"num_heads": 4, "context_channels": 12}, (5, 12)),
}


def seeded(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shapes(module: nn.Module, *inputs: Tensor) -> dict[str, LayerShape]:
    return {layer.name: layer for layer in trace_layers(module, lambda m: m(*inputs))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_macs_are_half_of_the_flops_that_pytorch_counts(variant: str) -> None:
    settings, context_shape = VARIANTS[variant]
    with torch.device("meta"):
        unet = CompVisUNet(**SMALL, **settings)
        context = {} if context_shape is None else {"encoder_hidden_states": torch.zeros(1, *context_shape)}
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, 2, 8, 8), torch.zeros(1), **context)
    layers = unet_layers(unet, (2, 8, 8), context)
    assert 2 * sum(layer.macs for layer in layers) == counter.get_total_flops()
    weights = {name: value.numel() for name, value in unet.named_parameters()}
    weighted = [layer for layer in layers if not isinstance(layer, AttentionShape)]
    assert all(layer.num_weights == weights[f"{layer.name}.weight"] for layer in weighted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_does_not_depend_on_its_batch_and_noise_has_the_shape_of_the_state(variant: str) -> None:
    settings, context_shape = VARIANTS[variant]
    torch.manual_seed(0)
    unet = CompVisUNet(**SMALL, **settings).eval()
    x, timestep = seeded((3, 2, 8, 4)), torch.tensor([0, 500, 999])
    context = None if context_shape is None else seeded((3, *context_shape), 1)
    with torch.no_grad():
        noise = unet(x, timestep, context)
        alone = unet(x[1:2], timestep[1:2], None if context is None else context[1:2])
    assert noise.shape == x.shape
    torch.testing.assert_close(noise[1:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unet(x, timestep.flip(0), context), noise, atol=1e-3)


def test_attention_block_attends_to_pixels() -> None:
    torch.manual_seed(0)
    block, x = AttentionBlock(64, num_heads=2).eval(), seeded((2, 64, 3, 5))
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    reference = nn.MultiheadAttention(64, 2, batch_first=True).eval()
    reference.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight.flatten(1),
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.proj_out.weight.flatten(1),
            "out_proj.bias": block.proj_out.bias,
        }
    )
    with torch.no_grad():
        expected = x + reference(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_cross_attention_attends_to_its_context() -> None:
    torch.manual_seed(0)
    attention, tokens, context = CrossAttention(16, 6, num_heads=4), seeded((2, 7, 16)), seeded((2, 3, 6), 1)
    with torch.no_grad():
        heads = []
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            q, k, v = attention.to_q(tokens), attention.to_k(context), attention.to_v(context)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 2  # square root of 4 channels
            heads.append(scores.softmax(dim=-1) @ v[..., part])
        expected = attention.to_out(torch.cat(heads, dim=-1))
        torch.testing.assert_close(attention(tokens, context), expected, rtol=1e-4, atol=1e-5)


def test_gated_feed_forward_gates_by_its_second_half() -> None:
    torch.manual_seed(0)
    layer, tokens = GatedFeedForward(4), seeded((1, 2, 4))
    with torch.no_grad():
        both = layer.proj(tokens)
        torch.testing.assert_close(layer(tokens), layer.out(both[..., :16] * F.gelu(both[..., 16:])))


def test_cross_attention_by_hand() -> None:
    found = shapes(CrossAttention(16, 6, num_heads=4), torch.zeros(1, 7, 16), torch.zeros(1, 3, 6))
    assert found["to_q"] == LinearShape("to_q", 16, 16, positions=7)
    assert found["to_k"] == LinearShape("to_k", 6, 16, positions=3)
    assert found["products"] == AttentionShape("products", heads=4, queries=7, keys=3, head_dim=4)
    macs = {name: layer.macs for name, layer in found.items()}
    assert macs == {
        "to_q": 7 * 16 * 16,
        "to_k": 3 * 6 * 16,
        "to_v": 3 * 6 * 16,
        "to_out": 7 * 16 * 16,
        "products": 4 * 7 * 3 * 4 * 2,
    }


def test_self_attention_over_pixels_by_hand() -> None:
    found = shapes(AttentionBlock(64, num_heads=2), torch.zeros(1, 64, 3, 5))
    assert {name: layer.macs for name, layer in found.items()} == {
        "qkv": 15 * 64 * 192,
        "proj_out": 15 * 64 * 64,
        "products": 2 * 15 * 15 * 32 * 2,
    }
    assert found["qkv"] == ConvShape("qkv", 64, 192, (1, 1), (1, 1), (0, 0), (1, 1), 1, 3, 5)


def test_geglu_by_hand() -> None:
    found = shapes(GatedFeedForward(4), torch.zeros(1, 9, 4))
    assert {name: layer.macs for name, layer in found.items()} == {"proj": 9 * 4 * 32, "out": 9 * 16 * 4}


def test_products_stand_behind_the_projections_of_their_attention() -> None:
    names = list(shapes(SpatialTransformer(32, 12, num_heads=4), torch.zeros(1, 32, 2, 2), torch.zeros(1, 5, 12)))
    block = "transformer_blocks.0"
    attentions = [f"{block}.attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out", "products")]
    assert names == ["proj_in", *attentions, f"{block}.ff.proj", f"{block}.ff.out", "proj_out"]


def test_timestep_embedding_is_one_rotation_a_frequency() -> None:
    embedding = timestep_embedding(torch.tensor([0, 1, 70]), 8)
    assert embedding[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert embedding[1, [0, 4]].tolist() == pytest.approx([math.cos(1), math.sin(1)])
    torch.testing.assert_close(embedding[:, :4] ** 2 + embedding[:, 4:] ** 2, torch.ones(3, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give num_heads or head_channels, found None and None"),
        ({"num_heads": 1, "head_channels": 32}, "found 1 and 32"),
        ({"num_heads": 5}, "num_heads must divide the width of every level, found 5 at 64"),
        ({"head_channels": 48}, "head_channels must divide the width of every level, found 48 at 64"),
    ],
)
def test_heads_that_do_not_fit_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        CompVisUNet(**SMALL, **settings)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 7, 8), (2, 8, 9)])
def test_states_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        unet = CompVisUNet(**SMALL, num_heads=1)
        with pytest.raises(ValueError, match=r"shape \(2, H, W\) with H and W multiples of 2, found"):
            unet(torch.zeros(1, *shape), torch.zeros(1))


def test_a_context_that_does_not_fit_is_refused() -> None:
    with torch.device("meta"):
        x, timestep = torch.zeros(1, 2, 8, 8), torch.zeros(1)
        with pytest.raises(ValueError, match="context tokens must have 12 channels, found None"):
            CompVisUNet(**SMALL, num_heads=1, context_channels=12)(x, timestep)
        with pytest.raises(ValueError, match="context tokens must have None channels, found 12"):
            CompVisUNet(**SMALL, num_heads=1)(x, timestep, torch.zeros(1, 5, 12))
