"""FID, sFID, KID and the Inception score equal what pytorch-fid and torchmetrics compute with the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_fid import fid_score, inception
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore as TorchmetricsScore
from torchmetrics.image.kid import KernelInceptionDistance

from tests.metrics.conftest import natural_images, save
from tmpq_exp.metrics.frechet import frechet_distance
from tmpq_exp.metrics.inception import PytorchFidInception, PytorchFidSpatial, TorchmetricsInception, weights_file
from tmpq_exp.metrics.inception_metrics import (
    InceptionScore,
    KernelDistance,
    fid,
    fid_torchmetrics,
    inception_score,
    kernel_distance,
    sfid,
)
from tmpq_exp.metrics.metric import Batch, MissingWeights, Place, features_of
from tmpq_exp.metrics.statistics import FeatureStatistics

CPU = torch.device("cpu")


@pytest.fixture
def theirs(inception_weights: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """pytorch-fid's whole network, which then also loads our weights wherever it builds one."""
    state = torch.load(inception_weights, weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
    network: nn.Module = inception.fid_inception_v3()
    return network.eval()


@pytest.mark.parametrize(("size", "channels"), [(24, 3), pytest.param(320, 3, marks=pytest.mark.slow), (16, 1)])
def test_features_are_pytorch_fids_of_the_saved_images(
    theirs: nn.Module, inception_weights: Path, tmp_path: Path, size: int, channels: int
) -> None:
    images = natural_images(2, size, 0, channels)
    files = sorted(save(images, tmp_path / "images").iterdir())
    expected = fid_score.get_activations(files, inception.InceptionV3([3]), batch_size=2, num_workers=0)
    noisy = (images + 0.3 / 255).clamp(0, 1)  # as made, before they are saved
    found = features_of(PytorchFidInception(inception_weights), noisy)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-7 * np.abs(expected).max())
    assert found.std(0).max() > 1e-3 * found.abs().max()  # the images are told apart


def test_spatial_features_are_seven_channels_before_the_pooling(theirs: nn.Module, inception_weights: Path) -> None:
    images = natural_images(2, 299, 0)
    x = 2 * images - 1
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
                 "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):  # fmt: skip
        x = getattr(theirs, name)(x)
    expected = theirs.Mixed_6d.branch1x1(x)[:, :7].flatten(1).double()
    found = features_of(PytorchFidSpatial(inception_weights), images)
    assert found.shape == (2, 2023)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_two_implementations_differ(inception_weights: Path) -> None:
    images = natural_images(2, 24, 0)
    ours, other = (
        features_of(kind(inception_weights), images) for kind in (PytorchFidInception, TorchmetricsInception)
    )
    assert 1e-4 < float((ours - other).norm() / ours.norm()) < 1


def torchmetrics_network(weights: Path, layer: str) -> NoTrainInceptionV3:
    return NoTrainInceptionV3("inception-v3-compat", [layer], str(weights))


class Precise(nn.Module):
    """torchmetrics' network, its features in float64."""

    def __init__(self, weights: Path, layer: str) -> None:
        super().__init__()
        self.network = torchmetrics_network(weights, layer)
        self.num_features = 2048

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)
        return features.double()


def as_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


@pytest.mark.slow
def test_fid_of_torchmetrics(inception_weights: Path, tmp_path: Path) -> None:
    real, fake = natural_images(6, 24, 0), natural_images(4, 24, 1) ** 2
    theirs = FrechetInceptionDistance(Precise(inception_weights, "2048"), input_img_size=(3, 24, 24))
    theirs.update(as_bytes(real), real=True)
    theirs.update(as_bytes(fake), real=False)
    metric = fid_torchmetrics(str(inception_weights), str(save(real, tmp_path / "real")))
    metric.make_ready(Place(CPU, tmp_path / "cache"))
    assert metric([fake[:3], fake[3:]]) == pytest.approx(float(theirs.compute()), rel=1e-4)


