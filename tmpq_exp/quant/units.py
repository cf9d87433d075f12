"""Owns the cut of a supernet into reconstruction units, their order, and which unit needs whose output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tmpq_exp.quant.layers import QuantLayer
from tmpq_exp.quant.supernet import Supernet

Call = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Unit:
    """A part of the network that is reconstructed as one: a residual, attention or transformer block, or a lone layer.

    Args:
        name: Path of its module in the float network.
        module: The module; it returns one tensor.
        layers: Its quantized layers, in the order of every allocation.
    """

    name: str
    module: nn.Module
    layers: tuple[QuantLayer, ...]


@contextmanager
def replaced_forwards(units: Sequence[Unit], forward: Callable[[int, Call], Call]) -> Iterator[None]:
    """Let every unit's module call ``forward(index, its own forward)`` instead of its own forward."""
    try:
        for index, unit in enumerate(units):
            unit.module.forward = forward(index, unit.module.forward)
        yield
    finally:
        for unit in units:
            unit.module.__dict__.pop("forward", None)


def find_units(supernet: Supernet, run_forward: Callable[[nn.Module], Any]) -> tuple[Unit, ...]:
    """Units in the order of execution: the outermost blocks, and every quantized layer outside of them alone.

    Args:
        supernet: Its network is cut.
        run_forward: Runs one small forward.

    Raises:
        ValueError: If a unit is not called exactly once a forward; it is named.
    """
    units = _partition(supernet)
    called: list[int] = []

    def noting(index: int, forward: Call) -> Call:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(index)
            return forward(*args, **kwargs)

        return call

    with torch.no_grad(), replaced_forwards(units, noting):
        run_forward(supernet)
    for index, unit in enumerate(units):
        if called.count(index) != 1:
            raise ValueError(f"block {unit.name} is called {called.count(index)} times a forward, 1 was expected")
    return tuple(units[index] for index in called)


def _partition(supernet: Supernet) -> list[Unit]:
    from diffusers.models.attention import BasicTransformerBlock  # here, because the import takes seconds
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    blocks = (BasicTransformerBlock, Attention, ResnetBlock2D, QuantLayer)
    order = {id(layer): index for index, layer in enumerate(supernet.layers)}
    units: list[Unit] = []
    inside = ""
    for name, module in supernet.network.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, blocks):
            layers = [layer for layer in module.modules() if isinstance(layer, QuantLayer)]
            if layers:
                units.append(Unit(name, module, tuple(sorted(layers, key=lambda layer: order[id(layer)]))))
            inside = f"{name}."
    return units


def find_last_uses(supernet: Supernet, units: Sequence[Unit], run_forward: Callable[[nn.Module], Any]) -> list[int]:
    """For every unit the index of the last unit that takes its output directly; its own index if none does.

    One forward in which the output of every unit is a fresh leaf: what has a gradient at another unit's input reached
    it through nothing but the code between units.

    Args:
        supernet: The network that was cut; it runs at its present setting.
        units: Its units in the order of execution.
        run_forward: Runs one small forward.
    """
    leaves: list[Tensor] = []
    last_uses = list(range(len(units)))

    def cutting(index: int, forward: Call) -> Call:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
            if inputs:
                sums = torch.stack([x.sum() for x in inputs]).sum()
                gradients = torch.autograd.grad(sums, leaves, retain_graph=True, allow_unused=True)
                for producer, gradient in enumerate(gradients):
                    if gradient is not None:
                        last_uses[producer] = index
            with torch.no_grad():
                output: Tensor = forward(*args, **kwargs)
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        return call

    with torch.enable_grad(), frozen(supernet), replaced_forwards(units, cutting):
        run_forward(supernet)
    return last_uses


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradient for the float parameters; on leaving, what needed one needs it again."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
