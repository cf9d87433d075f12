"""What compression costs in simulation: ratios to float, measured side by side in one process.

    python -m tests.benchmarks [--rounds 7] [--threads 2] [--only conv] [--output outputs/bench.json]

Every ratio is taken within a round, where both sides run one after the other, so that a slow phase of the machine
meets both; the median and the interquartile range over rounds are printed. Models are in eval mode, float32 and
channels_last, under ``inference_mode``. Quantization is simulated: a ratio above 1 is the price of the simulation.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.calibration import demo_config, demo_seconds, loss_ratio
from tmpq_exp.config import CalibrationConfig, QuantConfig, QuantizerConfig
from tmpq_exp.cost import AttentionShape, CostModel
from tmpq_exp.diffusion.schedule import TimestepRule, group_minima, timestep_groups
from tmpq_exp.files import replace_file
from tmpq_exp.quant.allocation import DIRECT_TILE, Allocation
from tmpq_exp.quant.primitives import RangeEstimator
from tmpq_exp.quant.supernet import Supernet
from tmpq_exp.search.budget import Budget
from tmpq_exp.search.space import SearchSpace
from tmpq_exp.trace import trace_layers
from tmpq_exp.winograd.conv import WinogradMatrices, WinogradSpec, transform_weights, winograd_conv2d
from tmpq_exp.zoo.digits import DigitsDDPM

SUPERNET_GOAL = 1.25
"""Most times that a quantized forward may take longer than the float one."""

WINOGRAD_GOAL = 6.0
"""Most times that a quantized F(4,3) convolution may take longer than the float direct one."""

IMAGES_GOAL_SECONDS = 10.0
"""Most seconds for 512 digits at 10 steps."""

CANDIDATES_GOAL = 1000.0
"""Fewest feasible candidates a second, with bits shared by all steps."""
CALIBRATION_GOAL_SECONDS = 60.0
"""Most seconds for the calibration of ddpm_digits at four bit widths."""

LOSS_GOAL = 1.1
"""Most times that the loss at W5A5 may be larger than with ten times as many iterations."""

BITS, SOFTMAX_BITS = 6, 8


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Args:
        name: What was measured.
        ratio: Median over rounds, in ``unit``.
        unit: ``x float`` for a ratio of times, else what it says.
        goal: Largest ratio, or lowest rate a second, that is acceptable; None where none was set.
        met: Whether the median keeps the goal.
        spread: Interquartile range over rounds, in ``unit``.
        device: Processor and threads.
    """

    name: str
    ratio: float
    unit: str
    goal: float | None
    met: bool | None
    spread: float
    device: str


def measurement(name: str, values: Sequence[float], unit: str, goal: float | None) -> Measurement:
    """Median and spread of one value a round."""
    median = statistics.median(values)
    low, high = np.quantile(values, [0.25, 0.75]).tolist()
    met = None if goal is None else median <= goal
    device = f"{processor()}, {torch.get_num_threads()} threads"
    return Measurement(name, round(median, 4), unit, goal, met, round(high - low, 4), device)


def rate(name: str, rates: Sequence[float], goal: float | None) -> Measurement:
    """Candidates a second: the goal is a lowest one."""
    line = measurement(name, rates, "1/s", None)
    return replace(line, goal=goal, met=None if goal is None else line.ratio >= goal)


def processor() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Mean wall time of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


