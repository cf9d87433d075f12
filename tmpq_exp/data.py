"""Image data for training recipes, reference statistics and the test of classifiers, as LightningDataModules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

DIGITS_SIZE = 16
"""Side of the resized digits in pixels."""

EVALUATION_BATCH = 500
"""Images a batch where nothing is learned."""


def to_uint8(images: Tensor) -> Tensor:
    """Images in [0, 1] -> uint8, rounding to nearest: the only such rounding in the project."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def uci_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 UCI digits that scikit-learn carries, resized bilinearly from 8x8 to 16x16.

    Returns:
        ``(images, labels)``: uint8 ``(1797, 1, 16, 16)`` and int64 ``(1797,)``.

    References:
        E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    resized = F.interpolate(images, size=(DIGITS_SIZE, DIGITS_SIZE), mode="bilinear", align_corners=False)
    return to_uint8(resized), torch.from_numpy(digits.target).long()


class LabelledImages(NamedTuple):
    """Images in memory: uint8 ``(N, C, H, W)`` and int64 labels ``(N,)``."""

    pixels: Tensor
    labels: Tensor

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> DataLoader[tuple[Tensor, ...]]:
        """Images in [0, 1] with their labels.

        Args:
            batch_size: Images a batch.
            generator: Draws the order, and the last, smaller batch is dropped; None: in order, all of them.
        """
        dataset = _Float(self)
        batches: BatchSampler | _Rows
        if generator is None:
            batches = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
        else:
            batches = _Rows(RandomSampler(dataset, generator=generator), batch_size, self.pixels.device)
        return DataLoader(dataset, sampler=batches, batch_size=None)  # one indexing a batch, not one an image

    def to(self, device: torch.device) -> LabelledImages:
        """The same on a device, where batches are then made."""
        return LabelledImages(self.pixels.to(device), self.labels.to(device))


class _Rows(Sampler[Tensor]):
    """Indices of all whole batches of an epoch, sent to a device at once: to send them one by one would stop it."""

    def __init__(self, order: RandomSampler, batch_size: int, device: torch.device) -> None:
        self._batches, self._device = BatchSampler(order, batch_size, drop_last=True), device

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.tensor(list(self._batches)).to(self._device))

    def __len__(self) -> int:
        return len(self._batches)


class _Float(Dataset[tuple[Tensor, ...]]):
    """Batches of images as floats, by lists of indices."""

    def __init__(self, images: LabelledImages) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images.labels)

    def __getitem__(self, indices: list[int] | Tensor) -> tuple[Tensor, ...]:
        return self._images.pixels[indices].float() / 255, self._images.labels[indices]


