"""References: statistics files are checked, folders are measured once and kept by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tmpq_exp.metrics.frechet import FrechetMetric, digits_frechet, feature_frechet
from tmpq_exp.metrics.metric import Place
from tmpq_exp.metrics.reference import ReferenceFolder, open_reference
from tmpq_exp.metrics.statistics import FeatureSums, read_npz

CPU = torch.device("cpu")
KEYS = (("mu_s", "sigma_s"), ("mu", "sigma"))


class Means(nn.Module):
    """Features are the mean colours; counts its forwards."""

    num_features = 3

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(shift))
        self.forwards = 0

    def features(self, images: Tensor) -> Tensor:
        self.forwards += 1
        return images.mean((2, 3)).expand(-1, 3) + self.shift


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (6, 5), seed: int = 0, mode: str = "RGB") -> Path:
    """Random PNG files in two subfolders; ``size`` is width and height."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        path = folder / f"part_{index % 2}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return folder


def measured(folder: Path, cache: Path, network: Means) -> FrechetMetric:
    metric = FrechetMetric("fd_means", network, ReferenceFolder(folder))
    metric.make_ready(Place(CPU, cache))
    return metric


def test_a_folder_is_measured_once_and_kept_by_its_content(tmp_path: Path) -> None:
    folder, network = write_images(tmp_path / "real", 60), Means()
    first = measured(folder, tmp_path / "cache", network)
    assert network.forwards == 2
    pixels = [np.asarray(Image.open(path)).reshape(-1, 3).mean(0) / 255 for path in sorted(folder.rglob("*.png"))]
    np.testing.assert_allclose(first.reference.mean.numpy(), np.mean(pixels, 0), rtol=1e-6)
    np.testing.assert_allclose(first.reference.covariance.numpy(), np.cov(pixels, rowvar=False), rtol=1e-4, atol=1e-9)
    assert first.reference.num_images == 60

    folder = folder.rename(tmp_path / "moved")  # the content counts, not the place
    again = measured(folder, tmp_path / "cache", network)
    assert network.forwards == 2
    assert again.fingerprint() == first.fingerprint()

    other = Means(1.0)
    assert measured(folder, tmp_path / "cache", other).fingerprint() != first.fingerprint()
    assert other.forwards == 2
    Image.new("RGB", (6, 5)).save(folder / "part_1" / "001.png")
    changed = measured(folder, tmp_path / "cache", network)
    assert network.forwards == 4
    assert changed.fingerprint()["reference"] != first.fingerprint()["reference"]


