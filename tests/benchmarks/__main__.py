"""What compression costs in simulation: ratios to float, measured side by side in one process.

    python -m tests.benchmarks [--rounds 7] [--threads 2] [--only conv] [--output outputs/bench.json]

Every ratio is taken within a round, where both sides run one after the other, so that a slow phase of the machine
meets both; the median and the interquartile range over rounds are printed. Models are in eval mode, float32 and
channels_last, under ``inference_mode``. Quantization is simulated: a ratio above 1 is the price of the simulation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.calibration import demo_config, demo_seconds, loss_ratio
from tests.benchmarks.growth import images_growth, layers_growth, widths_growth
from tests.benchmarks.naive import naive_ratio
from tests.benchmarks.scoring import forward_share, frechet_seconds
from tests.benchmarks.supernets import BITS, SOFTMAX_BITS, cifar_unet, supernet_benchmarks
from tests.benchmarks.timing import Measurement, at_least, measurement, rate, seconds, time_ratios
from tmpq_exp.batch_size import LARGEST
from tmpq_exp.config import CalibrationConfig
from tmpq_exp.cost import AttentionShape, CostModel
from tmpq_exp.diffusion.schedule import TimestepRule, group_minima, timestep_groups
from tmpq_exp.files import replace_file
from tmpq_exp.quant.allocation import DIRECT_TILE
from tmpq_exp.search.budget import Budget
from tmpq_exp.search.space import SearchSpace
from tmpq_exp.trace import trace_layers
from tmpq_exp.winograd.conv import WinogradMatrices, WinogradSpec, transform_weights, winograd_conv2d
from tmpq_exp.zoo.digits import DigitsDDPM

WINOGRAD_GOAL = 6.0
"""Most times that a quantized F(4,3) convolution may take longer than the float direct one."""

MEMORY_GOAL = 8.0
"""Most times its input and output that a quantized F(4,3) convolution may hold, its input included."""

IMAGES_GOAL_SECONDS = 10.0
"""Most seconds for 512 digits at 10 steps."""

CANDIDATES_GOAL = 1000.0
"""Fewest feasible candidates a second, with bits shared by all steps."""

FORWARD_GOAL = 0.9
"""Smallest share of the search's time that is spent in U-Net calls."""

FRECHET_GOAL_SECONDS = 3.0
"""Most seconds for a Frechet distance in 2048 dimensions."""

CALIBRATION_GOAL_SECONDS = 60.0
"""Most seconds for the calibration of ddpm_digits at four bit widths."""

LOSS_GOAL = 1.1
"""Most times that the loss at W5A5 may be larger than with ten times as many iterations."""


