"""Learning of S_B and S_G from random noise: one set for a network or one a layer, alike or apart by side.

References:
    Pan et al., "Data-Free Group-Wise Fully Quantized Winograd Convolution via Learnable Scales", CVPR 2025.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmpq_exp.winograd.conv import WinogradMatrices, WinogradSpec, transform_weights, winograd_conv2d
from tmpq_exp.winograd.noise import Noise, noise
from tmpq_exp.winograd.scales import ConvWeight, ScaleSet, layers_sqnr_db, noise_seeds
from tmpq_exp.winograd.transform import PointsSpec, WinogradScales, closed_form_scales, standard_scales

_TRAIN_STREAM = 0


@dataclass(frozen=True)
class ScaleResult:
    """What learning scales for one F(m, r) gave.

    Args:
        m: Outputs of a tile in one dimension.
        points: The points as the spec names them.
        scales: By kind: ``standard``, ``closed_form``, ``learned`` (as learned, whether better or not) and ``kept``
            (for the network, or for each layer, the better of the last two on held-out noise).
        sqnr_db: By kind: median over layers of the held-out SQNR in dB.
        layer_sqnr_db: By kind and name of the layer: the same for every layer.
        kept: ``learned``, ``closed_form``, or ``per_layer`` where some layers kept one and some the other.
        curve: SQNR in dB of every step of learning, on that step's layers and noise.
    """

    m: int
    points: PointsSpec
    scales: Mapping[str, ScaleSet]
    sqnr_db: Mapping[str, float]
    layer_sqnr_db: Mapping[str, Mapping[str, float]]
    kept: str
    curve: tuple[float, ...]

    @property
    def kept_scales(self) -> ScaleSet:
        """The scales to use."""
        return self.scales["kept"]


class LearnedScales(nn.Module):
    """S_B and S_G as a fixed sign times exp(log scale); S_A follows, so the transform stays exact.

    Args:
        initial: Where learning starts: its signs stay.
        separate_columns: Transforms from the right have scales of their own.
    """

    def __init__(self, initial: WinogradScales, separate_columns: bool = False) -> None:
        super().__init__()
        self.sides = ("left", "right") if separate_columns or initial.columns is not None else ("left",)
        for side, scales in zip(self.sides, (initial, initial.right()), strict=False):
            for name, values in (("b", scales.s_b), ("g", scales.s_g)):
                scale = torch.tensor(values, dtype=torch.float64)
                self.register_buffer(f"sign_{name}_{side}", scale.sign().float())
                self.register_parameter(f"log_{name}_{side}", nn.Parameter(scale.abs().log().float()))

    def forward(self, side: str = "left") -> tuple[Tensor, Tensor]:
        """Diagonals ``(s_b, s_g)`` of a side, each (n,)."""
        s_b, s_g = (
            self.get_buffer(f"sign_{name}_{side}") * self.get_parameter(f"log_{name}_{side}").exp() for name in "bg"
        )
        return s_b, s_g

    def matrices(self, spec: WinogradSpec) -> WinogradMatrices:
        """Matrices that are differentiable in the scales."""
        transform = spec.transform()
        left, *right = (WinogradMatrices.from_tensors(transform, *self(side)) for side in self.sides)
        matrices = replace(left, right=right[0]) if right else left
        return matrices if spec.transform_bits is None else matrices.with_integers(transform, spec.transform_bits)

    @torch.no_grad()
    def to_scales(self) -> WinogradScales:
        """The present values as floats.

        Raises:
            ValueError: If learning has driven one out of the range of float32.
        """
        (s_b, s_g), *right = ([tuple(x.tolist()) for x in self(side)] for side in self.sides)
        return WinogradScales(s_b, s_g, (right[0][0], right[0][1]) if right else None)


class WinogradScalesModule(L.LightningModule):
    """Learns the scales of a network from noise alone; a batch is the seed of a step.

    Every step draws ``layers_per_step`` layers, feeds each unit noise, and lowers the mean of -SQNR (dB) between the
    float convolution and the quantized Winograd convolution. Weights stay frozen. A step depends on its seed alone, so
    every rank of a distributed run takes the same steps. Learning sees plain rounding, also where stages are shaped.

    Args:
        layers: At least one.
        spec: Which F(m, r), and which stages are quantized.
        initial: Where learning starts; the closed form where none is given.
        learning_rate: Of SGD on the log scales, above 0.
        momentum: Of SGD, in [0, 1).
        bits: Bits of x, V and U, 2..16; those of M are the spec's.
        layers_per_step: Layers drawn in a step, the paper's K.
        noise_kind: What the layers are fed.
        per_layer: Every layer learns scales of its own; otherwise all share one set, as in the paper.
        separate_columns: Transforms from the right have scales of their own.

    Raises:
        ValueError: If there is no layer, or ``learning_rate`` or ``momentum`` is out of range.

    References:
        Pan et al., CVPR 2025, section 4. Differs from the paper in the initial value, which it does not give; rate,
        momentum and number of steps are ours too, and so are the choices of noise and of who shares scales.
    """

    def __init__(
        self,
        layers: Sequence[ConvWeight],
        spec: WinogradSpec,
        *,
        initial: WinogradScales | None = None,
        learning_rate: float = 0.02,
        momentum: float = 0.9,
        bits: int = 8,
        layers_per_step: int = 2,
        noise_kind: Noise | str = Noise.GAUSSIAN,
        per_layer: bool = False,
        separate_columns: bool = False,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers must hold at least one eligible convolution, found none")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, found {learning_rate!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), found {momentum!r}")
        self.layers, self.spec, self.bits = tuple(layers), replace(spec, shaped_stages=()), bits
        self.learning_rate, self.momentum, self.layers_per_step = learning_rate, momentum, layers_per_step
        self.noise_kind = Noise(noise_kind)
        initial = closed_form_scales(spec.transform()) if initial is None else initial
        count = len(self.layers) if per_layer else 1
        self.scales = nn.ModuleList(LearnedScales(initial, separate_columns) for _ in range(count))
        self.curve: list[float] = []

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        """Mean of -SQNR in dB over the layers that this seed draws."""
        generator = torch.Generator().manual_seed(int(batch))
        drawn = torch.randperm(len(self.layers), generator=generator)[: self.layers_per_step]
        loss = -torch.stack([self._layer_sqnr_db(i, generator) for i in drawn.tolist()]).mean()
        self.curve.append(-loss.item())
        self.log("sqnr_db", -loss.detach(), prog_bar=True, batch_size=1)
        return loss

    def _layer_sqnr_db(self, index: int, generator: torch.Generator) -> Tensor:
        layer, learned = self.layers[index], self.scales[index % len(self.scales)]
        assert isinstance(learned, LearnedScales)
        matrices = learned.matrices(self.spec)
        weight = layer.weight.detach().to(matrices.G)
        x = noise(weight.shape[1], generator, self.noise_kind).to(weight)
        reference = F.conv2d(x, weight, padding=layer.padding)
        weights = transform_weights(weight, matrices, self.spec, self.bits)
        estimate = winograd_conv2d(x, weights, None, matrices, self.spec, self.bits, layer.padding)
        return 10 * torch.log10(reference.square().sum() / (reference - estimate).square().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, as in the paper."""
        return torch.optim.SGD(self.scales.parameters(), lr=self.learning_rate, momentum=self.momentum)

    def to_scale_set(self) -> ScaleSet:
        """The present values."""
        learned = [module.to_scales() for module in self.scales if isinstance(module, LearnedScales)]
        if len(learned) == 1:
            return ScaleSet(learned[0])
        names = [layer.name for layer in self.layers]
        return ScaleSet(closed_form_scales(self.spec.transform()), dict(zip(names, learned, strict=True)))


