"""Models of which only the architecture is known: they have a cost, but no weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tmpq_exp.cost import LayerShape
from tmpq_exp.zoo.task import CostedModel, probe, unet_layers


class BareArchitecture(CostedModel):
    """A noise predictor without weights, for ``task=cost``.

    Args:
        name: Name of the model, as in ``model=...``.
        sample_shape: ``(C, H, W)`` of one state.
        unet: Builds the network, called as ``unet(x, timestep, **conditioning)``.
        context_shape: Number and width of the context tokens, which become the argument ``encoder_hidden_states``; None
            for a network without one.
        guided: See ``CostedModel``.
        diffusers: Builds the equivalent in diffusers, of the same inputs; None where there is none.

    Raises:
        ValueError: If a shape has another number of entries or one below 1, or a builder lacks or does not take a key.
    """

    def __init__(
        self,
        name: str,
        sample_shape: Sequence[int],
        unet: Callable[[], nn.Module],
        context_shape: Sequence[int] | None = None,
        guided: bool = False,
        diffusers: Callable[[], nn.Module] | None = None,
    ) -> None:
        _check_shape("sample_shape", sample_shape, "(C, H, W)", 3)
        if context_shape is not None:
            _check_shape("context_shape", context_shape, "(tokens, channels)", 2)
        for key, builder in (("unet", unet), ("diffusers", diffusers)):
            _check_arguments(key, builder)
        self.name, self.guided = name, guided
        self.sample_shape, self.context_shape = tuple(sample_shape), context_shape
        self.unet, self.diffusers = unet, diffusers

    def layers(self) -> tuple[LayerShape, ...]:
        """See ``CostedModel.layers``."""
        return self._layers(self.unet)

    def diffusers_layers(self) -> tuple[LayerShape, ...] | None:
        """See ``CostedModel.diffusers_layers``."""
        return None if self.diffusers is None else self._layers(self.diffusers)

    def on_meta(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A network of one of the builders, without memory."""
        with torch.device("meta"):
            return build()

    def probe(self, network: nn.Module) -> Any:
        """One call with one image of zeros."""
        return probe(network, self.sample_shape, self._conditioning())

    def _layers(self, build: Callable[[], nn.Module]) -> tuple[LayerShape, ...]:
        return unet_layers(self.on_meta(build), self.sample_shape, self._conditioning())

    def _conditioning(self) -> dict[str, torch.Tensor]:
        return {} if self.context_shape is None else {"encoder_hidden_states": torch.zeros(1, *self.context_shape)}


def _check_shape(key: str, shape: Sequence[int], meaning: str, length: int) -> None:
    if len(shape) != length or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"{key} must be {meaning}, all integers of at least 1, found {list(shape)}")


def _check_arguments(key: str, builder: Callable[[], Any] | None) -> None:
    """A misspelt key of a builder is told before the network is built."""
    if isinstance(builder, partial):
        try:
            inspect.signature(builder.func).bind(*builder.args, **builder.keywords)
        except TypeError as error:
            raise ValueError(f"{key}: {error}") from error
