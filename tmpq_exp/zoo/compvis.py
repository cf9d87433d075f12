"""The U-Net of latent diffusion models in its original form, of which costs are read off without weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tmpq_exp.attention import AttentionProducts

NUM_GROUPS = 32
"""Groups of every group normalization; all widths are multiples of it."""


def timestep_embedding(timestep: Tensor, num_channels: int) -> Tensor:
    """Cosines and sines of the timestep at geometric frequencies.

    Args:
        timestep: ``(N,)``.
        num_channels: Width, even.

    Returns:
        ``(N, num_channels)``.
    """
    half = num_channels // 2
    exponents = torch.arange(half, device=timestep.device, dtype=torch.float32) / half
    angles = timestep[:, None].float() * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around the timestep embedding, and a skip connection.

    Args:
        in_channels, out_channels: Width before and behind.
        embedding_channels: Width of the timestep embedding.
        scale_shift_norm: Whether the embedding scales and shifts the second normalization instead of being added.
        resample: Halves or doubles the resolution between the first activation and the first convolution, and on the
            skip connection.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        scale_shift_norm: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.resample = resample or nn.Identity()
        self.in_norm = nn.GroupNorm(NUM_GROUPS, in_channels)
        self.in_conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_layer = nn.Linear(embedding_channels, (2 if scale_shift_norm else 1) * out_channels)
        self.out_norm = nn.GroupNorm(NUM_GROUPS, out_channels)
        self.out_conv = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``(N, C, H, W)`` and ``(N, embedding_channels)`` -> ``(N, out_channels, H', W')``."""
        hidden: Tensor = self.in_conv(self.resample(F.silu(self.in_norm(x))))
        shift: Tensor = self.emb_layer(F.silu(embedding))[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            hidden = self.out_norm(hidden) * (1 + scale) + shift
        else:
            hidden = self.out_norm(hidden + shift)
        result: Tensor = self.skip_connection(self.resample(x)) + self.out_conv(F.silu(hidden))
        return result


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, with projections by 1x1 convolutions."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(NUM_GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.products = AttentionProducts()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> the same shape."""
        heads = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.num_heads, -1)).transpose(3, 4)
        attended: Tensor = self.proj_out(self.products(*heads.unbind(1)).transpose(2, 3).reshape(x.shape))
        return x + attended


