"""A candidate's score as a naive loop takes it, against ours: the same images, feature network and distance."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from pytorch_fid.fid_score import calculate_activation_statistics, calculate_frechet_distance
from torch import Tensor, nn
from torchvision.utils import save_image

from tests.benchmarks.scoring import MICRO_BATCH, calibrated_module, digits_objective, others_like, uniform_candidate
from tests.benchmarks.supernets import BITS, plain_network
from tests.benchmarks.timing import Measurement, at_least, device_name, measurement, time_ratios
from tmpq_exp.metrics.frechet import digits_frechet
from tmpq_exp.zoo.digits import DigitsDDPM

NAIVE_GOAL = 10.0
"""Fewest times that the naive loop may take longer."""


class Features(nn.Module):
    """A feature network in the form that pytorch-fid asks for: three equal channels in, a list of maps out."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        """``(N, 3, H, W) -> [(N, d, 1, 1)]``."""
        return [self.network(images[:, :1])[:, :, None, None]]


def naive_ratio(
    num_images: int, num_steps: int, rounds: int, device: str = "cpu", micro_batch: int = MICRO_BATCH
) -> Measurement:
    """Time of a naive loop over ours for one candidate of ddpm_digits at W6A6.

    The loop estimates ranges for the candidate, quantizes weights in every call, writes each image as a PNG and lets
    pytorch-fid read, extract and compare. Ours does the same through ``Objective``, with the trial's line on disk;
    the float reference's images, which it compares with besides, are made before. Both run ``micro_batch`` images a
    forward.
    """
    task = DigitsDDPM().task()
    module = calibrated_module(task, (BITS,)).to(device)
    metric = digits_frechet()
    metric.network.to(device)
    candidate = uniform_candidate(module, BITS, num_steps)
    batches = [range(first, first + micro_batch) for first in range(0, num_images, micro_batch)]

    def naive(folder: Path) -> float:
        plain = plain_network(task.unet, task.probe)
        for indices in batches:
            for index, image in zip(indices, task.sample(plain, indices, candidate.timesteps, 0), strict=True):
                save_image(image, folder / f"{index}.png")
        files = sorted(folder.glob("*.png"))[:num_images]
        mean, covariance = calculate_activation_statistics(
            files, Features(metric.network.features), 50, metric.reference.mean.numel(), device, 0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scipy, about how pytorch-fid asks for the root, and of few images
            found: float = calculate_frechet_distance(
                mean, covariance, metric.reference.mean.numpy(), metric.reference.covariance.numpy()
            )
        return found

    ours = digits_objective(module, candidate, num_images, micro_batch)
    with tempfile.TemporaryDirectory() as folder, ours as objective:
        objective.evaluate(candidate, "search")
        others = others_like(candidate)
        ratios = time_ratios(
            lambda: naive(Path(folder)),
            lambda: objective.evaluate(next(others), "search"),
            rounds,
            round_seconds=0,
        )
    name = f"naive loop / ours, a candidate of ddpm_digits, {num_images} images, {micro_batch} a forward"
    line = measurement(name, ratios, "x ours", None, device_name(device))
    return at_least(NAIVE_GOAL, line)
