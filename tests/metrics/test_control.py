"""The control variate against the plain distance, on features whose distribution is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.metrics.control import RIDGE_IMAGES, ControlledFrechet
from tmpq_exp.metrics.frechet import FrechetMetric, frechet_distance
from tmpq_exp.metrics.metric import Batch
from tmpq_exp.metrics.statistics import FeatureStatistics

DIM = 12


class Pixels(nn.Module):
    """Features are the pixels."""

    num_features = DIM

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def statistics(features: Tensor) -> FeatureStatistics:
    return FeatureStatistics(features.mean(0), torch.cov(features.T), len(features))


def controlled(metric: FrechetMetric, known: Tensor, few: Tensor) -> ControlledFrechet:
    """The metric with a control of these features, known from many images and at the few seeds."""
    return ControlledFrechet(metric, lambda: statistics(known), lambda: few, {"schedule": "test"})


def populations(seed: int) -> tuple[FrechetMetric, Tensor, Tensor, Tensor]:
    """The metric, and features of a control and of two candidates, which lie near it, at 4,096 common seeds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, DIM, generator=generator, dtype=torch.float64)

    spread = torch.linspace(0.3, 3, DIM, dtype=torch.float64)
    control = normal(4096) * spread
    first = control + 0.2 * normal(4096) + 0.1
    second = 1.05 * control + 0.2 * normal(4096)
    return FrechetMetric("fd_test", Pixels(), statistics(normal(4096) * spread.flip(0) + 0.5)), control, first, second


def test_a_candidate_equal_to_the_control_has_the_controls_distance() -> None:
    metric, control, _, _ = populations(0)
    expected = frechet_distance(statistics(control), metric.reference)
    found = controlled(metric, control, control[:50]).distance(control[:50])
    assert found == pytest.approx(expected, rel=1e-9)


def test_a_shift_of_all_images_is_found_exactly() -> None:
    metric, control, _, _ = populations(1)
    moved = control + torch.linspace(-1, 1, DIM, dtype=torch.float64)
    expected = frechet_distance(statistics(moved), metric.reference)
    assert controlled(metric, control, control[:20]).distance(moved[:20]) == pytest.approx(expected, rel=1e-9)


def test_images_that_are_all_drawn_together_are_found_exactly() -> None:
    metric, control, _, _ = populations(5)
    mean = control.mean(0)
    moved = mean + 0.9 * (control - mean)
    expected = frechet_distance(statistics(moved), metric.reference)
    found = controlled(metric, control, control[:20]).distance(moved[:20])
    assert found == pytest.approx(expected, rel=1e-2)


def test_differences_of_candidates_have_less_noise_than_plain_ones() -> None:
    metric, control, first, second = populations(2)
    true = frechet_distance(statistics(first), metric.reference) - frechet_distance(
        statistics(second), metric.reference
    )
    plain = control_variate = 0.0
    for start in range(0, 2048, 64):
        few = slice(start, start + 64)
        a, b = (frechet_distance(statistics(x[few]), metric.reference) for x in (first, second))
        plain += (a - b - true) ** 2
        variate = controlled(metric, control[2048:], control[few])
        control_variate += (variate.distance(first[few]) - variate.distance(second[few]) - true) ** 2
    assert control_variate < 0.5 * plain


def test_weights_count_images() -> None:
    metric, control, first, _ = populations(3)
    weights = torch.cat([torch.full((10,), 2.0), torch.ones(30)]).double()
    twice = controlled(metric, control, torch.cat([control[:40], control[:10]]))
    once = controlled(metric, control, control[:40])
    expected = twice.distance(torch.cat([first[:40], first[:10]]))
    assert once.distance(first[:40], weights) == pytest.approx(expected, rel=1e-9)


def by_single_features(variate: ControlledFrechet, features: Tensor) -> float:
    """The estimate as its class states it, from every image's features."""
    known, difference = variate.statistics(), features - variate.features()
    control, centred = (x - x.mean(0) for x in (variate.features(), difference))
    variances, covariances = (control.T @ x / (len(features) - 1) for x in (control, centred))
    identity, size = torch.eye(DIM, dtype=torch.float64), variances.trace()
    common = covariances.trace() / size * identity
    ridge = RIDGE_IMAGES / len(features) * size / DIM * identity
    slope = common + torch.linalg.solve(variances + ridge, covariances - variances @ common).T
    carried = (identity + slope) @ known.covariance @ (identity + slope).T
    rest = torch.cov((centred - control @ slope.T).T)
    return variate.metric.distance(known.mean + difference.mean(0), carried + rest)


@pytest.mark.parametrize("count", [5, 300])
def test_running_sums_give_what_single_features_give(count: int) -> None:
    metric, control, first, _ = populations(6)
    images = to_pixels(first[:count]).float().view(count, 1, 3, 4)
    variate = controlled(metric, to_pixels(control[2048:]), to_pixels(control[:count]))
    measurement = variate.start()
    for batch in images.split(7):
        measurement.update(Batch(batch))
    features = torch.cat([Batch(batch).features(metric.network) for batch in images.split(7)])
    assert measurement.value() == pytest.approx(by_single_features(variate, features), rel=1e-9)
    assert measurement.interval(10, seed=0) is None, "no features are kept for it"


def test_batches_are_one_measurement_and_its_interval_narrows_with_more_images() -> None:
    metric, control, first, _ = populations(4)
    widths = []
    for count in (50, 400):
        variate = controlled(metric, to_pixels(control[2048:]), to_pixels(control[:count]))
        measurement = variate.start(resampled=True)
        images = to_pixels(first[:count]).float().view(count, 1, 3, 4)
        for batch in images.split(25):
            measurement.update(Batch(batch))
        low, high = measurement.interval(60, seed=0) or (0.0, 0.0)
        assert low < measurement.value() < high
        widths.append(high - low)
    assert widths[1] < widths[0]


def to_pixels(features: Tensor) -> Tensor:
    """Into [0, 1], where images are."""
    return (features / 24 + 0.5).clamp(0, 1)
