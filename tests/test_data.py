"""The digits and folders of images: all of them, in shape, split with every class on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tmpq_exp.data import DigitsData, FolderData, to_uint8, uci_digits


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
