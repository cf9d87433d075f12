"""Where the time of a search goes, and how long a Frechet distance takes."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tests.benchmarks.supernets import SOFTMAX_BITS
from tmpq_exp.config import CalibrationConfig, QuantConfig
from tmpq_exp.cost import AttentionShape, CostModel
from tmpq_exp.diffusion.schedule import TimestepSpacing, spaced_timesteps
from tmpq_exp.metrics.frechet import digits_frechet, frechet_distance
from tmpq_exp.metrics.statistics import FeatureStatistics
from tmpq_exp.quant.allocation import DIRECT_TILE, Allocation, Candidate
from tmpq_exp.quant.calibration import CalibrationModule
from tmpq_exp.quant.states import trajectory_states
from tmpq_exp.quant.supernet import SupernetModule
from tmpq_exp.search.objective import Objective
from tmpq_exp.search.protocol import Protocol
from tmpq_exp.search.trials import TrialLog
from tmpq_exp.zoo.digits import DigitsDDPM
from tmpq_exp.zoo.task import DiffusionTask, task_layers

MICRO_BATCH = 64


def forward_share(num_images: int, num_steps: int, num_candidates: int) -> float:
    """Share of the time of scoring candidates of ddpm_digits that U-Net calls take, in [0, 1].

    A scored candidate is quantized weights, noise, sampling, features, the Frechet distance and its line on disk. The
    images of the float reference are made before.
    """
    task = DigitsDDPM().task()
    cost = CostModel(task_layers(task))
    module = calibrated_module(task, (8, 7, 6, 5))
    weights = [layer.weight_choices for layer in module.supernet.layers]
    schedule = spaced_timesteps(task.num_train_timesteps, num_steps, TimestepSpacing.QUADRATIC)
    inside = 0.0
    forward = module.supernet.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            inside += time.perf_counter() - start

    module.supernet.forward = timed  # type: ignore[method-assign]
    candidates = [
        Candidate(schedule, (Allocation(tuple(row[i % len(row)] for row in weights), (8 - i % 4,) * len(cost), tiles),))
        for i, tiles in enumerate([(0,) * len(cost)] * (num_candidates + 1))
    ]
    with digits_objective(module, candidates[0], num_images) as objective:
        objective.evaluate(candidates[0], "search")
        inside, start = 0.0, time.perf_counter()
        for candidate in candidates[1:]:
            objective.evaluate(candidate, "search")
        return inside / (time.perf_counter() - start)


def calibrated_module(task: DiffusionTask, bits: Sequence[int]) -> SupernetModule:
    """A supernet that holds these bits everywhere, but 8 for the softmax, with ranges from a few states."""
    layers = task_layers(task)
    weights = [(SOFTMAX_BITS,) if isinstance(shape, AttentionShape) else tuple(bits) for shape in layers]
    module = SupernetModule(task, layers, weights, [tuple(bits)] * len(layers), QuantConfig())
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CalibrationModule(module.supernet, trajectory_states(task, 4, 4, 0), CalibrationConfig(), 0))
    return module


@contextmanager
def digits_objective(
    module: SupernetModule, reference: Candidate, num_images: int, micro_batch: int = MICRO_BATCH
) -> Iterator[Objective]:
    """Scores candidates of ddpm_digits as a search does, trials on disk included, ``micro_batch`` images a forward."""
    with tempfile.TemporaryDirectory() as folder:
        yield Objective(
            module,
            digits_frechet(),
            Protocol(num_images, 0, micro_batch),
            CostModel(module.supernet.shapes),
            TrialLog(Path(folder) / "trials.jsonl"),
            reference_candidate=reference,
            state="of this call",
            on_trial=lambda _: None,
        )


def uniform_candidate(module: SupernetModule, bits: int, num_steps: int) -> Candidate:
    """The same bits everywhere, but 8 for the softmax, on the quadratic schedule; every layer direct."""
    steps = spaced_timesteps(module.task.num_train_timesteps, num_steps, TimestepSpacing.QUADRATIC)
    layers = module.supernet.shapes
    weights = tuple(SOFTMAX_BITS if isinstance(shape, AttentionShape) else bits for shape in layers)
    return Candidate(steps, (Allocation(weights, (bits,) * len(layers), (DIRECT_TILE,) * len(layers)),))


def others_like(candidate: Candidate) -> Iterator[Candidate]:
    """Candidates of the same cost, no two the same: the objective remembers what it has scored."""
    first, *rest = candidate.timesteps
    for added in itertools.count(1):
        yield Candidate((first + added, *rest), candidate.allocations)


def frechet_seconds(dimensions: int) -> float:
    """Seconds of one Frechet distance of Gaussians of full rank, the root of the reference included."""
    generator = torch.Generator().manual_seed(0)

    def statistics() -> FeatureStatistics:
        fit = torch.randn(2 * dimensions, dimensions, generator=generator, dtype=torch.float64)
        return FeatureStatistics(fit.mean(0), fit.T.cov(), len(fit))

    a, b = statistics(), statistics()
    start = time.perf_counter()
    frechet_distance(a, b)
    return time.perf_counter() - start
