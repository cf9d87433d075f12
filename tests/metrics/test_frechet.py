"""The Frechet distance equals its closed form and torchmetrics', on statistics that equal numpy's."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_fid.fid_score import calculate_frechet_distance
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from tmpq_exp.data import to_uint8, uci_digits
from tmpq_exp.metrics.frechet import FrechetMetric, digits_frechet, frechet_distance
from tmpq_exp.metrics.metric import Batch
from tmpq_exp.metrics.statistics import FeatureStatistics, FeatureSums
from tmpq_exp.zoo.digits import DigitsClassifier
from tmpq_exp.zoo.embedded import embedded_file
from tmpq_exp.zoo.weights import write_tensors


class Pixels(nn.Module):
    """Features are a fixed mixture of pixels; also torchmetrics' feature module."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("mixture", torch.randn(16, self.num_features, generator=generator))

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1).to(self.mixture.dtype) @ self.mixture

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def images(count: int, seed: int, power: float = 1.0) -> Tensor:
    uniform = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return to_uint8(uniform**power).float() / 255


def statistics(batches: list[Tensor]) -> FeatureStatistics:
    sums = FeatureSums(Pixels())
    for batch in batches:
        sums.update(batch)
    return sums.statistics()


def test_equals_torchmetrics() -> None:
    real, fake = images(300, 0), images(200, 1, power=2.0)
    theirs = FrechetInceptionDistance(feature=Pixels(), input_img_size=(1, 4, 4)).set_dtype(torch.float64)
    theirs.update(real.float(), real=True)
    theirs.update(fake.float(), real=False)
    ours = FrechetMetric("fd_pixels", Pixels(), statistics([real]))([fake[:70], fake[70:]])
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2, *[st.floats(0.1, 5)] * 2), min_size=2, max_size=6))
def test_equals_the_closed_form_for_diagonal_covariances(rows: list[tuple[float, ...]]) -> None:
    mean_a, mean_b, std_a, std_b = torch.tensor(rows, dtype=torch.float64).unbind(1)
    a, b = (FeatureStatistics(m, torch.diag(s**2), 9) for m, s in ((mean_a, std_a), (mean_b, std_b)))
    expected = float((mean_a - mean_b).square().sum() + (std_a - std_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("dimensions", "rank"), [(3, 3), (64, 64), (64, 20)])
def test_equals_pytorch_fid(dimensions: int, rank: int) -> None:
    rng = np.random.default_rng(dimensions)
    mixtures = rng.standard_normal((2, rank, dimensions)) * np.geomspace(1, 30, dimensions)
    fits = [rng.standard_normal((4 * dimensions, rank)) @ mixture + rng.random(dimensions) for mixture in mixtures]
    a, b = ((fit.mean(0), np.cov(fit, rowvar=False)) for fit in fits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs warns of its own call of scipy, and of singular products
        theirs = calculate_frechet_distance(*a, *b)
    ours = frechet_distance(*(FeatureStatistics(torch.from_numpy(m), torch.from_numpy(c), 9) for m, c in (a, b)))
    assert ours == pytest.approx(theirs, rel=1e-6 if rank == dimensions else 1e-4)


def interval(metric: FrechetMetric, batches: list[Tensor], num_resamples: int, seed: int) -> tuple[float, float]:
    measurement = metric.start(resampled=True)
    for batch in batches:
        measurement.update(Batch(batch))
    assert measurement.value() == metric(batches)
    found = measurement.interval(num_resamples, seed)
    assert found is not None
    return found


def test_interval_holds_the_distance_and_narrows_with_more_images() -> None:
    metric = FrechetMetric("fd_pixels", Pixels(), statistics([images(300, 0)]))
    fake = images(2000, 1, power=2.0)
    few, many = (interval(metric, [fake[:count]], 100, seed=0) for count in (100, 2000))
    for count, (low, high) in ((100, few), (2000, many)):
        assert low < metric([fake[:count]]) < high
    assert many[1] - many[0] < 0.5 * (few[1] - few[0])
    assert interval(metric, [fake[:60], fake[60:100]], 100, seed=0) == pytest.approx(few)
    assert interval(metric, [fake[:100]], 100, seed=1) != few


def test_interval_is_as_wide_as_the_distance_varies() -> None:
    metric = FrechetMetric("fd_pixels", Pixels(), statistics([images(3000, 0)]))
    sets = [images(200, seed, power=2.0) for seed in range(1, 41)]
    half_widths = [(high - low) / 2 for low, high in (interval(metric, [s], 60, seed=0) for s in sets[:8])]
    assert np.mean(half_widths) == pytest.approx(1.96 * np.std([metric([s]) for s in sets], ddof=1), rel=0.35)


def test_statistics_equal_numpys() -> None:
    batch = images(50, 0)
    features = Pixels().features(batch).double().numpy()
    found = statistics([batch])
    np.testing.assert_allclose(found.mean.numpy(), features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)
    assert found.num_images == 50


@given(st.lists(st.integers(1, 39), max_size=5, unique=True))
def test_the_split_into_batches_changes_nothing(cuts: list[int]) -> None:
    batch = images(40, 0)
    split = statistics(list(batch.tensor_split(sorted(cuts))))
    torch.testing.assert_close(split.mean, statistics([batch]).mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(split.covariance, statistics([batch]).covariance, rtol=1e-5, atol=1e-7)


def test_a_covariance_needs_two_images() -> None:
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        statistics([images(1, 0)])


def test_images_count_as_they_would_be_saved() -> None:
    exact = images(20, 0)
    noisy = exact + 0.3 / 255
    assert torch.equal(statistics([noisy]).mean, statistics([exact]).mean)


def test_embedded_reference_is_that_of_the_data() -> None:
    sums = FeatureSums(DigitsClassifier().load())
    sums.update(uci_digits()[0].float() / 255)
    recomputed, metric = sums.statistics(), digits_frechet()
    assert metric.name == "fd_digits"
    assert metric.reference.num_images == 1797
    for found, expected in (
        (metric.reference.mean, recomputed.mean),
        (metric.reference.covariance, recomputed.covariance),
    ):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert metric([uci_digits()[0].float() / 255]) == pytest.approx(0, abs=1e-3)


def test_fingerprint_names_what_the_number_depends_on() -> None:
    network, reference = Pixels(), statistics([images(20, 0)])
    base = FrechetMetric("fd_pixels", network, reference).fingerprint()
    assert base["metric"] == "fd_pixels"
    other_reference = FrechetMetric("fd_pixels", network, statistics([images(20, 1)])).fingerprint()
    assert {key for key in base if base[key] != other_reference[key]} == {"reference"}
    network.mixture[0, 0] += 1
    other_network = FrechetMetric("fd_pixels", network, reference).fingerprint()
    assert {key for key in base if base[key] != other_network[key]} == {"extractor"}
    resized = FrechetMetric("fd_pixels", network, reference, resize="to 8x8").fingerprint()
    assert {key for key in resized if resized[key] != other_network[key]} == {"extractor", "resize"}


def test_statistics_round_trip(tmp_path: Path) -> None:
    saved = statistics([images(20, 0)])
    saved.save(tmp_path / "reference.safetensors", "noise")
    loaded = FeatureStatistics.load(tmp_path / "reference.safetensors")
    assert torch.equal(loaded.mean, saved.mean)
    assert torch.equal(loaded.covariance, saved.covariance)
    assert loaded.num_images == 20


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"mean": torch.zeros(64)}, {"num_images": "9"}),
        ({"mean": torch.zeros(64), "covariance": torch.zeros(64, 64)}, {}),
        ({"mean": torch.zeros(64), "covariance": torch.zeros(64, 64)}, {"num_images": "many"}),
        ({"mean": torch.zeros(64), "covariance": torch.zeros(64, 63)}, {"num_images": "9"}),
        ({"mean": torch.zeros(63), "covariance": torch.zeros(63, 63)}, {"num_images": "9"}),
        ({"mean": torch.zeros(64), "covariance": torch.full((64, 64), float("nan"))}, {"num_images": "9"}),
    ],
)
def test_bad_statistics_are_refused_by_name(
    tensors: dict[str, Tensor], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    write_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=r"reference statistics: .*bad\.safetensors"):
        digits_frechet(reference=str(path))


def test_missing_and_truncated_statistics(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference statistics: no file at .*nowhere"):
        digits_frechet(reference=str(tmp_path / "nowhere"))
    embedded = embedded_file("digits_classifier", "reference.safetensors").read_bytes()
    (tmp_path / "short").write_bytes(embedded[:-5])
    with pytest.raises(ValueError, match=r"short is truncated"):
        digits_frechet(reference=str(tmp_path / "short"))
