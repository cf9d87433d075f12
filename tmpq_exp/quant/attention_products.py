"""Quantized products of attention: q, k, v and the softmax, in place of the processor of the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tmpq_exp.config import QuantizerConfig
from tmpq_exp.quant.layers import FLOAT, LayerSetting, QuantLayer
from tmpq_exp.quant.lru_cache import LRUCache
from tmpq_exp.quant.quantizer import ActQuantizer


class QuantAttentionProducts(QuantLayer):
    """Attention processor that quantizes q, k, v and the softmax before the two products meet them.

    At float bits it hands over to the processor it replaces, so that a float supernet is bit-equal to the float model.

    Args:
        name, cache: See ``QuantLayer``.
        float_processor: Processor of the float model.
        inner_dim: Channels of q, k and v over all heads.
        softmax_choices: Bit widths of the softmax.
        act_choices: Bit widths of q, k and v.
        config: Quantizer settings of activations.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532. The softmax lies in [0, 1], so its range is unsigned.
    """

    def __init__(
        self,
        name: str,
        cache: LRUCache,
        float_processor: Callable[..., Tensor],
        inner_dim: int,
        softmax_choices: Sequence[int],
        act_choices: Sequence[int],
        config: QuantizerConfig,
    ) -> None:
        super().__init__(name, cache, softmax_choices, act_choices)
        self.float_processor = float_processor
        self.q, self.k, self.v = (ActQuantizer(act_choices, inner_dim, -1, config) for _ in range(3))
        unsigned = QuantizerConfig(estimator="minmax", symmetric=False)
        self.softmax = ActQuantizer(softmax_choices, 1, -1, unsigned)

    def act_quantizers(self) -> Iterator[ActQuantizer]:
        """Those of q, k, v and the softmax."""
        yield from (self.q, self.k, self.v, self.softmax)

    def act_bits(self, setting: LayerSetting) -> Iterator[tuple[ActQuantizer, int]]:
        """See ``QuantLayer.act_bits``; the softmax has the bits that are weights' elsewhere."""
        for quantizer in (self.q, self.k, self.v):
            yield quantizer, setting.act_bits
        yield self.softmax, setting.weight_bits

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """``forward``, with the signature by which diffusers decides what to pass."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of a diffusers ``Attention`` module; images ``(B, C, H, W)`` or tokens ``(B, N, C)``."""
        if self.q.held is None and self.observer is None and self.setting == FLOAT:
            return self.float_processor(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape
        if len(image_shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
        out: Tensor = attn.to_out[1](attn.to_out[0](self._products(attn, hidden_states, context, attention_mask)))
        if len(image_shape) == 4:
            out = out.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            out = out + residual
        out = out / attn.rescale_output_factor
        return out

    def _products(self, attn: Any, hidden_states: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T) v over all heads, ``(B, N, inner_dim)``."""
        query, key = attn.to_q(hidden_states), attn.to_k(context)
        if attn.norm_q is not None or attn.norm_k is not None:
            raise ValueError(f"layer {self.name}: attention with normalized q and k is not supported")
        query = attn.head_to_batch_dim(self.quantize_act(self.q, query))
        key = attn.head_to_batch_dim(self.quantize_act(self.k, key))
        value = attn.head_to_batch_dim(self.quantize_act(self.v, attn.to_v(context)))
        weights = attn.get_attention_scores(query, key, mask)
        if self.softmax.held is not None:
            weights = self.softmax.quantize_held(weights)
        else:
            if self.observer is not None:
                self.observer(self.softmax, weights)
            weights = self._quantized(self.softmax, weights, self.setting.weight_bits)
        products: Tensor = attn.batch_to_head_dim(torch.bmm(weights, value))
        return products
