"""Scales of S_B and S_G that are learned from random noise, and how well a set of scales does on a network's weights.

References:
    Pan et al., "Data-Free Group-Wise Fully Quantized Winograd Convolution via Learnable Scales", CVPR 2025.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmpq_exp.quant.primitives import sqnr_db
from tmpq_exp.winograd.conv import WinogradMatrices, WinogradSpec, transform_weights, winograd_conv2d
from tmpq_exp.winograd.transform import PointsSpec, WinogradScales, closed_form_scales, standard_scales

NOISE_BATCH, NOISE_SIZE = 2, 24
"""Images, and pixels a side, of the noise that a layer sees; 24 is a multiple of the tiles 2, 3, 4, 6 and 8."""

_TRAIN_STREAM, _HELD_OUT_STREAM = 0, 1


@dataclass(frozen=True)
class ConvWeight:
    """An eligible convolution of a network, all that learning scales needs of it.

    Args:
        name: Its name in the network.
        weight: Float weights, (K, C, r, r); never changed.
        padding: Zeros on every side of H and W.
    """

    name: str
    weight: Tensor
    padding: int | tuple[int, int] = 1


@dataclass(frozen=True)
class ScaleResult:
    """What learning scales for one F(m, r) gave.

    Args:
        m: Outputs of a tile in one dimension.
        points: The points as the spec names them.
        scales: By kind: ``standard``, ``closed_form``, ``learned`` (as learned, whether better or not).
        sqnr_db: By kind: median over layers of the held-out SQNR in dB.
        kept: ``learned`` where it beats the closed form on held-out noise, else ``closed_form``.
        curve: SQNR in dB of every step of learning, on that step's layers and noise.
    """

    m: int
    points: PointsSpec
    scales: Mapping[str, WinogradScales]
    sqnr_db: Mapping[str, float]
    kept: str
    curve: tuple[float, ...]

    @property
    def kept_scales(self) -> WinogradScales:
        """The scales to use."""
        return self.scales[self.kept]


class LearnedScales(nn.Module):
    """S_B and S_G as a fixed sign times exp(log scale); S_A follows, so the transform stays exact.

    Args:
        initial: Where learning starts: its signs stay.
    """

    def __init__(self, initial: WinogradScales) -> None:
        super().__init__()
        for name, values in (("b", initial.s_b), ("g", initial.s_g)):
            scale = torch.tensor(values, dtype=torch.float64)
            self.register_buffer(f"sign_{name}", scale.sign().float())
            self.register_parameter(f"log_{name}", nn.Parameter(scale.abs().log().float()))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Diagonals ``(s_b, s_g)``, each (n,)."""
        sign_b, sign_g = self.get_buffer("sign_b"), self.get_buffer("sign_g")
        return sign_b * self.get_parameter("log_b").exp(), sign_g * self.get_parameter("log_g").exp()

    @torch.no_grad()
    def to_scales(self) -> WinogradScales:
        """The present values as floats.

        Raises:
            ValueError: If learning has driven one out of the range of float32.
        """
        s_b, s_g = self()
        return WinogradScales(tuple(s_b.tolist()), tuple(s_g.tolist()))


