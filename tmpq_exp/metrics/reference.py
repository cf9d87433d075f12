"""Reference images of a metric: a folder, whose features are kept in a cache under the hash of the images' content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tmpq_exp.metrics.metric import FeatureNetwork, Place, features_of
from tmpq_exp.metrics.statistics import FeatureStatistics, FeatureSums, read_npz
from tmpq_exp.progress import StageBar
from tmpq_exp.zoo.weights import content_hash, read_tensors, write_tensors

REFERENCE_BATCH = 50
"""Images a forward of the feature network."""

IMAGE_SUFFIXES = (".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

FORMAT = "reference 1"

NPZ_KEYS = (("mu", "sigma"),)
"""Names of mean and covariance, as pytorch-fid writes them."""


class ReferenceFolder:
    """Images below a folder, all of one size, in sorted order.

    Args:
        folder: The folder; subfolders are searched too.
        image_shape: ``(C, H, W)`` that the images must have; they are read as gray where C is 1. None: RGB of any size.

    Raises:
        ValueError: If there are fewer than two images, or the folder is missing.
    """

    def __init__(self, folder: Path, image_shape: tuple[int, int, int] | None = None) -> None:
        if not folder.is_dir():
            raise ValueError(f"evaluation.reference: no folder at {folder}")
        self.folder, self.image_shape = folder, image_shape
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if len(self.files) < 2:
            raise ValueError(
                f"evaluation.reference: {folder} must hold at least 2 images ({', '.join(IMAGE_SUFFIXES)}), "
                f"found {len(self.files)}"
            )

    @cached_property
    def content(self) -> str:
        """Hash of the bytes of all images in order, 16 hex digits."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def batches(self) -> Iterator[Tensor]:
        """Images in [0, 1], ``(N, C, H, W)``, on the CPU.

        Raises:
            ValueError: If an image cannot be read or has another size than the first one, or than ``image_shape``.
        """
        gray = self.image_shape is not None and self.image_shape[0] == 1
        size = None if self.image_shape is None else self.image_shape[1:]
        with ThreadPoolExecutor() as pool:
            for first in range(0, len(self.files), REFERENCE_BATCH):
                files = self.files[first : first + REFERENCE_BATCH]
                pixels = list(pool.map(lambda path: _read(path, gray), files))
                size = pixels[0].shape[:2] if size is None else size
                _check_size(files, pixels, size)
                batch = torch.from_numpy(np.stack(pixels))
                yield (batch.unsqueeze(1) if gray else batch.permute(0, 3, 1, 2)).contiguous().float() / 255

    def statistics(self, name: str, network: FeatureNetwork, extractor: str, place: Place) -> FeatureStatistics:
        """Mean and covariance of the images' features.

        Args:
            name: Of the metric, for progress.
            network: Feature network.
            extractor: Hash of everything about it, which names the file in the cache.
            place: Where the network runs, and where the result is kept.
        """
        path = self._cached("statistics", extractor, place)
        if not path.exists():
            sums = FeatureSums(network)
            for images in self._shown(name, place.device):
                sums.update(images)
            path.parent.mkdir(parents=True, exist_ok=True)
            sums.statistics().save(path, f"images of {self.folder.name}")
        return FeatureStatistics.load(path)

    def features(self, name: str, network: FeatureNetwork, extractor: str, place: Place) -> Tensor:
        """Features of every image in float32, ``(N, num_features)``, on the CPU; arguments as for ``statistics``."""
        path = self._cached("features", extractor, place)
        if not path.exists():
            found = [features_of(network, images).float().cpu() for images in self._shown(name, place.device)]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"features": torch.cat(found)}, {"format": FORMAT})
        tensors, _ = read_tensors(path, "reference features")
        if "features" not in tensors or tensors["features"].shape != (len(self.files), network.num_features):
            raise ValueError(f"reference features: {path} is damaged; remove it, it is made again then")
        return tensors["features"]

    def _shown(self, name: str, device: torch.device) -> Iterator[Tensor]:
        """Batches on the device, under a progress bar."""
        with StageBar(f"{name}: reference", len(self.files)) as bar:
            for images in self.batches():
                yield images.to(device)
                bar.advance(len(images))

    def _cached(self, kind: str, extractor: str, place: Place) -> Path:
        """File in the cache, named by everything its content depends on."""
        named = f"{FORMAT};{self.content};{extractor};{self.image_shape};{place.device.type};{REFERENCE_BATCH}"
        key = hashlib.sha256(named.encode()).hexdigest()[:16]
        return place.cache_dir / f"reference_{kind}_{key}.safetensors"


def open_reference(
    name: str,
    reference: str | None,
    num_features: int,
    *,
    keys: Sequence[tuple[str, str]] = NPZ_KEYS,
    image_shape: tuple[int, int, int] | None = None,
) -> FeatureStatistics | ReferenceFolder:
    """What ``evaluation.reference`` names: a folder of images, an ``.npz``, or a file that this project wrote.

    Args:
        name: Of the metric.
        reference: Path of the folder or file.
        num_features: Features of the metric's network.
        keys: Names in an ``.npz``; see ``read_npz``.
        image_shape: See ``ReferenceFolder``.

    Raises:
        ValueError: If nothing usable is there.
    """
    if reference is None:
        raise ValueError(
            f"evaluation.reference: {name} needs a folder of images or an .npz of statistics "
            f"({' and '.join(keys[0])}), found null"
        )
    path = Path(reference)
    if not path.exists():
        raise ValueError(
            f"reference statistics: no file at {path} (evaluation.reference); a folder of images, an .npz with "
            f"{' and '.join(keys[0])}, or reference.safetensors of a training run was expected"
        )
    if path.is_dir():
        return ReferenceFolder(path, image_shape)
    if path.suffix == ".npz":
        return read_npz(path, num_features, keys)
    statistics = FeatureStatistics.load(path)
    if len(statistics.mean) != num_features:
        raise ValueError(
            f"reference statistics: {path} has {len(statistics.mean)} features, the network of {name} {num_features}"
        )
    return statistics


def extractor_hash(network: FeatureNetwork, *settings: str) -> str:
    """Hash of a feature network's weights, number of features, and what is done around it, 16 hex digits."""
    named = (content_hash(network.state_dict()), network.num_features, settings)
    return hashlib.sha256(repr(named).encode()).hexdigest()[:16]


def _read(path: Path, gray: bool) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L" if gray else "RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"evaluation.reference: {path} cannot be read as an image ({error})") from error


def _check_size(files: Sequence[Path], pixels: Sequence[np.ndarray], size: tuple[int, ...]) -> None:
    for path, array in zip(files, pixels, strict=True):
        if array.shape[:2] != tuple(size):
            raise ValueError(
                f"evaluation.reference: {path} has {array.shape[1]}x{array.shape[0]} pixels, expected "
                f"{size[1]}x{size[0]} as all others; bring the images to one size first"
            )
