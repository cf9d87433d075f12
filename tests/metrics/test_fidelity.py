"""PSNR, SSIM, latent SQNR and LPIPS: by hand, by torchmetrics, and in batches as all at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchvision import models

from tests.metrics.conftest import natural_images
from tmpq_exp.metrics.fidelity import FeatureError, LatentSqnr, Psnr, Ssim, latent_sqnr_db, psnr_db, ssim
from tmpq_exp.metrics.lpips import Lpips
from tmpq_exp.metrics.metric import Batch, Metric, MissingWeights


def test_psnr_of_each_image() -> None:
    reference = torch.full((2, 1, 4, 4), 0.5)
    images = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)  # 20 and 40 dB
    assert psnr_db(images, reference).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert psnr_db(reference, reference).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("measure", [psnr_db, ssim, latent_sqnr_db])
def test_one_shape(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match="must have one shape"):
        measure(torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_torchmetrics(channels: int) -> None:
    reference = natural_images(3, 16, 0, channels)
    images = (reference + 0.1 * natural_images(3, 16, 1, channels)).clamp(0, 1)
    theirs = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    theirs.update(images, reference)
    torch.testing.assert_close(ssim(images, reference), theirs.compute())
    assert ssim(reference, reference).tolist() == pytest.approx([1, 1, 1])
    assert ssim(images[:1], reference[:1]).shape == (1,)


def test_images_too_small_for_a_window_are_refused() -> None:
    Ssim().check_images((1, 6, 6))
    with pytest.raises(ValueError, match="ssim takes images of at least 6x6 pixels, found 5x9"):
        Ssim().check_images((1, 5, 9))
    with pytest.raises(ValueError, match="at least 6x6 pixels"):
        ssim(torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5))


def test_latent_sqnr_by_hand() -> None:
    reference = torch.full((3, 2, 4, 4), 2.0)
    latents = reference * torch.tensor([1.1, 0.99, 1.0]).view(3, 1, 1, 1)
    assert latent_sqnr_db(latents, reference).tolist() == pytest.approx([20, 40, math.inf], abs=1e-3)


class Pixel:
    """One feature: the first pixel."""

    num_features = 1

    def features(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :1]

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def to(self, device: torch.device) -> Pixel:
        return self


def test_feature_error_is_between_images_as_they_are_saved() -> None:
    reference = torch.zeros(2, 1, 2, 2)
    images = torch.tensor([10.4, 30.0]).view(2, 1, 1, 1).expand(-1, -1, 2, 2) / 255
    found = FeatureError(Pixel()).values(Batch(images, reference))
    assert found.tolist() == pytest.approx([(10 / 255) ** 2, (30 / 255) ** 2], rel=1e-6)


@given(st.lists(st.integers(1, 6), max_size=3, unique=True), st.integers(0, 7))
def test_batches_measure_as_all_at_once(cuts: list[int], num_paired: int) -> None:
    reference, images = natural_images(7, 8, 0)[:num_paired], natural_images(7, 8, 1)
    metrics: list[Metric] = [Psnr(), Ssim(), LatentSqnr(), FeatureError(Pixel())]
    if num_paired == 0:
        return
    for metric in metrics:
        once, parts = metric.start(), metric.start()
        once.update(Batch(images, reference, None, images, reference))
        done = 0
        for part in images.tensor_split(sorted(cuts)):
            paired = reference[done : done + len(part)]
            parts.update(Batch(part, paired, None, part, paired))
            done += len(part)
        assert parts.value() == pytest.approx(once.value(), rel=1e-5)
        assert metric.fingerprint()["metric"] == metric.name


def test_images_alone_are_not_enough() -> None:
    with pytest.raises(ValueError, match="ssim measures images beside their reference, not alone"):
        Ssim()([natural_images(2, 8, 0)])


def test_interval_of_a_mean() -> None:
    measurement = Psnr().start()
    noise = torch.linspace(0.01, 0.1, 50).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    measurement.update(Batch(noise, torch.zeros_like(noise)))
    values = psnr_db(noise, torch.zeros_like(noise)).double()
    mean, half = float(values.mean()), 1.96 * float(values.std()) / 50**0.5
    assert measurement.interval(2000, 0) == pytest.approx((mean - half, mean + half), rel=0.02)
    assert measurement.interval(100, 0) == measurement.interval(100, 0)


@pytest.fixture(scope="module", params=["alex", "squeeze"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A backbone with random weights, as torchvision releases its own."""
    make = {"alex": models.alexnet, "squeeze": models.squeezenet1_1}[request.param]
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "backbone.pth"
    state = {key: value for key, value in make(weights=None).state_dict().items() if key.startswith("features.")}
    torch.save(state, path)
    return request.param, path


def test_lpips_is_torchmetrics(backbone: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name, path = backbone
    state = torch.load(path, weights_only=True)
    released: Any = {"alex": models.alexnet, "squeeze": models.squeezenet1_1}[name]

    def pretrained(weights: object) -> torch.nn.Module:
        network: torch.nn.Module = released(weights=None)
        network.load_state_dict(state, strict=False)
        return network

    metric = Lpips(str(path), name)
    monkeypatch.setattr(models, released.__name__, pretrained)
    reference = natural_images(3, 64, 0)
    images = (reference + 0.3 * natural_images(3, 64, 1)).clamp(0, 1)
    expected = learned_perceptual_image_patch_similarity(
        images,
        reference,
        net_type=cast(Any, name),
        reduction="none",
        normalize=True,
    )
    torch.testing.assert_close(metric.values(Batch(images, reference)), expected.flatten(), rtol=1e-4, atol=1e-6)
    assert float(expected.min()) > 1e-4
    assert metric.values(Batch(reference[:, :1], reference[:, :1])).tolist() == [0, 0, 0]  # gray
    assert not metric.higher_is_better


def test_lpips_without_its_weights_or_with_others(backbone: tuple[str, Path], tmp_path: Path) -> None:
    name, path = backbone
    with pytest.raises(MissingWeights, match=r"lpips: no weights at nowhere \(metrics\.lpips\.weights\)"):
        Lpips("nowhere", name)
    other = "squeeze" if name == "alex" else "alex"
    with pytest.raises(ValueError, match=rf"backbone of lpips: .*backbone\.pth is not torchvision's {other}: features"):
        Lpips(str(path), other)
    with pytest.raises(ValueError, match=r"metrics\.lpips\.backbone must be one of alex, vgg, squeeze, found 'resnet'"):
        Lpips(str(path), "resnet")
    with pytest.raises(ValueError, match="lpips takes images of at least 32x32 pixels, found 16x16"):
        Lpips(str(path), name).check_images((1, 16, 16))