def winograd_ratio(channels: int, batch: int, size: int, rounds: int, shaped: bool = False) -> Measurement:
    """Fully quantized F(4,3) convolution over the float direct one of the same shape; shaped rounding has no goal."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    spec = WinogradSpec(4, shaped_stages=("u", "v", "m") if shaped else ())
    matrices = WinogradMatrices.from_scales(spec.transform())
    weights = transform_weights(weight, matrices, spec, 8)
    ratios = time_ratios(
        lambda: winograd_conv2d(x, weights, None, matrices, spec, 8, 1), lambda: F.conv2d(x, weight, padding=1), rounds
    )
    kind = "shaped W8A8" if shaped else "W8A8"
    name = f"Winograd F(4,3) {kind} / float direct conv, C = {channels}, {size}x{size}, batch {batch}"
    return measurement(name, ratios, "x float", None if shaped else WINOGRAD_GOAL)


@torch.inference_mode()
def winograd_memory(channels: int, batch: int, size: int) -> Measurement:
    """Most bytes that a fully quantized F(4,3) convolution holds beside its input, over input and output."""
    x, weight = torch.randn(batch, channels, size, size), torch.randn(channels, channels, 3, 3)
    spec = WinogradSpec(4)
    matrices = WinogradMatrices.from_scales(spec.transform())
    weights = transform_weights(weight, matrices, spec, 8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = winograd_conv2d(x, weights, None, matrices, spec, 8, 1)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    name = f"memory of Winograd F(4,3) W8A8 / input + output, C = {channels}, {size}x{size}, batch {batch}"
    return measurement(name, [(max(held) + x.nbytes) / (x.nbytes + y.nbytes)], "x", MEMORY_GOAL)


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
    """Seconds of a block-wise calibration of ddpm_digits; its iterations, and the seconds a unit, are in the name."""
    iterations = f"{calibration.weight_iterations} + {calibration.act_iterations} iterations"
    seconds, num_units = demo_seconds(calibration)
    name = (
        f"calibration={calibration.method}, ddpm_digits, {iterations}, {num_units} units of {seconds / num_units:.3g} s"
    )
    return measurement(name, [seconds], "s", CALIBRATION_GOAL_SECONDS)


def calibration_loss(calibration: CalibrationConfig) -> Measurement:
    """Reconstruction loss at W5A5 over that of ten times as many iterations."""
    iterations = f"{calibration.weight_iterations} + {calibration.act_iterations}"
    name = f"loss at W5A5, {iterations} iterations / ten times as many"
    return measurement(name, [loss_ratio(calibration)], "x", LOSS_GOAL)


def scoring_share(rounds: int) -> Measurement:
    """Share of the time of scoring that is spent in U-Net calls."""
    shares = [forward_share(128, 10, 4) for _ in range(rounds)]
    return at_least(FORWARD_GOAL, measurement("U-Net calls / time of scoring, ddpm_digits", shares, "", None))


def benchmarks(rounds: int) -> dict[str, Callable[[], Measurement]]:
    """All benchmarks by the name that ``--only`` looks for."""
    few = max(3, rounds // 2)
    conv = {f"conv {c}": (lambda c=c: winograd_ratio(c, 16, 32, rounds)) for c in (64, 128, 256)}  # type: ignore[misc]
    return {
        **supernet_benchmarks(rounds),
        **conv,
        "candidates": lambda: candidate_rate(500, rounds),
        "candidates per_step": lambda: candidate_rate(200, rounds, None, bits_per_step="per_step"),
        "conv 64 shaped": lambda: winograd_ratio(64, 16, 32, rounds, shaped=True),
        "conv memory": lambda: winograd_memory(64, 16, 32),
        "workers": lambda: _workers(few),
        "scoring": lambda: scoring_share(few),
        "naive loop": lambda: naive_ratio(128, 10, few),
        **(gpu_naive_loops(few) if torch.cuda.is_available() else {}),
        "growth images": lambda: images_growth(128, 10, few),
        "growth layers": lambda: layers_growth(rounds),
        "growth widths": lambda: widths_growth(few),
        "frechet": lambda: measurement(
            "Frechet distance, 2048 dimensions", [frechet_seconds(2048) for _ in range(3)], "s", FRECHET_GOAL_SECONDS
        ),
        "images": lambda: image_seconds(512, 10, few),
        "calibration seconds": lambda: calibration_seconds(demo_config().calibration),
        "calibration loss": lambda: calibration_loss(demo_config().calibration),
    }


def gpu_naive_loops(rounds: int) -> dict[str, Callable[[], Measurement]]:
    """The naive loop against ours on a GPU, both at few images a forward and at as many as we take by ourselves."""
    return {
        f"gpu naive loop {size}": lambda size=size: naive_ratio(2048, 10, rounds, "cuda", size)  # type: ignore[misc]
        for size in (256, LARGEST["cuda"])
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


def _workers(rounds: int) -> Measurement:
    from tests.benchmarks.workers import two_workers  # on Ray, an extra that the other benchmarks do without

    return two_workers(rounds)


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
    measurements = []
    for line in _measure(chosen.rounds, chosen.only):
        measurements.append(line)
        write(chosen.output, measurements)  # each at once, so that a benchmark that is stopped keeps those before
    if not measurements:
        parser.error(f"--only {chosen.only!r} fits none of: {', '.join(benchmarks(1))}")
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
