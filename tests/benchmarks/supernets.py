"""The supernet against its float network, and against fake quantization as peers write it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.timing import Measurement, device_name, measurement, time_ratios
from tmpq_exp.config import QuantConfig, QuantizerConfig
from tmpq_exp.cost import AttentionShape
from tmpq_exp.quant.allocation import DIRECT_TILE, Allocation
from tmpq_exp.quant.layers import WeightedLayer
from tmpq_exp.quant.primitives import RangeEstimator
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.quant.timestep_path import find_timestep_layers
from tmpq_exp.trace import trace_layers
from tmpq_exp.zoo.digits import DigitsDDPM

SUPERNET_GOAL = 1.10
"""Most times that a quantized forward may take longer than the float one."""

COMPILED_GPU_GOAL = 1.15
"""The same on a GPU for the compiled supernet, against the float network as it is."""

STATE_GOAL = 1.05
"""Most bytes of the quantized state of four bit widths, in float32 copies of the network."""

BITS, SOFTMAX_BITS = 6, 8

WIDTHS = (8, 7, 6, 5)


def cifar_unet() -> nn.Module:
    """The 35.7 M network of DDPM and DDIM on CIFAR-10 (Ho et al. 2020), with random weights."""
    torch.manual_seed(0)
    network: nn.Module = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=None,
        norm_num_groups=32,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def digits_unet() -> nn.Module:
    """The embedded digits model."""
    return DigitsDDPM().load()


@torch.inference_mode()
def uniform_supernet(
    network: nn.Module, x: Tensor, *, compiled: bool = False, **conditioning: Tensor
) -> tuple[Supernet, Allocation]:
    """A calibrated supernet with direct convolutions, and its uniform W6A6 allocation."""
    timesteps = torch.zeros(len(x), dtype=torch.long, device=x.device)
    first = {key: value[:1] for key, value in conditioning.items()}

    def probe(model: Any) -> object:
        return model(x[:1], timesteps[:1], **first)

    layers, of_timestep = trace_layers(network, probe), find_timestep_layers(network, probe)
    weights = tuple(SOFTMAX_BITS if isinstance(shape, AttentionShape) else BITS for shape in layers)
    allocation = Allocation(weights, (BITS,) * len(layers), (DIRECT_TILE,) * len(layers))
    config = QuantConfig(compile=compiled)
    for settings in (config.weight, config.act):
        assert isinstance(settings, QuantizerConfig)
        settings.estimator = RangeEstimator.MINMAX.value  # the range has no influence on the time
    bits = [(bits,) for bits in weights], [(BITS,)] * len(layers)
    supernet = Supernet(network, layers, *bits, config, timestep_layers=of_timestep)
    generator = torch.Generator().manual_seed(0)
    quantizers = [quantizer for layer in supernet.layers for quantizer in layer.act_quantizers()]
    for quantizer in quantizers:
        quantizer.start_observing()
    with supernet.observing(lambda quantizer, value: quantizer.observe(value, 1024, generator)):
        supernet(x, timesteps, **conditioning)
    for quantizer in quantizers:
        quantizer.finish_observing()
    for layer in supernet.layers:
        rows = layer.weight_rows()
        if rows is not None:
            rows[0].estimate(rows[1])
    supernet.quantizers_changed()
    return supernet, allocation


class PlainLayer(nn.Module):
    """Fake quantization as it is commonly written: weights and input quantized anew in every forward.

    Args:
        layer: Convolution or linear layer.
        low, high: Range of its input.

    References:
        Li et al., "Q-Diffusion: Quantizing Diffusion Models", ICCV 2023: uniform quantizers per output channel for
        weights, per tensor for activations. Written from the description.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, low: float, high: float) -> None:
        super().__init__()
        self.layer, levels = layer, 2**BITS - 1
        flat = layer.weight.detach().flatten(1)
        shape = [-1] + [1] * (layer.weight.dim() - 1)
        self.weight_scale = ((flat.amax(1) - flat.amin(1)) / levels).view(shape)
        self.weight_zero = (-flat.amin(1).view(shape) / self.weight_scale).round()
        self.scale = torch.tensor(max(high - low, 1e-8) / levels, device=flat.device)
        self.zero = (-low / self.scale).round()

    def forward(self, x: Tensor) -> Tensor:
        """Like the layer."""
        x = _plainly(x, self.scale, self.zero)
        weight = _plainly(self.layer.weight, self.weight_scale, self.weight_zero)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        y: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return y