def test_features_of_a_folder_are_kept_too(tmp_path: Path) -> None:
    folder, network = ReferenceFolder(write_images(tmp_path / "real", 51)), Means()
    place = Place(CPU, tmp_path / "cache")
    first = folder.features("kid", network, "e", place)
    assert first.shape == (51, 3)
    assert folder.features("kid", network, "e", place).equal(first)
    assert network.forwards == 2
    (kept,) = place.cache_dir.iterdir()
    kept.write_bytes(kept.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{kept.name} is truncated"):
        folder.features("kid", network, "e", place)


def test_gray_images_are_read_as_the_classifier_takes_them(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "real", 4, size=(16, 16), mode="L")
    metric = digits_frechet(reference=str(folder))
    metric.make_ready(Place(CPU, tmp_path / "cache"))
    sums = FeatureSums(metric.network)
    files = sorted(folder.rglob("*.png"))
    sums.update(torch.stack([torch.from_numpy(np.array(Image.open(path)))[None].float() / 255 for path in files]))
    torch.testing.assert_close(metric.reference.mean, sums.statistics().mean, rtol=1e-5, atol=1e-6)


def test_folders_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.reference: .*must hold at least 2 images .*found 1"):
        ReferenceFolder(write_images(tmp_path / "one", 1))
    mixed = write_images(tmp_path / "mixed", 3)
    Image.new("RGB", (7, 5)).save(mixed / "z.png")
    with pytest.raises(ValueError, match=r"z\.png has 7x5 pixels, expected 6x5 as all others"):
        measured(mixed, tmp_path / "cache", Means())
    with pytest.raises(ValueError, match=r"000\.png has 6x5 pixels, expected 16x16"):
        list(ReferenceFolder(mixed, (1, 16, 16)).batches())
    broken = write_images(tmp_path / "broken", 3)
    (broken / "part_0" / "000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"000\.png cannot be read as an image"):
        measured(broken, tmp_path / "cache", Means())
    assert not (tmp_path / "cache").exists()


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


GOOD = {"mu": np.array([1.0, 2.0]), "sigma": np.array([[2.0, 0.5], [0.5, 1.0]])}


def test_statistics_of_a_file(tmp_path: Path) -> None:
    found = read_npz(npz(tmp_path / "r.npz", **GOOD, arr_0=np.zeros((2, 4, 4, 3), np.uint8)), 2, KEYS)
    assert found.mean.tolist() == [1, 2]
    assert found.covariance.tolist() == [[2, 0.5], [0.5, 1]]
    assert (found.mean.dtype, found.num_images) == (torch.float64, None)
    spatial = read_npz(npz(tmp_path / "s.npz", mu_s=GOOD["mu"], sigma_s=GOOD["sigma"], mu=np.zeros(9)), 2, KEYS)
    assert spatial.mean.equal(found.mean)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"mean": np.zeros(2), "cov": np.eye(2)},
            r"holds mean, cov, expected mu_s and sigma_s or mu and sigma of shapes",
        ),
        ({"mu": np.zeros(2)}, r"holds mu \(2,\), expected .*\(2,\) and \(2, 2\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, r"holds mu \(3,\), sigma \(3, 3\), expected .*\(2,\) and \(2, 2\)"),
        ({"mu": np.zeros(2), "sigma": np.ones(2)}, r"sigma \(2,\), expected"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, r"mu in .*holds values that are no finite numbers"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, r"mu in .*holds values that are no finite numbers"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 1.0], [0.0, 1.0]])}, r"sigma in .* is not symmetric"),
        ({"mu": np.array([None, {}]), "sigma": np.eye(2)}, r"r\.npz is damaged or no \.npz of arrays"),
    ],
)
def test_other_files_are_refused_with_what_they_hold(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_npz(npz(tmp_path / "r.npz", **arrays), 2, KEYS)


def test_files_that_are_no_npz_are_refused(tmp_path: Path) -> None:
    good = npz(tmp_path / "good.npz", **GOOD).read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(2))
    for data in (good[:-30], b"text", b"", (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "bad.npz").write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.npz is damaged or no \.npz of arrays .*expected mu_s and sigma_s"):
            read_npz(tmp_path / "bad.npz", 2, KEYS)
    with pytest.raises(ValueError, match=r"no file at .*nowhere\.npz"):
        read_npz(tmp_path / "nowhere.npz", 2, KEYS)


def test_a_reference_that_is_not_there_or_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.reference: fid needs a folder of images or an \.npz .*null"):
        open_reference("fid", None, 2048)
    with pytest.raises(ValueError, match=r"no file at .*nowhere \(evaluation\.reference\); a folder of images"):
        open_reference("fid", str(tmp_path / "nowhere"), 2048)
    digits = digits_frechet().reference
    digits.save(tmp_path / "digits.safetensors", "digits")
    assert open_reference("fd_digits", str(tmp_path / "digits.safetensors"), len(digits.mean)) is not None
    with pytest.raises(ValueError, match=r"digits\.safetensors has 64 features, the network of fid 2048"):
        open_reference("fid", str(tmp_path / "digits.safetensors"), 2048)


def test_a_distance_on_any_feature_module(tmp_path: Path) -> None:
    folder = str(write_images(tmp_path / "real", 8))
    by_method = feature_frechet("fd_means", Means(), folder)
    by_forward = feature_frechet("fd_pool", nn.AdaptiveAvgPool2d(1), folder, num_features=3)
    for metric in (by_method, by_forward):
        metric.make_ready(Place(CPU, tmp_path / "cache"))
    torch.testing.assert_close(by_forward.reference.mean, by_method.reference.mean)
    assert by_forward([torch.rand(5, 3, 6, 5)]) > 0
    assert by_forward.fingerprint()["extractor"] != by_method.fingerprint()["extractor"]
    for name in ("fid", "fid_mine", "sfid"):
        with pytest.raises(ValueError, match=f"fid and sfid mean InceptionV3, found '{name}'"):
            feature_frechet(name, Means(), folder)
    with pytest.raises(ValueError, match="num_features must be given for AdaptiveAvgPool2d"):
        feature_frechet("fd_pool", nn.AdaptiveAvgPool2d(1), folder)
