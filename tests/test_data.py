"""The digits and folders of images: all of them, in shape, split with every class on both sides."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tmpq_exp.data import DigitsData, FolderData, ImageFolderData, evenly_chosen, to_uint8, uci_digits


def test_digits() -> None:
    images, labels = uci_digits()
    assert images.shape == (1797, 1, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.shape == (1797,)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (images.min(), images.max()) == (0, 255)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 1 / 3, 0.5, 0.7, 0.9])
def test_holdout(fraction: float) -> None:
    data = DigitsData(32, holdout_fraction=fraction)
    held, train = data.holdout_set, data.train_set
    assert len(held[0]) + len(train[0]) == 1797
    assert len(held[0]) == pytest.approx(1797 * fraction, abs=1)
    assert train[1].unique().tolist() == list(range(10))
    assert fraction == 0 or held[1].unique().tolist() == list(range(10))


def test_every_fifth_image_is_held_out_at_one_fifth() -> None:
    images, labels = uci_digits()
    held = DigitsData(32, holdout_fraction=0.2).holdout_set
    assert torch.equal(held[1], labels[::5])
    assert torch.equal(held[0], images[::5])


def test_loaders() -> None:
    def order(seed: int) -> torch.Tensor:
        return torch.cat([labels for _, labels in DigitsData(256, 0.2, seed).train_dataloader()])

    assert len(order(0)) == 1437 // 256 * 256
    assert torch.equal(order(0), order(0))
    assert not torch.equal(order(0), order(1))
    data = DigitsData(256, 0.2)
    assert torch.equal(torch.cat([y for _, y in data.val_dataloader()]), data.holdout_set.labels)
    assert torch.equal(torch.cat([x for x, _ in data.val_dataloader()]), data.holdout_set.pixels.float() / 255)
    assert list(DigitsData(256).val_dataloader()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size must be .* found 0"),
        ({"batch_size": 1438, "holdout_fraction": 0.2}, r"data\.batch_size must be in 1\.\.1437 .* found 1438"),
        ({"batch_size": 8, "holdout_fraction": 1.0}, r"data\.holdout_fraction must be in \[0, 1\), found 1.0"),
        ({"batch_size": 8, "holdout_fraction": -0.1}, r"data\.holdout_fraction must be in \[0, 1\), found -0.1"),
    ],
)
def test_settings_out_of_range_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitsData(**arguments)  # type: ignore[arg-type]


@given(st.integers(0, 255))
def test_bytes_survive(value: int) -> None:
    assert to_uint8(torch.tensor(value / 255)).item() == value


def test_rounding_is_to_nearest_and_clamps() -> None:
    images = torch.tensor([-0.5, 0.49 / 255, 0.51 / 255, 127.4 / 255, 254.6 / 255, 1.7])
    assert to_uint8(images).tolist() == [0, 0, 1, 127, 255, 255]


def write_images(root: Path, *, size: int = 8, classes: tuple[str, ...] = ("cat", "ship"), per_class: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def folder_data(root: Path | None) -> FolderData:
    return FolderData(2, str(root) if root else None, "noise", 8, "made by a test", seed=1)


def test_a_folder_of_images(tmp_path: Path) -> None:
    data = folder_data(write_images(tmp_path))
    assert data.description == "noise: made by a test"
    assert data.train_set.pixels.shape == (6, 3, 8, 8)
    assert data.train_set.labels.tolist() == data.holdout_set.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with Image.open(tmp_path / "test" / "ship" / "1.png") as image:
        assert np.array_equal(data.holdout_set.pixels[4].permute(1, 2, 0).numpy(), np.asarray(image))
    assert data.reference_set is data.train_set
    batches = list(data.train_dataloader())
    assert [images.shape for images, _ in batches] == [(2, 3, 8, 8)] * 3
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == [0, 0, 0, 1, 1, 1]


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.root must be given"):
        folder_data(None)
    with pytest.raises(ValueError, match=r"data\.root: .*nowhere/train must hold one subfolder of images a class"):
        folder_data(tmp_path / "nowhere")
    root = write_images(tmp_path / "a")
    (root / "train" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png cannot be read as an image"):
        folder_data(root)
    root = write_images(tmp_path / "b", size=9)
    with pytest.raises(ValueError, match=r"\.png must be 8x8 pixels, found 9x9"):
        folder_data(root)
    root = write_images(tmp_path / "c")
    (root / "test" / "cat").rename(root / "test" / "dog")
    with pytest.raises(ValueError, match=r"different classes, first cat"):
        folder_data(root)


def class_folders(root: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """``<root>/<class>/<i>.png``, image i of grey value 10 i; sizes by ``class/file``."""
    for index, (name, size) in enumerate(sizes.items()):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (10 * index,) * 3).save(path)
    return root


def even(root: Path, per_class: int = 5) -> Path:
    names = [f"{kind}/{i}" for kind in ("cat", "dog", "ship") for i in range(per_class)]
    return class_folders(root, dict.fromkeys(names, (8, 8)))


def test_test_images_come_in_order_and_normalised(tmp_path: Path) -> None:
    data = ImageFolderData(str(even(tmp_path)), mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0], batch_size=4)
    batches = list(data.test_dataloader())
    assert [len(labels) for _, labels in batches] == [4, 4, 4, 3]
    assert data.num_batches == 4
    assert (data.classes, data.image_shape) == (("cat", "dog", "ship"), (3, 8, 8))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 5 + [1] * 5 + [2] * 5
    images = torch.cat([images for images, _ in batches])
    grey = torch.arange(15) * 10 / 255
    for colour, (mean, std) in enumerate(zip((0.1, 0.2, 0.3), (1.0, 2.0, 4.0), strict=True)):
        assert torch.allclose(images[:, colour, 0, 0], (grey - mean) / std, atol=1e-6)


@pytest.mark.parametrize(
    ("limit", "chosen"), [(None, range(15)), (15, range(15)), (99, range(15)), (5, range(0, 15, 3)), (3, (0, 5, 10))]
)
def test_limit_takes_every_so_manieth_file_so_that_all_classes_are_in(
    limit: int | None, chosen: Iterable[int], tmp_path: Path
) -> None:
    data = ImageFolderData(str(even(tmp_path)), limit=limit)
    everything = ImageFolderData(str(tmp_path)).samples
    assert data.samples == [everything[index] for index in chosen]
    assert {label for _, label in data.samples} == {0, 1, 2}


@given(st.integers(1, 500), st.integers(1, 600))
def test_chosen_values_lie_at_equal_distances(num_values: int, count: int) -> None:
    chosen = [index for _, index in evenly_chosen([("", i) for i in range(num_values)], count)]
    assert len(chosen) == min(count, num_values)
    assert chosen[0] == 0
    steps = {b - a for a, b in itertools.pairwise(chosen)}
    assert steps <= {num_values // len(chosen), -(-num_values // len(chosen))}


def test_images_of_many_sizes_are_resized_and_cropped(tmp_path: Path) -> None:
    root = class_folders(tmp_path, {"a/0": (20, 10), "a/1": (10, 30), "b/0": (8, 8)})
    data = ImageFolderData(str(root), resize=8, crop=6)
    ((images, _),) = data.test_dataloader()
    assert images.shape == (3, 3, 6, 6)
    with pytest.raises(ValueError, match=r"a/1\.png has 10x30 pixels, the first image 20x10; set data\.resize"):
        list(ImageFolderData(str(root)).test_dataloader())
    with pytest.raises(ValueError, match=r"data\.crop: .*b/0\.png has 8x8 pixels, less than 9"):
        list(ImageFolderData(str(root), crop=9).test_dataloader())


def test_the_fingerprint_knows_images_and_what_is_done_to_them(tmp_path: Path) -> None:
    root = str(even(tmp_path))
    first = ImageFolderData(root).fingerprint()
    assert first == ImageFolderData(root, batch_size=7).fingerprint()
    others = [ImageFolderData(root, limit=5), ImageFolderData(root, crop=4), ImageFolderData(root, std=[1, 1, 1])]
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "cat" / "0.png")
    assert len({first, ImageFolderData(root).fingerprint(), *(data.fingerprint() for data in others)}) == 5


def test_calibration_images_lie_apart_and_are_prepared_as_test_images(tmp_path: Path) -> None:
    tests, others = even(tmp_path / "tests"), class_folders(tmp_path / "others", {"x/0": (9, 8), "x/1": (8, 8)})
    data = ImageFolderData(str(tests), crop=4, batch_size=2, calibration_root=str(others), calibration_images=1)
    assert data.calibration is not None
    assert [Path(path).name for path, _ in data.calibration.samples] == ["0.png"]
    assert data.calibration.preprocessing == data.preprocessing
    assert ImageFolderData(str(tests)).calibration is None
    for root in (tests, tests / "cat", tmp_path):
        with pytest.raises(ValueError, match=r"data\.calibration_root must lie apart from data\.root"):
            ImageFolderData(str(tests), calibration_root=str(root))
    with pytest.raises(ValueError, match=r"data\.calibration_root: images of .* have shape \(3, 8, 9\), test images"):
        ImageFolderData(str(tests), calibration_root=str(others))
    others = class_folders(tmp_path / "mixed", {"x/0": (8, 8), "x/1": (8, 9)})
    mixed = ImageFolderData(str(tests), calibration_root=str(others)).calibration
    assert mixed is not None
    with pytest.raises(ValueError, match=r"data\.calibration_root: .*x/1\.png has 8x9 pixels"):
        list(mixed.test_dataloader())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"calibration_images": 0}, r"data\.calibration_images must be at least 1, found 0"),
        ({"limit": 0}, r"data\.limit must be at least 1, found 0"),
        ({"batch_size": 0}, r"data\.batch_size must be at least 1, found 0"),
        ({"resize": 0}, r"data\.resize must be at least 1 pixel, found 0"),
        ({"crop": -2}, r"data\.crop must be at least 1 pixel, found -2"),
        ({"resize": 8, "crop": 9}, r"data\.crop must be at most data\.resize \(8\), found 9"),
        ({"mean": [0.5]}, r"data\.mean must have 3 entries"),
        ({"std": [1.0, 0.0, 1.0]}, r"data\.std must be above 0"),
    ],
)
def test_bad_settings_of_test_images_are_named(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        ImageFolderData(str(even(tmp_path)), **arguments)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.root must be given"):
        ImageFolderData(None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("nowhere", "empty", "hollow", "file"):
        with pytest.raises(ValueError, match=rf"data\.root: .*{name} must hold one subfolder of images a class"):
            ImageFolderData(str(tmp_path / name))
    root = even(tmp_path / "damaged")
    (root / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"dog/3\.png cannot be read as an image"):
        list(ImageFolderData(str(root)).test_dataloader())
