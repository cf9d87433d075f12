"""Images on their way through the metrics: none beyond the wanted ones, none after NaN, each compared with its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tmpq_exp.metrics.fidelity import Psnr
from tmpq_exp.metrics.metric import Batch, Measurement
from tmpq_exp.search.evaluation import NOTHING_MADE, Evaluation, Made


class Counting(Measurement):
    """Counts images; breaks down at ``limit``."""

    def __init__(self, limit: int = 100) -> None:
        self.limit = limit
        self.batches: list[Batch] = []

    def update(self, batch: Batch) -> None:
        self.batches.append(batch)
        if self.value() > self.limit:
            raise ValueError("too many")

    def value(self) -> float:
        return float(sum(len(batch.images) for batch in self.batches))


def evaluation(
    *, reference: Made | None = NOTHING_MADE, num_images: int = 5, num_paired: int = 3, **started: Measurement
) -> Evaluation:
    return Evaluation(started, num_images, num_paired, reference, None, {})


def made(*brightness: float) -> Made:
    return Made(torch.tensor(brightness).view(-1, 1, 1, 1).expand(-1, 1, 2, 2))


def brightness(images: Tensor | None) -> list[float]:
    assert images is not None
    return images[:, 0, 0, 0].tolist()


def test_no_image_beyond_the_wanted_ones_is_measured() -> None:
    counting = Counting()
    measured = evaluation(count=counting)
    for part in (made(0.1, 0.2), made(0.3, 0.4), made(0.5, 0.6), made(0.7)):
        measured.take(part)
    assert measured.values() == ({"count": 5}, {})
    assert brightness(counting.batches[-1].images) == pytest.approx([0.5])


def test_nothing_is_measured_from_nan_on() -> None:
    counting = Counting()
    measured = evaluation(count=counting)
    for part in (made(0.1, 0.2), made(0.3, float("nan")), made(0.5)):
        measured.take(part)
    metrics, problems = measured.values()
    assert metrics["count"] != metrics["count"]
    assert problems == {"count": "images held NaN or infinity"}
    assert len(counting.batches) == 1


def test_a_metric_that_breaks_down_takes_no_more_and_the_others_go_on() -> None:
    short, counting = Counting(limit=3), Counting()
    measured = evaluation(short=short, count=counting)
    for part in (made(0.1, 0.2), made(0.3, 0.4), made(0.5)):
        measured.take(part)
    metrics, problems = measured.values()
    assert (metrics["count"], problems) == (5, {"short": "short: too many"})
    assert len(short.batches) == 2


def test_every_image_meets_the_references_of_its_seed() -> None:
    counting = Counting()
    measured = evaluation(reference=made(0.1, 0.2, 0.3), count=counting)
    for part in (made(0.5, 0.5), made(0.5, 0.5), made(0.5)):
        measured.take(part)
    found = [brightness(batch.reference) for batch in counting.batches]
    assert found == [pytest.approx([0.1, 0.2]), pytest.approx([0.3]), []]
    assert measured.own is NOTHING_MADE


def test_the_reference_is_its_own_reference() -> None:
    counting = Counting()
    measured = evaluation(reference=None, count=counting, psnr_db=Psnr().start())
    for part in (made(0.1, 0.2), made(0.3, 0.4), made(0.5)):
        measured.take(part)
    assert [brightness(batch.reference) for batch in counting.batches] == [
        brightness(batch.images[:count]) for batch, count in zip(counting.batches, (2, 1, 0), strict=True)
    ]
    assert brightness(measured.own.images) == pytest.approx([0.1, 0.2, 0.3])
    metrics, problems = measured.values()
    assert metrics["psnr_db"] == float("inf")  # equal images are no problem
    assert problems == {}
