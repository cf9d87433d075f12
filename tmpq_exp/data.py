"""Image data for training recipes and reference statistics, as LightningDataModules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from fractions import Fraction

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

DIGITS_SIZE = 16
"""Side of the resized digits in pixels."""


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


class ImageData(L.LightningDataModule):
    """Images in [0, 1] with labels, in memory.

    Class attributes:
        description: What the images are, from where, under which licence; for model cards.
    """

    description: str

    @abstractmethod
    def val_dataloader(self) -> Iterable[tuple[Tensor, ...]]:
        """Held-out images and their labels; nothing if none are held out."""

    @abstractmethod
    def everything(self) -> tuple[Tensor, Tensor]:
        """All images ``(N, C, H, W)`` in [0, 1] and their labels ``(N,)``, held-out ones included."""


class DigitsData(ImageData):
    """UCI digits as float images in [0, 1].

    Args:
        batch_size: Images a batch, at least 1.
        holdout_fraction: Share of images kept for validation, in [0, 1); evenly spread (at 1/n every n-th one), so
            that all classes are in. With 0 all images train and none validate.
        seed: Order of the training images.
    """

    description = "UCI digits as shipped by scikit-learn (CC BY 4.0), 8x8 resized bilinearly to 16x16"

    def __init__(self, batch_size: int, holdout_fraction: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, found {batch_size}")
        if not 0 <= holdout_fraction < 1:
            raise ValueError(f"data.holdout_fraction must be in [0, 1), found {holdout_fraction}")
        self.batch_size, self.seed = batch_size, seed
        images, labels = self.everything()
        share = Fraction(holdout_fraction).limit_denominator(10**6)
        held = torch.tensor([i * share // 1 != (i - 1) * share // 1 for i in range(len(images))])
        num_train = len(images) - int(held.sum())
        if batch_size > num_train:
            raise ValueError(f"data.batch_size must be in 1..{num_train} (training images), found {batch_size}")
        self.train_set = TensorDataset(images[~held], labels[~held])
        self.holdout_set = TensorDataset(images[held], labels[held])

    def everything(self) -> tuple[Tensor, Tensor]:
        """See ``ImageData.everything``."""
        images, labels = uci_digits()
        return images.float() / 255, labels

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled batches; the last, smaller one is dropped."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> Iterable[tuple[Tensor, ...]]:
        """The held-out images in order; nothing without any."""
        return DataLoader(self.holdout_set, 512) if len(self.holdout_set) else []