@torch.inference_mode()
def time_ratios(
    function: Callable[[], object], reference: Callable[[], object], rounds: int, round_seconds: float = 0.2
) -> list[float]:
    """Time of a function over that of its reference, once a round; which of them goes first alternates."""
    for warm in (function, reference):
        warm()
    repeats = max(1, round(round_seconds / seconds(reference))) if rounds > 1 else 1
    ratios = []
    for index in range(rounds):
        order = (function, reference) if index % 2 else (reference, function)
        times = {side: seconds(side, repeats) for side in order}
        ratios.append(times[function] / times[reference])
    return ratios


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
def uniform_supernet(network: nn.Module, x: Tensor, **conditioning: Tensor) -> tuple[Supernet, Allocation]:
    """A calibrated supernet with direct convolutions, and its uniform W6A6 allocation."""
    timestep = torch.zeros(1, dtype=torch.long)
    first = {key: value[:1] for key, value in conditioning.items()}
    layers = trace_layers(network, lambda model: model(x[:1], timestep, **first))
    weights = tuple(SOFTMAX_BITS if isinstance(shape, AttentionShape) else BITS for shape in layers)
    allocation = Allocation(weights, (BITS,) * len(layers), (DIRECT_TILE,) * len(layers))
    config = QuantConfig()
    for quantizer in (config.weight, config.act):
        assert isinstance(quantizer, QuantizerConfig)
        quantizer.estimator = RangeEstimator.MINMAX.value  # the range has no influence on the time
    supernet = Supernet(network, layers, [(bits,) for bits in weights], [(BITS,)] * len(layers), config)
    generator = torch.Generator().manual_seed(0)
    quantizers = [quantizer for layer in supernet.layers for quantizer in layer.act_quantizers()]
    for quantizer in quantizers:
        quantizer.start_observing()
    with supernet.observing(lambda quantizer, value: quantizer.observe(value, 1024, generator)):
        supernet(x, torch.zeros(len(x), dtype=torch.long), **conditioning)
    for quantizer in quantizers:
        quantizer.finish_observing()
    for layer in supernet.layers:
        rows = layer.weight_rows()
        if rows is not None:
            rows[0].estimate(rows[1])
    supernet.quantizers_changed()
    return supernet, allocation


def supernet_ratio(name: str, make: Callable[[], nn.Module], batch: int, rounds: int) -> Measurement:
    """Forward of the supernet, every layer at W6A6 and direct, over that of the float network."""
    network: Any = make()
    config = network.config
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size)
    x = x.contiguous(memory_format=torch.channels_last)
    timestep = torch.full((batch,), 500)
    conditioning = {} if config.num_class_embeds is None else {"class_labels": torch.arange(batch) % 10}
    supernet, allocation = uniform_supernet(network, x, **conditioning)
    with supernet.subnet(allocation):
        ratios = time_ratios(
            lambda: supernet(x, timestep, **conditioning), lambda: network(x, timestep, **conditioning), rounds
        )
    return measurement(f"supernet W6A6 / float, {name}, batch {batch}", ratios, "x float", SUPERNET_GOAL)


