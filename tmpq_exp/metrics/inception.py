"""InceptionV3 of 2015 as feature network: as pytorch-fid runs it, and as torchmetrics (torch-fidelity) runs it.

The weights are the same, resizing and scaling are not: figures of the two are never mixed, and have different names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytorch_fid.inception
import torch
import torch_fidelity.feature_extractor_inceptionv3
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from tmpq_exp.data import to_uint8
from tmpq_exp.metrics.metric import MissingWeights
from tmpq_exp.zoo.weights import read_state_dict

INCEPTION_BATCH = 50
"""Images a forward, at most; pytorch-fid's own default."""

PYTORCH_FID_URL: str = pytorch_fid.inception.FID_WEIGHTS_URL
TORCH_FIDELITY_URL: str = torch_fidelity.feature_extractor_inceptionv3.URL_INCEPTION_V3

SPATIAL_CHANNELS = 7
"""Channels of ``mixed_6/conv`` that sFID keeps: 7 * 17 * 17 = 2023 features, about as many as FID has."""


def weights_file(metric: str, given: str | None, url: str) -> Path:
    """File of weights that were released at ``url``: the given one, or the one in torch's hub folder.

    Args:
        metric: Name of the metric, for the message.
        given: Path from the configuration, or None.
        url: Where the file was released; its last part is its name.

    Raises:
        MissingWeights: If it is not there; nothing is downloaded.
    """
    name = url.rsplit("/", 1)[-1]
    hub = Path(torch.hub.get_dir()) / "checkpoints" / name
    path = Path(given) if given else hub
    if not path.is_file():
        looked = f"metrics.{metric}.weights" if given else "torch's hub folder; the variable TORCH_HOME moves it"
        place = f"at {hub}" if given else "there"
        raise MissingWeights(
            f"{metric}: no weights at {path} ({looked}); put the file {place} (released at {url}), or give its path as "
            f"metrics.{metric}.weights=PATH"
        )
    return path


class PytorchFidInception(nn.Module):
    """Pooled features of pytorch-fid's InceptionV3; images bilinearly to 299x299 without antialiasing, then [-1, 1].

    Args:
        weights: File of pytorch-fid's weights.
    """

    num_features = 2048
    resize = "bilinear to 299x299"
    library = f"pytorch-fid {version('pytorch-fid')}"
    block = pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]

    def __init__(self, weights: Path) -> None:
        super().__init__()
        with _reading_instead_of_downloading(pytorch_fid.inception, weights):
            self.network = pytorch_fid.inception.InceptionV3([self.block]).eval()

    def features(self, images: Tensor) -> Tensor:
        """``(N, 1 or 3, H, W)`` in [0, 1] -> ``(N, num_features)``."""
        return torch.cat([self._features(part) for part in torch.split(rgb(images), INCEPTION_BATCH)])

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)[0]
        return features.flatten(1)


class PytorchFidSpatial(PytorchFidInception):
    """Features of sFID: the first 7 channels of the first convolution of ``mixed_6`` at all 17x17 places.

    References:
        Nash et al., "Generating Images with Sparse Representations", ICML 2021; layer and channels as in ADM's
        evaluation (Dhariwal, Nichol 2021).
    """

    num_features = SPATIAL_CHANNELS * 17 * 17
    block = pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[768]

    def _features(self, images: Tensor) -> Tensor:
        found: list[Tensor] = []
        mixed_6 = self.network.blocks[2][6]  # Mixed_6d of torchvision's names
        hook = mixed_6.branch1x1.register_forward_hook(lambda _layer, _inputs, output: found.append(output))
        try:
            self.network(images)
        finally:
            hook.remove()
        return found[0][:, :SPATIAL_CHANNELS].flatten(1)


class TorchmetricsInception(nn.Module):
    """Features of torchmetrics' InceptionV3, which is torch-fidelity's with antialiased resizing.

    Args:
        weights: File of torch-fidelity's weights.
        layer: ``2048``: pooled features; ``logits_unbiased``: logits of the 1,008 classes without their bias.
    """

    resize = "bilinear to 299x299, antialiased"
    library = f"torchmetrics {version('torchmetrics')}, torch-fidelity {version('torch-fidelity')}"

    def __init__(self, weights: Path, layer: str = "2048") -> None:
        super().__init__()
        self.num_features = {"2048": 2048, "logits_unbiased": 1008}[layer]
        with _reading_instead_of_downloading(torch_fidelity.feature_extractor_inceptionv3, weights):
            self.network = NoTrainInceptionV3("inception-v3-compat", [layer])

    def features(self, images: Tensor) -> Tensor:
        """``(N, 1 or 3, H, W)`` in [0, 1] -> ``(N, num_features)``."""
        parts = torch.split(to_uint8(rgb(images)), INCEPTION_BATCH)
        return torch.cat([self.network(part).flatten(1) for part in parts])


def rgb(images: Tensor) -> Tensor:
    """Images of three channels; a gray channel is repeated, as it is when a gray file is read in colour."""
    return images.expand(-1, 3, -1, -1)


@lru_cache(maxsize=4)
def torchmetrics_inception(weights: Path, layer: str) -> TorchmetricsInception:
    """One network for all metrics that read the same layer."""
    return TorchmetricsInception(weights, layer)


@contextmanager
def _reading_instead_of_downloading(module: ModuleType, weights: Path) -> Iterator[None]:
    """Let a library that downloads its weights have those of a file, of which only tensors are read.

    Raises:
        ValueError: If the file is damaged or holds other weights.
    """
    state = read_state_dict(weights, "InceptionV3")
    download = module.load_state_dict_from_url
    module.load_state_dict_from_url = lambda *_, **__: state  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        problem = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise ValueError(f"InceptionV3: {weights} holds weights of another network ({problem})") from error
    finally:
        module.load_state_dict_from_url = download  # type: ignore[attr-defined]
