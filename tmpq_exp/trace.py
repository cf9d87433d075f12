"""Owns the reading of layer shapes off a network: one forward, on any device, also without weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tmpq_exp.attention import AttentionProducts
from tmpq_exp.cost import AttentionShape, ConvShape, LayerShape, LinearShape

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def trace_layers(model: nn.Module, run_forward: Callable[[nn.Module], Any]) -> tuple[LayerShape, ...]:
    """Shapes of all layers that cost something, by running one forward. Works on the meta device.

    Counted are ``nn.Conv2d``, ``nn.Linear``, ``AttentionProducts`` and diffusers' ``Attention``, whose products are no
    modules and become an entry ``<module path>.products``. Order: ``model.named_modules()``, a products entry of
    diffusers after the last module inside its attention. A layer that is never called is left out.

    Args:
        model: The float network.
        run_forward: Runs one forward of the model it is given, batch 1, one U-Net call. diffusers' attention must get
            its context as positional or keyword argument ``encoder_hidden_states``.

    Raises:
        ValueError: If the batch is not 1, a layer is called more than once, no layer was called, or a module was
            called whose cost is not known (transposed, 1-D and 3-D convolutions, ``nn.MultiheadAttention``).
    """
    attention_classes = _diffusers_attention()
    entries = _cost_entries(model, attention_classes)
    found: dict[str, LayerShape] = {}

    def record(name: str, shape: LayerShape) -> None:
        if name in found:
            raise ValueError(f"layer {name!r} is called more than once in one forward; its cost would be ambiguous")
        found[name] = shape

    def hook(name: str) -> Callable[..., None]:
        def on_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                record(name, _conv_shape(name, module, output))
            elif isinstance(module, nn.Linear):
                positions = output.numel() // module.out_features
                record(name, LinearShape(name, module.in_features, module.out_features, positions))
            elif isinstance(module, AttentionProducts):
                record(name, _products_shape(name, *args, **kwargs))
            elif isinstance(module, attention_classes):
                record(name, _attention_shape(name, module, args, kwargs))
            else:
                raise ValueError(f"layer {name!r} is a {type(module).__name__}, whose cost is not known")

        return on_forward

    counted = (*_CONVOLUTIONS, nn.Linear, nn.Bilinear, nn.MultiheadAttention, AttentionProducts, *attention_classes)
    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in entries
        if isinstance(module, counted)
    ]
    try:
        with torch.no_grad():
            run_forward(model)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("run_forward called no layer of the model it was given")
    return tuple(found[name] for name, _ in entries if name in found)


def _diffusers_attention() -> tuple[type[nn.Module], ...]:
    """diffusers' attention class; none where it was never imported, because no network can hold it then.

    To import it here would take seconds.
    """
    module = sys.modules.get("diffusers.models.attention_processor")
    return () if module is None else (module.Attention,)


def _cost_entries(model: nn.Module, attention_classes: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
    """Modules in ``named_modules`` order, attention modules renamed to their products and moved behind their own."""
    entries: list[tuple[str, nn.Module]] = []
    open_attentions: list[tuple[str, nn.Module]] = []

    def close_last() -> None:
        prefix, attention = open_attentions.pop()
        entries.append((f"{prefix}products", attention))

    for name, module in model.named_modules():
        while open_attentions and not name.startswith(open_attentions[-1][0]):
            close_last()
        if isinstance(module, attention_classes):
            open_attentions.append((f"{name}." if name else "", module))
        else:
            entries.append((name, module))
    while open_attentions:
        close_last()
    return entries


def _conv_shape(name: str, conv: nn.Conv2d, output: torch.Tensor) -> ConvShape:
    if output.dim() != 4 or output.shape[0] != 1:
        raise ValueError(f"run_forward must run batch 1, found output {tuple(output.shape)} at layer {name!r}")

    def pair(values: tuple[int, ...]) -> tuple[int, int]:
        return values[0], values[1]

    kernel, dilation = pair(conv.kernel_size), pair(conv.dilation)
    if isinstance(conv.padding, str):
        same = conv.padding == "same"
        padding = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2) if same else (0, 0)
    else:
        padding = pair(conv.padding)
    height, width = output.shape[2:]
    channels = conv.in_channels, conv.out_channels
    return ConvShape(name, *channels, kernel, pair(conv.stride), padding, dilation, conv.groups, height, width)


def _products_shape(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionShape:
    if q.shape[0] != 1:
        raise ValueError(f"run_forward must run batch 1, found queries {tuple(q.shape)} at layer {name!r}")
    return AttentionShape(name, q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _attention_shape(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionShape:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    if hidden_states.shape[0] != 1:
        raise ValueError(f"run_forward must run batch 1, found input {tuple(hidden_states.shape)} at layer {name!r}")
    queries = _num_tokens(hidden_states)
    keys = queries if context is None else _num_tokens(context)
    return AttentionShape(name, module.heads, queries, keys, module.to_q.out_features // module.heads)


def _num_tokens(states: torch.Tensor) -> int:
    """Tokens of ``(1, C, H, W)`` or ``(1, N, C)``."""
    return int(states.shape[2] * states.shape[3]) if states.dim() == 4 else int(states.shape[1])