def step_seeds(seed: int, num_steps: int) -> list[int]:
    """Seeds of the steps of learning, the data of ``WinogradScalesModule``; more steps start with the same ones."""
    return noise_seeds(seed, _TRAIN_STREAM, num_steps)


def learn_scales(
    layers: Sequence[ConvWeight],
    spec: WinogradSpec,
    *,
    num_steps: int,
    learning_rate: float,
    seed: int,
    trainer_factory: Callable[..., L.Trainer],
    initial: str = "closed_form",
    bits: int = 8,
    layers_per_step: int = 2,
    noise_kind: Noise | str = Noise.GAUSSIAN,
    per_layer: bool = False,
    separate_columns: bool = False,
) -> ScaleResult:
    """Learns the scales of a network and judges them, the closed form and the standard scales on held-out noise.

    Args:
        layers: The network's eligible convolutions, at least one.
        spec: Which F(m, r), and which stages are quantized.
        num_steps: Steps of SGD, at least 1; with ``per_layer`` so many for each layer, on average.
        learning_rate: Learning rate on the log scales, above 0.
        seed: Seeds training and held-out noise, in separate streams.
        trainer_factory: Called once, with ``max_epochs=1`` and ``max_steps``; makes the Trainer.
        initial: ``closed_form`` or ``standard``.
        bits: Bits of x, V and U.
        layers_per_step: Layers drawn in a step.
        noise_kind, per_layer, separate_columns: See ``WinogradScalesModule``. Held-out noise is of the same kind.

    Raises:
        ValueError: If an argument is out of range.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, found {num_steps!r}")
    transform = spec.transform()
    fixed = {"standard": standard_scales(transform), "closed_form": closed_form_scales(transform)}
    if initial not in fixed:
        raise ValueError(f"initial must be one of {', '.join(fixed)}, found {initial!r}")
    module = WinogradScalesModule(
        layers,
        spec,
        initial=fixed[initial],
        learning_rate=learning_rate,
        bits=bits,
        layers_per_step=layers_per_step,
        noise_kind=noise_kind,
        per_layer=per_layer,
        separate_columns=separate_columns,
    )
    total = num_steps * -(-len(layers) // layers_per_step) if per_layer else num_steps
    trainer_factory(max_epochs=1, max_steps=total).fit(module, train_dataloaders=step_seeds(seed, total))
    scales = {kind: ScaleSet(value) for kind, value in fixed.items()} | {"learned": module.to_scale_set()}
    by_layer = {kind: layers_sqnr_db(layers, spec, value, seed, bits, noise_kind) for kind, value in scales.items()}
    kept, scales["kept"] = _keep_better(scales, by_layer, per_layer)
    by_layer["kept"] = {
        name: by_layer["learned" if scales["kept"].of(name) == scales["learned"].of(name) else "closed_form"][name]
        for name in by_layer["learned"]
    }
    medians = {kind: statistics.median(values.values()) for kind, values in by_layer.items()}
    return ScaleResult(spec.m, spec.points, scales, medians, by_layer, kept, tuple(module.curve))


def _keep_better(
    scales: Mapping[str, ScaleSet], sqnr_db: Mapping[str, Mapping[str, float]], per_layer: bool
) -> tuple[str, ScaleSet]:
    """The better of learned and closed form on held-out noise, for the network or for each layer."""
    closed, learned = sqnr_db["closed_form"], sqnr_db["learned"]
    if not per_layer:
        kept = "learned" if statistics.median(learned.values()) > statistics.median(closed.values()) else "closed_form"
        return kept, scales[kept]
    better = {name: scales["learned"].of(name) for name, value in learned.items() if value > closed[name]}
    kept = {0: "closed_form", len(learned): "learned"}.get(len(better), "per_layer")
    return kept, ScaleSet(scales["closed_form"].shared, better)
