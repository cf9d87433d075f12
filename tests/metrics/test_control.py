"""The control variate against the plain distance, on features whose distribution is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tmpq_exp.metrics.control import ControlVariate
from tmpq_exp.metrics.frechet import FeatureStatistics, FrechetMetric, frechet_distance

DIM = 12


def metric_of(reference: FeatureStatistics) -> FrechetMetric:
    network: object = nn.Identity()
    return FrechetMetric("fd_test", network, reference)  # type: ignore[arg-type]


def statistics(features: Tensor) -> FeatureStatistics:
    return FeatureStatistics(features.mean(0), torch.cov(features.T), len(features))


def populations(seed: int) -> tuple[FrechetMetric, Tensor, Tensor, Tensor]:
    """The metric, and features of a control and of two candidates, which lie near it, at 4,096 common seeds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, DIM, generator=generator, dtype=torch.float64)

    spread = torch.linspace(0.3, 3, DIM, dtype=torch.float64)
    control = normal(4096) * spread
    first = control + 0.2 * normal(4096) + 0.1
    second = 1.05 * control + 0.2 * normal(4096)
    return metric_of(statistics(normal(4096) * spread.flip(0) + 0.5)), control, first, second


def test_a_candidate_equal_to_the_control_has_the_controls_distance() -> None:
    metric, control, _, _ = populations(0)
    variate = ControlVariate(metric, statistics(control))
    expected = frechet_distance(statistics(control), metric.reference)
    assert variate.distance(control[:50], control[:50]) == pytest.approx(expected, rel=1e-9)


def test_a_shift_of_all_images_is_found_exactly() -> None:
    metric, control, _, _ = populations(1)
    variate = ControlVariate(metric, statistics(control))
    moved = control + torch.linspace(-1, 1, DIM, dtype=torch.float64)
    expected = frechet_distance(statistics(moved), metric.reference)
    assert variate.distance(moved[:20], control[:20]) == pytest.approx(expected, rel=1e-9)


def test_differences_of_candidates_have_less_noise_than_plain_ones() -> None:
    metric, control, first, second = populations(2)
    variate = ControlVariate(metric, statistics(control[2048:]))
    truth = metric.distance(first.mean(0), torch.cov(first.T)) - metric.distance(second.mean(0), torch.cov(second.T))
    plain, controlled = [], []
    for start in range(0, 2048, 64):
        few = slice(start, start + 64)
        distances = [metric.distance(x[few].mean(0), torch.cov(x[few].T)) for x in (first, second)]
        plain.append((distances[0] - distances[1] - truth) ** 2)
        a, b = (variate.distance(x[few], control[few]) for x in (first, second))
        controlled.append((a - b - truth) ** 2)
    assert sum(controlled) < 0.5 * sum(plain)


def test_weights_count_images() -> None:
    metric, control, first, _ = populations(3)
    variate = ControlVariate(metric, statistics(control))
    twice = torch.cat([first[:40], first[:10]]), torch.cat([control[:40], control[:10]])
    weights = torch.cat([torch.full((10,), 2.0), torch.ones(30)]).double()
    assert variate.distance(first[:40], control[:40], weights) == pytest.approx(variate.distance(*twice), rel=1e-9)


def test_the_interval_holds_the_distance_and_narrows_with_more_images() -> None:
    metric, control, first, _ = populations(4)
    variate = ControlVariate(metric, statistics(control[2048:]))
    widths = []
    for count in (50, 400):
        low, high = variate.interval(first[:count], control[:count], 60, seed=0)
        assert low < variate.distance(first[:count], control[:count]) < high
        widths.append(high - low)
    assert widths[1] < widths[0]