@pytest.mark.slow
def test_fid_on_folders_is_pytorch_fids(theirs: nn.Module, inception_weights: Path, tmp_path: Path) -> None:
    real, fake = natural_images(6, 24, 0), natural_images(5, 24, 1)
    metric = fid(str(inception_weights), str(save(real, tmp_path / "real")))
    metric.make_ready(Place(CPU, tmp_path / "cache"))
    network = inception.InceptionV3([3])
    statistics = [
        fid_score.calculate_activation_statistics(sorted(folder.iterdir()), network, num_workers=0)
        for folder in (tmp_path / "real", save(fake, tmp_path / "fake"))
    ]
    np.testing.assert_allclose(metric.reference.mean.numpy(), statistics[0][0], rtol=1e-6)
    np.testing.assert_allclose(
        metric.reference.covariance.numpy(), statistics[0][1], atol=1e-7 * np.abs(statistics[0][1]).max()
    )
    (m1, s1), (m2, s2) = statistics
    roots = (
        np.linalg.svd(  # of six and five images a matrix root of 2048 x 2048 is all rounding: the centred features do
            centred(real, network) @ centred(fake, network).T, compute_uv=False
        ).sum()
    )
    expected = np.square(m1 - m2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots
    assert metric([fake[:2], fake[2:]]) == pytest.approx(expected, rel=1e-6)


def centred(images: Tensor, network: nn.Module) -> np.ndarray:
    """Features without their mean, scaled so that their Gram matrix is the covariance."""
    features = network(images)[0].flatten(1).double()
    return ((features - features.mean(0)) / (len(images) - 1) ** 0.5).numpy()


@pytest.mark.parametrize("dimensions", [256, pytest.param(2048, marks=pytest.mark.slow)])
def test_the_distance_is_pytorch_fids_to_a_millionth(dimensions: int) -> None:
    rng = np.random.default_rng(0)
    scales = np.geomspace(0.05, 1, dimensions)  # as uneven as Inception's features are
    fits = [np.maximum(rng.standard_normal((3 * dimensions, dimensions)) + shift, 0) * scales for shift in (0, 0.1)]
    statistics = [(features.mean(0), np.cov(features, rowvar=False)) for features in fits]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs warns of its own call of scipy
        expected = fid_score.calculate_frechet_distance(*statistics[0], *statistics[1])
    ours = frechet_distance(*(FeatureStatistics(torch.from_numpy(m), torch.from_numpy(c)) for m, c in statistics))
    assert ours == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
@pytest.mark.parametrize("size", [20, 40])
def test_kernel_distance_is_torchmetrics_with_the_same_subsets(size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(60, 32, generator=generator), torch.randn(40, 32, generator=generator) + 0.3
    theirs = KernelInceptionDistance(nn.Identity(), subsets=7, subset_size=size).set_dtype(torch.float64)
    theirs.update(real.double(), real=True)
    theirs.update(fake.double(), real=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected, _ = theirs.compute()
    assert kernel_distance(real, fake, 7, size, seed=5) == pytest.approx(float(expected), rel=1e-6)
    assert kernel_distance(real, fake, 7, size, seed=6) != pytest.approx(float(expected), rel=1e-6)


def test_few_images_give_smaller_subsets() -> None:
    features = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    assert kernel_distance(features, features[:6] + 1, 3, 1000, 0) == kernel_distance(
        features, features[:6] + 1, 3, 6, 0
    )
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        kernel_distance(features, features[:1], 3, 1000, 0)


def test_kid_measures_features_of_torchmetrics_network(inception_weights: Path, tmp_path: Path) -> None:
    real, fake = natural_images(3, 24, 0), natural_images(2, 24, 1) ** 2
    metric = KernelDistance(str(inception_weights), str(save(real, tmp_path / "real")), subsets=3, subset_size=3)
    metric.make_ready(Place(CPU, tmp_path / "cache"))
    features = torchmetrics_network(inception_weights, "2048")(as_bytes(torch.cat([real, fake])))
    torch.testing.assert_close(metric.reference, features[:3], rtol=1e-4, atol=1e-5)
    assert metric([fake[:1], fake[1:]]) == pytest.approx(kernel_distance(features[:3], features[3:], 3, 3, 0), rel=1e-3)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std")
@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score_is_torchmetrics(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randperm", torch.arange)  # theirs shuffles
    logits = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    theirs = TorchmetricsScore(nn.Identity(), splits=splits)
    theirs.update(logits)
    score = inception_score(logits, splits)
    assert score == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
    assert 3 < score < 20


@pytest.mark.slow
def test_inception_score_reads_logits_of_torchmetrics_network(inception_weights: Path) -> None:
    images = natural_images(3, 24, 0)
    metric = InceptionScore(str(inception_weights), splits=2)
    measurement = metric.start()
    for part in images.split(2):
        measurement.update(Batch(part))
    logits = torchmetrics_network(inception_weights, "logits_unbiased")(as_bytes(images))
    torch.testing.assert_close(features_of(metric.network, images).float(), logits, rtol=1e-4, atol=1e-4)
    assert measurement.value() == pytest.approx(inception_score(logits, 2), rel=1e-5)
    assert measurement.interval(10, 0) is None


def test_inception_score_of_known_classes() -> None:
    logits = 50 * torch.eye(4).repeat(5, 1)
    assert inception_score(logits, 1) == pytest.approx(4)
    assert inception_score(logits, 20) == pytest.approx(1)
    assert inception_score(torch.zeros(6, 9), 2) == pytest.approx(1)


def test_statistics_of_adm_serve_sfid(inception_weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "reference.npz"
    np.savez(file, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.ones(2023), sigma_s=2 * np.eye(2023))
    metric = sfid(str(inception_weights), str(file))
    assert (metric.name, len(metric.reference.mean)) == ("sfid", 2023)
    assert (float(metric.reference.mean[0]), float(metric.reference.covariance[0, 0])) == (1, 2)


def test_fingerprints_keep_the_implementations_apart(inception_weights: Path, tmp_path: Path) -> None:
    weights, folder = str(inception_weights), str(save(natural_images(2, 24, 0), tmp_path / "real"))
    np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    ours, theirs = (make(weights, str(tmp_path / "reference.npz")) for make in (fid, fid_torchmetrics))
    first, second = ours.fingerprint(), theirs.fingerprint()
    assert {key for key in first if first[key] != second[key]} == {"metric", "extractor", "resize", "library"}
    assert first["library"] == "pytorch-fid 0.3.0"
    kid = KernelDistance(weights, folder)
    assert kid.extractor == theirs.extractor  # torchmetrics' network, once for a distance and once for kid
    assert kid.fingerprint()["subsets"] != KernelDistance(weights, folder, subsets=5).fingerprint()["subsets"]
    assert InceptionScore(weights).extractor not in (ours.extractor, theirs.extractor)


def test_weights_that_are_missing_say_where_they_belong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    place = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(MissingWeights) as caught:
        fid(None, str(tmp_path))
    for part in (str(place), "TORCH_HOME", "https://github.com/mseitzer/pytorch-fid", "metrics.fid.weights=PATH"):
        assert part in str(caught.value)
    with pytest.raises(MissingWeights, match=r"kid: no weights at nowhere\.pth \(metrics\.kid\.weights\)"):
        KernelDistance("nowhere.pth", str(tmp_path))
    place.parent.mkdir(parents=True)
    place.touch()
    assert weights_file("fid", None, inception.FID_WEIGHTS_URL) == place


def test_weights_of_another_network_are_refused(inception_weights: Path, tmp_path: Path) -> None:
    state = torch.load(inception_weights, weights_only=True)
    torch.save({key: value for key, value in state.items() if not key.startswith("Mixed_5b")}, tmp_path / "part.pth")
    (tmp_path / "short.pth").write_bytes(inception_weights.read_bytes()[:1000])
    for name, message in (("part.pth", "holds weights of another network"), ("short.pth", "damaged")):
        for kind in (PytorchFidInception, TorchmetricsInception):
            with pytest.raises(
                ValueError, match=rf"InceptionV3: .*{name} .*{message}|InceptionV3: .*{name} is {message}"
            ):
                kind(tmp_path / name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: KernelDistance(w, ".", subsets=0), r"metrics\.kid\.subsets must be at least 1, found 0"),
        (lambda w: KernelDistance(w, ".", subset_size=1), r"metrics\.kid\.subset_size must be at least 2, found 1"),
        (lambda w: InceptionScore(w, splits=0), r"metrics\.inception_score\.splits must be at least 1, found 0"),
        (lambda w: fid(w, None), r"evaluation\.reference: fid needs a folder of images or an \.npz .*found null"),
    ],
)
def test_settings_out_of_range_are_named(make: object, message: str, inception_weights: Path) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make(str(inception_weights))


def test_kid_needs_images(inception_weights: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(ValueError, match=r"kid needs a folder of images, found the statistics .*r\.npz"):
        KernelDistance(str(inception_weights), str(tmp_path / "r.npz"))