def _plainly(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    integers = torch.clamp(torch.round(x / scale) + zero_point, 0, 2**BITS - 1)
    return (integers - zero_point) * scale


@torch.inference_mode()
def plain_network(network: nn.Module, call: Callable[[nn.Module], object]) -> nn.Module:
    """A copy of a network whose convolutions and linear layers are ``PlainLayer``; ``call`` shows the ranges."""
    copied = copy.deepcopy(network)
    names = [name for name, module in copied.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    ranges: dict[str, tuple[float, float]] = {}
    hooks = [
        copied.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: ranges.__setitem__(name, (float(inputs[0].min()), float(inputs[0].max())))  # type: ignore[misc]
        )
        for name in names
    ]
    call(copied)
    for hook in hooks:
        hook.remove()
    for name in names:
        parent, _, child = name.rpartition(".")
        layer: Any = copied.get_submodule(name)
        setattr(copied.get_submodule(parent), child, PlainLayer(layer, *ranges[name]))
    return copied


@dataclass(frozen=True)
class Case:
    """A float network at a batch size, with the input it is timed on."""

    name: str
    network: nn.Module
    x: Tensor
    conditioning: dict[str, Tensor]

    @classmethod
    def of(cls, name: str, make: Callable[[], nn.Module], batch: int, device: str = "cpu") -> Case:
        """A network on a device."""
        network: Any = make().to(device)
        config = network.config
        x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, device=device)
        labels = {} if config.num_class_embeds is None else {"class_labels": torch.arange(batch, device=device) % 10}
        return cls(f"{name}, batch {batch}", network, x.contiguous(memory_format=torch.channels_last), labels)

    def call(self, network: Callable[..., object]) -> object:
        """One forward."""
        return network(self.x, torch.full((len(self.x),), 500, device=self.x.device), **self.conditioning)

    @property
    def device_name(self) -> str | None:
        """Name of the GPU; None on the CPU."""
        return device_name(self.x.device)


def supernet_ratio(case: Case, rounds: int, *, compiled: bool = False) -> Measurement:
    """Forward of the supernet, every layer at W6A6 and direct, over that of the float network, not compiled."""
    supernet, allocation = uniform_supernet(case.network, case.x, compiled=compiled, **case.conditioning)
    with supernet.subnet(allocation):
        ratios = time_ratios(lambda: case.call(supernet), lambda: case.call(case.network), rounds)
    kind = "compiled supernet" if compiled else "supernet"
    goal = (COMPILED_GPU_GOAL if compiled else None) if case.x.is_cuda else SUPERNET_GOAL
    return measurement(f"{kind} W6A6 / float, {case.name}", ratios, "x float", goal, case.device_name)


def timestep_ratio(case: Case, rounds: int) -> Measurement:
    """Forward of the supernet where the path of the timestep is known over that where it is computed."""
    supernet, allocation = uniform_supernet(case.network, case.x, **case.conditioning)

    def known() -> None:
        with supernet.at_timestep(500):
            case.call(supernet)

    with supernet.subnet(allocation):
        ratios = time_ratios(known, lambda: case.call(supernet), rounds)
    return measurement(f"timestep's path known / computed, {case.name}", ratios, "x", None, case.device_name)


def float_ratio(case: Case, rounds: int) -> Measurement:
    """Forward of the compiled float network over that of the same network as it is."""
    fast = torch.compile(case.network)
    ratios = time_ratios(lambda: case.call(fast), lambda: case.call(case.network), rounds)
    return measurement(f"compiled float / float, {case.name}", ratios, "x float", None, case.device_name)