def winograd_ratio(channels: int, batch: int, size: int, rounds: int) -> Measurement:
    """Fully quantized F(4,3) convolution over the float direct one of the same shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    spec = WinogradSpec(4)
    matrices = WinogradMatrices.from_scales(spec.transform())
    u = transform_weights(weight, matrices, spec, 8)
    ratios = time_ratios(
        lambda: winograd_conv2d(x, u, None, matrices, spec, 8, 1), lambda: F.conv2d(x, weight, padding=1), rounds
    )
    name = f"Winograd F(4,3) W8A8 / float direct conv, C = {channels}, {size}x{size}, batch {batch}"
    return measurement(name, ratios, "x float", WINOGRAD_GOAL)


def candidate_rate(
    num_candidates: int, rounds: int, goal: float | None = CANDIDATES_GOAL, **space_arguments: Any
) -> Measurement:
    """Candidates drawn, repaired and filled in a second, at W6A6 on the CIFAR-10 DDIM network."""
    with torch.device("meta"):
        x, timestep = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long)
        layers = trace_layers(cifar_unet(), lambda network: network(x, timestep))
    cost = CostModel(layers)
    weights = tuple((SOFTMAX_BITS,) if isinstance(shape, AttentionShape) else (8, 7, 6, 5) for shape in layers)
    space = SearchSpace(
        timestep_groups(1000, 10, TimestepRule.QUADRATIC),
        weights,
        ((8, 7, 6, 5),) * len(layers),
        ((DIRECT_TILE,),) * len(layers),
        **space_arguments,
    )
    budget = Budget(space, cost, cost.bitops(space.uniform(group_minima(space.timestep_groups), BITS, BITS)))
    rates = []
    for index in range(rounds):
        rng = np.random.default_rng(index)

        def make(rng: np.random.Generator = rng) -> None:
            drawn = space.sample(rng, highest_bits=True, max_steps=budget.max_steps)
            assert budget.is_feasible(budget.fill(budget.repair(drawn, rng), rng))

        rates.append(1 / seconds(make, num_candidates))
    return rate(f"filled candidates at W6A6, {len(layers)} layers, {space.bits_per_step.value} bits", rates, goal)


def image_seconds(num_images: int, num_steps: int, rounds: int) -> Measurement:
    """Seconds of float digits, in micro-batches of 64."""
    task = DigitsDDPM().task()
    timesteps = range(task.num_train_timesteps - 1, 0, -(task.num_train_timesteps // num_steps))[:num_steps]
    starts = range(0, num_images, 64)

    def sample() -> None:
        for start in starts:
            task.sample(task.unet, range(start, min(start + 64, num_images)), timesteps, 0)

    with torch.inference_mode():
        task.sample(task.unet, range(min(64, num_images)), timesteps[:1], 0)  # warm
        values = [seconds(sample) for _ in range(rounds)]
    return measurement(f"{num_images} float digits at {num_steps} steps", values, "s", IMAGES_GOAL_SECONDS)


def calibration_seconds(calibration: CalibrationConfig) -> Measurement:
    """Seconds of a block-wise calibration of ddpm_digits; its iterations are in the name."""
    iterations = f"{calibration.weight_iterations} + {calibration.act_iterations} iterations"
    name = f"calibration={calibration.method}, ddpm_digits, {iterations}"
    return measurement(name, [demo_seconds(calibration)], "s", CALIBRATION_GOAL_SECONDS)


def calibration_loss(calibration: CalibrationConfig) -> Measurement:
    """Reconstruction loss at W5A5 over that of ten times as many iterations."""
    iterations = f"{calibration.weight_iterations} + {calibration.act_iterations}"
    name = f"loss at W5A5, {iterations} iterations / ten times as many"
    return measurement(name, [loss_ratio(calibration)], "x", LOSS_GOAL)


def benchmarks(rounds: int) -> dict[str, Callable[[], Measurement]]:
    """All benchmarks by the name that ``--only`` looks for."""
    few = max(3, rounds // 2)
    conv = {f"conv {c}": (lambda c=c: winograd_ratio(c, 16, 32, rounds)) for c in (64, 128, 256)}  # type: ignore[misc]
    return {
        "supernet ddpm_digits": lambda: supernet_ratio("ddpm_digits", digits_unet, 16, 3 * rounds),
        "supernet cifar10": lambda: supernet_ratio("CIFAR-10 DDIM 35.7 M", cifar_unet, 16, rounds),
        **conv,
        "candidates": lambda: candidate_rate(500, rounds),
        "candidates per_step": lambda: candidate_rate(200, rounds, None, bits_per_step="per_step"),
        "images": lambda: image_seconds(512, 10, few),
        "calibration seconds": lambda: calibration_seconds(demo_config().calibration),
        "calibration loss": lambda: calibration_loss(demo_config().calibration),
    }


def table(measurements: Sequence[Measurement]) -> Table:
    """Measurements for the terminal."""
    made = Table(title=measurements[0].device)
    for heading in ("benchmark", "median", "spread", "goal", "met"):
        made.add_column(heading, justify="left" if heading == "benchmark" else "right")
    for line in measurements:
        goal = "-" if line.goal is None else f"{line.goal:g}"
        met = {None: "-", True: "yes", False: "no"}[line.met]
        made.add_row(line.name, f"{line.ratio:.4g} {line.unit}", f"{line.spread:.2g}", goal, met)
    return made


def write(path: Path, measurements: Sequence[Measurement]) -> None:
    """All measurements as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps([asdict(line) for line in measurements], indent=2) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each ratio, at least 1 (7)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, at least 1 (2)")
    parser.add_argument("--only", default="", help="only benchmarks whose name holds this")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench.json"), help="JSON file to write")
    chosen = parser.parse_args(arguments)
    if min(chosen.rounds, chosen.threads) < 1:
        parser.error(f"--rounds and --threads must be at least 1, found {chosen.rounds} and {chosen.threads}")
    torch.set_num_threads(chosen.threads)
    measurements = list(_measure(chosen.rounds, chosen.only))
    if not measurements:
        parser.error(f"--only {chosen.only!r} fits none of: {', '.join(benchmarks(1))}")
    write(chosen.output, measurements)
    Console(width=110).print(table(measurements))
    print(f"written to {chosen.output}")


def _measure(rounds: int, only: str) -> Iterator[Measurement]:
    for name, benchmark in benchmarks(rounds).items():
        if only in name:
            start = time.perf_counter()
            line = benchmark()
            print(f"{name:<22} {line.ratio:.4g} {line.unit}  in {time.perf_counter() - start:.0f} s", file=sys.stderr)
            yield line


if __name__ == "__main__":
    main()
