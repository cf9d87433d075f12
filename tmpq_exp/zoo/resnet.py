"""Residual networks for classification: He et al.'s for CIFAR, and torchvision's, both from a file of weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from tmpq_exp.zoo.task import ClassificationModel, ClassificationTask
from tmpq_exp.zoo.weights import fill, read_state_dict

CIFAR_DEPTHS = (20, 32, 44, 56, 110)
IMAGENET_DEPTHS = (18, 34, 50)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters.

    Where the stride is 2 the shortcut takes every second pixel and puts the added channels on as zeros, half of them
    before and half behind the others.

    References:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, option A.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.num_added = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)``."""
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        before = self.num_added // 2
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(shortcut, (0, 0, 0, 0, before, self.num_added - before)))


class CifarResNet(nn.Module):
    """6 k + 2 layers: one convolution, three levels of k blocks with 16, 32 and 64 channels, one linear layer.

    Args:
        depth: Layers, one of ``CIFAR_DEPTHS``.
        num_classes: Classes.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        num_blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _level(16, 16, num_blocks, stride=1)
        self.layer2 = _level(16, 32, num_blocks, stride=2)
        self.layer3 = _level(32, 64, num_blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 3, H, W) -> (N, num_classes)``; 32 x 32 is what it is made for."""
        features = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(features.mean(dim=(2, 3)))
        return logits


def _level(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = CifarBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(CifarBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))


class _ResNet(ClassificationModel):
    """A residual network of some depth from a file of weights, which also tells the number of classes.

    Args:
        depth: Layers.
        checkpoint: State dict as ``torch.save`` or safetensors wrote it, see ``read_state_dict``.
    """

    def __init__(self, depth: int, checkpoint: str | None) -> None:
        if depth not in self.depths:
            raise ValueError(f"model.depth must be one of {', '.join(map(str, self.depths))}, found {depth}")
        if checkpoint is None:
            raise ValueError("model.checkpoint must be given: a file of weights (.th, .pt, .pth or .safetensors)")
        self.depth, self.checkpoint, self.name = depth, Path(checkpoint), f"{self.family}{depth}"

    family: str
    depths: tuple[int, ...]
    head: str

    @abstractmethod
    def architecture(self, num_classes: int) -> nn.Module:
        """The network with fresh weights."""

    def task(self) -> ClassificationTask:
        """See ``ClassificationModel.task``."""
        tensors = read_state_dict(self.checkpoint, f"checkpoint of model {self.name}")
        num_classes = self._num_classes(tensors)
        network = self.architecture(num_classes)
        fill(network, tensors, self.checkpoint, self.name)
        return ClassificationTask(self.name, network.eval().requires_grad_(False), num_classes)

    def _num_classes(self, tensors: Mapping[str, Tensor]) -> int:
        bias = tensors.get(f"{self.head}.bias")
        return 1 if bias is None or bias.dim() != 1 else len(bias)  # without it, ``fill`` names what is missing


class ResNetCifar(_ResNet):
    """ResNet-20, 32, 44, 56 or 110 for 32x32 images.

    Args: see ``_ResNet``. Keys of the checkpoint: ``conv1 bn1 layer1..layer3 linear``.
    """

    family, depths, head = "resnet_cifar", CIFAR_DEPTHS, "linear"

    def architecture(self, num_classes: int) -> nn.Module:
        """See ``CifarResNet``."""
        return CifarResNet(self.depth, num_classes)


class ResNetImagenet(_ResNet):
    """torchvision's ResNet-18, 34 or 50.

    Args: see ``_ResNet``. Keys of the checkpoint: torchvision's.
    """

    family, depths, head = "resnet_imagenet", IMAGENET_DEPTHS, "fc"

    def architecture(self, num_classes: int) -> nn.Module:
        """torchvision's own class."""
        builder = getattr(torchvision.models, f"resnet{self.depth}")
        network: nn.Module = builder(weights=None, num_classes=num_classes)
        return network
