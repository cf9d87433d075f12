"""The embedded models of natural images: a class-conditional DDPM at 32x32 and the features of ``fd_cifar10``."""

from __future__ import annotations

from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from tmpq_exp.zoo.embedded import EmbeddedClassifier, EmbeddedDDPM, FeatureClassifier
from tmpq_exp.zoo.training import random_flip_and_shift

CIFAR_SIZE = 32
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CifarDDPM(EmbeddedDDPM):
    """Class-conditional DDPM on CIFAR-10 images: 11.2 M parameters, 2.53 GMAC a call, T = 1000, linear betas.

    Args:
        checkpoint, recipe: See ``EmbeddedDDPM``.
    """

    name = "ddpm_cifar10"
    image_shape = (3, CIFAR_SIZE, CIFAR_SIZE)
    class_names = CIFAR_NAMES
    clip_sample = True
    flip = True
    min_snr_gamma = 5.0
    weights_dtype = "float16"

    def architecture(self) -> nn.Module:
        """A three-level U-Net, two blocks a level, with attention at 16x16."""
        network: nn.Module = UNet2DModel(
            sample_size=CIFAR_SIZE,
            in_channels=3,
            out_channels=3,
            block_out_channels=(96, 128, 192),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            attention_head_dim=64,
            num_class_embeds=len(CIFAR_NAMES),
        )
        return network


class PreActivationBlock(nn.Module):
    """Residual block with normalization first: two 3x3 convolutions, and a 1x1 one where shapes differ.

    References:
        Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(in_channels), nn.BatchNorm2d(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride)``."""
        activated = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(activated)))) + shortcut
        return out


class CifarClassifier(EmbeddedClassifier):
    """Wide residual network (14 layers, widths 64-128-256) on 32x32 images; its 256 features serve ``fd_cifar10``.

    Args:
        checkpoint, recipe: See ``EmbeddedClassifier``.
    """

    name = "cifar10_classifier"
    image_shape = (3, CIFAR_SIZE, CIFAR_SIZE)
    weights_dtype = "float16"

    def architecture(self) -> FeatureClassifier:
        """Three levels of two residual blocks."""
        widths = (64, 128, 256)
        blocks: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        channels = 16
        for width in widths:
            blocks += [PreActivationBlock(channels, width, 1 if width == widths[0] else 2)]
            blocks += [PreActivationBlock(width, width, 1)]
            channels = width
        body = nn.Sequential(*blocks, nn.BatchNorm2d(channels), nn.ReLU())
        return FeatureClassifier(body, channels, len(CIFAR_NAMES))

    def augment(self, images: Tensor) -> Tensor:
        """Mirrored at random and shifted by up to four pixels."""
        return random_flip_and_shift(images)
