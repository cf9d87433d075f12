"""Owns the path of the timestep through a network: its layers, and what they return at timesteps seen before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tmpq_exp.quant.layers import QuantLinear
from tmpq_exp.quant.lru_cache import LRUCache

MAX_BYTES = 64 * 2**20
"""Cap of what is kept; all layers of SD v1.5 take 91 kB an image and timestep."""


class _Descendants(TorchFunctionMode):
    """Knows, while it is entered, every tensor that was computed from those it was given."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, Tensor] = {}  # the tensors are held, so that no other one takes their identity

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.has_any((args, kwargs)):
            self.add(args[0] if result is None else result)  # assignment to a part returns None
        return result

    def add(self, values: Any) -> None:
        """Count every tensor in here among them."""
        self._found.update({id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)})

    def has_any(self, values: Any) -> bool:
        """Whether there is any of them in here."""
        return any(id(leaf) in self._found for leaf in tree_leaves(values))


def find_timestep_layers(network: nn.Module, run_forward: Callable[[nn.Module], Any]) -> frozenset[str]:
    """Linear layers whose input depends on the timestep alone, by running one forward: the time embedding, and its
    projections in every block unless classes or other conditions are added to it.

    Args:
        network: Float network, called as ``network(x, timestep, **conditioning)``.
        run_forward: Runs one forward of the network it is given.

    Returns:
        Their names.
    """
    others, found = _Descendants(), set()

    def before_network(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others.add((args[:1], args[2:], {name: value for name, value in kwargs.items() if name != "timestep"}))

    def before_layer(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not others.has_any(args):
                found.add(name)

        return note

    handles = [network.register_forward_pre_hook(before_network, with_kwargs=True)]
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(before_layer(name)))
    try:
        with torch.no_grad(), others:
            run_forward(network)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)


class TimestepPath:
    """Layers that depend on the timestep alone; each is computed once a timestep, number of images and setting.

    What is kept is what was computed, for as many images: the result is the same to the last bit.

    Args:
        layers: The layers; their outputs are asked for here while a timestep is known.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        self._layers, self._cache = tuple(layers), LRUCache(MAX_BYTES)
        self._at: tuple[Any, ...] | None = None
        for layer in layers:
            layer.known = self

    @contextmanager
    def at(self, timestep: int) -> Iterator[None]:
        """Every image of the calls in here is at this timestep, and the layers' settings stay as they are.

        While layers are watched or learned, nothing is kept.
        """
        if not any(layer.observer or layer.learning for layer in self._layers):
            self._at = (timestep, *(layer.setting for layer in self._layers))
        try:
            yield
        finally:
            self._at = None

    def output(self, name: str, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """``compute(x)`` of the layer of this name, or what it returned here before."""
        if self._at is None:
            return compute(x)
        return self._cache.get((name, len(x), self._at), lambda: compute(x)).clone()  # the network may write to it

    def clear(self) -> None:
        """Forget all outputs: parameters have changed."""
        self._cache.clear()
