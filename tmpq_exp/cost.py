"""Owns every cost formula: MACs, BitOPs and weight bytes of a layer, of a U-Net call and of a whole trajectory.

Symbols: C, K are input and output channels; F(m, r) has tiles of n = m + r - 1 values a side. All counts are exact
Python integers. Nothing here needs torch; ``tmpq_exp.trace`` reads the shapes off a network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

from tmpq_exp.quant.allocation import DIRECT_TILE, FLOAT_BITS, Allocation, Candidate
from tmpq_exp.winograd.transform import ineligible_reason

TRANSFORM_BITS = 8
"""Bits of the transform matrices of a Winograd layer, and of M, its products before the output transform."""


def _bytes(num_values: int, bits: int) -> int:
    return (num_values * bits + 7) // 8


@dataclass(frozen=True)
class ConvShape:
    """A 2-D convolution, one image, one U-Net call.

    Args:
        name: Module path.
        in_channels, out_channels: C and K.
        kernel_size, stride, padding, dilation: Height and width each.
        groups: Channel groups.
        out_height, out_width: Output size in pixels.
        shaped_stages: Stages ``v`` and ``m`` that round with error feedback where it is a Winograd layer.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    out_height: int
    out_width: int
    shaped_stages: tuple[str, ...] = ()
    kind: ClassVar[str] = "conv"

    @property
    def macs(self) -> int:
        """Direct convolution: output elements x C / groups x kernel area."""
        return self.out_height * self.out_width * self.num_weights

    @property
    def num_weights(self) -> int:
        """K x C / groups x kernel area."""
        height, width = self.kernel_size
        return self.out_channels * (self.in_channels // self.groups) * height * width

    @property
    def num_inputs(self) -> int:
        """Values that it reads, where its stride divides its input."""
        return self.in_channels * self.out_height * self.out_width * self.stride[0] * self.stride[1]

    def tile_size(self, tile: int) -> int:
        """Side n = m + r - 1 of the transformed tile of F(m, r).

        Raises:
            ValueError: If this layer cannot be computed with F(m, r).
        """
        reason = ineligible_reason(self.kernel_size, self.stride, self.dilation, self.groups)
        if reason is not None:
            raise ValueError(f"tile of layer {self.name!r} must be {DIRECT_TILE} (direct), found {tile}: {reason}")
        if tile < 2:
            raise ValueError(f"tile of layer {self.name!r} must be {DIRECT_TILE} (direct) or above 1, found {tile}")
        return tile + self.kernel_size[0] - 1

    def num_tiles(self, tile: int) -> int:
        """Output tiles of m x m pixels, those cut by the border included: what they waste counts as work."""
        return -(-self.out_height // tile) * -(-self.out_width // tile)

    def hadamard_macs(self, tile: int) -> int:
        """Multiplications in the transformed domain, n^2 C K a tile; those of the convolution if direct."""
        if tile == DIRECT_TILE:
            return self.macs
        return self.num_tiles(tile) * self.tile_size(tile) ** 2 * self.in_channels * self.out_channels

    def input_transform_macs(self, tile: int) -> int:
        """B^T d B as two dense products of n x n matrices, 2 n^3 a tile and input channel; 0 if direct."""
        if tile == DIRECT_TILE:
            return 0
        return self.num_tiles(tile) * 2 * self.tile_size(tile) ** 3 * self.in_channels

    def output_transform_macs(self, tile: int) -> int:
        """A^T M A as two dense products, m n^2 + m^2 n a tile and output channel; 0 if direct."""
        if tile == DIRECT_TILE:
            return 0
        n = self.tile_size(tile)
        return self.num_tiles(tile) * (tile * n * n + tile * tile * n) * self.out_channels

    def feedback_macs(self, tile: int, stage: str) -> int:
        """Error feedback of V or M: each of n^2 taps takes up the errors of those before it, n^2 (n^2 - 1) / 2 a tile.

        That of V at every input channel, of M at every output channel; 0 if direct, or if the stage is not shaped.
        """
        if tile == DIRECT_TILE or stage not in self.shaped_stages:
            return 0
        taps = self.tile_size(tile) ** 2
        channels = {"v": self.in_channels, "m": self.out_channels}[stage]
        return self.num_tiles(tile) * taps * (taps - 1) // 2 * channels

    def multiplications(self, tile: int) -> int:
        """Those of the Hadamard stage, as papers count, and of error feedback; of the convolution if direct."""
        return self.hadamard_macs(tile) + self.feedback_macs(tile, "v") + self.feedback_macs(tile, "m")

    def executed_macs(self, tile: int) -> int:
        """All that is multiplied and accumulated: ``multiplications`` and both transforms, or the convolution."""
        return self.multiplications(tile) + self.input_transform_macs(tile) + self.output_transform_macs(tile)

    def bitops(self, weight_bits: int, act_bits: int, tile: int) -> int:
        """MACs times the bits of both operands.

        The input transform and error feedback of V count act_bits x 8, the output transform and error feedback of M
        8 x 8; with float activations, which nothing rounds, the transforms count 32 x 32.
        """
        is_float = act_bits == FLOAT_BITS
        matrix_bits, product_bits = (FLOAT_BITS, FLOAT_BITS) if is_float else (TRANSFORM_BITS, TRANSFORM_BITS)
        of_input, of_output = self.input_transform_macs(tile), self.output_transform_macs(tile)
        if not is_float:
            of_input, of_output = of_input + self.feedback_macs(tile, "v"), of_output + self.feedback_macs(tile, "m")
        return (
            self.hadamard_bitops(weight_bits, act_bits, tile)
            + of_input * act_bits * matrix_bits
            + of_output * product_bits * matrix_bits
        )

    def hadamard_bitops(self, weight_bits: int, act_bits: int, tile: int) -> int:
        """``bitops`` of the Hadamard stage alone, without transforms and error feedback."""
        return self.hadamard_macs(tile) * weight_bits * act_bits

    def weight_bytes(self, weight_bits: int, tile: int) -> int:
        """Stored weights: kernels, or for a Winograd layer U, n^2 values a pair of input and output channel."""
        if tile == DIRECT_TILE:
            return _bytes(self.num_weights, weight_bits)
        return _bytes(self.tile_size(tile) ** 2 * self.in_channels * self.out_channels, weight_bits)


def is_eligible(shape: ConvShape) -> bool:
    """Whether a convolution can be computed with F(m, 3)."""
    return ineligible_reason(shape.kernel_size, shape.stride, shape.dilation, shape.groups) is None


def saving_tiles(shape: ConvShape, tiles: Sequence[int], weight_bits: int, act_bits: int) -> tuple[int, ...]:
    """Of these tiles those that cost fewer BitOPs than every smaller one, ascending; direct counts as the smallest.

    A larger tile is the noisier one, so one that saves nothing is never worth taking. Transforms, and tiles that the
    border cuts, may eat up what the Hadamard stage saves: at few channels, or on maps that are no multiple of m.

    Args:
        shape: An eligible convolution.
        tiles: ``DIRECT_TILE`` or m each.
        weight_bits, act_bits: The highest that the layer may have: there transforms weigh least.
    """
    kept: list[int] = []
    least = float("inf")
    for tile in sorted(tiles):
        bitops = shape.bitops(weight_bits, act_bits, tile)
        if bitops < least:
            kept, least = [*kept, tile], bitops
    return tuple(kept)


class _DirectOnly(ABC):
    """Costs of a layer that knows no tiles."""

    name: str

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-accumulates."""

    @property
    @abstractmethod
    def num_weights(self) -> int:
        """Weights."""

    def executed_macs(self, tile: int) -> int:
        """``macs``; only the direct tile is accepted."""
        if tile != DIRECT_TILE:
            raise ValueError(f"tile of layer {self.name!r} must be {DIRECT_TILE} (direct), found {tile}")
        return self.macs

    def multiplications(self, tile: int) -> int:
        """``macs``: there are no transforms."""
        return self.executed_macs(tile)

    def bitops(self, weight_bits: int, act_bits: int, tile: int) -> int:
        """MACs times the bits of both operands."""
        return self.executed_macs(tile) * weight_bits * act_bits

    def hadamard_bitops(self, weight_bits: int, act_bits: int, tile: int) -> int:
        """``bitops``: there are no transforms."""
        return self.bitops(weight_bits, act_bits, tile)

    def weight_bytes(self, weight_bits: int, tile: int) -> int:
        """Stored weights."""
        self.executed_macs(tile)
        return _bytes(self.num_weights, weight_bits)


@dataclass(frozen=True)
class LinearShape(_DirectOnly):
    """A linear layer, one image, one U-Net call.

    Args:
        name: Module path.
        in_features, out_features: Width of input and output.
        positions: Vectors it is applied to: 1 for an embedding, the number of tokens inside attention.
    """

    name: str
    in_features: int
    out_features: int
    positions: int
    kind: ClassVar[str] = "linear"

    @property
    def macs(self) -> int:
        """in_features x output elements."""
        return self.in_features * self.out_features * self.positions

    @property
    def num_weights(self) -> int:
        """in_features x out_features."""
        return self.in_features * self.out_features

    @property
    def num_inputs(self) -> int:
        """Values that it reads."""
        return self.in_features * self.positions


@dataclass(frozen=True)
class AttentionShape(_DirectOnly):
    """The two products of an attention layer, Q K^T and softmax V, one image, one U-Net call.

    In an ``Allocation`` its ``weight_bits`` entry holds the bits of the softmax, its ``act_bits`` those of q, k and v.

    Args:
        name: Path of the attention module, with ``.products`` behind it.
        heads: Number of heads.
        queries, keys: Tokens that ask and tokens that are asked; they differ in cross-attention.
        head_dim: Channels of a head in q and k.
        value_dim: Channels of a head in v; 0 stands for ``head_dim``.
    """

    name: str
    heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int = 0
    kind: ClassVar[str] = "attention"

    def __post_init__(self) -> None:
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)

    @property
    def macs(self) -> int:
        """Both products: heads x queries x keys x (head_dim + value_dim)."""
        return self.heads * self.queries * self.keys * (self.head_dim + self.value_dim)

    @property
    def num_weights(self) -> int:
        """0: both operands are activations."""
        return 0

    @property
    def num_inputs(self) -> int:
        """Values of q, k and v."""
        return self.heads * (self.queries * self.head_dim + self.keys * (self.head_dim + self.value_dim))

    def bitops(self, weight_bits: int, act_bits: int, tile: int) -> int:
        """M q k + M softmax v, where M is the MACs of each product."""
        self.executed_macs(tile)
        pairs = self.heads * self.queries * self.keys
        return pairs * self.head_dim * act_bits * act_bits + pairs * self.value_dim * weight_bits * act_bits


LayerShape: TypeAlias = ConvShape | LinearShape | AttentionShape


def with_error_feedback(layers: Sequence[LayerShape], stages: Sequence[str]) -> tuple[LayerShape, ...]:
    """Layers whose Winograd tiles round these stages (``u``, ``v``, ``m``) with error feedback, and pay for it.

    That of U costs nothing here: it is done once, before the network runs.
    """
    counted = tuple(stage for stage in ("v", "m") if stage in stages)
    return tuple(replace(shape, shaped_stages=counted) if isinstance(shape, ConvShape) else shape for shape in layers)


@dataclass(frozen=True)
class LayerCost:
    """One row of the per-layer table: costs of one image and one U-Net call."""

    name: str
    kind: str
    weight_bits: int
    act_bits: int
    tile: int
    macs: int
    bitops: int
    hadamard_bitops: int
    weight_bytes: int


@dataclass(frozen=True)
class CostModel:
    """Costs of a network under an allocation.

    Normalizations, activation functions, biases, residual sums and the sampler's own arithmetic count nothing, in
    operations as in bytes. Costs of a layer are remembered: a search prices thousands of candidates a second.

    Args:
        layers: The network's layers, in the order of an ``Allocation``'s entries.
        calls_per_step: U-Net calls a sampling step makes: 2 with classifier-free guidance, else 1.

    Raises:
        ValueError: If there is no layer, a name occurs twice, or ``calls_per_step`` is below 1.

    References:
        Sun et al., "TMPQ-DM", arXiv 2404.09532: BitOPs as the budget of a whole trajectory.

    Differs from the authors' release, which ignores the number of steps, counts convolutions at batch 2 and attention
    at batch 1, and takes n C^2 for the attention products of a transformer.
    """

    layers: tuple[LayerShape, ...]
    calls_per_step: int = 1
    _bitops: dict[tuple[int, int, int, int], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers must not be empty")
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"layers must have distinct names, found {repeated} more than once")
        if self.calls_per_step < 1:
            raise ValueError(f"calls_per_step must be at least 1, found {self.calls_per_step}")

    def __len__(self) -> int:
        return len(self.layers)

    def uniform(self, weight_bits: int, act_bits: int, softmax_bits: int) -> Allocation:
        """Direct layers with the same bits everywhere; the softmax has its own, unless the weights are float."""
        softmax = FLOAT_BITS if weight_bits == FLOAT_BITS else softmax_bits
        weights = (softmax if isinstance(shape, AttentionShape) else weight_bits for shape in self.layers)
        return Allocation(tuple(weights), (act_bits,) * len(self.layers), (DIRECT_TILE,) * len(self.layers))

    def layer_bitops(self, layer_index: int, weight_bits: int, act_bits: int, tile: int) -> int:
        """BitOPs of one layer, one image, one U-Net call."""
        key = (layer_index, weight_bits, act_bits, tile)
        value = self._bitops.get(key)
        if value is None:
            value = self._bitops[key] = self.layers[layer_index].bitops(weight_bits, act_bits, tile)
        return value

    def call_bitops(self, allocation: Allocation) -> int:
        """BitOPs of one U-Net call, one image."""
        return sum(self.layer_bitops(*setting) for setting in self._settings(allocation))

    def bitops(self, candidate: Candidate) -> int:
        """BitOPs of the whole trajectory, one image, guidance included."""
        return self._trajectory(candidate, self.call_bitops)

    def hadamard_bitops(self, candidate: Candidate) -> int:
        """``bitops`` without transforms and error feedback of Winograd layers, to be printed beside it."""

        def of_call(allocation: Allocation) -> int:
            return sum(self.layers[i].hadamard_bitops(w, a, tile) for i, w, a, tile in self._settings(allocation))

        return self._trajectory(candidate, of_call)

    def multiplications(self, candidate: Candidate) -> int:
        """``macs`` without the transforms of Winograd layers: what papers on Winograd count, and error feedback."""

        def of_call(allocation: Allocation) -> int:
            return sum(self.layers[i].multiplications(tile) for i, _, _, tile in self._settings(allocation))

        return self._trajectory(candidate, of_call)

    def macs(self, candidate: Candidate) -> int:
        """Multiply-accumulates executed over the whole trajectory, one image, guidance included.

        A Winograd layer counts its Hadamard stage, both transforms and error feedback, not what it stands for.
        """

        def of_call(allocation: Allocation) -> int:
            return sum(self.layers[i].executed_macs(tile) for i, _, _, tile in self._settings(allocation))

        return self._trajectory(candidate, of_call)

    def weight_bytes(self, candidate: Candidate) -> int:
        """Bytes of stored weights; biases, normalizations, scales and zero points are not counted.

        Where steps differ in a layer's weight bits or tile, each distinct pair is stored.
        """
        stored = {(i, w, tile) for allocation in candidate.allocations for i, w, _, tile in self._settings(allocation)}
        return sum(self.layers[i].weight_bytes(w, tile) for i, w, tile in stored)

    def layer_table(self, allocation: Allocation) -> tuple[LayerCost, ...]:
        """Costs of every layer, one image, one U-Net call, in layer order."""
        return tuple(
            LayerCost(
                name=self.layers[i].name,
                kind=self.layers[i].kind,
                weight_bits=w,
                act_bits=a,
                tile=tile,
                macs=self.layers[i].executed_macs(tile),
                bitops=self.layer_bitops(i, w, a, tile),
                hadamard_bitops=self.layers[i].hadamard_bitops(w, a, tile),
                weight_bytes=self.layers[i].weight_bytes(w, tile),
            )
            for i, w, a, tile in self._settings(allocation)
        )

    def _settings(self, allocation: Allocation) -> Iterator[tuple[int, int, int, int]]:
        if len(allocation) != len(self.layers):
            raise ValueError(f"allocation must have one entry a layer ({len(self.layers)}), found {len(allocation)}")
        return zip(range(len(self.layers)), allocation.weight_bits, allocation.act_bits, allocation.tiles, strict=True)

    def _trajectory(self, candidate: Candidate, of_call: Callable[[Allocation], int]) -> int:
        if len(candidate.allocations) == 1:
            total = len(candidate.timesteps) * of_call(candidate.allocations[0])
        else:
            total = sum(of_call(allocation) for allocation in candidate.allocations)
        return self.calls_per_step * total