class ImageData(L.LightningDataModule):
    """Images for training, with others held out, and those that references are measured on.

    Args:
        batch_size: Images a training batch, from 1 to the number of training images.
        seed: Order of the training images.
        train, holdout, reference: The images.

    Class attributes:
        description: What the images are, from where, under which licence; for model cards.
    """

    description: str

    def __init__(
        self, batch_size: int, seed: int, train: LabelledImages, holdout: LabelledImages, reference: LabelledImages
    ) -> None:
        super().__init__()
        if not 1 <= batch_size <= len(train.labels):
            raise ValueError(f"data.batch_size must be in 1..{len(train.labels)} (training images), found {batch_size}")
        self.batch_size, self.seed = batch_size, seed
        self.train_set, self.holdout_set, self.reference_set = train, holdout, reference

    def keep_on(self, device: torch.device) -> None:
        """Keep the training images on the device that learns from them, so that no step copies any."""
        self.train_set = self.train_set.to(device)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches; the last, smaller one is dropped."""
        return self.train_set.batches(self.batch_size, torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> Iterable[tuple[Tensor, ...]]:
        """The held-out images in order; nothing without any."""
        return self.holdout_set.batches(EVALUATION_BATCH) if len(self.holdout_set.labels) else []

    def reference_dataloader(self) -> Iterable[tuple[Tensor, ...]]:
        """The images behind reference statistics, in order."""
        return self.reference_set.batches(EVALUATION_BATCH)


def held_out(count: int, holdout_fraction: float) -> Tensor:
    """Which of ``count`` images are held out, as a mask: evenly spread, at 1/n every n-th one.

    Raises:
        ValueError: If the fraction is not in [0, 1).
    """
    if not 0 <= holdout_fraction < 1:
        raise ValueError(f"data.holdout_fraction must be in [0, 1), found {holdout_fraction}")
    share = Fraction(holdout_fraction).limit_denominator(10**6)
    return torch.tensor([i * share // 1 != (i - 1) * share // 1 for i in range(count)])


class DigitsData(ImageData):
    """UCI digits; the reference is all of them.

    Args:
        batch_size, seed: See ``ImageData``.
        holdout_fraction: Share of images kept for validation, in [0, 1); evenly spread (at 1/n every n-th one), so
            that all classes are in. With 0 all images train and none validate.
    """

    description = "UCI digits as shipped by scikit-learn (CC BY 4.0), 8x8 resized bilinearly to 16x16"

    def __init__(self, batch_size: int, holdout_fraction: float = 0.0, seed: int = 0) -> None:
        images, labels = uci_digits()
        held = held_out(len(images), holdout_fraction)
        train, holdout = (LabelledImages(images[mask], labels[mask]) for mask in (~held, held))
        super().__init__(batch_size, seed, train, holdout, LabelledImages(images, labels))


class FolderData(ImageData):
    """A data set of image folders ``<root>/train/<class>/*`` and ``<root>/test/<class>/*``, whole in memory.

    Images of ``test`` are held out; the reference is the training set.

    Args:
        batch_size, seed: See ``ImageData``.
        root: The folder.
        name: What to call the data set wherever a figure is reported.
        size: Side of the images in pixels; images of another size are refused.
        description: Source and licence, for model cards.

    Raises:
        ValueError: If a folder is missing or empty, an image has another size, or the two splits differ in classes.
    """

    def __init__(
        self, batch_size: int, root: str | None, name: str, size: int, description: str, seed: int = 0
    ) -> None:
        if root is None:
            raise ValueError(
                "data.root must be given: a folder that holds train/<class>/ and test/<class>/ with images"
            )
        self.description = f"{name}: {description}"
        (train, classes), (test, test_classes) = (read_folder(Path(root) / split, size) for split in ("train", "test"))
        if classes != test_classes:
            differing = sorted({*classes} ^ {*test_classes})
            raise ValueError(f"data.root: {root}/train and {root}/test have different classes, first {differing[0]}")
        super().__init__(batch_size, seed, train, test, train)


def read_folder(folder: Path, size: int) -> tuple[LabelledImages, tuple[str, ...]]:
    """RGB images of a folder with one subfolder a class, in sorted order.

    Returns:
        The images, and the names of the classes in the order of their labels.

    Raises:
        ValueError: If the folder is missing or holds no images, or an image cannot be read or has another size.
    """
    found = _labelled_files(folder)

    def read(path: str) -> np.ndarray:
        pixels = np.asarray(_open_rgb(path))
        if pixels.shape != (size, size, 3):
            raise ValueError(
                f"data.root: {path} must be {size}x{size} pixels, found {pixels.shape[1]}x{pixels.shape[0]}"
            )
        return pixels

    with ThreadPoolExecutor() as pool:
        images = np.stack(list(pool.map(read, (path for path, _ in found.samples), chunksize=256)))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(pixels, torch.tensor(found.targets)), tuple(found.classes)


def _labelled_files(folder: Path, key: str = "data.root") -> ImageFolder:
    try:
        return ImageFolder(str(folder))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{key}: {folder} must hold one subfolder of images a class ({error})") from None


def _open_rgb(path: str, key: str = "data.root") -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{key}: {path} cannot be read as an image ({error})") from error


class ImageFolderData(L.LightningDataModule):
    """Test images of a classifier, ``<root>/<class>/*``, read from disk batch by batch.

    Labels count the class folders in sorted order.

    Args:
        root: The folder.
        name: What to call the images wherever a figure is reported.
        resize: Pixels of the shorter side after resizing (bilinear, with antialiasing); None leaves images as they are.
        crop: Side in pixels of the square that is cut from the middle; None takes whole images.
        mean, std: Of each colour, in [0, 1]: images are normalised to ``(image - mean) / std``.
        limit: Take n images, every (N / n)-th file in sorted order, so that all classes are in; None, or a number from
            N on, takes all.
        batch_size: Images a batch.
        calibration_root: Another folder ``<calibration_root>/<class>/*``, on whose images static activation scales are
            measured; None: there are none.
        calibration_images: Take so many of them, as ``limit`` does.

    Raises:
        ValueError: If a setting is out of range, a folder is missing or holds no images, or calibration images are test
            images, or have another size.
    """

    key = "data.root"

    def __init__(
        self,
        root: str | None,
        name: str | None = None,
        resize: int | None = None,
        crop: int | None = None,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        limit: int | None = None,
        batch_size: int = 100,
        calibration_root: str | None = None,
        calibration_images: int = 256,
    ) -> None:
        super().__init__()
        if root is None:
            raise ValueError("data.root must be given: a folder that holds one subfolder of test images a class")
        _check_preprocessing(resize, crop, mean, std)
        counts = {"limit": limit, "batch_size": batch_size, "calibration_images": calibration_images}
        for key, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key} must be at least 1, found {value}")
        found = _labelled_files(Path(root), self.key)
        self.root, self.name, self.batch_size = Path(root), name or Path(root).name, batch_size
        self.classes: tuple[str, ...] = tuple(found.classes)
        self.samples = evenly_chosen(found.samples, len(found.samples) if limit is None else limit)
        self.crop = crop
        steps: list[nn.Module] = [] if resize is None else [transforms.Resize(resize, antialias=True)]
        steps += [] if crop is None else [transforms.CenterCrop(crop)]
        self.preprocessing = {"resize": resize, "crop": crop, "mean": list(mean), "std": list(std)}
        self._transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])
        first = _open_rgb(self.samples[0][0], self.key)
        self.image_shape: tuple[int, int, int] = tuple(self._transform(first).shape)
        self.calibration: CalibrationImages | None = None
        if calibration_root is not None:
            _check_apart(Path(root), Path(calibration_root))
            self.calibration = CalibrationImages(
                calibration_root, None, resize, crop, mean, std, calibration_images, batch_size
            )
            if self.calibration.image_shape != self.image_shape:
                raise ValueError(
                    f"data.calibration_root: images of {calibration_root} have shape {self.calibration.image_shape}, "
                    f"test images {self.image_shape}; set data.resize and data.crop to make all images alike"
                )

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Normalised images ``(n, 3, H, W)`` with labels ``(n,)``, in order."""
        batches = BatchSampler(SequentialSampler(self.samples), self.batch_size, drop_last=False)
        return DataLoader(_Files(self), sampler=batches, batch_size=None)

    @property
    def num_batches(self) -> int:
        """Batches of ``test_dataloader``."""
        return -(-len(self.samples) // self.batch_size)

    def read(self, path: str) -> Tensor:
        """One image as the network gets it.

        Raises:
            ValueError: If it cannot be read, or has another size than the first one.
        """
        image = _open_rgb(path, self.key)
        if self.preprocessing["resize"] is None and self.crop is not None and min(image.size) < self.crop:
            raise ValueError(f"data.crop: {path} has {image.size[0]}x{image.size[1]} pixels, less than {self.crop}")
        pixels: Tensor = self._transform(image)
        if tuple(pixels.shape) != self.image_shape:
            height, width = self.image_shape[1:]
            raise ValueError(
                f"{self.key}: {path} has {pixels.shape[2]}x{pixels.shape[1]} pixels, the first image {width}x{height}; "
                "set data.resize and data.crop to make all images alike"
            )
        return pixels

    def fingerprint(self) -> str:
        """Hash of names, labels and bytes of all chosen files and of what is done to them, 16 hex digits."""
        digest = hashlib.sha256(repr(sorted(self.preprocessing.items())).encode())
        for path, label in self.samples:
            file = Path(path)
            digest.update(f"{file.relative_to(self.root).as_posix()}:{label};".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:16]


class CalibrationImages(ImageFolderData):
    """Images apart from the test images, prepared as these are; their classes do not matter."""

    key = "data.calibration_root"


class _Files(Dataset[tuple[Tensor, ...]]):
    """Batches of preprocessed images, by lists of indices."""

    def __init__(self, data: ImageFolderData) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data.samples)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, ...]:
        chosen = [self._data.samples[index] for index in indices]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(self._data.read, (path for path, _ in chosen)))
        return torch.stack(images), torch.tensor([label for _, label in chosen])


def evenly_chosen(values: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """``count`` of the values at equal distances, the first among them; all of them where there are no more."""
    count = min(count, len(values))
    return [values[index * len(values) // count] for index in range(count)]


def _check_apart(root: Path, calibration_root: Path) -> None:
    one, other = root.resolve(), calibration_root.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ValueError(
            f"data.calibration_root must lie apart from data.root ({root}), for test images must not calibrate what is "
            f"measured on them; found {calibration_root}"
        )


def _check_preprocessing(resize: int | None, crop: int | None, mean: Sequence[float], std: Sequence[float]) -> None:
    for key, value in (("resize", resize), ("crop", crop)):
        if value is not None and value < 1:
            raise ValueError(f"data.{key} must be at least 1 pixel, found {value}")
    if resize is not None and crop is not None and crop > resize:
        raise ValueError(f"data.crop must be at most data.resize ({resize}), found {crop}")
    for key, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"data.{key} must have 3 entries, one a colour, found {list(values)}")
    if min(std) <= 0:
        raise ValueError(f"data.std must be above 0, found {list(std)}")