class CrossAttention(nn.Module):
    """Attention of tokens to a context of another width and length, or to themselves."""

    def __init__(self, channels: int, context_channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.products = AttentionProducts()

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """``(N, queries, C)`` and ``(N, keys, context_channels)`` -> ``(N, queries, C)``."""
        projected = (self.to_q(tokens), self.to_k(context), self.to_v(context))
        q, k, v = (values.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for values in projected)
        attended: Tensor = self.to_out(self.products(q, k, v).transpose(1, 2).flatten(2))
        return attended


class GatedFeedForward(nn.Module):
    """GEGLU of four times the width: a linear layer to values and gates, and one back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(N, tokens, C)`` -> the same shape."""
        values, gates = self.proj(tokens).chunk(2, dim=-1)
        result: Tensor = self.out(values * F.gelu(gates))
        return result


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a layer normalization."""

    def __init__(self, channels: int, context_channels: int, num_heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, num_heads)
        self.attn2 = CrossAttention(channels, context_channels, num_heads)
        self.ff = GatedFeedForward(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """``(N, queries, C)`` and ``(N, keys, context_channels)`` -> ``(N, queries, C)``."""
        normalized = self.norm1(tokens)
        tokens = tokens + self.attn1(normalized, normalized)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        result: Tensor = tokens + self.ff(self.norm3(tokens))
        return result


class SpatialTransformer(nn.Module):
    """One transformer block over the pixels, between two 1x1 convolutions."""

    def __init__(self, channels: int, context_channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NUM_GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_channels, num_heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``(N, C, H, W)`` and ``(N, keys, context_channels)`` -> ``(N, C, H, W)``."""
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        result: Tensor = x + self.proj_out(tokens.transpose(1, 2).reshape(x.shape))
        return result


class Stage(nn.ModuleList):
    """Layers in a row, each given what it takes of embedding and context."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """``(N, C, H, W)`` -> ``(N, C', H', W')``."""
        for layer in self:
            if isinstance(layer, ResidualBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


@dataclass(frozen=True)
class _Layers:
    """Makes the layers of a ``CompVisUNet``; see there."""

    embedding_channels: int
    num_heads: int | None
    head_channels: int | None
    context_channels: int | None
    scale_shift_norm: bool
    residual_resampling: bool

    def residual(self, before: int, behind: int, resample: nn.Module | None = None) -> nn.Module:
        return ResidualBlock(before, behind, self.embedding_channels, self.scale_shift_norm, resample)

    def attention(self, width: int) -> nn.Module:
        heads = self.num_heads if self.head_channels is None else width // self.head_channels
        if not heads or width % heads or (self.head_channels and width % self.head_channels):
            fixed = "num_heads" if self.head_channels is None else "head_channels"
            raise ValueError(f"{fixed} must divide the width of every level, found {getattr(self, fixed)} at {width}")
        if self.context_channels is None:
            return AttentionBlock(width, heads)
        return SpatialTransformer(width, self.context_channels, heads)

    def halving(self, width: int) -> nn.Module:
        if self.residual_resampling:
            return self.residual(width, width, nn.AvgPool2d(2))
        return nn.Conv2d(width, width, 3, stride=2, padding=1)

    def doubling(self, width: int) -> nn.Module:
        if self.residual_resampling:
            return self.residual(width, width, nn.Upsample(scale_factor=2))
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1))


class CompVisUNet(nn.Module):
    """Noise predictor of the latent diffusion models; with ``num_heads=1`` and no context also that of DDPM and DDIM.

    Blocks are called ``input_blocks``, ``middle_block`` and ``output_blocks`` as in the authors' code.

    Args:
        in_channels: Channels of the state, and of the predicted noise.
        channels: Width of the first level, a multiple of 32.
        multipliers: Width of each level over that of the first; a level has half the resolution of the one before.
        attention_at: Downsampling factors whose levels have attention; the middle has it always.
        num_heads: Attention heads; give either this or ``head_channels``.
        head_channels: Channels of an attention head.
        context_channels: Width of the context tokens of spatial transformers; None for attention blocks without one.
        scale_shift_norm: See ``ResidualBlock``.
        residual_resampling: Whether levels are joined by residual blocks instead of convolutions.
        num_blocks: Residual blocks a level, and one more on the way up.

    Raises:
        ValueError: If not one of ``num_heads`` and ``head_channels`` is given, or a width is no multiple of it.

    References:
        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, and Ho et al.,
        "Denoising Diffusion Probabilistic Models", NeurIPS 2020.

    Differs from the authors' code, which projects q, k and v of attention blocks by 1-D convolutions over the pixels:
    the 1x1 convolutions here have the same weights and costs. There is no dropout.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        multipliers: Sequence[int],
        attention_at: Collection[int],
        *,
        num_heads: int | None = None,
        head_channels: int | None = None,
        context_channels: int | None = None,
        scale_shift_norm: bool = False,
        residual_resampling: bool = False,
        num_blocks: int = 2,
    ) -> None:
        super().__init__()
        if (num_heads is None) == (head_channels is None):
            raise ValueError(f"give num_heads or head_channels, found {num_heads} and {head_channels}")
        self.in_channels, self.channels, self.smallest = in_channels, channels, 2 ** (len(multipliers) - 1)
        self.context_channels = context_channels
        embedding = 4 * channels
        make = _Layers(embedding, num_heads, head_channels, context_channels, scale_shift_norm, residual_resampling)

        def block(before: int, level: int) -> list[nn.Module]:
            has_attention = 2**level in attention_at
            return [make.residual(before, widths[level]), *([make.attention(widths[level])] if has_attention else [])]

        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        widths, skips = [channels * multiplier for multiplier in multipliers], [channels]
        for level, width in enumerate(widths):
            for _ in range(num_blocks):
                self.input_blocks.append(Stage(block(skips[-1], level)))
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage([make.halving(width)]))
                skips.append(width)
        last = widths[-1]
        self.middle_block = Stage([make.residual(last, last), make.attention(last), make.residual(last, last)])
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for index in range(num_blocks + 1):
                layers = block(last + skips.pop(), level)
                last = width
                if level and index == num_blocks:
                    layers.append(make.doubling(width))
                self.output_blocks.append(Stage(layers))
        self.out_norm = nn.GroupNorm(NUM_GROUPS, last)
        self.out = nn.Conv2d(last, in_channels, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        """Predicted noise.

        Args:
            x: ``(N, in_channels, H, W)``; H and W divide by the downsampling of the lowest level.
            timestep: ``(N,)``.
            encoder_hidden_states: Context tokens, ``(N, keys, context_channels)``, for a U-Net that takes them.

        Returns:
            Of the shape of ``x``.

        Raises:
            ValueError: If a shape is another one.
        """
        if x.shape[1] != self.in_channels or x.shape[2] % self.smallest or x.shape[3] % self.smallest:
            expected = f"({self.in_channels}, H, W) with H and W multiples of {self.smallest}"
            raise ValueError(f"a state must have shape {expected}, found {tuple(x.shape[1:])}")
        found = None if encoder_hidden_states is None else encoder_hidden_states.shape[-1]
        if found != self.context_channels:
            raise ValueError(f"context tokens must have {self.context_channels} channels, found {found}")
        embedding = self.time_embed(timestep_embedding(timestep, self.channels))
        skips: list[Tensor] = []
        for block in self.input_blocks:
            x = block(x, embedding, encoder_hidden_states)
            skips.append(x)
        x = self.middle_block(x, embedding, encoder_hidden_states)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding, encoder_hidden_states)
        noise: Tensor = self.out(F.silu(self.out_norm(x)))
        return noise
