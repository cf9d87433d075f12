"""Mean and covariance of features: accumulated over images, kept as safetensors, read from an ``.npz``."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tmpq_exp.metrics.metric import FeatureNetwork, features_of
from tmpq_exp.zoo.weights import read_tensors, write_tensors


@dataclass(frozen=True)
class FeatureStatistics:
    """Gaussian fit of a set of features: mean ``(d,)`` and unbiased covariance ``(d, d)`` in float64.

    ``num_images`` is None where a file does not say of how many.
    """

    mean: Tensor
    covariance: Tensor
    num_images: int | None = None

    def save(self, path: Path, source: str) -> None:
        """Write as safetensors; ``source`` says what the images were."""
        tensors = {"mean": self.mean, "covariance": self.covariance}
        write_tensors(path, tensors, {"num_images": str(self.num_images), "source": source})

    @classmethod
    def load(cls, path: Path) -> FeatureStatistics:
        """Inverse of ``save``.

        Raises:
            ValueError: If the file is missing, truncated, or holds other tensors.
        """
        tensors, metadata = read_tensors(path, "reference statistics")
        if tensors.keys() != {"mean", "covariance"} or "num_images" not in metadata:
            raise ValueError(
                f"reference statistics: {path} holds {sorted(tensors)}, expected mean and covariance, "
                "and num_images in its metadata"
            )
        mean, covariance, num_images = tensors["mean"], tensors["covariance"], metadata["num_images"]
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)) or not num_images.isdecimal():
            raise ValueError(
                f"reference statistics: {path} holds a mean {tuple(mean.shape)}, a covariance "
                f"{tuple(covariance.shape)} and num_images {num_images!r}, expected (d,), (d, d) and a number"
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"reference statistics: {path} holds values that are not finite")
        return cls(mean.double(), covariance.double(), int(num_images))


class FeatureSums:
    """Running float64 sums of features; memory does not grow with the number of images."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self._sum = torch.zeros(network.num_features, dtype=torch.float64)
        self._outer = torch.zeros(network.num_features, network.num_features, dtype=torch.float64)
        self.num_images = 0

    @torch.inference_mode()
    def update(self, images: Tensor) -> None:
        """Add images in [0, 1], ``(N, C, H, W)``, where they are; the network follows them."""
        self.add(features_of(self.network, images))

    def add(self, features: Tensor) -> None:
        """Add features in float64, ``(N, num_features)``, on any device."""
        self._sum += features.sum(0).cpu()
        self._outer += (features.T @ features).cpu()
        self.num_images += len(features)

    def statistics(self) -> FeatureStatistics:
        """Mean and covariance of what was added.

        Raises:
            ValueError: With fewer than two images.
        """
        if self.num_images < 2:
            raise ValueError(f"a covariance needs at least 2 images, found {self.num_images}")
        mean = self._sum / self.num_images
        covariance = (self._outer - self.num_images * torch.outer(mean, mean)) / (self.num_images - 1)
        return FeatureStatistics(mean.clone(), covariance, self.num_images)


class JointSums:
    """Running float64 sums of a control's features c and a candidate's differences d to it, and of their products.

    Differences, so that a candidate that is its control, or moved by a constant, loses no digits.

    Args:
        num_features: Features of an image.
    """

    def __init__(self, num_features: int) -> None:
        self._sums = torch.zeros(2, num_features, dtype=torch.float64)
        self._products = torch.zeros(3, num_features, num_features, dtype=torch.float64)
        self.num_images, self.count = 0, 0.0

    def add(self, features: Tensor, control: Tensor, weights: Tensor | None = None) -> None:
        """Add images of the same seeds, in the same order.

        Args:
            features, control: Of the candidate and of its control in float64, ``(N, num_features)``, on one device.
            weights: How often each image counts, ``(N,)``; None counts each once.
        """
        weights = torch.ones_like(features[:, 0]) if weights is None else weights
        difference = features - control
        weighted = control.T * weights, difference.T * weights
        products = weighted[0] @ control, weighted[0] @ difference, weighted[1] @ difference
        self._sums += torch.stack([values.sum(1) for values in weighted]).cpu()
        self._products += torch.stack(products).cpu()
        self.num_images += len(features)
        self.count += float(weights.sum())

    def moments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean of d, and unbiased covariances: of c, of c with d (rows c, columns d), and of d."""
        control, difference = self._sums / self.count
        means = torch.outer(control, control), torch.outer(control, difference), torch.outer(difference, difference)
        variances, covariances, differing = (self._products - self.count * torch.stack(means)) / (self.count - 1)
        return difference, variances, covariances, differing


def read_npz(path: Path, num_features: int, keys: Sequence[tuple[str, str]]) -> FeatureStatistics:
    """Statistics of an ``.npz`` file, as pytorch-fid and ADM's evaluation write them; nothing is unpickled.

    The file does not say by which network its features are: giving those of another is on the user.

    Args:
        path: The file.
        num_features: Features of the network.
        keys: Accepted names of mean and covariance, the first pair that the file has with fitting sizes is taken.

    Raises:
        ValueError: If the file is missing, damaged, or has other keys, sizes, or values that are not finite.
    """
    accepted = " or ".join(" and ".join(pair) for pair in keys)
    expected = f"expected {accepted} of shapes ({num_features},) and ({num_features}, {num_features})"
    arrays = _read_arrays(path, {name for pair in keys for name in pair}, expected)
    shapes = {name: value.shape for name, value in arrays.items()}
    for mean, covariance in keys:
        if shapes.get(mean) == (num_features,) and shapes.get(covariance) == (num_features, num_features):
            mu, sigma = (_as_float64(arrays[name], path, name) for name in (mean, covariance))
            if not torch.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-8):
                raise ValueError(f"reference statistics: {covariance} in {path} is not symmetric, so no covariance")
            return FeatureStatistics(mu, sigma)
    described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(f"reference statistics: {path} holds {described}, {expected}")


def _read_arrays(path: Path, wanted: set[str], expected: str) -> dict[str, np.ndarray]:
    """The wanted arrays of a file, those that it has."""
    if not path.is_file():
        raise ValueError(f"reference statistics: no file at {path}; {expected}")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = list(file.files)
            arrays = {name: file[name] for name in names if name in wanted}
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"reference statistics: {path} is damaged or no .npz of arrays ({error}); {expected}"
        ) from error
    if not arrays:
        raise ValueError(f"reference statistics: {path} holds {', '.join(names) or 'nothing'}, {expected}")
    return arrays


def _as_float64(array: np.ndarray, path: Path, name: str) -> Tensor:
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"reference statistics: {name} in {path} holds values that are no finite numbers")
    return torch.from_numpy(array.astype(np.float64))
