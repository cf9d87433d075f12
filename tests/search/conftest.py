"""An objective that the tests share: a supernet and a metric that cost nothing, and candidates to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tmpq_exp.cost import CostModel, LinearShape
from tmpq_exp.metrics.metric import Batch, FeatureNetwork, Measurement, Metric
from tmpq_exp.quant.allocation import Allocation, Candidate
from tmpq_exp.search.objective import Objective
from tmpq_exp.search.protocol import Protocol
from tmpq_exp.search.trials import Trial, TrialLog
from tmpq_exp.zoo.conditioning import Unconditional

COST = CostModel((LinearShape("a", 4, 8, 2), LinearShape("b", 8, 4, 1)))


def candidate(weight_bits: int, act_bits: int = 8, timesteps: tuple[int, ...] = (9, 0)) -> Candidate:
    return Candidate(timesteps, (Allocation((weight_bits,) * 2, (act_bits,) * 2, (0, 0)),))


REFERENCE = candidate(32, 32, (9, 5, 0))


@dataclass
class FakeSupernet:
    """Images whose brightness is the candidate's weight bits; those of ``bad`` hold NaN.

    No more than ``room`` images of a ``large`` candidate fit into memory.
    """

    bad: Candidate | None = None
    large: tuple[Candidate, ...] = ()
    room: int = 1
    calls: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_compiled: bool = False
    task: Any = field(default_factory=lambda: fake_task())

    def latents(self, candidate: Candidate, image_indices: Sequence[int], seed: int) -> Tensor:
        return self.images(candidate, image_indices, seed) * 2 - 1

    def images(self, candidate: Candidate, image_indices: Sequence[int], seed: int) -> Tensor:
        self.calls.append((candidate.key(), tuple(image_indices), seed))
        if candidate in self.large and len(image_indices) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        images = torch.full((len(image_indices), 1, 2, 2), candidate.allocations[0].weight_bits[0] / 64)
        if candidate == self.bad:
            images[-1, 0, 0, 0] = float("nan")
        return images


class FakeNetwork:
    """One feature an image: its brightness."""

    num_features = 1

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1).mean(1, keepdim=True)

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def to(self, device: torch.device) -> FakeNetwork:
        return self


@dataclass
class FakeMetric(Metric):
    """Mean brightness; ``raises`` or an odd ``value`` stand for a metric that breaks down."""

    name: str = "brightness"
    reference: str = "r"
    value: float | None = None
    raises: Exception | None = None
    network: FeatureNetwork | None = field(default_factory=FakeNetwork)

    def start(self, *, resampled: bool = False) -> Measurement:
        return FakeMeasurement(self)

    def fingerprint(self) -> dict[str, Any]:
        return {"metric": self.name, "reference": self.reference}


class FakeMeasurement(Measurement):
    def __init__(self, metric: FakeMetric) -> None:
        self.metric = metric
        self.images: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        self.images.append(batch.images)

    def value(self) -> float:
        if self.metric.raises is not None:
            raise self.metric.raises
        return float(torch.cat(self.images).mean()) if self.metric.value is None else self.metric.value

    def interval(self, num_resamples: int, seed: int) -> tuple[float, float]:
        return self.value() - num_resamples, self.value() + num_resamples


def fake_task(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        fingerprint={"weights": "w", "sampler": "s"} | changes,
        conditions=Unconditional(),
        decode=lambda x0: x0 / 2 + 0.5,
    )


@dataclass
class Setup:
    supernet: FakeSupernet
    trials: TrialLog
    told: list[Trial]
    arguments: dict[str, Any]

    def objective(self, **changes: Any) -> Objective:
        arguments: dict[str, Any] = self.arguments | changes
        return Objective(self.supernet, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    told: list[Trial] = []
    trials = TrialLog(tmp_path / "trials.jsonl")
    arguments = {
        "metric": FakeMetric(),
        "protocol": Protocol(num_images=5, seed=3, micro_batch=2),
        "cost": COST,
        "trials": trials,
        "reference_candidate": REFERENCE,
        "state": "s",
        "on_trial": told.append,
    }
    return Setup(FakeSupernet(), trials, told, arguments)