def plain_ratio(case: Case, rounds: int, *, compiled: bool = False) -> Measurement:
    """Forward of plain fake quantization over that of the supernet, both at W6A6; attention products not quantized
    in the first."""
    plain = plain_network(case.network, case.call)
    supernet, allocation = uniform_supernet(case.network, case.x, compiled=compiled, **case.conditioning)
    with supernet.subnet(allocation):
        ratios = time_ratios(lambda: case.call(plain), lambda: case.call(supernet), rounds)
    kind = "compiled supernet" if compiled else "supernet"
    return measurement(f"plain fake quantization / {kind}, {case.name}", ratios, "x ours", None, case.device_name)


@torch.inference_mode()
def state_ratio(name: str, network: Any) -> Measurement:
    """Bytes of all that a supernet of four bit widths holds beside the float weights, learned roundings included, over
    those of one float32 copy of the network."""
    labels = {} if network.config.num_class_embeds is None else {"class_labels": torch.zeros(1, dtype=torch.long)}
    case = Case(name, network, torch.zeros(1, network.config.in_channels, *[network.config.sample_size] * 2), labels)
    layers = trace_layers(network, case.call)
    supernet = Supernet(network, layers, [WIDTHS] * len(layers), [WIDTHS] * len(layers), QuantConfig())
    for layer in supernet.layers:
        if isinstance(layer, WeightedLayer):
            quantizer, rows = layer.weight_rows()
            quantizer.estimate(rows)
            quantizer.start_rounding(layer.float_layer.weight)
    held = sum(tensor.nbytes for tensor in supernet.quantizer_state().values())
    weights = sum(parameter.nbytes for parameter in network.parameters())
    title = f"state of {len(WIDTHS)} bit widths / float32 copy, {name}"
    return measurement(title, [held / weights], "x", STATE_GOAL)


def supernet_benchmarks(rounds: int) -> dict[str, Callable[[], Measurement]]:
    """Those of this module by name; with a GPU also there."""
    cifar = "CIFAR-10 DDIM 35.7 M"
    found: dict[str, Callable[[], Measurement]] = {
        "supernet ddpm_digits": lambda: supernet_ratio(Case.of("ddpm_digits", digits_unet, 16), 3 * rounds),
        "supernet cifar10": lambda: supernet_ratio(Case.of(cifar, cifar_unet, 16), rounds),
        "compiled supernet ddpm_digits": lambda: supernet_ratio(
            Case.of("ddpm_digits", digits_unet, 16), 3 * rounds, compiled=True
        ),
        "compiled supernet cifar10": lambda: supernet_ratio(Case.of(cifar, cifar_unet, 16), rounds, compiled=True),
        "timestep 1": lambda: timestep_ratio(Case.of(cifar, cifar_unet, 1), 3 * rounds),
        "timestep 16": lambda: timestep_ratio(Case.of(cifar, cifar_unet, 16), rounds),
        "state ddpm_digits": lambda: state_ratio("ddpm_digits", digits_unet()),
        "state cifar10": lambda: state_ratio(cifar, cifar_unet()),
        "plain ddpm_digits": lambda: plain_ratio(Case.of("ddpm_digits", digits_unet, 16), rounds),
        "plain cifar10": lambda: plain_ratio(Case.of(cifar, cifar_unet, 16), rounds),
    }
    for batch in (64, 256) if torch.cuda.is_available() else ():

        def case(batch: int = batch) -> Case:
            return Case.of(cifar, cifar_unet, batch, "cuda")

        found |= {
            f"gpu supernet {batch}": lambda case=case: supernet_ratio(case(), rounds),  # type: ignore[misc]
            f"gpu compiled supernet {batch}": lambda case=case: supernet_ratio(case(), rounds, compiled=True),  # type: ignore[misc]
            f"gpu compiled float {batch}": lambda case=case: float_ratio(case(), rounds),  # type: ignore[misc]
            f"gpu plain {batch}": lambda case=case: plain_ratio(case(), rounds, compiled=True),  # type: ignore[misc]
        }
    return found
