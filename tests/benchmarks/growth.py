"""How the cost of a candidate and of a supernet grows: with images, with layers, with bit widths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DModel

from tests.benchmarks.scoring import calibrated_module, digits_objective, others_like, uniform_candidate
from tests.benchmarks.supernets import BITS, WIDTHS, Case, supernet_ratio
from tests.benchmarks.timing import Measurement, measurement, seconds, time_ratios
from tmpq_exp.zoo.digits import DigitsDDPM


def images_growth(num_images: int, num_steps: int, rounds: int) -> Measurement:
    """Time of a candidate of ddpm_digits on twice as many images over that on ``num_images``: 2 is proportional."""
    module = calibrated_module(DigitsDDPM().task(), (BITS,))
    candidate = uniform_candidate(module, BITS, num_steps)
    with (
        digits_objective(module, candidate, 2 * num_images) as more,
        digits_objective(module, candidate, num_images) as fewer,
    ):
        for objective in (more, fewer):
            objective.evaluate(candidate, "search")
        others = others_like(candidate)
        ratios = time_ratios(
            lambda: more.evaluate(next(others), "search"),
            lambda: fewer.evaluate(next(others), "search"),
            rounds,
            round_seconds=0,
        )
    return measurement(f"a candidate on {2 * num_images} images / on {num_images}", ratios, "x", None)


def layers_growth(rounds: int) -> Measurement:
    """The supernet's price, its forward over the float one, of a network twice as deep over that of the shallow one:
    1 means that what quantization costs a layer does not depend on how many there are."""

    def unet(layers_per_block: int) -> Any:
        torch.manual_seed(0)
        network: Any = UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            block_out_channels=(64, 64),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=layers_per_block,
            add_attention=False,
        )
        return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    prices = [
        supernet_ratio(Case.of(f"{depth} a block", lambda depth=depth: unet(depth), 16), rounds)  # type: ignore[misc]
        for depth in (2, 4)
    ]
    name = "supernet / float, a network of twice the blocks / of a shallow one"
    line = measurement(name, [prices[1].ratio / prices[0].ratio], "x", None)
    return replace(line, spread=max(price.spread for price in prices))


def widths_growth(rounds: int) -> Measurement:
    """Time to build and calibrate a supernet of ddpm_digits by ranges, four bit widths over one."""
    task = DigitsDDPM().task()

    def build(widths: tuple[int, ...]) -> float:
        return seconds(lambda: calibrated_module(task, widths))

    build((BITS,))  # warm
    ratios = [build(WIDTHS) / build((BITS,)) for _ in range(rounds)]
    return measurement(f"calibration=ranges of {len(WIDTHS)} bit widths / of one, ddpm_digits", ratios, "x", None)
