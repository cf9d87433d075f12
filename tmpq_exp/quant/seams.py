"""Owns the finding of seams: where a residual block's input is a concatenation, and after how many channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SPLIT_LAYERS = ("conv1", "conv_shortcut")
"""Convolutions of a residual block that see its input channel by channel."""


class _Concatenations(TorchFunctionMode):
    """Notes every concatenation of two tensors along the channels while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._found: list[tuple[Tensor, int]] = []  # the tensors are held, so that no other one takes their identity

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate):
            options = dict(zip(("tensors", "dim"), args, strict=False)) | (kwargs or {})
            tensors = options["tensors"]
            if options.get("dim", 0) in (1, 1 - tensors[0].dim()) and len(tensors) == 2:
                self._found.append((result, tensors[0].shape[1]))
        return result

    def seam(self, x: Tensor) -> int:
        """Channels before the seam of this very tensor; 0 if it was not concatenated."""
        return next((seam for result, seam in self._found if result is x), 0)


def find_seams(network: nn.Module, run_forward: Callable[[nn.Module], Any]) -> dict[str, int]:
    """Convolutions whose input channels come from two places, by running one forward.

    Args:
        network: Float network with diffusers' ``ResnetBlock2D``; others have no seams.
        run_forward: Runs one forward of the network it is given.

    Returns:
        Layer name -> input channels before the seam.

    References:
        Li et al., "Q-Diffusion: Quantizing Diffusion Models", ICCV 2023, section 3.3: shortcut splitting.
    """
    from diffusers.models.resnet import ResnetBlock2D  # here, because its import takes seconds

    concatenations, seams = _Concatenations(), {}

    def hook(name: str) -> Callable[..., None]:
        def before_forward(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seam = concatenations.seam(args[0] if args else kwargs["input_tensor"])
            for child in SPLIT_LAYERS if seam else ():
                if isinstance(getattr(block, child, None), nn.Module):
                    seams[f"{name}.{child}"] = seam

        return before_forward

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in network.named_modules()
        if isinstance(module, ResnetBlock2D)
    ]
    try:
        with torch.no_grad(), concatenations:
            run_forward(network)
    finally:
        for handle in handles:
            handle.remove()
    return seams