class WinogradScalesModule(L.LightningModule):
    """Learns one set of scales for all layers of a network from noise alone; a batch is the seed of a step.

    Every step draws ``layers_per_step`` layers, feeds each unit Gaussian noise, and lowers the mean of -SQNR (dB)
    between the float convolution and the quantized Winograd convolution. Weights stay frozen. A step depends on its
    seed alone, so every rank of a distributed run takes the same steps.

    Args:
        layers: At least one.
        spec: Which F(m, r), and which stages are quantized.
        initial: Where learning starts; the closed form where none is given.
        lr: Learning rate of SGD on the log scales, above 0.
        momentum: Of SGD, in [0, 1).
        bits: Bits of x, V and U, 2..16; those of M are the spec's.
        layers_per_step: Layers drawn in a step, the paper's K.

    Raises:
        ValueError: If there is no layer, or ``lr`` or ``momentum`` is out of range.

    References:
        Pan et al., CVPR 2025, section 4. Differs from the paper in the initial value, which it does not give; rate,
        momentum and number of steps are ours too.
    """

    def __init__(
        self,
        layers: Sequence[ConvWeight],
        spec: WinogradSpec,
        *,
        initial: WinogradScales | None = None,
        lr: float = 0.02,
        momentum: float = 0.9,
        bits: int = 8,
        layers_per_step: int = 2,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must hold at least one eligible convolution, found none")
        if not lr > 0:
            raise ValueError(f"lr must be above 0, found {lr!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), found {momentum!r}")
        self.layers, self.spec, self.bits = tuple(layers), spec, bits
        self.lr, self.momentum, self.layers_per_step = lr, momentum, layers_per_step
        self.transform = spec.transform()
        self.scales = LearnedScales(closed_form_scales(self.transform) if initial is None else initial)
        self.curve: list[float] = []

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Mean of -SQNR in dB over the layers that this seed draws."""
        generator = torch.Generator().manual_seed(int(batch))
        drawn = torch.randperm(len(self.layers), generator=generator)[: self.layers_per_step]
        matrices = WinogradMatrices.from_tensors(self.transform, *self.scales())
        losses = [-self._layer_sqnr_db(self.layers[i], matrices, generator) for i in drawn.tolist()]
        loss = torch.stack(losses).mean()
        self.curve.append(-loss.item())
        self.log("sqnr_db", -loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def _layer_sqnr_db(self, layer: ConvWeight, matrices: WinogradMatrices, generator: torch.Generator) -> Tensor:
        weight = layer.weight.detach().to(matrices.G)
        x = gaussian_noise(weight.shape[1], generator).to(weight)
        reference = F.conv2d(x, weight, padding=layer.padding)
        u = transform_weights(weight, matrices, self.spec, self.bits)
        estimate = winograd_conv2d(x, u, None, matrices, self.spec, self.bits, layer.padding)
        return 10 * torch.log10(reference.square().sum() / (reference - estimate).square().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as in the paper."""
        return torch.optim.SGD(self.scales.parameters(), lr=self.lr, momentum=self.momentum)


def gaussian_noise(num_channels: int, generator: torch.Generator) -> Tensor:
    """Unit Gaussian noise, (``NOISE_BATCH``, C, ``NOISE_SIZE``, ``NOISE_SIZE``), float32 on the CPU."""
    return torch.randn(NOISE_BATCH, num_channels, NOISE_SIZE, NOISE_SIZE, generator=generator)


def step_seeds(seed: int, num_steps: int) -> list[int]:
    """Seeds of the steps of learning, the data of ``WinogradScalesModule``; more steps start with the same ones."""
    return _stream(seed, _TRAIN_STREAM, num_steps)


def _stream(seed: int, stream: int, length: int) -> list[int]:
    sequence = np.random.SeedSequence(seed, spawn_key=(stream,))
    return [int(value) for value in sequence.generate_state(length, np.uint32)]


@torch.no_grad()
def layer_sqnr_db(layer: ConvWeight, spec: WinogradSpec, scales: WinogradScales, seed: int, bits: int = 8) -> float:
    """SQNR in dB of one layer's quantized Winograd convolution of unit Gaussian noise, against float.

    With ``WinogradSpec(m, points=...)`` and the other defaults this is the figure that reports quote: the network's
    own weights, groups of 32, all stages int8.

    Args:
        layer: The layer.
        spec: Which F(m, r), and which stages are quantized.
        scales: Diagonals of S_B and S_G.
        seed: Of the noise; equal seeds give equal noise for every kind of scale.
        bits: Bits of x, V and U.
    """
    x = gaussian_noise(layer.weight.shape[1], torch.Generator().manual_seed(seed))
    return input_sqnr_db(layer, x, spec, scales, bits)


@torch.no_grad()
def input_sqnr_db(layer: ConvWeight, x: Tensor, spec: WinogradSpec, scales: WinogradScales, bits: int) -> float:
    """SQNR in dB of one layer's quantized Winograd convolution of this input, (B, C, H, W), against float."""
    weight = layer.weight.detach().float().cpu()
    matrices = WinogradMatrices.from_scales(spec.transform(), scales)
    u = transform_weights(weight, matrices, spec, bits)
    estimate = winograd_conv2d(x, u, None, matrices, spec, bits, layer.padding)
    return sqnr_db(F.conv2d(x, weight, padding=layer.padding), estimate)


def network_sqnr_db(
    layers: Sequence[ConvWeight], spec: WinogradSpec, scales: WinogradScales, seed: int, bits: int = 8
) -> float:
    """Median over layers of ``layer_sqnr_db``; every layer has its own noise, apart from that of learning."""
    seeds = _stream(seed, _HELD_OUT_STREAM, len(layers))
    return statistics.median(
        layer_sqnr_db(layer, spec, scales, layer_seed, bits) for layer, layer_seed in zip(layers, seeds, strict=True)
    )


def learn_scales(
    layers: Sequence[ConvWeight],
    spec: WinogradSpec,
    *,
    steps: int,
    lr: float,
    seed: int,
    trainer_factory: Callable[..., L.Trainer],
    initial: str = "closed_form",
    bits: int = 8,
    layers_per_step: int = 2,
) -> ScaleResult:
    """Learns one set of scales for a network and judges it, the closed form and the standard scales on held-out noise.

    Args:
        layers: The network's eligible convolutions, at least one.
        spec: Which F(m, r), and which stages are quantized.
        steps: Steps of SGD, at least 1.
        lr: Learning rate on the log scales, above 0.
        seed: Seeds training and held-out noise, in separate streams.
        trainer_factory: Called once, with ``max_epochs=1`` and ``max_steps=steps``; makes the Trainer.
        initial: ``closed_form`` or ``standard``.
        bits: Bits of x, V and U.
        layers_per_step: Layers drawn in a step.

    Raises:
        ValueError: If an argument is out of range.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, found {steps!r}")
    transform = spec.transform()
    scales = {"standard": standard_scales(transform), "closed_form": closed_form_scales(transform)}
    if initial not in scales:
        raise ValueError(f"initial must be one of {', '.join(scales)}, found {initial!r}")
    module = WinogradScalesModule(
        layers, spec, initial=scales[initial], lr=lr, bits=bits, layers_per_step=layers_per_step
    )
    trainer_factory(max_epochs=1, max_steps=steps).fit(module, train_dataloaders=step_seeds(seed, steps))
    scales["learned"] = module.scales.to_scales()
    held_out = {kind: network_sqnr_db(layers, spec, value, seed, bits) for kind, value in scales.items()}
    kept = "learned" if held_out["learned"] > held_out["closed_form"] else "closed_form"
    return ScaleResult(spec.m, spec.points, scales, held_out, kept, tuple(module.curve))
