"""The weight-sharing supernet: every bit choice of every layer at once, and its Lightning module that makes images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tmpq_exp.config import QuantConfig
from tmpq_exp.cost import AttentionShape, ConvShape, LayerShape, is_eligible
from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.quant.attention_products import QuantAttentionProducts
from tmpq_exp.quant.compiling import compiled
from tmpq_exp.quant.layers import (
    FLOAT,
    LayerSetting,
    Observer,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    WeightedLayer,
    layers_at,
)
from tmpq_exp.quant.lru_cache import LRUCache
from tmpq_exp.quant.quantizer import Quantizer
from tmpq_exp.quant.seams import find_seams
from tmpq_exp.quant.timestep_path import TimestepPath, find_timestep_layers
from tmpq_exp.winograd.conv import StaticRanges, WinogradSpec
from tmpq_exp.winograd.matrices import NetworkMatrices
from tmpq_exp.winograd.scales import ScaleSet, as_scale_set
from tmpq_exp.winograd.transform import WinogradScales
from tmpq_exp.zoo.task import DiffusionTask

PRODUCTS_SUFFIX = ".products"


class Supernet(nn.Module):
    """A float network whose layers can each run at any of their bit choices; float weights, biases and norms shared.

    Outside ``subnet`` it is the float network, to the last bit.

    Args:
        network: Float network; it is left as it is, only its parameters are shared.
        layers: Its layers, in the order of every allocation (``trace_layers``).
        weight_choices, act_choices: Bit widths each layer holds, one entry a layer.
        config: Quantizer settings.
        seams: Layer name -> input channels before the seam of a concatenation, whose two sides are quantized apart.
        timestep_layers: Names of linear layers whose input depends on the timestep alone (``find_timestep_layers``).

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: weight-sharing supernet as precision solver.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[LayerShape],
        weight_choices: Sequence[Sequence[int]],
        act_choices: Sequence[Sequence[int]],
        config: QuantConfig,
        seams: Mapping[str, int] | None = None,
        timestep_layers: Collection[str] = (),
    ) -> None:
        super().__init__()
        shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
        self.network: nn.Module = _with_fixed_dtype(copy.deepcopy(network, shared))
        self.cache = LRUCache(config.cache_max_bytes)
        self.shapes, self.config, self.seams = tuple(layers), config, dict(seams or {})
        self.winograd: dict[int, tuple[WinogradSpec, NetworkMatrices]] = {}
        self.ranges: dict[tuple[str, int], StaticRanges] = {}
        choices = zip(layers, weight_choices, act_choices, strict=True)
        self._layers = [self._replace(shape, weights, acts) for shape, weights, acts in choices]
        self._runs_compiled = False
        of_timestep = (x for x in self._layers if isinstance(x, QuantLinear) and x.name in timestep_layers)
        self._timestep_path = TimestepPath(tuple(of_timestep))
        self.to(next(network.parameters()).device)

    def _replace(self, shape: LayerShape, weight_choices: Sequence[int], act_choices: Sequence[int]) -> QuantLayer:
        if isinstance(shape, AttentionShape):
            attention: Any = self.network.get_submodule(shape.name.removesuffix(PRODUCTS_SUFFIX))
            layer: QuantLayer = QuantAttentionProducts(
                shape.name,
                self.cache,
                attention.processor,
                shape.heads * shape.head_dim,
                weight_choices,
                act_choices,
                self.config.act,
            )
            attention.set_processor(layer)
            return layer
        parent_name, _, child_name = shape.name.rpartition(".")
        parent = self.network.get_submodule(parent_name)
        arguments: dict[str, Any] = {
            "name": shape.name,
            "cache": self.cache,
            "float_layer": self.network.get_submodule(shape.name),
            "weight_choices": weight_choices,
            "act_choices": act_choices,
            "config": self.config,
            "seam": self.seams.get(shape.name, 0),
        }
        if isinstance(shape, ConvShape):
            layer = QuantConv2d(winograd=self.winograd if is_eligible(shape) else {}, ranges=self.ranges, **arguments)
        else:
            layer = QuantLinear(**arguments)
        setattr(parent, child_name, layer)
        return layer

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Supernet:
        """Move, as ``to`` does, and take along or forget what is no parameter or buffer."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for m, (spec, matrices) in self.winograd.items():
            self.winograd[m] = spec, matrices.map(fn)
        for key, ranges in self.ranges.items():
            self.ranges[key] = ranges.map(fn)
        self.quantizers_changed()
        return self

    @property
    def is_compiled(self) -> bool:
        """Whether subnets that can be are compiled, where the network lies at present."""
        wanted = self.config.compile
        return next(self.network.parameters()).is_cuda if wanted is None else wanted

    def set_winograd(self, tiles: Mapping[int, tuple[WinogradSpec, WinogradScales | ScaleSet]]) -> None:
        """Let eligible convolutions take these tiles, with these specifications and scales, without ranges."""
        device = next(self.network.parameters()).device
        self.winograd.clear()
        self.ranges.clear()
        for m, (spec, scales) in tiles.items():
            matrices = as_scale_set(scales).network_matrices(spec)
            self.winograd[m] = spec, matrices.map(lambda x: x.to(device))
        self.cache.clear()

    def set_ranges(self, ranges: Mapping[tuple[str, int], StaticRanges]) -> None:
        """Let Winograd layers have static activation scales, by layer and tile; the others' stay dynamic."""
        device = next(self.network.parameters()).device
        self.ranges.clear()
        self.ranges.update({key: found.map(lambda x: x.to(device)) for key, found in ranges.items()})
        self.cache.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the float network takes and returns."""
        return (self._compiled_network if self._runs_compiled else self.network)(*args, **kwargs)

    @contextmanager
    def subnet(self, allocation: Allocation) -> Iterator[None]:
        """Run at these bits and tiles; on leaving, the layers are as they were.

        Raises:
            ValueError: If the allocation has another number of layers, or bits or a tile that a layer cannot take.
        """
        if len(allocation) != len(self._layers):
            raise ValueError(f"the network has {len(self._layers)} layers, the allocation {len(allocation)} entries")
        settings = [
            LayerSetting(*setting)
            for setting in zip(allocation.weight_bits, allocation.act_bits, allocation.tiles, strict=True)
        ]
        for layer, setting in zip(self._layers, settings, strict=True):
            layer.check(setting)
        with layers_at(self._layers, settings), self._compiled(settings) if self.is_compiled else nullcontext():
            yield

    def at_timestep(self, timestep: int) -> AbstractContextManager[None]:
        """Let all images of the calls in here be told this timestep, inside ``subnet``.

        Layers that depend on it alone are then computed once a timestep; compiled code computes them anew.
        """
        return nullcontext() if self._runs_compiled else self._timestep_path.at(timestep)

    @contextmanager
    def _compiled(self, settings: Sequence[LayerSetting]) -> Iterator[None]:
        """Run through the compiled network, if all is float or all layers can hold what they need, under the cap."""
        pairs = list(zip(self._layers, settings, strict=True))
        is_held = self._num_weight_bytes <= self.cache.max_bytes and all(layer.can_hold(to) for layer, to in pairs)
        is_watched = any(layer.observer or layer.learning for layer in self._layers)
        if is_watched or not (is_held or all(setting == FLOAT for setting in settings)):
            yield
            return
        try:
            if is_held:
                for layer, setting in pairs:
                    layer.hold(setting)
            self._runs_compiled = True
            yield
        finally:
            self._runs_compiled = False
            for layer in self._layers:
                layer.release()

    @cached_property
    def _num_weight_bytes(self) -> int:
        """Bytes of all dequantized weights of one subnet."""
        return sum(layer.float_layer.weight.nbytes for layer in self._layers if isinstance(layer, WeightedLayer))

    @cached_property
    def _compiled_network(self) -> Callable[..., Any]:
        return compiled(self.network)

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Run in float and show every activation that a subnet would quantize to ``observer``."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(layer.observing(observer))
            yield

    @property
    def layers(self) -> tuple[QuantLayer, ...]:
        """The layers, in the order of every allocation."""
        return tuple(self._layers)

    def named_quantizers(self, layers: Sequence[QuantLayer] | None = None) -> Iterator[tuple[str, Quantizer]]:
        """Quantizers of all or of some layers, as ``<layer>/<quantizer>``."""
        for layer in self._layers if layers is None else layers:
            for name, quantizer in layer.quantizers():
                yield f"{layer.name}/{name}", quantizer

    def quantizer_state(self, layers: Sequence[QuantLayer] | None = None) -> dict[str, Tensor]:
        """Scales, zero points and roundings of quantizers, no weights: ``<layer>/<quantizer>.<buffer>``.

        Args:
            layers: Whose; None takes all.
        """
        return {
            f"{name}.{buffer}": value
            for name, quantizer in self.named_quantizers(layers)
            for buffer, value in quantizer.named_buffers()
        }

    def load_quantizer_state(
        self, state: Mapping[str, Tensor], source: str, layers: Sequence[QuantLayer] | None = None
    ) -> None:
        """Inverse of ``quantizer_state``.

        Raises:
            ValueError: If the state is of another network or other bit choices, or not finite; ``source`` is named
                and nothing is changed.
        """
        own = self.quantizer_state(layers)
        if state.keys() != own.keys():
            first = sorted(state.keys() ^ own.keys())[0]
            raise ValueError(f"{source} holds quantizers of another network; the first that differs is {first}")
        buffers = [
            (quantizer, buffer, f"{name}.{buffer}")
            for name, quantizer in self.named_quantizers(layers)
            for buffer, _ in quantizer.named_buffers()
        ]
        for quantizer, buffer, key in buffers:
            if not quantizer.accepts(buffer, state[key]):
                raise ValueError(
                    f"{source}: {key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}; "
                    "it was made for other bit choices"
                )
            if not state[key].isfinite().all():
                raise ValueError(f"{source}: {key} is not finite")
        for quantizer, buffer, key in buffers:
            quantizer.set_buffer(buffer, state[key])
        self.quantizers_changed()

    def quantizers_changed(self) -> None:
        """Forget everything derived from scales and zero points."""
        self.cache.clear()
        self._timestep_path.clear()
        for layer in self._layers:
            for quantizer in layer.act_quantizers():
                quantizer.forget_parameters()


def _with_fixed_dtype(network: nn.Module) -> nn.Module:
    """The network with its ``dtype`` found once.

    diffusers' models look through all of their modules for it at every call, twice, which took longer than all
    activation quantizers of a small U-Net together.
    """
    dtype = next(network.parameters()).dtype
    cls = type(network)
    network.__class__ = type(cls.__name__, (cls,), {"dtype": property(lambda _: dtype), "__module__": cls.__module__})
    return network


class SupernetModule(L.LightningModule):
    """Builds the supernet of a task and makes images with any of its subnets.

    A float schedule is a candidate like any other, with ``FLOAT_BITS`` everywhere: it runs the float network.

    Args:
        task: Float task.
        layers, weight_choices, act_choices, config: See ``Supernet``.
    """

    def __init__(
        self,
        task: DiffusionTask,
        layers: Sequence[LayerShape],
        weight_choices: Sequence[Sequence[int]],
        act_choices: Sequence[Sequence[int]],
        config: QuantConfig,
    ) -> None:
        super().__init__()
        self.task = task
        seams = find_seams(task.unet, task.probe) if config.split_shortcuts else {}
        of_timestep = find_timestep_layers(task.unet, task.probe)
        self.supernet = Supernet(task.unet, layers, weight_choices, act_choices, config, seams, of_timestep)
        self._request: tuple[Candidate, Sequence[Sequence[int]], int] | None = None

    @property
    def is_compiled(self) -> bool:
        """See ``Supernet.is_compiled``."""
        return self.supernet.is_compiled

    @torch.inference_mode()
    def images(self, candidate: Candidate, image_indices: Sequence[int], seed: int) -> Tensor:
        """One micro-batch of images.

        Args:
            candidate: Kept timesteps and allocation.
            image_indices: Which images of the stream.
            seed: Seed of the image stream.

        Returns:
            Images in [0, 1], ``(N, C, H, W)``.
        """
        return self.task.decode(self.latents(candidate, image_indices, seed))

    @torch.inference_mode()
    def latents(self, candidate: Candidate, image_indices: Sequence[int], seed: int) -> Tensor:
        """The same before they are decoded: clean states, ``(N, C, H, W)``; arguments as for ``images``."""
        supernet, timesteps = self.supernet, candidate.timesteps
        told = [self.task.sampler.network_timestep(timestep) for timestep in timesteps]
        is_uniform = len(candidate.allocations) == 1

        @contextmanager
        def activate(step_index: int) -> Iterator[None]:
            subnet = nullcontext() if is_uniform else supernet.subnet(candidate.allocation_at(step_index))
            with subnet, supernet.at_timestep(told[step_index]):
                yield

        with supernet.subnet(candidate.allocations[0]) if is_uniform else nullcontext():
            return self.task.latents(supernet, image_indices, timesteps, seed, activate=activate)

    @contextmanager
    def requesting(self, candidate: Candidate, micro_batches: Sequence[Sequence[int]], seed: int) -> Iterator[None]:
        """Let ``predict_step`` make these micro-batches of images of a candidate; its batches are their numbers."""
        self._request = (candidate, micro_batches, seed)
        try:
            yield
        finally:
            self._request = None

    def predict_step(self, batch: int, batch_idx: int) -> Tensor:
        """Images of one micro-batch."""
        assert self._request is not None, "predict outside `requesting`"
        candidate, micro_batches, seed = self._request
        return self.images(candidate, micro_batches[batch], seed)
